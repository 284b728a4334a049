"""The port every engine adapter implements, and the only failures it may let out.

The one rule: an adapter maps every foreign exception to an `EngineFailure` here; the pool decides what a
failure means by its class alone, never by its text.
"""

from collections.abc import AsyncGenerator, Callable
from typing import ClassVar, Protocol

import msgspec

from llorch.events import FinishReason
from llorch.task import Message, Sampling


class EngineFailure(Exception):
    """Something the engine did. `code` and `retriable` are what the task's `error` event says.

    `sent`: whether the request may have reached the engine, so that its slot must drain.
    `summary` is ours and may be logged; `detail` is the engine's own words, which may quote a prompt.
    """

    code: ClassVar[str] = "WORKER_RESET"
    retriable: ClassVar[bool] = True

    def __init__(self, summary: str, *, detail: str = "", sent: bool = True) -> None:
        super().__init__(f"{summary}: {detail}" if detail else summary)
        self.summary = summary
        self.sent = sent


class EngineRefused(EngineFailure):
    """It closed the door before one byte of an answer (refused, reset, EOF): the task may be tried again."""

    code = "POOL_UNAVAILABLE"


class EngineGone(EngineRefused):
    """Nobody listens there: what the engine ran is no more."""


class EngineLoading(EngineRefused):
    """503: the model is loading; trying again later is expected to work."""


class EngineMisconfigured(EngineFailure):
    """401, 403, 404, 501: no task can work until somebody mends the engine or the configuration."""

    code = "POOL_UNAVAILABLE"


class EngineBroken(EngineFailure):
    """It broke off, or sent what no engine sends, after it had begun to answer."""


class EngineStalled(EngineFailure):
    """It went silent."""

    code = "DECODE_TIMEOUT"


class EngineInvalidRequest(EngineFailure):
    """It refused the task's parameters; the message has its own words."""

    code, retriable = "INVALID_PARAMS", False


class EngineContextOverflow(EngineInvalidRequest):
    """It found the prompt too long."""

    code = "CONTEXT_OVERFLOW"


class Generation(msgspec.Struct, frozen=True, kw_only=True):
    """One request to generate. `slot` None lets the engine choose; `cache_prompt` allows its prompt cache."""

    prompt: str
    max_tokens: int
    sampling: Sampling
    slot: int | None = None
    cache_prompt: bool = True


class Final(msgspec.Struct, frozen=True):
    """The engine's own account of a finished generation, in tokens."""

    finish_reason: FinishReason
    tokens_out: int
    tokens_in: int


class Prefill(msgspec.Struct, frozen=True):
    """How far the engine is with the prompt, in tokens."""

    total: int
    done: int


class Chunk(msgspec.Struct, frozen=True):
    """All that one read from the engine held: texts of tokens, oldest first, and the end if it came.

    `begun` marks what comes before the first token: a slot has begun on the prompt, and is as far with it as
    `prefill` says, if it does. Any other chunk without text is progress: a token that is only part of a
    character. `hang_up`, on the first chunk, closes the connection in the step that calls it; the iterator is
    to be closed then, too.
    """

    texts: list[str]
    final: Final | None = None
    begun: bool = False
    prefill: Prefill | None = None
    hang_up: Callable[[], None] | None = None


BEGUN = Chunk([], begun=True)


class Props(msgspec.Struct, frozen=True):
    """What the engine says of itself: slots, context per slot in tokens, version, model.

    `chat_template`: it can render messages; `grammar`: it can be held to a grammar or a JSON schema.
    """

    slots: int
    ctx: int
    engine_version: str | None = None
    model: str | None = None
    model_path: str | None = None
    chat_template: bool = False
    grammar: bool = False


class Engine(Protocol):
    """One engine endpoint. Every method may raise `EngineFailure` and nothing else."""

    name: str

    def generate(self, generation: Generation) -> AsyncGenerator[Chunk, None]:
        """Stream a generation, from `BEGUN` to a `final`. Closing the iterator closes the connection."""
        ...

    def keep_spare(self, wanted: bool) -> None:
        """Told whether tasks wait for a slot, so that the next generation can be prepared. Plain, cheap."""
        ...

    async def tokenize(self, text: str) -> int:
        """The number of tokens of `text`, special ones included."""
        ...

    async def render(self, messages: tuple[Message, ...]) -> str:
        """The prompt that the model's own chat template makes of `messages`."""
        ...

    async def health(self) -> None:
        """Return if the engine is ready to work; EngineLoading while it loads."""
        ...

    async def props(self) -> Props:
        """What the engine says of itself."""
        ...

    async def busy_slots(self) -> int:
        """How many slots are at work."""
        ...

    async def model_digest(self, model_path: str) -> str | None:
        """`sha256:…` of the model file, or None where it can't be read from here."""
        ...

    async def close(self) -> None:
        """Close every connection."""
        ...

"""An engine in memory that does only what the test tells it to, and remembers what it was sent."""

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator

import msgspec

from llorch.engine import BEGUN, Chunk, EngineFailure, Final, Generation, Props
from llorch.events import FinishReason
from llorch.task import Message


class Call:
    """One `generate`: the test says what the engine answers, step by step."""

    def __init__(self, generation: Generation) -> None:
        self.generation = generation
        self.closed = False
        self.answered = False
        self.sent = 0
        self._steps: asyncio.Queue[Chunk | Exception | None] = asyncio.Queue()

    @property
    def prompt(self) -> str:
        """What it is asked to go on with."""
        return self.generation.prompt

    def begin(self) -> None:
        """Answer with headers: a slot has begun on the prompt."""
        self.send(BEGUN)

    def say(self, *texts: str) -> None:
        """One read with these tokens; none: a token that is only part of a character."""
        self.send(Chunk(list(texts)))

    def finish(self, *texts: str, reason: FinishReason = "stop", tokens_out: int | None = None) -> None:
        """The last read: tokens, and the engine's own account."""
        count = self.sent + len(texts) if tokens_out is None else tokens_out
        self.send(Chunk(list(texts), Final(reason, count, tokens_in=3)))

    def send(self, chunk: Chunk) -> None:
        """One read, as it is."""
        self.sent += len(chunk.texts)
        self._steps.put_nowait(chunk)

    def fail(self, failure: Exception) -> None:
        """Break off with `failure`."""
        self._steps.put_nowait(failure)

    def end(self) -> None:
        """End the stream without a final chunk."""
        self._steps.put_nowait(None)

    async def next(self) -> Chunk | None:
        """What comes next, None at the end; raises what `fail` was given."""
        step = await self._steps.get()
        if isinstance(step, Exception):
            raise step
        self.answered = True
        return step


class MemoryEngine:
    """Implements `llorch.engine.Engine`. While `failure` is set, everything that is asked raises it.

    A call occupies a slot until its final chunk or its close; with `clings` until `let_go`.
    """

    name = "memory"

    def __init__(self, *, slots: int = 1, ctx: int = 4096) -> None:
        self.says = Props(slots=slots, ctx=ctx, engine_version="b1", model="tiny")
        self.failure: Exception | None = None
        self.calls: list[Call] = []
        self.working: set[Call] = set()
        self.clings = False
        self.busy: int | None = None
        self.asked: Counter[str] = Counter()
        self.digests: dict[str, str] = {}
        self.closed = False
        self._gates: dict[str, asyncio.Event] = {}

    # -- what the test does with it ----------------------------------------------------------------

    def hold(self, method: str) -> asyncio.Event:
        """Keep every call of `method` waiting until the event that comes back is set."""
        self._gates[method] = asyncio.Event()
        return self._gates[method]

    def change(self, **says: object) -> None:
        """From now on `props` says something else."""
        self.says = msgspec.structs.replace(self.says, **says)

    def let_go(self) -> None:
        """Stop working on what was closed."""
        self.working = {call for call in self.working if not call.closed}

    @property
    def prompts(self) -> list[str]:
        """What it was sent, in that order."""
        return [call.prompt for call in self.calls]

    @property
    def open(self) -> list[Call]:
        """The calls whose connection is open."""
        return [call for call in self.calls if not call.closed]

    # -- the port ----------------------------------------------------------------------------------

    async def generate(self, generation: Generation) -> AsyncGenerator[Chunk, None]:
        """Stream what the test says; also what comes after a final chunk."""
        call = Call(generation)
        self.calls.append(call)
        try:
            await self._ask("generate")
            self.working.add(call)
            while (chunk := await call.next()) is not None:
                if chunk.final is not None:
                    self.working.discard(call)
                yield chunk
        except EngineFailure as failure:
            if not failure.sent:
                self.working.discard(call)
            raise
        finally:
            call.closed = True
            if not self.clings:
                self.working.discard(call)

    async def tokenize(self, text: str) -> int:
        """A token a word."""
        await self._ask("tokenize")
        return len(text.split())

    async def render(self, messages: tuple[Message, ...]) -> str:
        """`role: content`, a line each."""
        await self._ask("render")
        return "".join(f"{message.role}: {message.content}\n" for message in messages)

    async def health(self) -> None:
        """Good unless `failure` is set."""
        await self._ask("health")

    async def props(self) -> Props:
        """What `change` made of it."""
        await self._ask("props")
        return self.says

    def keep_spare(self, wanted: bool) -> None:
        """Nothing to prepare."""

    async def busy_slots(self) -> int:
        """`busy` if it is set, else the calls at work."""
        await self._ask("busy_slots")
        return len(self.working) if self.busy is None else self.busy

    async def model_digest(self, model_path: str) -> str | None:
        """What `digests` has for the file."""
        await self._ask("model_digest")
        return self.digests.get(model_path)

    async def close(self) -> None:
        """Remember it."""
        self.closed = True

    async def _ask(self, method: str) -> None:
        self.asked[method] += 1
        if method in self._gates:
            await self._gates[method].wait()
        if self.failure is not None:
            raise self.failure

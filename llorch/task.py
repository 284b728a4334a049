"""A task: what was asked, its state, its log. The only assignments to `state` are here.

The one rule: a transition is a plain method that checks the table, sets the state, appends the event and
calls `on_transition`, all in one step. The first terminal transition wins; a later one changes nothing.
"""

import enum
import time
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Literal, Protocol

import msgspec

from llorch.eventlog import EventLog
from llorch.events import End, Error, FinishReason, Started, frame, token_frame

Priority = Literal["interactive", "batch"]
Determinism = Literal["strict", "best_effort"]
CancelReason = Literal["client", "disconnect"]

SAMPLER_PROFILE_VERSION = "1"


class Sampling(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Sampling parameters, all of them sent, so that no engine flag decides; the defaults are profile "1"."""

    seed: int | None = None
    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    typical_p: float = 1.0
    repeat_penalty: float = 1.0
    repeat_last_n: int = 64
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    stop: tuple[str, ...] = ()
    grammar: str | None = None
    json_schema: bytes | None = None


DEFAULT_SAMPLING = Sampling()  # one for all: thousands of tasks may wait
NO_METADATA: Mapping[str, str] = MappingProxyType({})


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One turn of a conversation, for the engine's own chat template."""

    role: str
    content: str


class TaskRequest(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What a client asked for, checked; `max_tokens` None means as many as default and context allow."""

    prompt: str | None = None
    messages: tuple[Message, ...] = ()
    max_tokens: int | None = None
    sampling: Sampling = DEFAULT_SAMPLING
    determinism: Determinism = "best_effort"
    priority: Priority = "interactive"
    pool_id: str | None = None
    session_id: str | None = None
    metadata: Mapping[str, str] = NO_METADATA

    @property
    def size_bytes(self) -> int:
        """UTF-8 bytes of the prompt, or of all messages, as the queue's byte bound counts them."""
        if self.prompt is not None:
            return len(self.prompt.encode())
        return sum(len(m.role.encode()) + len(m.content.encode()) for m in self.messages)


class State(enum.Enum):
    """Where a task stands; the last three are final."""

    QUEUED = "queued"
    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def final(self) -> bool:
        """Whether a task in this state has ended."""
        return not TRANSITIONS[self]


TRANSITIONS: dict[State, frozenset[State]] = {
    State.QUEUED: frozenset({State.RUNNING, State.FAILED, State.CANCELLED}),
    State.RUNNING: frozenset({State.COMPLETED, State.FAILED, State.CANCELLED}),
    State.COMPLETED: frozenset(),
    State.FAILED: frozenset(),
    State.CANCELLED: frozenset(),
}


class Running(Protocol):
    """What a running task holds: something that can be told to stop the engine."""

    replica_id: str

    def interrupt(self) -> None:
        """Stop the engine's work on this task; plain, idempotent."""


class Task:
    """One unit of work. Times are seconds on the injected monotonic `now`; `created_at` is Unix time."""

    __slots__ = (
        "_log",
        "admitted_at",
        "cancel_reason",
        "cause",
        "correlation_id",
        "created_at",
        "ended_at",
        "error",
        "finish_reason",
        "first_token_at",
        "id",
        "identity",
        "last_token_at",
        "lease",
        "max_tokens",
        "now",
        "on_transition",
        "pool_id",
        "predicted_start_ms",
        "prompt",
        "prompt_tokens",
        "prompt_tokens_done",
        "queue_position",
        "replica_id",
        "request",
        "size_bytes",
        "started_at",
        "state",
        "ticket",
        "tokens_in",
        "tokens_out",
    )

    def __init__(
        self,
        task_id: str,
        request: TaskRequest,
        *,
        prompt: str,
        max_tokens: int,
        pool_id: str,
        now: Callable[[], float],
        on_transition: Callable[["Task", State | None], None],
        correlation_id: str | None = None,
        identity: str | None = None,
        ticket: str | None = None,
    ) -> None:
        self.id = task_id
        self.request = msgspec.structs.replace(request, messages=()) if request.messages else request
        self.prompt = prompt
        self.max_tokens = max_tokens
        self.pool_id = pool_id
        self.now = now
        self.on_transition = on_transition
        self.correlation_id = correlation_id
        self.identity = identity
        self.ticket = ticket
        self.size_bytes = 0
        self.state = State.QUEUED
        self._log: EventLog | None = None
        self.lease: Running | None = None
        self.replica_id: str | None = None
        self.created_at = time.time()
        self.queue_position = 0
        self.predicted_start_ms: int | None = None
        self.prompt_tokens: int | None = None
        self.prompt_tokens_done: int | None = None
        self.tokens_in: int | None = None
        self.tokens_out = 0
        self.finish_reason: FinishReason | None = None
        self.error: Error | None = None
        self.cause: str | None = None
        self.cancel_reason: CancelReason | None = None
        self.admitted_at = now()
        self.started_at: float | None = None
        self.first_token_at: float | None = None
        self.last_token_at: float | None = None
        self.ended_at: float | None = None

    @property
    def log(self) -> EventLog:
        """The task's events; made when looked at: a waiting task that nobody reads has but `started`."""
        if self._log is None:
            self._log = EventLog()
            self._log.append(frame(0, Started(self.queue_position, self.predicted_start_ms)))
        return self._log

    @property
    def strict(self) -> bool:
        """Whether this task must give the same bytes every time, and so runs alone on its replica."""
        return self.request.determinism == "strict"

    @property
    def decode_time_ms(self) -> int | None:
        """First to last token in ms on our clock; None before the first token."""
        if self.first_token_at is None or self.last_token_at is None:
            return None
        return _ms(self.last_token_at - self.first_token_at)

    @property
    def first_token_ms(self) -> int | None:
        """Start to first token in ms."""
        if self.first_token_at is None or self.started_at is None:
            return None
        return _ms(self.first_token_at - self.started_at)

    @property
    def queue_ms(self) -> int | None:
        """Admission to start, or to the end of a task that never started, in ms; None while it waits."""
        until = self.started_at if self.started_at is not None else self.ended_at
        return None if until is None else _ms(until - self.admitted_at)

    def log_fields(self) -> dict[str, object]:
        """What every log line about this task carries, None where unknown, no text of prompts [MVP-070]."""
        return {
            "correlation_id": self.correlation_id,
            "job_id": self.id,
            "session_id": self.request.session_id,
            "pool_id": self.pool_id,
            "replica_id": self.replica_id,
            "queue_position": self.queue_position,
            "predicted_start_ms": self.predicted_start_ms,
            "tokens_in": self.tokens_in,
            "tokens_out": self.tokens_out,
            "queue_ms": self.queue_ms,
            "first_token_ms": self.first_token_ms,
            "decode_time_ms": self.decode_time_ms,
            "identity": self.identity,
        }

    def admit(self, queue_position: int, predicted_start_ms: int | None) -> None:
        """Record the place in the queue, which is what `started` says; once, in the step that admits."""
        self.queue_position = queue_position
        self.predicted_start_ms = predicted_start_ms
        self.admitted_at = self.now()
        self.on_transition(self, None)

    def start(self, lease: Running) -> bool:
        """QUEUED → RUNNING under `lease`; False if the task is no longer QUEUED."""
        if State.RUNNING not in TRANSITIONS[self.state]:
            return False
        self.lease, self.replica_id = lease, lease.replica_id
        self.started_at = self.now()
        return self._move(State.RUNNING)

    def prefill(self, total: int, done: int) -> None:
        """Note how many of the prompt's tokens the engine has read; no event, no change of state."""
        self.prompt_tokens, self.prompt_tokens_done = total, done

    def tokens(self, texts: list[str]) -> bool:
        """Append a token for each text, all in one step; False, and nothing appended, unless RUNNING."""
        if self.state is not State.RUNNING:
            return False
        self.last_token_at = self.now()
        if self.first_token_at is None:
            self.first_token_at = self.last_token_at
        log, event_id = self.log, self.log.next_id
        for text in texts:
            log.append(token_frame(event_id, text, self.tokens_out))
            self.tokens_out += 1
            event_id += 1
        return True

    def token(self, text: str) -> bool:
        """Append one token; False, and nothing appended, unless RUNNING."""
        return self.tokens([text])

    def complete(
        self, finish_reason: FinishReason, *, tokens_out: int | None = None, tokens_in: int | None = None
    ) -> bool:
        """RUNNING → COMPLETED with the engine's own counts; False if the task had ended."""
        if State.COMPLETED not in TRANSITIONS[self.state]:
            return False
        if tokens_out is not None:
            self.tokens_out = tokens_out
        self.tokens_in = tokens_in
        return self._end(State.COMPLETED, finish_reason)

    def cancel(self, reason: CancelReason = "client") -> bool:
        """QUEUED or RUNNING → CANCELLED [MVP-032]: the log gives out nothing more but its `end`, then the
        engine is told to stop, all in this step. False if the task had ended."""
        if State.CANCELLED not in TRANSITIONS[self.state]:
            return False
        lease = self.lease
        self.cancel_reason = reason
        self._end(State.CANCELLED, "cancelled")
        if lease is not None:
            lease.interrupt()
        return True

    def fail(self, error: Error, *, cause: str | None = None) -> bool:
        """QUEUED or RUNNING → FAILED, the log sealed with `error`; False if the task had ended.

        A running engine is told to stop. `cause` is for the log: the message of `error` may quote a prompt.
        """
        if State.FAILED not in TRANSITIONS[self.state]:
            return False
        lease = self.lease
        self.error, self.cause = error, cause or error.message
        self._seal(frame(self.log.next_id, error), recall=False)
        self._move(State.FAILED)
        if lease is not None:
            lease.interrupt()
        return True

    def _end(self, state: State, finish_reason: FinishReason) -> bool:
        self.finish_reason = finish_reason
        end = End(self.tokens_out, finish_reason, self.decode_time_ms, self.tokens_in)
        self._seal(frame(self.log.next_id, end), recall=state is State.CANCELLED)
        return self._move(state)

    def _seal(self, terminal: bytes, *, recall: bool) -> None:
        self.ended_at = self.now()
        self.log.seal(terminal, recall=recall)
        self.prompt = ""  # nobody needs it any more, and it may be megabytes
        self.request = msgspec.structs.replace(
            self.request, prompt=None, messages=(), sampling=DEFAULT_SAMPLING
        )
        self.lease = None

    def _move(self, state: State) -> bool:
        previous, self.state = self.state, state
        self.on_transition(self, previous)
        return True


def _ms(seconds: float) -> int:
    return round(seconds * 1000)

"""What a llorch answers, as a client reads it: views of its JSON, and one exception for each kind of no.

The one rule: answers are read leniently. A field that is not known here is somebody else's, one that is not
there has a default: so a client lives with an older server and with a newer one.
"""

import msgspec

from llorch.events import End, Error, Started, Token

# -- what comes back -------------------------------------------------------------------------------


class Created(msgspec.Struct, frozen=True, omit_defaults=True):
    """An admitted task; `predicted_start_ms` is milliseconds from admission, the URLs are paths."""

    task_id: str
    queue_position: int
    predicted_start_ms: int | None = None
    stream_url: str = ""
    cancel_url: str = ""
    correlation_id: str = ""


class Cancelled(msgspec.Struct, frozen=True):
    """The state that a task is in for ever, and how many tokens it gave."""

    task_id: str
    state: str
    tokens_out: int


class Timings(msgspec.Struct, frozen=True):
    """Milliseconds, null until known."""

    queue_ms: int | None = None
    first_token_ms: int | None = None
    decode_time_ms: int | None = None


class Snapshot(msgspec.Struct, frozen=True):
    """A task as it stands."""

    task_id: str
    state: str
    tokens_out: int = 0
    tokens_in: int | None = None
    pool_id: str = ""
    replica_id: str | None = None
    priority: str = ""
    queue_position: int | None = None
    predicted_start_ms: int | None = None
    created_at: str = ""
    timings: Timings = Timings()
    finish_reason: str | None = None
    error: Error | None = None


class TaskList(msgspec.Struct, frozen=True):
    """Tasks, newest first."""

    tasks: list[Snapshot] = []


class Slots(msgspec.Struct, frozen=True):
    """Slots in force, at work, and not let go of by the engine yet."""

    total: int = 0
    busy: int = 0
    draining: int = 0


class Lane(msgspec.Struct, frozen=True):
    """Waiting tasks of one priority, and how many may wait."""

    depth: int = 0
    capacity: int = 0


class Queue(msgspec.Struct, frozen=True):
    """Waiting tasks, and how many interactive ones may wait; no lanes from a server that has but one."""

    depth: int = 0
    capacity: int = 0
    interactive: Lane | None = None
    batch: Lane | None = None

    @property
    def first(self) -> Lane:
        """The lane that goes first."""
        return self.interactive or Lane(self.depth, self.capacity)


class Replica(msgspec.Struct, frozen=True):
    """One engine of a pool, and the GPUs it computes on where that is known."""

    replica_id: str
    ready: bool = False
    slots: int = 0
    busy: int = 0
    draining: int = 0
    determinism: str = "unknown"
    devices: list[int] = []
    last_error: str | None = None


class ReloadStep(msgspec.Struct, frozen=True):
    """What a reload did, and how long it took in ms."""

    name: str
    ms: int = 0
    replica_id: str | None = None


class Reloaded(msgspec.Struct, frozen=True):
    """What a pool has after a reload, and which replicas are let go."""

    pool_id: str
    replicas: list[str] = []
    retired: list[str] = []
    steps: list[ReloadStep] = []


class Drain(msgspec.Struct, frozen=True):
    """A pool that takes no new tasks: milliseconds until what it has is failed."""

    deadline_ms: int = 0


class Pool(msgspec.Struct, frozen=True):
    """How a pool is."""

    pool_id: str
    live: bool = False
    ready: bool = False
    engine: str = ""
    engine_version: str | None = None
    model: str | None = None
    ctx: int | None = None
    slots: Slots = Slots()
    queue: Queue = Queue()
    replicas: list[Replica] = []
    determinism: str = "unknown"
    last_error: str | None = None
    accelerator: str = ""
    drain: Drain | None = None


class Totals(msgspec.Struct, frozen=True):
    """Counts since the start of the server."""

    admitted: int = 0
    refused: int = 0
    completed: int = 0
    failed: int = 0
    cancelled: int = 0
    tokens_out: int = 0


class Percentiles(msgspec.Struct, frozen=True):
    """Milliseconds, null until anything was measured."""

    p50: int | None = None
    p95: int | None = None


class Gpu(msgspec.Struct, frozen=True):
    """One device: percent, bytes, degrees Celsius."""

    index: int = 0
    name: str = ""
    utilization: int | None = None
    vram_used_bytes: int = 0
    vram_total_bytes: int = 0
    temperature_c: int | None = None


class Status(msgspec.Struct, frozen=True):
    """The whole server in one snapshot."""

    version: str = ""
    uptime_s: float = 0.0
    pools: list[Pool] = []
    tasks: list[Snapshot] = []
    totals: Totals = Totals()
    tokens_per_s: float = 0.0
    first_token_ms: Percentiles = Percentiles()
    readers: int = 0
    gpus: list[Gpu] = []
    gpu_fault: str | None = None


class Metrics(msgspec.Struct, frozen=True):
    """How a task that waits is getting on; `predicted_start_ms` is milliseconds from now."""

    queue_position: int | None = None
    predicted_start_ms: int | None = None
    queue_depth: int = 0
    prompt_tokens: int | None = None
    prompt_tokens_done: int | None = None


class Broken(msgspec.Struct, frozen=True):
    """The stream broke off; `follow` tries again in so many seconds."""

    reason: str
    retry_in_s: float


Event = Started | Token | End | Error | Metrics | Broken


# -- what can go wrong -----------------------------------------------------------------------------


class Envelope(msgspec.Struct, frozen=True):
    """The body of every refusal."""

    code: str
    message: str
    retriable: bool | None = None
    retry_after_ms: int | None = None
    hint: str | None = None


class ClientError(Exception):
    """Something kept the server from doing what was asked; the message says what, and the cure."""


class BadUrl(ClientError):
    """Not the URL of a server, or not a token that can be sent."""


class Unreachable(ClientError):
    """No answer, or a broken one; `sent`: the request may have arrived."""

    def __init__(self, message: str, *, sent: bool) -> None:
        super().__init__(message)
        self.sent = sent


class BadAnswer(ClientError):
    """An answer, but not one of llorch's."""


class TooOld(ClientError):
    """A llorch that has no such route."""


class Refused(ClientError):
    """The server's envelope; the request itself can't be granted, now or later."""

    def __init__(self, answer: Envelope, status: int) -> None:
        super().__init__(answer.message)
        self.answer = answer
        self.status = status


class NotAllowed(Refused):
    """401 or 403: the token, or the host."""


class NotFound(Refused):
    """404: no such task, pool or route."""


class Later(Refused):
    """Not now: `retry_after_s` is seconds from now."""

    @property
    def retry_after_s(self) -> float:
        """What the server says, else 2 s."""
        return (self.answer.retry_after_ms or 2000) / 1000


class Busy(Later):
    """429: the queue is full."""


class Unavailable(Later):
    """503: the model is loading, the engine is gone, or the server is stopping."""


class ServerBug(Refused):
    """500: the server's log has more, under the correlation id."""

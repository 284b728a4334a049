"""A pool and an orchestrator over an engine in memory, at work in the background; for tests of the core."""

import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import msgspec

from llorch.admission import QueueLimits
from llorch.orchestrator import Orchestrator, StreamSettings
from llorch.plan import PoolSettings
from llorch.pool import Pool
from llorch.replica import Replica, SelfTest
from llorch.replicaset import FreeVram
from llorch.task import Sampling, State, Task, TaskRequest
from tests.memory_engine import Call, MemoryEngine
from tests.virtualtime import settled

POOL = PoolSettings(
    queue=QueueLimits(capacity=8, max_bytes=10_000),
    max_wait_s=3600.0,
    default_retry_after_ms=2000,
    ctx=0,
    max_tokens_default=16,
    max_tokens=64,
    retries=2,
    first_token_s=30.0,
    idle_s=10.0,
    wall_s=600.0,
)
STREAM = StreamSettings(
    max_readers=100,
    retain_s=300.0,
    retain_bytes=1 << 20,
    cancel_on_disconnect=False,
    disconnect_grace_s=10.0,
)


class Event(NamedTuple):
    """One SSE frame, taken apart."""

    id: int
    name: str
    data: dict[str, Any]


def parse(frame: bytes) -> Event:
    """What is in one frame of ours."""
    id_line, event_line, data_line, *blank = frame.decode().split("\n")
    assert blank == ["", ""]
    data = msgspec.json.decode(data_line.removeprefix("data: "))
    return Event(int(id_line.removeprefix("id: ")), event_line.removeprefix("event: "), data)


def events(task: Task, position: int = 0) -> list[Event]:
    """What a reader gets at once, from `position` on."""
    found: list[Event] = []
    while True:
        batch, position = task.log.read(position)
        if not batch:
            return found
        found += map(parse, batch)


def names(task: Task) -> str:
    """The names of all events of a task, in one string."""
    return " ".join(event.name for event in events(task))


def text(task: Task) -> str:
    """The tokens of a task, joined."""
    return "".join(event.data["t"] for event in events(task) if event.name == "token")


class Rig:
    """What `rig()` built; `moves` are all transitions, `readiness` what the pool said of its replicas.

    `engine`, `replica`: the first.
    """

    def __init__(
        self, engines: Sequence[MemoryEngine], settings: dict[str, Any], free_vram: FreeVram, **options: Any
    ) -> None:
        self.engine = engines[0]
        self.engines: list[MemoryEngine] = []
        self._options = options
        self.readiness: list[tuple[bool, str | None]] = []
        self.moves: list[tuple[Task, State]] = []
        limits = _replace(POOL.queue, settings)
        self.pool = Pool(
            "default",
            self.engine.name,
            msgspec.structs.replace(_replace(POOL, settings), queue=limits),
            [self.build(f"default-{number}", engine) for number, engine in enumerate(engines)],
            on_readiness=self._readiness,
            free_vram=free_vram,
            chance=random.Random(0),
        )
        self.orchestrator = Orchestrator([self.pool], _replace(STREAM, settings), tickets=False)
        assert not settings, f"no such settings: {settings}"
        self.orchestrator.listeners.append(lambda _, task, __: self.moves.append((task, task.state)))
        self.replica = self.pool.replicas[0]
        self.queue = self.pool.queue

    def build(self, replica_id: str, engine: MemoryEngine, **options: Any) -> Replica:
        """A replica like the others, for an engine that has to be closed at the end."""
        self.engines.append(engine)
        return Replica(replica_id, engine, chance=random.Random(0), **self._options | options)

    def _readiness(self, _: Pool, replica: Replica) -> None:
        self.readiness.append((replica.ready, replica.stuck or replica.last_error))

    async def submit(self, prompt: str = "hello", *, seed: int | None = None, **asked: Any) -> Task:
        """Hand in a task, strict if it has a seed, and let all happen that can happen now."""
        request = TaskRequest(
            prompt=None if "messages" in asked else prompt,
            sampling=Sampling(seed=seed),
            determinism="best_effort" if seed is None else "strict",
            **asked,
        )
        task = await self.orchestrator.submit(request)
        await settled()
        return task

    async def running(self, prompt: str = "hello", **asked: Any) -> tuple[Task, Call]:
        """A task that the engine has at once, and what the engine has of it."""
        task = await self.submit(prompt, **asked)
        assert task.state is State.RUNNING
        return task, self.engine.calls[-1]

    def cancel(self, task: Task) -> Task:
        """Cancel it."""
        return self.orchestrator.cancel(task.id)

    async def until_ended(self, task: Task) -> None:
        """Return when the task has ended, whatever time that takes."""
        async for _ in task.log.follow():
            pass
        await settled()


def _replace(settings: Any, changes: dict[str, Any]) -> Any:
    known = {field: changes.pop(field) for field in settings.__struct_fields__ if field in changes}
    return msgspec.structs.replace(settings, **known)


@asynccontextmanager
async def rig(
    *,
    slots: int = 1,
    engine: MemoryEngine | None = None,
    engines: Sequence[MemoryEngine] = (),
    configured: int | None = None,
    drain_s: float = 60.0,
    self_test: SelfTest | None = None,
    free_vram: FreeVram = lambda devices: None,
    **settings: Any,
) -> AsyncIterator[Rig]:
    """A rig whose engine has `slots`, probed and ready unless the engine is not; all is closed afterwards.

    With `engines` there is a replica for each: `default-0`, `default-1` and so on. Further arguments are
    fields of PoolSettings and StreamSettings.
    """
    built = Rig(
        engines or [engine or MemoryEngine(slots=slots)],
        settings,
        free_vram,
        slots=configured,
        drain_s=drain_s,
        self_test=self_test,
    )
    work = asyncio.create_task(built.orchestrator.run(), name="orchestrator")
    await settled()
    try:
        yield built
    finally:
        built.orchestrator.stop()
        await built.orchestrator.close()
        work.cancel()
        await asyncio.wait({work})
    assert work.cancelled(), f"the orchestrator failed: {work.exception()!r}"
    assert all(task.state.final for task, _ in built.moves), "a task has not ended"
    assert all(engine.closed for engine in built.engines), "an engine was not closed"
    assert not any(engine.open for engine in built.engines), "a connection to an engine is open"
    assert (len(built.queue), built.queue.reserved, built.queue.reserved_bytes) == (0, 0, 0)

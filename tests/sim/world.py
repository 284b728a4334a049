"""One run of the whole core under one seed: clients, readers, cancels, faults, a stop; and the invariants.

`run_seed(seed)` raises AssertionError with what was violated. The same seed gives the same run.
"""

import asyncio
import contextlib
import random
from collections import Counter
from collections.abc import Callable

import msgspec

from llorch.admission import QueueLimits
from llorch.errors import LlorchError
from llorch.orchestrator import Orchestrator, StreamSettings
from llorch.plan import PoolSettings
from llorch.pool import Pool
from llorch.replica import Replica
from llorch.selftest import examine
from llorch.task import Message, Sampling, State, Task, TaskRequest
from tests.sim.engine import CTX, SimEngine
from tests.sim.loop import SimLoop

TOO_LONG_S = 600.0


class World:
    """Everything of one run."""

    def __init__(self, seed: int, loop: SimLoop) -> None:
        self.chance = random.Random(seed ^ 0x5EED)
        self.loop = loop
        self.admitted: list[Task] = []
        self.starts: list[Task] = []
        self.readers: set[asyncio.Task[None]] = set()
        self.violations: list[str] = []
        self.stopped = False

    # -- the scenario ------------------------------------------------------------------------------

    async def play(self) -> None:
        """From the first probe to the last lease."""
        chance = self.chance
        self.engine = SimEngine(
            self.loop.chance, chance.choice((1, 2, 2, 3)), chance.choice((0.0, 0.0, 0.05, 0.3))
        )
        limits = settings(chance)
        replica = Replica(
            "default-0",
            self.engine,
            slots=chance.choice((None, 2, 2)),
            drain_s=chance.choice((0.3, 60.0)),
            self_test=chance.choice((None, examine)),
            chance=self.loop.chance,
        )
        self.pool = Pool(
            "default",
            self.engine.name,
            limits,
            [replica],
            on_readiness=lambda pool, replica: None,
            chance=self.loop.chance,
        )
        self.orchestrator = Orchestrator([self.pool], stream_settings(chance), tickets=False)
        self.orchestrator.listeners.append(self._moved)
        self.loop.after_step = self.check_step
        work = asyncio.create_task(self.orchestrator.run(), name="work")
        await self.orchestrator.first_probe(2.0)
        clients = [
            asyncio.create_task(self._client(n), name=f"client-{n}") for n in range(chance.randint(2, 9))
        ]
        weather = asyncio.create_task(self._weather(), name="weather")
        if chance.random() < 0.2:
            await asyncio.sleep(chance.choice((0.01, 0.2, 1.0)))
        else:
            await asyncio.wait(clients)
            if chance.random() < 0.7:
                await self._readers_leave()
        await self._stop()
        weather.cancel()
        await asyncio.wait(clients)
        await self._readers_leave()
        if self.chance.random() < 0.5:
            self.check_replay()
        assert not work.done(), f"the dispatcher died: {work.exception()!r}"
        work.cancel()
        await asyncio.wait({work, weather})
        self.loop.after_step = lambda: None
        self.check_end()

    async def _stop(self) -> None:
        self.orchestrator.stop()
        self.stopped = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.chance.choice((0.0, 0.05, 30.0))):
                await self.orchestrator.finished()
        await self.orchestrator.close()
        assert not self.engine.open.total(), "an engine connection is open after close"
        assert self.engine.closed, "the engine was not closed"

    async def _readers_leave(self) -> None:
        try:
            async with asyncio.timeout(TOO_LONG_S):
                while self.readers:
                    await asyncio.wait(self.readers)
        except TimeoutError:
            raise AssertionError(f"{len(self.readers)} readers never saw the end") from None

    async def _weather(self) -> None:
        """The engine dies and comes back."""
        for _ in range(self.chance.choice((0, 0, 0, 0, 1, 2))):
            await asyncio.sleep(self.chance.choice((0.0, 0.02, 0.3, 2.0)))
            self.engine.kill()
            await asyncio.sleep(self.chance.choice((0.0, 0.2, 3.0)))
            self.engine.load()
            await asyncio.sleep(self.chance.choice((0.0, 0.1, 1.0)))
            self.engine.come_up()

    async def _client(self, number: int) -> None:
        await asyncio.sleep(self.chance.choice((0.0, 0.0, 0.001, 0.05, 0.2, 0.5)))
        request = request_of(number, self.chance)
        submit = asyncio.create_task(self.orchestrator.submit(request), name=f"submit-{number}")
        if self.chance.random() < 0.15:  # a client that leaves while its request is looked at
            await asyncio.sleep(self.chance.choice((0.0, 0.001, 0.05)))
            submit.cancel()
        await asyncio.wait({submit})
        if submit.cancelled():
            return
        if (refusal := submit.exception()) is not None:
            assert isinstance(refusal, LlorchError), f"submit raised {refusal!r}"
            return
        task = submit.result()
        for _ in range(self.chance.choice((0, 1, 1, 2, 3))):
            self._spawn(self._read(task))
        for _ in range(self.chance.choice((0, 0, 0, 1, 1, 2))):
            self._spawn(self._cancel(task))
        self._spawn(self._read_to_the_end(task))

    def _spawn(self, work: object) -> None:
        task = asyncio.create_task(work)  # type: ignore[arg-type]
        self.readers.add(task)
        task.add_done_callback(self._left)

    def _left(self, reader: "asyncio.Task[None]") -> None:
        self.readers.discard(reader)
        if not reader.cancelled() and reader.exception() is not None:
            self.violations.append(f"{reader.get_name()}: {reader.exception()!r}")

    async def _cancel(self, task: Task) -> None:
        await asyncio.sleep(self.chance.choice((0.0, 0.0, 0.001, 0.02, 0.2, 1.0)))
        try:
            self.orchestrator.cancel(task.id)
        except LlorchError:
            return  # forgotten by retention
        if not task.state.final or not task.log.sealed:
            self.violations.append("a cancel was answered and the task had not ended")
        if task.state is State.CANCELLED:
            self._check_recall(task)
            await asyncio.sleep(0.01)
            if any(
                self.engine.open[prompt]
                for prompt in self.engine.open
                if prompt.startswith(f"{name_of(task)}|")
            ):
                self.violations.append("the engine is still asked for a cancelled task")

    def _check_recall(self, task: Task) -> None:
        frames, _ = task.log.read(0)
        if any(b"event: token" in frame for frame in frames):
            self.violations.append("a cancelled task still hands out tokens")

    async def _read(self, task: Task) -> None:
        """Read, leave, come back with the last id, until the end; perhaps leave for good."""
        seen: list[bytes] = []
        last_id: int | None = None
        try:
            with self.orchestrator.reading(task):
                for _ in range(self.chance.randint(1, 3)):
                    position = task.log.resume(last_id)
                    if position is None:
                        break
                    if await self._follow(task, position, seen, self.chance.choice((1, 2, 100))):
                        break
                    last_id = frame_id(seen[-1]) if seen else None
                    await asyncio.sleep(self.chance.choice((0.0, 0.01, 0.1)))
        except LlorchError:
            return
        self._check_seen(task, seen)

    async def _follow(self, task: Task, position: int, seen: list[bytes], batches: int) -> bool:
        """Take so many batches; whether the terminal event was among them."""
        async with contextlib.aclosing(task.log.follow(position)) as follow:
            async for batch in follow:
                if task.state is State.CANCELLED and any(b"event: token" in frame for frame in batch):
                    self.violations.append("a token was handed out after the cancel")
                seen.extend(batch)
                batches -= 1
                if not batches:
                    return task.log.sealed and frame_id(batch[-1]) == task.log.next_id - 1
                if self.chance.random() < 0.3:
                    await asyncio.sleep(self.chance.choice((0.0, 0.01, 0.1)))
        return True

    async def _read_to_the_end(self, task: Task) -> None:
        seen: list[bytes] = []
        async with contextlib.aclosing(task.log.follow()) as follow:
            async for batch in follow:
                seen.extend(batch)
        if not task.state.final:
            self.violations.append("a reader came to the end of a task that has not ended")
        check_stream(task, seen, self.violations)

    def _check_seen(self, task: Task, seen: list[bytes]) -> None:
        ids = [frame_id(frame) for frame in seen]
        expected = list(range(len(ids)))
        if task.state is State.CANCELLED and ids and ids[-1] == task.log.next_id - 1:
            ids, expected = ids[:-1], expected[:-1]  # the end may skip what was recalled
        if ids != expected:
            self.violations.append(f"a reader that came back saw the ids {ids}")

    # -- what must hold ----------------------------------------------------------------------------

    def _moved(self, pool: Pool, task: Task, previous: State | None) -> None:
        if previous is None:
            self.admitted.append(task)
        elif task.state is State.RUNNING:
            self.starts.append(task)
            if task.strict and pool.replicas[0].determinism == "failed":
                self.violations.append("a strict task was started after a failed self-test")
        if self.stopped and task.state in (State.QUEUED, State.RUNNING):
            self.violations.append("a task was admitted or started after the stop")

    def check_step(self) -> None:
        """What must hold after every single callback."""
        queue, replica = self.pool.queue, self.pool.replicas[0]
        if self.violations or self.engine.violations:
            raise AssertionError("; ".join(self.violations + self.engine.violations))
        assert len(queue) <= queue.limits.capacity, "more tasks wait than the capacity"
        assert queue.reserved >= 0, "a place was given back twice"
        assert queue.reserved_bytes >= 0, "bytes were given back twice"
        assert len(replica.leases) <= max(replica.slots, 1), "more leases than slots"
        assert len(replica.leases) < 2 or not any(lease.exclusive for lease in replica.leases), "not alone"
        head = None
        for task in queue:
            head = head or task
            assert task.state is State.QUEUED, f"a {task.state.value} task stands in the queue"
        if head is not None and not self.stopped and replica.free_slots:
            waits_for_idle = head.strict and replica.leases
            assert waits_for_idle, "a slot is free and the head of the queue was not sent"

    def check_replay(self) -> None:
        """Whoever comes late reads the same, from every id."""
        for task in self.admitted:
            whole, _ = read_all(task, 0)
            check_stream(task, whole, self.violations)
            for frame in whole[:-1]:
                position = task.log.resume(frame_id(frame))
                assert position is not None, "204 before the end"
                rest, _ = read_all(task, position)
                assert rest == whole[whole.index(frame) + 1 :], "a resumed reader gets something else"
            assert task.log.resume(frame_id(whole[-1])) is None, "no 204 at the end"

    def check_end(self) -> None:
        """What must hold when all is over."""
        self.check_step()
        queue, replica, engine = self.pool.queue, self.pool.replicas[0], self.engine
        never_started = {task.id for task in self.admitted} - {task.id for task in self.starts}
        starts = [self.admitted.index(task) for task in self.starts]
        assert starts == sorted(starts), f"started in the order {starts}"
        assert all(task.state.final for task in self.admitted), "a task has not ended"
        assert (queue.reserved, queue.reserved_bytes, len(queue)) == (0, 0, 0), "a place is still taken"
        assert (queue.waiting_bytes, queue.strict) == (0, 0), "the queue counts what is not there"
        assert all(lease.draining and lease.closed for lease in replica.leases), "a lease is still at work"
        by_name = {name_of(task): task for task in self.admitted}
        for generation in engine.sent:
            if "|" not in generation.prompt:
                continue  # the self-test's
            task = by_name.get(generation.prompt.split("|")[0])
            assert task is not None, "a refused request reached the engine"
            assert task.id not in never_started, "a task that never started reached the engine"
            strict = task.request.metadata["strict"] == "True"
            assert generation.cache_prompt != strict, "a strict task and the prompt cache"
            assert generation.slot == 0 or not strict, "a strict task on another slot than 0"
        assert not self.orchestrator._readers, "a reader is still counted"
        left = asyncio.all_tasks(self.loop) - {asyncio.current_task()}
        assert not left, f"still running: {sorted(task.get_name() for task in left)}"


def settings(chance: random.Random) -> PoolSettings:
    """Small limits, so that they are met."""
    return PoolSettings(
        queue=QueueLimits(capacity=chance.randint(1, 5), max_bytes=chance.choice((100, 1000, 1000))),
        max_wait_s=chance.choice((0.3, 3600.0, 3600.0)),
        default_retry_after_ms=500,
        ctx=0,
        max_tokens_default=8,
        max_tokens=64,
        retries=chance.randint(0, 2),
        first_token_s=chance.choice((1.0, 5.0)),
        idle_s=0.5,
        wall_s=chance.choice((1.0, 30.0)),
    )


def stream_settings(chance: random.Random) -> StreamSettings:
    """Retention that forgets, and a disconnect that may cancel."""
    return StreamSettings(
        max_readers=chance.choice((2, 100)),
        retain_s=chance.choice((0.1, 300.0)),
        retain_bytes=chance.choice((100, 1 << 20)),
        cancel_on_disconnect=chance.random() < 0.3,
        disconnect_grace_s=0.05,
    )


def request_of(number: int, chance: random.Random) -> TaskRequest:
    """A request whose prompt begins with `number|`; some need the engine to count their tokens."""
    prompt = f"{number}|" + "x" * chance.choice((0, 0, 0, 0, CTX - 10, CTX))
    strict = chance.random() < 0.2
    as_messages = chance.random() < 0.3
    return TaskRequest(
        prompt=None if as_messages else prompt,
        messages=(Message("user", prompt),) if as_messages else (),
        max_tokens=chance.choice((None, 1, 6)),
        sampling=Sampling(seed=1 if strict else None),
        determinism="strict" if strict else "best_effort",
        metadata={"name": str(number), "strict": str(strict)},
    )


def name_of(task: Task) -> str:
    """The number of the client that handed in `task`."""
    return task.request.metadata["name"]


def frame_id(frame: bytes) -> int:
    """The id of an SSE frame."""
    return int(frame[4 : frame.index(b"\n")])


def read_all(task: Task, position: int) -> tuple[list[bytes], int]:
    """Every frame that is ready."""
    frames: list[bytes] = []
    while True:
        batch, position = task.log.read(position)
        if not batch:
            return frames, position
        frames += batch


def check_stream(task: Task, frames: list[bytes], violations: list[str]) -> None:
    """The shape of a whole stream, and that its words are this task's, in order."""
    names = [frame.split(b"\n")[1].removeprefix(b"event: ").decode() for frame in frames]
    count = Counter(names)
    tokens = [msgspec.json.decode(frame.split(b"data: ")[1]) for frame in frames if b"event: token" in frame]
    terminal = "error" if task.state is State.FAILED else "end"
    told: Callable[[bool, str], None] = lambda holds, what: None if holds else violations.append(what)  # noqa: E731
    told(names[:1] == ["started"] and count["started"] == 1, f"the stream begins with {names[:1]}")
    told(names[-1:] == [terminal], f"a {task.state.value} task's stream ends with {names[-1:]}")
    told(count["end"] + count["error"] == 1, "more than one terminal event")
    told([token["i"] for token in tokens] == list(range(len(tokens))), "token numbers have a gap")
    words = [token["t"].rpartition(":") for token in tokens]
    told([int(word[2]) for word in words] == list(range(len(words))), "tokens are not the engine's, in order")
    told(all(word[0].split("|")[0] == name_of(task) for word in words), "tokens of another task")
    if task.state is not State.CANCELLED:
        told([frame_id(frame) for frame in frames] == list(range(len(frames))), "ids have a gap")


def run_seed(seed: int) -> int:
    """Play one seed; the number of steps. Raises AssertionError."""
    loop = SimLoop(seed)
    world = World(seed, loop)
    try:
        asyncio.set_event_loop(loop)
        loop.run_until_complete(world.play())
        if world.violations or world.engine.violations:
            raise AssertionError("; ".join(world.violations + world.engine.violations))
        unexpected = [str(bug.get("exception") or bug["message"]) for bug in loop.bugs]
        assert not unexpected, f"the loop reports {unexpected}"
        return loop.steps
    finally:
        clean_up(loop)


def clean_up(loop: SimLoop) -> None:
    """After a violation there may be anything left."""
    loop.after_step = lambda: None
    loop.max_steps += 100_000
    left = asyncio.all_tasks(loop)
    for task in left:
        task.cancel()
    if left:
        loop.run_until_complete(asyncio.wait(left))
    loop.run_until_complete(loop.shutdown_asyncgens())
    asyncio.set_event_loop(None)
    loop.close()

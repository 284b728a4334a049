"""One run of the whole core under one seed, and the invariants.

Clients, readers, cancels, replicas that differ, die and come back, drains, other replicas instead, a stop.

`run_seed(seed)` raises AssertionError with what was violated. The same seed gives the same run.
"""

import asyncio
import contextlib
import random
from collections import Counter
from collections.abc import Callable

import msgspec

from llorch.admission import QueueLimits
from llorch.errors import LlorchError, QueueFull
from llorch.orchestrator import Orchestrator, StreamSettings
from llorch.plan import PoolSettings
from llorch.pool import Pool
from llorch.replica import Lease, Replica
from llorch.selftest import examine
from llorch.task import Message, Priority, Sampling, State, Task, TaskRequest
from tests.sim.engine import CTX, SimEngine
from tests.sim.loop import SimLoop

LANES: tuple[Priority, ...] = ("interactive", "batch")
TOO_LONG_S = 600.0
LET_GO_S = 0.5  # for an engine to be closed, once nothing runs on it any more


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
        self.engines: list[SimEngine] = []
        self.replicas: list[Replica] = []  # those of the pool
        self.retired: dict[Replica, float | None] = {}  # and since when nothing runs on them
        self.drained_until: float | None = None
        self.interactive_has_turn = False

    # -- the scenario ------------------------------------------------------------------------------

    async def play(self) -> None:
        """From the first probe to the last lease."""
        chance = self.chance
        self.fault_rate = chance.choice((0.0, 0.0, 0.05, 0.3))
        self.strict_rate = chance.choice((0.1, 0.2, 0.4))
        limits = settings(chance)
        self.promote_s = limits.queue.batch_promote_s
        self.replicas = [self._replica() for _ in range(chance.choice((1, 1, 1, 2, 2, 3)))]
        self.pool = Pool(
            "default",
            SimEngine.name,
            limits,
            self.replicas,
            on_readiness=lambda pool, replica: None,
            chance=self.loop.chance,
        )
        self.orchestrator = Orchestrator([self.pool], stream_settings(chance), tickets=False)
        self.orchestrator.listeners.append(self._moved)
        self.orchestrator.refusal_listeners.append(self._refused)
        self.loop.after_step = self.check_step
        work = asyncio.create_task(self.orchestrator.run(), name="work")
        await self.orchestrator.first_probe(2.0)
        clients = [
            asyncio.create_task(self._client(n), name=f"client-{n}") for n in range(chance.randint(2, 9))
        ]
        outside = [asyncio.create_task(self._weather(engine), name="weather") for engine in self.engines]
        outside.append(asyncio.create_task(self._operator(), name="operator"))
        if chance.random() < 0.2:
            await asyncio.sleep(chance.choice((0.01, 0.2, 1.0)))
        else:
            await asyncio.wait(clients)
            if chance.random() < 0.7:
                await self._readers_leave()
        await self._stop()
        for trouble in outside:
            trouble.cancel()
        await asyncio.wait([*clients, *outside])
        for trouble in outside:
            if not trouble.cancelled() and (bug := trouble.exception()) is not None:
                raise bug
        await self._readers_leave()
        if self.chance.random() < 0.5:
            self.check_replay()
        assert not work.done(), f"the dispatcher died: {work.exception()!r}"
        work.cancel()
        await asyncio.wait({work})
        self.loop.after_step = lambda: None
        self.check_end()

    async def _stop(self) -> None:
        self.orchestrator.stop()
        self.stopped = True
        for engine in self.engines:
            engine.over = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.chance.choice((0.0, 0.05, 30.0))):
                await self.orchestrator.finished()
        await self.orchestrator.close()
        for replica in (*self.replicas, *self.retired):
            assert isinstance(replica.engine, SimEngine)
            assert not replica.engine.open.total(), "an engine connection is open after close"
            assert replica.engine.closed, "an engine was not closed"

    async def _readers_leave(self) -> None:
        try:
            async with asyncio.timeout(TOO_LONG_S):
                while self.readers:
                    await asyncio.wait(self.readers)
        except TimeoutError:
            raise AssertionError(f"{len(self.readers)} readers never saw the end") from None

    def _replica(self) -> Replica:
        """A new one, with an engine of its own."""
        engine = SimEngine(
            self.loop.chance, self.chance.choice((1, 2, 2, 3)), self.fault_rate, self.violations
        )
        self.engines.append(engine)
        return Replica(
            f"replica-{len(self.engines)}",
            engine,
            slots=self.chance.choice((None, 2, 2)),
            drain_s=self.chance.choice((0.3, 60.0)),
            self_test=self.chance.choice((None, examine)),
            chance=self.loop.chance,
        )

    async def _operator(self) -> None:
        """Somebody drains the pool, or gives it other replicas."""
        for _ in range(self.chance.choice((0, 0, 1, 2))):
            await asyncio.sleep(self.chance.choice((0.0, 0.02, 0.3, 1.0)))
            if self.chance.random() < 0.4:
                await self._drain()
            else:
                await self._switch()

    async def _drain(self) -> None:
        deadline_s = self.chance.choice((0.02, 0.3, 2.0))
        if self.stopped:
            return
        self.pool.drain(deadline_s)
        self.drained_until = self.loop.now + deadline_s
        await asyncio.sleep(self.chance.choice((0.0, 0.1, 3.0)))
        if not self.stopped and self.chance.random() < 0.8:
            self.drained_until = None
            self.pool.end_drain()

    async def _switch(self) -> None:
        """Some stay, some leave, some are new; nobody in the queue is touched."""
        kept = [replica for replica in self.replicas if self.chance.random() < 0.5]
        fresh = [self._replica() for _ in range(self.chance.choice((0, 1, 1, 2)) if kept else 1)]
        try:
            for replica in fresh:
                await replica.probe()
            if not self.stopped:
                self._go_over_to([replica for replica in kept if replica in self.replicas], fresh)
                fresh = []
        finally:
            for replica in fresh:
                await replica.close()
                await replica.engine.close()

    def _go_over_to(self, kept: list[Replica], fresh: list[Replica]) -> None:
        before = list(self.pool.queue)
        self.retired |= {replica: None for replica in self.replicas if replica not in kept}
        self.replicas = self.chance.sample([*kept, *fresh], len(kept) + len(fresh))
        self.drained_until = None
        self.pool.switch(self.replicas, self.pool.settings)
        after = list(self.pool.queue)
        if [task for task in before if task.state is State.QUEUED] != after:
            started = self._order_of([task for task in before if task.state is State.QUEUED])
            if started != after:
                self.violations.append("a switch lost a waiting task, or its place")

    async def _weather(self, engine: SimEngine) -> None:
        """An engine dies and comes back."""
        for _ in range(self.chance.choice((0, 0, 0, 0, 1, 2))):
            await asyncio.sleep(self.chance.choice((0.0, 0.02, 0.3, 2.0)))
            engine.kill()
            await asyncio.sleep(self.chance.choice((0.0, 0.2, 3.0)))
            engine.load()
            await asyncio.sleep(self.chance.choice((0.0, 0.1, 1.0)))
            engine.come_up()

    async def _client(self, number: int) -> None:
        await asyncio.sleep(self.chance.choice((0.0, 0.0, 0.001, 0.05, 0.2, 0.5)))
        request = request_of(number, self.chance, self.strict_rate)
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
                engine.open[prompt]
                for engine in self.engines
                for prompt in engine.open
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
        if not seen or frame_id(seen[-1]) != task.log.next_id - 1:
            self.violations.append("a stream was closed before its reader had the end")
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
            self._check_admission(task)
            self.admitted.append(task)
        elif task.state is State.RUNNING:
            self.starts.append(task)
            self._check_turn(task)
            self._check_place(task)
        elif task.error is not None and task.error.code == "QUEUE_TIMEOUT" and previous is State.RUNNING:
            self.violations.append("a task that runs has waited too long")
        if self.stopped and task.state in (State.QUEUED, State.RUNNING):
            self.violations.append("a task was admitted or started after the stop")

    def _refused(self, pool: Pool, refusal: LlorchError, *_: object) -> None:
        for lane, bound in zip(LANES, ("(queue.capacity)", "(queue.batch_capacity)"), strict=True):
            if isinstance(refusal, QueueFull) and bound in refusal.message:
                held = pool.queue.depth(lane) + pool.queue.lanes[lane].reserved
                if held < pool.queue.capacity(lane):
                    self.violations.append("a task was refused though its lane has room")

    def _check_admission(self, task: Task) -> None:
        queue = self.pool.queue
        if self.drained_until is not None:
            self.violations.append("a task was admitted while the pool was drained")
        order = self._order_of([*queue.lanes["interactive"], *queue.lanes["batch"]])
        if order != list(queue):
            self.violations.append("the queue is not in the order in which its tasks would go")
        if task.queue_position != order.index(task):
            self.violations.append(f"told {task.queue_position} ahead, there are {order.index(task)}")

    def _order_of(self, waiting: list[Task]) -> list[Task]:
        """Whom one dispatch after the other would send out if no time passed."""
        lanes = {lane: [task for task in waiting if task.request.priority == lane] for lane in LANES}
        interactive, batch = lanes["interactive"], lanes["batch"]
        turn, order = self.interactive_has_turn, list[Task]()
        while interactive or batch:
            batch_goes = not interactive or (batch and not turn and self._promoted(batch[0]))
            turn = bool(batch_goes and interactive)
            order.append((batch if batch_goes else interactive).pop(0))
        return order

    def _promoted(self, task: Task) -> bool:
        """Whether a batch task has waited long enough."""
        return self.promote_s is not None and task.admitted_at + self.promote_s <= self.loop.now

    def _check_turn(self, task: Task) -> None:
        """Interactive first, a promoted batch task now and then, never two of those before another."""
        lanes = self.pool.queue.lanes
        if task.request.priority == "interactive":
            batch = lanes["batch"].head
            if batch is not None and self._promoted(batch) and not self.interactive_has_turn:
                self.violations.append("a batch task that has waited long was passed over")
            self.interactive_has_turn = False
            return
        passes = len(lanes["interactive"]) > 0
        if passes and not self._promoted(task):
            self.violations.append("a batch task went before an interactive one")
        if passes and self.interactive_has_turn:
            self.violations.append("two batch tasks in a row went before an interactive one")
        self.interactive_has_turn = passes

    def _check_place(self, task: Task) -> None:
        """A task is started where it may run."""
        assert isinstance(task.lease, Lease)
        replica = task.lease.replica
        if replica not in self.replicas:
            self.violations.append("a task was started on a replica that was let go")
        if not replica.able:
            self.violations.append("a task was started on a replica that can't work")
        if len(replica.leases) > replica.slots:
            self.violations.append("a task was started on a replica without a free slot")
        self._check_agreement()
        if task.strict and not self._reliable(replica):
            self.violations.append("a strict task was started where its seed may not hold")

    def _reliable(self, replica: Replica) -> bool:
        """Whether strict tasks may go there: it is verified, or nothing is known of any that works."""
        verified = any(other.ready and other.determinism == "verified" for other in self.replicas)
        return replica.determinism == ("verified" if verified else "unknown")

    def check_step(self) -> None:
        """What must hold after every single callback."""
        if self.violations:
            raise AssertionError("; ".join(self.violations))
        queue = self.pool.queue
        assert queue.reserved >= 0, "a place was given back twice"
        assert queue.reserved_bytes >= 0, "bytes were given back twice"
        for replica in self.replicas:
            self._check_leases(replica)
        if self.retired:
            self._check_retired()
        if len(self.replicas) > 1 and self.loop.steps % 8 == 0:
            self._check_agreement()
        if len(queue):
            self._check_waiting()
        if self.drained_until is not None and self.loop.now > self.drained_until and not self.stopped:
            assert all(task.state.final for task in self.admitted), "a task has outlived the drain"

    def _check_leases(self, replica: Replica) -> None:
        if len(leases := replica.leases) < 2:
            return  # most of the time
        assert len(leases) <= replica.slots, "more leases than slots"
        assert not any(lease.exclusive for lease in leases), "not alone"

    def _check_retired(self) -> None:
        """Who is let go ends what it runs, and is closed then."""
        for replica, vacant_since in self.retired.items():
            self._check_leases(replica)
            if replica.leases:
                self.retired[replica] = None
            elif vacant_since is None:
                self.retired[replica] = self.loop.now
            elif self.loop.now > vacant_since + LET_GO_S and not self.stopped:
                assert isinstance(replica.engine, SimEngine)
                assert replica.engine.closed, "an engine that nobody uses any more was not closed"

    def _check_agreement(self) -> None:
        """All that are ready are alike, and nobody who is like them is kept out."""
        ready = [replica.made for replica in self.replicas if replica.ready]
        versions = {made.engine_version for made in ready}
        digests = {made.model_digest for made in ready if made.model_digest}
        assert len(versions) <= 1, f"at work: {versions}"
        assert len(digests) <= 1, f"at work: {digests}"
        for replica in self.replicas:
            if replica.able and not replica.ready:
                assert ready, "all that could work are kept out"
                alike = replica.made.engine_version in versions and replica.made.model_digest in (
                    None,
                    *digests,
                )
                assert not alike or not digests, "a replica is kept out though it is like the others"

    def _check_waiting(self) -> None:
        """No slot stays free while the one that goes next could have it."""
        lanes, limits = self.pool.queue.lanes, self.pool.queue.limits
        assert len(lanes["interactive"]) <= limits.capacity, "more tasks wait than the capacity"
        assert len(lanes["batch"]) <= limits.batch_capacity, "more batch tasks wait than the capacity"
        for lane in lanes.values():
            for task in lane:
                assert task.state is State.QUEUED, f"a {task.state.value} task stands in the queue"
        head, batch = lanes["interactive"].head or lanes["batch"].head, lanes["batch"].head
        if (
            head is not batch
            and batch is not None
            and not self.interactive_has_turn
            and self._promoted(batch)
        ):
            assert self.promote_s is not None
            if batch.admitted_at + self.promote_s == self.loop.now:
                return  # its timer is due, and about to be seen
            head = batch
        if head is None or self.stopped:
            return
        for replica in self.replicas:
            if replica.free_slots and (not head.strict or not replica.leases):
                doubt = any(other.ready and not other.dispatchable for other in self.replicas)
                waits = head.strict and (doubt or not self._reliable(replica))
                assert waits, "a slot is free and the head of the queue was not sent"

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
        queue = self.pool.queue
        never_started = {task.id for task in self.admitted} - {task.id for task in self.starts}
        for lane in LANES:
            starts = [self.admitted.index(task) for task in self.starts if task.request.priority == lane]
            assert starts == sorted(starts), f"{lane} tasks were started in the order {starts}"
        assert all(task.state.final for task in self.admitted), "a task has not ended"
        assert (queue.reserved, queue.reserved_bytes, len(queue)) == (0, 0, 0), "a place is still taken"
        assert (queue.waiting_bytes, queue.strict) == (0, 0), "the queue counts what is not there"
        for replica in (*self.replicas, *self.retired):
            assert all(lease.draining and lease.closed for lease in replica.leases), (
                "a lease is still at work"
            )
        by_name = {name_of(task): task for task in self.admitted}
        ran_on: dict[str, SimEngine] = {}
        for engine, generation in [(each, one) for each in self.engines for one in each.sent]:
            if "|" not in generation.prompt:
                continue  # the self-test's
            assert ran_on.setdefault(generation.prompt, engine) is engine, "a task went to another replica"
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
        queue=QueueLimits(
            capacity=chance.randint(1, 5),
            batch_capacity=chance.randint(1, 4),
            max_bytes=chance.choice((100, 1000, 1000)),
            batch_promote_s=chance.choice((None, 0.05, 0.3, 300.0)),
        ),
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


def request_of(number: int, chance: random.Random, strict_rate: float) -> TaskRequest:
    """A request whose prompt begins with `number|`; some need the engine to count their tokens."""
    prompt = f"{number}|" + "x" * chance.choice((0, 0, 0, 0, CTX - 10, CTX))
    strict = chance.random() < strict_rate
    as_messages = chance.random() < 0.3
    return TaskRequest(
        prompt=None if as_messages else prompt,
        messages=(Message("user", prompt),) if as_messages else (),
        max_tokens=chance.choice((None, 1, 6)),
        sampling=Sampling(seed=1 if strict else None),
        determinism="strict" if strict else "best_effort",
        priority=chance.choice(("interactive", "interactive", "batch")),
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
        if world.violations:
            raise AssertionError("; ".join(world.violations))
        unexpected = [str(bug.get("exception") or bug["message"]) for bug in loop.bugs]
        assert not unexpected, f"the loop reports {unexpected}"
        return loop.steps
    finally:
        clean_up(loop)


def clean_up(loop: SimLoop) -> None:
    """After a violation there may be anything left."""
    loop.after_step = lambda: None
    loop.max_steps += 100_000
    while left := asyncio.all_tasks(loop):  # a task that ends may let the next one start
        for task in left:
            task.cancel()
        loop.run_until_complete(asyncio.wait(left))
    loop.run_until_complete(loop.shutdown_asyncgens())
    asyncio.set_event_loop(None)
    loop.close()

"""Queue, pool and tasks as a state machine: whatever is done in whatever order, the invariants hold.

Numbers in the messages: 1 one terminal event, last · 2 one `started`, first · 3 tokens without a gap ·
4 no token handed out after a cancel · 5 a task that ends while it waits never reaches the engine · 6 starts
in admission order within a lane, interactive ones first · 7 waiting ≤ capacity · 8 leases ≤ slots, an
exclusive one alone · 9 after close all is ended and closed · 10 a refused request leaves nothing.
"""

import asyncio
import logging
from collections.abc import Coroutine, Iterator
from contextlib import AsyncExitStack
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from llorch.engine import (
    EngineBroken,
    EngineFailure,
    EngineGone,
    EngineInvalidRequest,
    EngineLoading,
    EngineRefused,
    EngineStalled,
)
from llorch.errors import LlorchError
from llorch.pool import Pool
from llorch.replica import Lease
from llorch.task import Priority, Sampling, State, Task, TaskRequest
from tests.memory_engine import Call, MemoryEngine
from tests.rig import Rig, events, parse, rig
from tests.virtualtime import VirtualTimeLoop, advance, settled, turns

FAILURES: list[type[Exception]] = [
    EngineBroken,
    EngineStalled,
    EngineInvalidRequest,
    EngineRefused,
    EngineGone,
    EngineLoading,
    ZeroDivisionError,
]
PICK = st.integers(0, 1000)
LANES: list[Priority] = ["interactive", "batch"]
LANE = st.sampled_from(["interactive", "interactive", "batch"])


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Thousands of failing engines would fill the log."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


class Reader:
    """A reader in the background; `late` are tokens it got after its task was cancelled."""

    def __init__(self, task: Task, position: int) -> None:
        self.task = task
        self.first = position
        self.got: list[bytes] = []
        self.late: list[bytes] = []
        self.work = asyncio.create_task(self._read())

    async def _read(self) -> None:
        async for batch in self.task.log.follow(self.first):
            self.got += batch
            if self.task.state is State.CANCELLED:
                self.late += [frame for frame in batch if parse(frame).name == "token"]


class Core(RuleBasedStateMachine):
    """One pool, its engines, its clients."""

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner(loop_factory=VirtualTimeLoop)
        self.stack = AsyncExitStack()
        self.tasks: list[Task] = []
        self.readers: list[Reader] = []
        self.requests = 0
        self.prompts: dict[Task, str] = {}
        self.interactive_has_turn = False
        self.wrong: list[str] = []
        self.it: Rig

    def do(self, *work: Coroutine[Any, Any, object]) -> None:
        """Run it, and let happen what follows at once."""

        async def all_of_it() -> None:
            for step in work:
                await step
            await settled()

        self.runner.run(all_of_it())

    @initialize(
        slots=st.lists(st.integers(1, 3), min_size=1, max_size=2),
        capacity=st.integers(1, 4),
        batch_capacity=st.integers(1, 3),
        promote_s=st.sampled_from([None, 3.0]),
        retries=st.integers(0, 2),
    )
    def begin(self, slots: list[int], retries: int, promote_s: float | None, **bounds: int) -> None:
        """A pool that is ready, of one or two replicas."""
        self.promote_s = promote_s
        self.do(self._begin(slots, retries=retries, batch_promote_s=promote_s, **bounds))

    async def _begin(self, slots: list[int], **settings: Any) -> None:
        engines = [MemoryEngine(slots=number, ctx=40) for number in slots]
        bounds = {"max_bytes": 200, "max_wait_s": 200.0, "retain_s": 1e6}
        self.it = await self.stack.enter_async_context(
            rig(engines=engines, drain_s=5.0, **bounds, **settings)  # type: ignore[arg-type]
        )
        self.it.orchestrator.listeners.append(self._moved)

    def _moved(self, _: Pool, task: Task, previous: State | None) -> None:
        """6, of both lanes together."""
        if task.state is not State.RUNNING:
            return
        assert isinstance(task.lease, Lease)
        if not task.lease.replica.able or task.lease.replica.excluded is not None:
            self.wrong.append("started on a replica that can't work")
        lanes, now = self.it.queue.lanes, task.now()
        head, passes = lanes["batch"].head, len(lanes["interactive"]) > 0
        batch = task if task.request.priority == "batch" else head
        after_s = self.promote_s
        promoted = batch is not None and after_s is not None and batch.admitted_at + after_s <= now
        has_turn = promoted and not self.interactive_has_turn
        if task is batch and passes and not has_turn:
            self.wrong.append("6: a batch task went before an interactive one")
        if task is not batch and has_turn:
            self.wrong.append("6: a batch task that has waited long was passed over")
        self.interactive_has_turn = task is batch and passes

    # -- clients -----------------------------------------------------------------------------------

    @rule(strict=st.booleans(), words=st.sampled_from([1, 2, 11, 45, 90]), lane=LANE, cancelled=st.booleans())
    def submit(self, strict: bool, words: int, lane: Priority, cancelled: bool) -> None:
        """A new task; it may be refused, or cancelled before anything else happens."""
        self.do(self._submit(strict, words, lane, cancelled))

    async def _submit(self, strict: bool, words: int, lane: Priority, cancelled: bool) -> None:
        queue = self.it.queue
        before = len(self.it.moves), queue.reserved, queue.reserved_bytes
        request = self._request(strict, words, lane)
        try:
            task = await self.it.orchestrator.submit(request)
        except LlorchError:
            assert (len(self.it.moves), queue.reserved, queue.reserved_bytes) == before, "10"
        else:
            self._admitted(task, request)
            if cancelled:
                await self._cancel(task)

    @rule(asked=st.lists(st.tuples(st.booleans(), LANE), min_size=2, max_size=6), leaves=st.integers(0, 5))
    def submit_together(self, asked: list[tuple[bool, Priority]], leaves: int) -> None:
        """Several at once, all of which an engine has to count; one client leaves meanwhile."""
        self.do(self._submit_together(asked, leaves))

    async def _submit_together(self, asked: list[tuple[bool, Priority]], leaves: int) -> None:
        gates = [engine.hold("tokenize") for engine in self.it.engines]
        requests = [self._request(strict, 11, lane) for strict, lane in asked]
        submits = [asyncio.create_task(self.it.orchestrator.submit(request)) for request in requests]
        await settled()
        if leaves < len(submits):
            submits[leaves].cancel()
        for gate in gates:
            gate.set()
        await settled()
        assert all(submit.done() for submit in submits)
        for submit, request in zip(submits, requests, strict=True):
            if not submit.cancelled() and submit.exception() is None:
                self._admitted(submit.result(), request)
        assert (self.it.queue.reserved, self.it.queue.reserved_bytes) == (0, 0), "10"

    def _admitted(self, task: Task, request: TaskRequest) -> None:
        assert request.prompt is not None
        self.tasks.append(task)
        self.prompts[task] = request.prompt

    def _request(self, strict: bool, words: int, lane: Priority) -> TaskRequest:
        self.requests += 1
        return TaskRequest(
            prompt=f"{'strict' if strict else 'shared'}-{self.requests}" + " x" * words,
            max_tokens=4,
            sampling=Sampling(seed=1 if strict else None),
            determinism="strict" if strict else "best_effort",
            priority=lane,
        )

    @precondition(lambda self: self.tasks)
    @rule(pick=PICK)
    def cancel(self, pick: int) -> None:
        """Of any task, in whatever state; nothing else happens in that step."""
        task = self.tasks[pick % len(self.tasks)]
        self.do(self._cancel(task))

    async def _cancel(self, task: Task) -> None:
        ended, tokens_out = task.state.final, task.tokens_out
        state = self.it.cancel(task).state
        assert state.final, "a cancel was answered and the task goes on"
        assert ended or (state, task.tokens_out) == (State.CANCELLED, tokens_out)

    @precondition(lambda self: self.tasks)
    @rule(pick=PICK, last_id=st.none() | st.integers(0, 5))
    def read(self, pick: int, last_id: int | None) -> None:
        """Somebody reads a task, from the start or from an id."""
        self.do(self._read(self.tasks[pick % len(self.tasks)], last_id))

    async def _read(self, task: Task, last_id: int | None) -> None:
        position = task.log.resume(last_id)
        assert position == self._resumed(task, last_id), "a reader is put elsewhere"
        if position is not None:
            self.readers.append(Reader(task, position))

    def _resumed(self, task: Task, last_id: int | None) -> int | None:
        if last_id is None:
            return 0
        last, sealed = task.log.next_id - 1, task.log.sealed
        if last_id < last or (last_id == last and not sealed):
            return last_id + 1
        return None if sealed else 0

    @precondition(lambda self: self.readers)
    @rule(pick=PICK)
    def leave(self, pick: int) -> None:
        """A reader goes."""
        self.readers[pick % len(self.readers)].work.cancel()
        self.do()

    # -- the engine --------------------------------------------------------------------------------

    @property
    def open(self) -> list[Call]:
        """What the engines could answer now."""
        return [call for engine in self.it.engines for call in engine.open]

    @precondition(lambda self: self.open)
    @rule(pick=PICK, count=st.integers(0, 3), begins=st.booleans())
    def say(self, pick: int, count: int, begins: bool) -> None:
        """Some tokens in one read."""
        call = self.open[pick % len(self.open)]
        if begins:
            call.begin()
        call.say(*"xyz"[:count])
        self.do()

    @precondition(lambda self: self.open)
    @rule(pick=PICK, texts=st.integers(0, 2), later=st.integers(0, 3), cancelled=st.booleans())
    def finish(self, pick: int, texts: int, later: int, cancelled: bool) -> None:
        """A token and, some turns later, the final chunk; perhaps with a cancel before anybody saw it."""
        self.do(self._finish(self.open[pick % len(self.open)], texts, later, cancelled))

    async def _finish(self, call: Call, texts: int, later: int, cancelled: bool) -> None:
        call.say("w")
        await turns(later)
        call.finish(*"yz"[:texts])
        for task in self.tasks:
            if cancelled and self.prompts[task] == call.prompt:
                await self._cancel(task)

    @precondition(lambda self: self.open)
    @rule(pick=PICK, kind=st.sampled_from([*FAILURES, None]), sent=st.booleans(), tokens=st.integers(0, 2))
    def fail(self, pick: int, kind: type[Exception] | None, sent: bool, tokens: int) -> None:
        """It breaks off, before or after some tokens; without a kind it just ends."""
        call = self.open[pick % len(self.open)]
        refuses = kind is not None and issubclass(kind, EngineRefused | EngineInvalidRequest)
        if call.sent and refuses:
            return  # no adapter says so once the answer has begun
        if not refuses:
            call.say(*"vw"[:tokens])
        if kind is None:
            call.end()
        elif issubclass(kind, EngineFailure):
            call.fail(kind("it failed", sent=sent or not refuses))
        else:
            call.fail(kind())
        self.do()

    def engine(self, pick: int) -> MemoryEngine:
        """One of them."""
        return self.it.engines[pick % len(self.it.engines)]

    @rule(pick=PICK, clings=st.booleans())
    def cling(self, pick: int, clings: bool) -> None:
        """Whether it goes on with what its client has left."""
        self.engine(pick).clings = clings

    @rule()
    def let_go(self) -> None:
        """They have noticed that their clients are gone."""
        for engine in self.it.engines:
            engine.let_go()
        self.do()

    @rule(pick=PICK, version=st.sampled_from(["b1", "b1", "b2"]))
    def become_another(self, pick: int, version: str) -> None:
        """The next probe finds it so."""
        self.engine(pick).change(engine_version=version)

    @rule(pick=PICK, kind=st.sampled_from([EngineGone, EngineLoading, EngineStalled, None]))
    def go_or_come(self, pick: int, kind: type[EngineFailure] | None) -> None:
        """One dies, loads, hangs, or is well again."""
        engine = self.engine(pick)
        engine.failure = None if kind is None else kind("not now", sent=False)
        if kind in (EngineGone, EngineLoading):
            engine.working.clear()
            for call in engine.open:
                call.fail(EngineBroken("killed") if call.sent else EngineRefused("killed"))
        self.do()

    @rule(seconds=st.sampled_from([0.05, 0.3, 3.0, 12.0, 250.0]))
    def time(self, seconds: float) -> None:
        """It passes."""
        self.do(advance(seconds))

    # -- what must hold ----------------------------------------------------------------------------

    @invariant()
    def streams_are_whole(self) -> None:
        """1, 2, 3."""
        for task in self.tasks:
            seen = events(task)
            names = [event.name for event in seen]
            terminals = [name for name in names if name in ("end", "error")]
            assert names.count("started") == 1, f"2: {names}"
            assert names[0] == "started", f"2: {names}"
            assert len(terminals) == task.state.final, f"1: {task.state}, {names}"
            assert not terminals or names[-1] == terminals[0], f"1: {names}"
            tokens = [event.data["i"] for event in seen if event.name == "token"]
            assert tokens == list(range(len(tokens))), f"3: {tokens}"
            if task.state is State.CANCELLED:
                assert names == ["started", "end"], f"4: {names}"
            else:
                assert [event.id for event in seen] == list(range(len(seen)))

    @invariant()
    def readers_get_what_is_there(self) -> None:
        """4, and nobody misses or repeats anything."""
        for reader in self.readers:
            assert not reader.late, f"4: {reader.late}"
            ids = [parse(frame).id for frame in reader.got]
            if reader.task.state is not State.CANCELLED:
                assert ids == list(range(reader.first, reader.first + len(ids)))
            if not reader.work.cancelled():
                assert reader.work.done() == reader.task.state.final
            if reader.work.done() and not reader.work.cancelled():
                assert parse(reader.got[-1]).name in ("end", "error")

    @invariant()
    def order_and_bounds_are_kept(self) -> None:
        """5, 6, 7, 8; and no slot stays free while the head could go."""
        if not hasattr(self, "it"):
            return
        assert not self.wrong, self.wrong
        queue, replicas, engines = self.it.queue, list(self.it.pool.replicas), self.it.engines
        admitted = [task for task, state in self.it.moves if state is State.QUEUED]
        started = [task for task, state in self.it.moves if state is State.RUNNING]
        for lane in LANES:
            starts = [admitted.index(task) for task in started if task.request.priority == lane]
            assert starts == sorted(starts), f"6: {starts}"
            assert queue.depth(lane) <= queue.capacity(lane), "7"
        sent = [prompt for engine in engines for prompt in set(engine.prompts)]
        assert set(sent) <= {self.prompts[task] for task in started}, "5"
        assert len(sent) == len(set(sent)), "a task went to another replica"
        assert [queue.position(task) for task in queue] == list(range(len(queue)))
        assert queue.waiting_bytes + queue.reserved_bytes <= queue.limits.max_bytes, "7, in bytes"
        for replica, engine in zip(replicas, engines, strict=True):
            assert len(replica.leases) <= replica.slots, "8"
            assert len(replica.leases) < 2 or not any(lease.exclusive for lease in replica.leases), "8"
            assert len(engine.working) <= replica.slots, "8, in the engine"
            strict = [call for call in engine.working if call.prompt.startswith("strict")]
            assert not strict or len(engine.working) == 1, "8, in the engine"
        versions = {replica.made.engine_version for replica in replicas if replica.ready}
        assert len(versions) <= 1, "two versions at work"
        assert versions or not any(replica.able for replica in replicas), "all are kept out"
        head = queue.head
        for replica in replicas:
            waits = not replica.free_slots or (head is not None and head.strict and replica.leases)
            assert head is None or waits, "the head could go"

    @invariant()
    def the_engines_are_asked_as_promised(self) -> None:
        """Nothing is sent again once an answer had begun, and nobody waits for what has ended."""
        if not hasattr(self, "it"):
            return
        at_work = {self.prompts[task] for task in self.tasks if task.state is State.RUNNING}
        assert {call.prompt for call in self.open} <= at_work, "an engine works for a task that has ended"
        answered: set[str] = set()
        for call in [call for engine in self.it.engines for call in engine.calls]:
            assert call.prompt not in answered, "sent again after an answer had begun"
            if call.answered:
                answered.add(call.prompt)
            strict = call.prompt.startswith("strict")
            assert call.generation.cache_prompt is not strict
            assert call.generation.slot == 0 or not strict

    def teardown(self) -> None:
        """9: `rig` looks at it, and nobody else is left."""
        if hasattr(self, "it"):
            self.do(self.stack.aclose(), self._readers_end())
            assert all(task.state.final for task in self.tasks), "9"
            self.streams_are_whole()
            self.readers_get_what_is_there()
        left = asyncio.all_tasks(self.runner.get_loop())
        self.runner.close()
        assert not left, f"9: {left}"

    async def _readers_end(self) -> None:
        for reader in self.readers:
            await asyncio.wait({reader.work})


Core.TestCase.settings = settings(
    max_examples=150, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
TestCore = Core.TestCase

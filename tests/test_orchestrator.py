"""The door to all tasks: who is let in, who is found, who reads, and how long what has ended is kept."""

import asyncio
from collections.abc import Callable
from contextlib import ExitStack

import pytest

from llorch.errors import LlorchError, PoolUnavailable, QueueFull, TaskNotFound, TooManyStreams, UnknownPool
from llorch.orchestrator import Orchestrator
from llorch.pool import Pool
from llorch.replica import Replica
from llorch.task import State, Task, TaskRequest
from tests.memory_engine import MemoryEngine
from tests.rig import POOL, STREAM, Rig, names, rig
from tests.virtualtime import VirtualTimeLoop, advance, current, settled, virtual_time


async def ended(it: Rig, prompt: str = "hello", *texts: str) -> Task:
    """A task that has completed."""
    task, call = await it.running(prompt)
    call.finish(*texts)
    await settled()
    return task


def kept(it: Rig, *tasks: Task) -> list[bool]:
    """Which of them can still be read."""
    known = it.orchestrator.recent(None, 1000)
    for task in tasks:
        if task not in known:
            with pytest.raises(TaskNotFound):
                it.orchestrator.get(task.id)
        else:
            assert it.orchestrator.get(task.id) is task
    return [task in known for task in tasks]


# -- submit ----------------------------------------------------------------------------------------


@virtual_time
async def test_a_task_can_be_found_from_the_step_that_admits_it() -> None:
    """By its id, which is random and 128 bits; it carries what its request brought."""
    async with rig() as it:
        request = TaskRequest(prompt="x", session_id="s", metadata={"k": "v"})
        task = await it.orchestrator.submit(request, correlation_id="c-1", identity="localhost")
        assert it.orchestrator.get(task.id) is task
        assert (task.correlation_id, task.identity, task.pool_id) == ("c-1", "localhost", "default")
        assert (len(bytes.fromhex(task.id)), task.ticket, task.request) == (16, None, request)
        others = {(await it.submit(str(number))).id for number in range(8)}
        assert len(others | {task.id}) == 9


@virtual_time
async def test_an_unknown_pool_is_refused_with_the_names_of_those_there_are() -> None:
    """Nothing is looked at before."""
    async with rig() as it:
        with pytest.raises(UnknownPool, match="no pool 'gpu2'") as refusal:
            await it.submit(pool_id="gpu2")
        assert refusal.value.hint == "the pools are: default"
        assert (await it.submit(pool_id="default")).pool_id == "default"
        with pytest.raises(UnknownPool):
            it.orchestrator.health("gpu2")


@virtual_time
async def test_a_refused_task_leaves_nothing_and_is_told_once() -> None:
    """C11: no task, no place, no byte; the listeners hear of it with its ids."""
    async with rig(capacity=1) as it:
        heard: list[tuple[str, str | None, str | None]] = []
        it.orchestrator.refusal_listeners.append(
            lambda _, refusal, correlation_id, identity: heard.append(
                (refusal.code, correlation_id, identity)
            )
        )
        await it.submit("running")
        await it.submit("waiting")
        for _ in range(100):
            with pytest.raises(QueueFull):
                await it.orchestrator.submit(TaskRequest(prompt="x"), correlation_id="c", identity="i")
        assert heard == [("ADMISSION_REJECT", "c", "i")] * 100
        assert (len(it.orchestrator.recent(None, 1000)), it.queue.reserved, it.queue.reserved_bytes) == (
            2,
            0,
            0,
        )


@pytest.mark.parametrize("method", ["render", "tokenize"])
@virtual_time
async def test_a_client_that_leaves_while_the_engine_is_asked_leaves_nothing(method: str) -> None:
    """Its place is given back, and nobody is told of a refusal."""
    async with rig(ctx=20) as it:
        heard: list[LlorchError] = []
        it.orchestrator.refusal_listeners.append(lambda _, refusal, __, ___: heard.append(refusal))
        it.engine.hold(method)
        request = TaskRequest(prompt="one two three four", max_tokens=9)
        submit = asyncio.create_task(it.orchestrator.submit(request))
        if method == "tokenize":
            await settled()
            assert (it.queue.reserved, it.queue.reserved_bytes) == (1, 18)
        submit.cancel()
        await settled()
        assert submit.cancelled()
        assert (it.queue.reserved, it.queue.reserved_bytes, it.orchestrator.recent(None, 9), heard) == (
            0,
            0,
            [],
            [],
        )
        assert it.engine.calls == []


@virtual_time
async def test_tickets_are_given_where_there_is_a_token() -> None:
    """128 random bits a task, and none for a task that is not there."""
    async with rig() as it:
        guarded = Orchestrator([it.pool], STREAM, tickets=True)
        task = await guarded.submit(TaskRequest(prompt="x"))
        assert task.ticket is not None
        assert len(bytes.fromhex(task.ticket)) == 16
        assert guarded.ticket(task.id) == task.ticket != task.id
        assert guarded.ticket("0" * 32) is None
        guarded.cancel(task.id)
        guarded.stop()
        await guarded.close()


# -- get, list, cancel -----------------------------------------------------------------------------


@virtual_time
async def test_an_unknown_task_is_not_found() -> None:
    """C12: neither read nor cancelled; the message quotes no more than it must."""
    async with rig() as it:
        for act in (it.orchestrator.get, it.orchestrator.cancel):
            with pytest.raises(TaskNotFound) as refusal:
                act("x" * 1000)
            assert len(refusal.value.message) < 60


@virtual_time
async def test_the_list_is_newest_first() -> None:
    """All of them, or those in one state, and no more than asked for."""
    async with rig(slots=2) as it:
        completed = await ended(it)
        running = [await it.submit(str(number)) for number in range(2)]
        waiting = [await it.submit(str(number)) for number in range(3)]
        recent = it.orchestrator.recent
        assert recent(None, 100) == [*reversed(waiting), *reversed(running), completed]
        assert recent(None, 2) == [waiting[2], waiting[1]]
        assert recent(State.RUNNING, 100) == [running[1], running[0]]
        assert recent(State.QUEUED, 1) == [waiting[2]]
        assert recent(State.CANCELLED, 100) == []


@virtual_time
async def test_positions_are_those_of_now() -> None:
    """How many wait before each, for one task or many; none for those that wait no more."""
    async with rig() as it:
        running = await it.submit()
        first, second, third = [await it.submit(str(number)) for number in range(3)]
        positions = it.orchestrator.queue_positions
        assert positions([third]) == {third.id: 2}
        it.cancel(first)
        assert positions([third]) == {third.id: 1}
        assert positions([running]) == {}
        several = positions([running, first, second, third])
        assert (several[second.id], several[third.id]) == (0, 1)
        assert not {running.id, first.id} & set(several)


# -- readers ---------------------------------------------------------------------------------------


@virtual_time
async def test_there_are_so_many_readers_and_no_more() -> None:
    """C6: the next is refused with a backoff, and let in when another has left, however it left."""
    async with rig(max_readers=2) as it:
        task, other = await it.submit(), await it.submit()
        with it.orchestrator.reading(task), it.orchestrator.reading(other):
            with pytest.raises(TooManyStreams) as refusal, it.orchestrator.reading(task):
                pass
            assert refusal.value.retry_after_ms == 1000
        with pytest.raises(ConnectionResetError), it.orchestrator.reading(task):
            raise ConnectionResetError
        with it.orchestrator.reading(task), it.orchestrator.reading(task):
            pass


@virtual_time
async def test_stopping_can_wait_until_nobody_reads() -> None:
    """`readers_gone` returns when the last one has left, at once if there is none."""
    async with rig() as it:
        task = await it.submit()
        await it.orchestrator.readers_gone()
        with it.orchestrator.reading(task):
            gone = asyncio.create_task(it.orchestrator.readers_gone())
            with it.orchestrator.reading(task):
                pass
            await settled()
            assert not gone.done()
        await gone


@virtual_time
async def test_a_lost_reader_cancels_nothing() -> None:
    """C1: the default; the task goes on for as long as it takes."""
    async with rig() as it:
        task, call = await it.running()
        with it.orchestrator.reading(task):
            pass
        await advance(25)
        call.finish("x")
        await settled()
        assert task.state is State.COMPLETED


@pytest.mark.parametrize("queued", [False, True])
@virtual_time
async def test_with_on_disconnect_cancel_the_last_reader_takes_the_task_with_it(queued: bool) -> None:
    """C1: when it has been gone for the grace, waiting or running."""
    async with rig(cancel_on_disconnect=True, disconnect_grace_s=10) as it:
        if queued:
            await it.submit("first")
        task = await it.submit("read")
        with it.orchestrator.reading(task):
            with it.orchestrator.reading(task):
                pass
            await advance(20)
            assert not task.state.final
        await advance(9.9)
        assert not task.state.final
        await advance(0.2)
        assert (task.state, names(task)) == (State.CANCELLED, "started end")


@virtual_time
async def test_a_reader_that_comes_back_within_the_grace_saves_its_task() -> None:
    """C1: the grace begins anew when it leaves again."""
    async with rig(cancel_on_disconnect=True, disconnect_grace_s=10, first_token_s=100) as it:
        task = await it.submit()
        for _ in range(2):
            with it.orchestrator.reading(task):
                pass
            await advance(9)
        with it.orchestrator.reading(task):
            await advance(15)
        assert task.state is State.RUNNING
        await advance(10)
        assert task.state is State.CANCELLED


@virtual_time
async def test_a_task_that_was_never_read_is_not_cancelled() -> None:
    """C1: fire and forget stays possible; nor is one that ends within the grace ended twice."""
    async with rig(cancel_on_disconnect=True, disconnect_grace_s=10) as it:
        ends, call = await it.running("ends")
        never_read = await it.submit("never read")
        with it.orchestrator.reading(ends):
            pass
        call.finish()
        await advance(20)
        assert (ends.state, never_read.state) == (State.COMPLETED, State.RUNNING)


# -- retention -------------------------------------------------------------------------------------


@virtual_time
async def test_an_ended_task_is_kept_for_retain_s() -> None:
    """Each from its own end; one that has not ended is kept for ever."""
    async with rig(retain_s=100, first_token_s=1000, slots=2) as it:
        running = await it.submit("runs")
        first = await ended(it)
        await advance(60)
        second = await ended(it)
        await advance(39)
        assert kept(it, running, first, second) == [True, True, True]
        await advance(2)
        assert kept(it, running, first, second) == [True, False, True]
        await advance(60)
        assert kept(it, running, first, second) == [True, False, False]


@virtual_time
async def test_of_too_many_bytes_the_oldest_ended_go_first() -> None:
    """In the order of their ends, not of their beginnings, and only as many as needed."""
    async with rig(retain_bytes=3000, slots=2) as it:
        early, early_call = await it.running("early")
        late = await ended(it, "late", "x" * 1000)
        await advance(11)
        early_call.finish("x" * 1000)
        await settled()
        await advance(11)
        assert kept(it, early, late) == [True, True]
        newest = await ended(it, "newest", "x" * 1000)
        assert kept(it, early, late, newest) == [True, False, True]


@virtual_time
async def test_nothing_goes_within_ten_seconds_of_its_end() -> None:
    """However little room there is; then down to the bound."""
    async with rig(retain_bytes=1) as it:
        tasks = [await ended(it, str(number), "x" * 1000) for number in range(20)]
        assert all(kept(it, *tasks))
        await advance(9.9)
        assert all(kept(it, *tasks))
        await advance(1.2)
        assert not any(kept(it, *tasks))


@virtual_time
async def test_a_task_with_a_reader_stays() -> None:
    """Beyond its time and beyond the bytes; those behind it in the row go all the same."""
    async with rig(retain_s=100, retain_bytes=1) as it:
        read = await ended(it, "read", "x" * 1000)
        other = await ended(it, "other", "x" * 1000)
        with it.orchestrator.reading(read):
            await advance(12)
            assert kept(it, read, other) == [True, False]
            await advance(500)
            assert kept(it, read) == [True]
        await advance(101)
        assert kept(it, read) == [False]


@virtual_time
async def test_a_cancelled_task_costs_what_is_left_of_it() -> None:
    """Recalled frames are not counted: its log is two frames."""
    async with rig(retain_bytes=2500) as it:
        cancelled, call = await it.running()
        call.say("x" * 2000)
        await settled()
        it.cancel(cancelled)
        await advance(11)
        other = await ended(it, "other", "x" * 2000)
        assert kept(it, cancelled, other) == [True, True]


@virtual_time
async def test_what_is_forgotten_is_forgotten_everywhere() -> None:
    """C11: after many tasks the books are empty."""
    async with rig(retain_s=20) as it:
        for number in range(200):
            task = await ended(it, str(number))
            with it.orchestrator.reading(task):
                pass
        await advance(41)
        books = it.orchestrator
        assert (books._tasks, books._finished, books._finished_bytes) == ({}, {}, 0)
        assert (books._readers, books._abandoned) == ({}, {})


# -- life ------------------------------------------------------------------------------------------


def bare(engine: MemoryEngine) -> Orchestrator:
    """An orchestrator that nobody runs."""
    replica = Replica("default-0", engine, slots=None, drain_s=60)
    pool = Pool("default", engine.name, POOL, [replica], on_readiness=lambda *_: None)
    return Orchestrator([pool], STREAM, tickets=False)


@virtual_time
async def test_the_first_probe_makes_the_pool_ready() -> None:
    """Before anybody runs."""
    orchestrator = bare(MemoryEngine())
    await orchestrator.first_probe(2)
    assert orchestrator.health("default").ready
    await orchestrator.close()


@virtual_time
async def test_the_first_probe_takes_no_longer_than_it_may() -> None:
    """A silent engine does not hold up the start; the pool is unready then."""
    engine = MemoryEngine()
    engine.hold("health")
    orchestrator = bare(engine)
    before = current().time()
    await orchestrator.first_probe(2)
    assert current().time() == before + 2
    assert not orchestrator.health("default").ready
    await orchestrator.close()


async def breaks(*_: object) -> None:
    """A bug."""
    raise ZeroDivisionError


def probing_breaks(orchestrator: Orchestrator) -> None:
    """In the probe."""
    orchestrator.pools["default"].replicas[0].engine.health = breaks  # type: ignore[method-assign]


def draining_breaks(orchestrator: Orchestrator) -> None:
    """While a slot drains."""
    replica = orchestrator.pools["default"].replicas[0]
    lease = replica.try_lease(exclusive=False)
    assert lease is not None
    lease.close(clean=False)
    replica.engine.busy_slots = breaks  # type: ignore[method-assign, assignment]


def expiring_breaks(orchestrator: Orchestrator) -> None:
    """At the deadline of a waiting task."""
    pool = orchestrator.pools["default"]
    pool._expire = lambda: 1 / 0  # type: ignore[method-assign, assignment, return-value]
    pool._due_sooner.set()


@pytest.mark.parametrize("plant", [probing_breaks, draining_breaks, expiring_breaks])
@virtual_time
async def test_a_bug_in_a_long_lived_coroutine_ends_the_run(plant: Callable[[Orchestrator], None]) -> None:
    """P6: `run` raises, whichever of them it was: better no server than one that admits work nobody does."""
    orchestrator = bare(MemoryEngine())
    await orchestrator.first_probe(2)
    work = asyncio.create_task(orchestrator.run())
    await settled()
    plant(orchestrator)
    await advance(6)
    assert work.done()
    with pytest.raises(ZeroDivisionError):
        await work
    orchestrator.stop()
    await orchestrator.close()


@virtual_time
async def test_closing_twice_is_closing_once() -> None:
    """A second signal may come at any time."""
    async with rig() as it:
        task = await it.submit()
        it.orchestrator.stop()
        await asyncio.gather(it.orchestrator.close(), it.orchestrator.close())
        assert names(task) == "started error"


def test_readers_of_a_finished_loop_leave_no_timer() -> None:
    """Closing cancels every timer: a loop that has nothing else to do is idle."""
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner, ExitStack() as readers:

        async def use() -> None:
            async with rig(cancel_on_disconnect=True) as it:
                await ended(it)
                task = await it.submit()
                readers.enter_context(it.orchestrator.reading(task))
                readers.close()

        runner.run(use())
        assert not [timer for timer in runner.get_loop()._scheduled if not timer.cancelled()]  # type: ignore[attr-defined]


@virtual_time
async def test_new_tasks_are_refused_once_it_stops() -> None:
    """P1: and what is there can still be read."""
    async with rig() as it:
        task = await it.submit()
        it.orchestrator.stop()
        with pytest.raises(PoolUnavailable):
            await it.submit()
        assert it.orchestrator.get(task.id) is task
        with it.orchestrator.reading(task):
            pass

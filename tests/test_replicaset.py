"""Several replicas of one pool: who gets what, who is kept out and let in, who comes and who leaves."""

import asyncio
from collections.abc import Sequence
from itertools import cycle

import pytest

from llorch.agreement import Made, disagreement
from llorch.engine import Engine, EngineBroken, EngineGone, EngineRefused, EngineStalled
from llorch.errors import DeterminismUnavailable, PoolUnavailable, PoolUnready, QueueFull
from llorch.replica import PROBE_INTERVAL_S, Replica, SelfTest
from llorch.selftest import Determinism, Verdict
from llorch.task import Priority, State, Task, TaskRequest
from tests.memory_engine import Call, MemoryEngine
from tests.rig import Rig, events, names, rig, text
from tests.virtualtime import advance, settled, virtual_time

LANES: list[Priority] = ["interactive", "batch"]


def engines(*slots: int, **says: object) -> list[MemoryEngine]:
    """One for each number of slots."""
    built = [MemoryEngine(slots=number) for number in slots]
    for engine in built:
        engine.change(**says)
    return built


def states(*tasks: Task) -> list[State]:
    """Where each of them is."""
    return [task.state for task in tasks]


def where(*tasks: Task) -> list[str | None]:
    """On which replica, by number."""
    return [task.replica_id and task.replica_id.rpartition("-")[2] for task in tasks]


def started(it: Rig) -> list[Task]:
    """Whom the pool has started, in that order."""
    return [task for task, state in it.moves if state is State.RUNNING]


def call_of(it: Rig, task: Task) -> Call:
    """What the engine has of a running task."""
    [call] = [call for engine in it.engines for call in engine.open if call.prompt == task.prompt]
    return call


async def finish(it: Rig, *tasks: Task) -> None:
    """Their engines are done with them."""
    for task in tasks:
        call_of(it, task).finish("x")
    await settled()


async def die(engine: MemoryEngine) -> None:
    """It is gone, and what it ran breaks off."""
    engine.failure = EngineGone("can't connect to the engine", sent=False)
    engine.working.clear()
    for call in engine.open:
        call.fail(EngineBroken("broke off") if call.sent else EngineRefused("hung up", sent=True))
    await settled()


async def come_back(engine: MemoryEngine, **says: object) -> None:
    """It listens again, perhaps as another one; and llorch has looked."""
    engine.failure = None
    engine.change(**says)
    await advance(3 * PROBE_INTERVAL_S)


def faults(it: Rig) -> list[str | None]:
    """What health says is wrong with each replica."""
    return [replica.last_error for replica in it.pool.health().replicas]


def verdicts(*given: Determinism) -> SelfTest:
    """A self-test with a verdict for each engine, in their order, whenever it is asked."""
    known: dict[int, Determinism] = {}

    async def self_test(engine: Engine, slots: int) -> Verdict:
        return Verdict(known.setdefault(id(engine), given[len(known) % len(given)]))

    return self_test


# -- who takes a task ------------------------------------------------------------------------------


@virtual_time
async def test_the_least_loaded_goes_first() -> None:
    """By active slots, draining ones too; by name where they are alike."""
    async with rig(engines=engines(2, 2, 3)) as it:
        tasks = [await it.submit(str(number)) for number in range(7)]
        assert where(*tasks) == ["0", "1", "2", "0", "1", "2", "2"]
        it.engines[1].clings = True
        it.cancel(tasks[1])
        await finish(it, tasks[2])
        late = [await it.submit("late"), await it.submit("later")]
        assert where(*late) == ["2", None], "a slot that drains is not free"


@virtual_time
async def test_the_one_with_most_free_memory_goes_first() -> None:
    """Each is asked about its own GPUs alone; load decides where they have as much."""
    asked: list[tuple[int, ...]] = []
    free = {(0,): 10, (1, 2): 30, (3,): 30}

    def free_vram(devices: tuple[int, ...]) -> int | None:
        asked.append(devices)
        return free[devices]

    async with rig(engines=engines(2, 2, 2), free_vram=free_vram) as it:
        for replica, devices in zip(it.pool.replicas, free, strict=True):
            replica.devices = devices
        decisions = []
        it.pool.placement_listeners.append(lambda _, task, decision: decisions.append(decision))
        tasks = [await it.submit(str(number)) for number in range(6)]
        assert where(*tasks) == ["1", "2", "1", "2", "0", "0"]
        assert set(asked) == set(free)
        assert [decision.replica_id for decision in decisions] == [task.replica_id for task in tasks]
        assert [decision.considered for decision in decisions] == [3, 3, 3, 2, 1, 1]
        assert not any(decision.fallback or decision.pinned for decision in decisions)


@virtual_time
async def test_tasks_start_in_the_order_of_their_admission_on_whichever_replica() -> None:
    """FIFO over all of them."""
    async with rig(engines=engines(1, 2), capacity=20) as it:
        tasks = [await it.submit(str(number)) for number in range(12)]
        for engine in cycle(it.engines):
            if engine.open:
                engine.open[-1].finish()
                await settled()
            if all(task.state.final for task in tasks):
                break
        assert started(it) == tasks
        assert all(len(engine.calls) >= 3 for engine in it.engines)


@virtual_time
async def test_a_strict_task_has_one_replica_alone_and_the_others_work_on() -> None:
    """It waits for any that is idle; what comes behind it goes to the others meanwhile [MVP-042]."""
    async with rig(engines=engines(2, 2)) as it:
        first, second = await it.submit("a"), await it.submit("b")
        strict, behind = await it.submit("s", seed=1), await it.submit("c")
        assert states(strict, behind) == [State.QUEUED] * 2
        assert it.pool.replicas.free_slots == 2
        await finish(it, second)
        assert where(first, strict, behind) == ["0", "1", "0"]
        more = await it.submit("d")
        assert more.state is State.QUEUED, "nothing runs beside a strict task"
        other = await it.submit("t", seed=1)
        await finish(it, strict)
        assert where(more, other) == ["1", None]
        assert call_of(it, more).generation.cache_prompt


@pytest.mark.parametrize("first", [0, 1])
@virtual_time
async def test_each_lane_gets_its_places_and_they_share_the_slots(first: int) -> None:
    """S = 3 free slots on two replicas, N = 2 and M = 3 places: 8 are admitted, whichever comes first."""
    async with rig(engines=engines(1, 2), capacity=2, batch_capacity=3) as it:
        admitted = dict.fromkeys(LANES, 0)
        for lane in (LANES[first], LANES[1 - first]):
            for _ in range(9):
                try:
                    await it.submit(priority=lane)
                except QueueFull:
                    break
                admitted[lane] += 1
        assert admitted == {"interactive": 5 - 3 * first, "batch": 3 + 3 * first}
        assert [it.queue.depth(lane) for lane in LANES] == [2, 3]


# -- one that differs ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"engine_version": "b2"}, "it runs engine b2, the pool b1"),
        ({"model": "huge"}, "it has the model huge, the pool tiny"),
    ],
)
@virtual_time
async def test_a_replica_that_differs_is_kept_out_and_health_says_why(
    changed: dict[str, object], reason: str
) -> None:
    """It gets nothing, its slots do not count, and it is let in once it is like the others."""
    built = engines(1, 2)
    built[1].change(**changed, ctx=8)
    async with rig(engines=built) as it:
        assert faults(it) == [None, reason]
        health = it.pool.health()
        assert [replica.ready for replica in health.replicas] == [True, False]
        assert (health.ready, health.slots.total, health.ctx) == (True, 1, 4096)
        assert (health.engine_version, health.model) == ("b1", "tiny")
        assert health.last_error == f"default-1: {reason}"
        tasks = [await it.submit(str(number)) for number in range(3)]
        assert where(*tasks) == ["0", None, None]
        built[1].change(engine_version="b1", model="tiny")
        await advance(2 * PROBE_INTERVAL_S)
        assert where(*tasks) == ["0", "1", "1"]
        assert (faults(it), it.pool.health().ctx) == ([None, None], 8)


@virtual_time
async def test_one_that_differs_is_let_in_when_no_other_can_work() -> None:
    """Then it is the measure, and who comes back as before is kept out."""
    built = engines(1, 1)
    built[1].change(engine_version="b2")
    async with rig(engines=built) as it:
        await die(built[0])
        await advance(PROBE_INTERVAL_S)
        assert it.pool.engine_version == "b2"
        task = await it.submit()
        assert where(task) == ["1"]
        await come_back(built[0])
        assert faults(it)[0] == "it runs engine b1, the pool b2"
        await come_back(built[0], engine_version="b2")
        assert faults(it) == [None, None]


@virtual_time
async def test_of_those_that_can_work_one_that_agrees_is_the_next_measure() -> None:
    """Not just the first: the ones that worked together go on."""
    built = engines(1, 1, 1)
    built[1].change(engine_version="b2")
    async with rig(engines=built) as it:
        await die(built[0])
        await advance(PROBE_INTERVAL_S)
        assert faults(it)[1:] == ["it runs engine b2, the pool b1", None]
        assert it.pool.engine_version == "b1"
        assert where(await it.submit()) == ["2"]


@virtual_time
async def test_one_that_becomes_another_is_the_one_that_is_kept_out() -> None:
    """Also the first, and also if nobody saw it away: the others are what the pool was."""
    built = engines(1, 1, 1)
    async with rig(engines=built) as it:
        await come_back(built[0], engine_version="b2")
        assert faults(it) == ["it runs engine b2, the pool b1", None, None]
        assert (it.pool.engine_version, it.pool.health().slots.total) == ("b1", 2)
        await come_back(built[1], engine_version="b2")
        assert faults(it) == ["it runs engine b2, the pool b1"] * 2 + [None]
        await come_back(built[2], engine_version="b2")
        assert faults(it) == [None] * 3, "all of them were upgraded, one after the other"
        assert it.pool.engine_version == "b2"


@virtual_time
async def test_a_digest_that_comes_late_keeps_one_out() -> None:
    """Until both are known nothing disagrees; the first that worked is the measure, read first or last."""
    built = engines(1, 1, model_path="/m.gguf")
    gates = [engine.hold("model_digest") for engine in built]
    digests = ["sha256:" + letter * 64 for letter in "ab"]
    for engine, digest in zip(built, digests, strict=True):
        engine.digests["/m.gguf"] = digest
    async with rig(engines=built) as it:
        gates[1].set()
        await settled()
        assert faults(it) == [None, None], "one digest alone says nothing"
        gates[0].set()
        await settled()
        assert faults(it) == [None, f"it has another model (sha256:{'b' * 12}…), the pool sha256:{'a' * 12}…"]
        assert it.pool.replicas.model_digest == digests[0]
        tasks = [await it.submit("a"), await it.submit("b")]
        assert where(*tasks) == ["0", None]


@virtual_time
async def test_two_that_differ_are_told_apart_though_the_first_tells_nothing() -> None:
    """It agrees with either, but they don't with each other: the one that was known first stays."""
    built = engines(1, 1, 1)
    for engine, digest in zip(built[1:], ["sha256:a", "sha256:b"], strict=True):
        engine.change(model_path="/m.gguf")
        engine.digests["/m.gguf"] = digest
    gate = built[2].hold("model_digest")
    async with rig(engines=built) as it:
        assert faults(it) == [None] * 3
        gate.set()
        await settled()
        assert faults(it) == [None, None, "it has another model (sha256:b…), the pool sha256:a…"]


@virtual_time
async def test_of_those_that_are_let_in_together_no_two_differ() -> None:
    """In the very step in which none of the old kind can work any more."""
    built = engines(1, 1, 1, 1)
    for engine in built[1:]:
        engine.change(engine_version="b2")
    for engine, digest in zip(built[2:], ["sha256:a", "sha256:b"], strict=True):
        engine.change(model_path="/m.gguf")
        engine.digests["/m.gguf"] = digest
    async with rig(engines=built) as it:
        assert [replica.ready for replica in it.pool.replicas] == [True, False, False, False]
        replicas, ready = it.pool.replicas, list[list[bool]]()

        def changed(replica: Replica) -> None:
            replicas._changed(replica)
            ready.append([each.ready for each in replicas])

        replicas[0].on_change = changed
        await die(built[0])
        await advance(PROBE_INTERVAL_S)
        assert ready == [[False, True, True, False]]


@virtual_time
async def test_the_same_file_under_another_name_is_the_same_model() -> None:
    """It is kept out as long as only the names are known."""
    built = engines(1, 1, model_path="/m.gguf")
    built[1].change(model="alias")
    gates = [engine.hold("model_digest") for engine in built]
    for engine in built:
        engine.digests["/m.gguf"] = "sha256:a"
    async with rig(engines=built) as it:
        assert faults(it) == [None, "it has the model alias, the pool tiny"]
        for gate in gates:
            gate.set()
        await settled()
        assert faults(it) == [None, None]


@virtual_time
async def test_one_that_is_kept_out_is_not_read_again_and_again() -> None:
    """Its model may have gigabytes."""
    built = engines(1, 1, model_path="/m.gguf")
    built[1].change(engine_version="b2")
    for engine in built:
        engine.digests["/m.gguf"] = "sha256:x"
    async with rig(engines=built) as it:
        await advance(20 * PROBE_INTERVAL_S)
        assert faults(it)[1] is not None
        assert built[1].asked["model_digest"] == 1


@virtual_time
async def test_what_a_kept_out_replica_runs_goes_on() -> None:
    """It takes nothing new."""
    built = engines(1, 1)
    async with rig(engines=built) as it:
        tasks = [await it.submit("a"), await it.submit("b")]
        built[1].change(engine_version="b2")
        await advance(2 * PROBE_INTERVAL_S)
        assert faults(it)[1] is not None
        await finish(it, tasks[1])
        assert text(tasks[1]) == "x"
        waiting = await it.submit("c")
        assert waiting.state is State.QUEUED


@virtual_time
async def test_readiness_is_told_of_each_replica_once() -> None:
    """When it is kept out, and when it is let in."""
    built = engines(1, 1)
    built[1].change(engine_version="b2")
    async with rig(engines=built) as it:
        assert it.readiness == [(True, None), (False, None)]
        told = len(it.readiness)
        await advance(5 * PROBE_INTERVAL_S)
        assert len(it.readiness) == told
        await come_back(built[1], engine_version="b1")
        assert it.readiness[told:] == [(True, None)]


def test_what_is_not_known_does_not_disagree() -> None:
    """And a digest outweighs a name."""
    known = Made("b1", "tiny", "sha256:a")
    assert disagreement(Made(None, None, None), known) is None
    assert disagreement(known, Made(None, None, None)) is None
    assert disagreement(Made("b1", "alias", "sha256:a"), known) is None
    assert disagreement(Made("b1", "alias", None), known) == "it has the model alias, the pool tiny"
    assert disagreement(Made("b2", "tiny", "sha256:a"), known) == "it runs engine b2, the pool b1"
    assert disagreement(Made("b1", "tiny", "sha256:b"), known) is not None
    assert Made(None, "new", None).or_else(known) == Made("b1", "new", "sha256:a")


# -- determinism -----------------------------------------------------------------------------------


@virtual_time
async def test_strict_tasks_go_to_the_verified_replica_only() -> None:
    """Also when the other one is idle, and the verified one has another strict task [MVP-042]."""
    async with rig(engines=engines(2, 2), self_test=verdicts("failed", "verified")) as it:
        assert [replica.determinism for replica in it.pool.replicas] == ["failed", "verified"]
        assert it.pool.health().determinism == "verified"
        strict = [await it.submit("s", seed=1), await it.submit("t", seed=1)]
        assert where(*strict) == ["1", None]
        behind = await it.submit("b")
        await finish(it, strict[0])
        assert where(strict[1], behind) == ["1", "0"]


@pytest.mark.parametrize("busy_with", [None, 1])
@virtual_time
async def test_one_of_which_nothing_is_known_is_no_way_out(busy_with: int | None) -> None:
    """A verified one that is at work is waited for, whatever its work is."""
    async with rig(engines=engines(2, 2), self_test=verdicts("unknown", "verified")) as it:
        running = [await it.submit("a"), await it.submit("b")] if busy_with is None else []
        if busy_with is not None:
            running = [await it.submit("a", seed=busy_with)]
        assert where(*running)[-1] == "1"
        strict = await it.submit("s", seed=1)
        await finish(it, *[task for task in running if task.replica_id == "default-0"])
        assert strict.state is State.QUEUED
        await finish(it, running[-1])
        assert where(strict) == ["1"]


@virtual_time
async def test_where_none_can_be_relied_on_strict_tasks_are_refused() -> None:
    """409 for new ones, and those that wait fail, as soon as the last one has failed its test."""
    gate = asyncio.Event()

    async def self_test(engine: Engine, slots: int) -> Verdict:
        await gate.wait()
        return Verdict("failed", "no")

    async with rig(engines=engines(1, 1), self_test=self_test) as it:
        waiting = await it.submit("s", seed=1)
        assert waiting.state is State.QUEUED
        gate.set()
        await settled()
        assert names(waiting) == "started error"
        assert events(waiting)[-1].data["code"] == "DETERMINISM_UNAVAILABLE"
        with pytest.raises(DeterminismUnavailable):
            await it.submit("t", seed=1)
        assert (await it.submit("u")).state is State.RUNNING


# -- one dies --------------------------------------------------------------------------------------


@virtual_time
async def test_a_replica_that_dies_takes_only_its_own_tasks_with_it() -> None:
    """Those get WORKER_RESET; who waits goes to the other, in order; once it is back it takes its part."""
    async with rig(engines=engines(2, 2)) as it:
        tasks = [await it.submit(str(number)) for number in range(8)]
        for engine in it.engines:
            for call in engine.calls:
                call.say("w")
        await settled()
        await die(it.engines[1])
        assert states(*tasks[:4]) == [State.RUNNING, State.FAILED] * 2
        assert {events(task)[-1].data["code"] for task in (tasks[1], tasks[3])} == {"WORKER_RESET"}
        assert states(*tasks[4:]) == [State.QUEUED] * 4
        await finish(it, tasks[0], tasks[2])
        assert where(*tasks[4:]) == ["0", "0", None, None]
        assert it.pool.health().ready
        await come_back(it.engines[1])
        assert where(*tasks[4:]) == ["0", "0", "1", "1"]
        assert started(it) == tasks


@virtual_time
async def test_a_task_that_the_dead_replica_had_not_begun_stays_on_it() -> None:
    """Once dispatched it keeps its lease, and is tried again on the same replica when that is back."""
    async with rig(engines=engines(1, 1)) as it:
        first, second = await it.submit("a"), await it.submit("b")
        await die(it.engines[1])
        assert states(first, second) == [State.RUNNING] * 2
        await come_back(it.engines[1])
        assert it.engines[1].prompts == ["b", "b"]


@virtual_time
async def test_without_a_replica_the_pool_says_why() -> None:
    """503: all are down, or none has been looked at yet; in between one is enough."""
    built = engines(1, 1)
    for engine in built:
        engine.failure = EngineStalled("no answer")
    async with rig(engines=built) as it:
        with pytest.raises(PoolUnavailable, match="default-0: no answer"):
            await it.submit()
        await come_back(built[1])
        assert where(await it.submit()) == ["1"]
    built = engines(1, 1)
    gates = [engine.hold("health") for engine in built]
    async with rig(engines=built) as it:
        with pytest.raises(PoolUnready):
            await it.submit()
        for gate in gates:
            gate.set()


# -- what is asked and foretold --------------------------------------------------------------------


@virtual_time
async def test_a_ready_replica_measures_the_prompt() -> None:
    """The least busy of those; the context is the least of all."""
    built = [MemoryEngine(slots=2, ctx=ctx) for ctx in (50, 40, 30)]
    async with rig(engines=built) as it:
        assert it.pool.ctx == 30
        await it.submit("a")
        built[1].failure = EngineGone("gone", sent=False)
        await advance(PROBE_INTERVAL_S)
        await it.submit("one two three four five", max_tokens=20)
        assert [engine.asked["tokenize"] for engine in built] == [0, 0, 1]


@virtual_time
async def test_a_replica_that_is_let_go_while_it_is_asked_refuses_nobody() -> None:
    """One of those that are there now is asked instead."""
    async with rig(ctx=30) as it:
        gate = it.engine.hold("tokenize")
        submit = asyncio.create_task(it.submit("four words of prompt", max_tokens=9))
        await settled()
        fresh = it.build("new", MemoryEngine())
        await fresh.probe()
        it.pool.switch([fresh], it.pool.settings)
        it.engine.failure = EngineRefused("the adapter is closed", sent=False)
        gate.set()
        assert where(await submit) == ["new"]


@virtual_time
async def test_predictions_count_all_slots_of_all_replicas() -> None:
    """Of ready ones; a strict task waits for the replica that is idle first."""
    async with rig(engines=engines(1, 2), capacity=20) as it:
        await advance(1)
        (warm,) = [await it.submit("w")]
        await advance(10)
        await finish(it, warm)
        tasks = [await it.submit(str(number)) for number in range(3)]
        await advance(4)
        waiting = [await it.submit(str(number)) for number in range(3, 8)]
        assert [task.predicted_start_ms for task in waiting] == [6000, 6000, 6000, 16_000, 16_000]
        strict = await it.submit("s", seed=1)
        assert strict.predicted_start_ms == 16_000
        assert states(*tasks) == [State.RUNNING] * 3


# -- waiting in two lanes --------------------------------------------------------------------------


@virtual_time
async def test_in_either_lane_a_task_waits_no_longer_than_max_wait_s() -> None:
    """A batch task too, though interactive ones come and go before it."""
    async with rig(max_wait_s=60.0, first_token_s=500.0, batch_promote_s=None) as it:
        await it.running("a")
        batch = await it.submit("b", priority="batch")
        await advance(30)
        interactive = await it.submit("c")
        await advance(29)
        assert states(batch, interactive) == [State.QUEUED] * 2
        await advance(1)
        assert states(batch, interactive) == [State.FAILED, State.QUEUED]
        assert events(batch)[-1].data["code"] == "QUEUE_TIMEOUT"
        await advance(30)
        assert interactive.state is State.FAILED


@virtual_time
async def test_when_both_heads_are_overdue_the_second_may_go_after_all() -> None:
    """The strict head leaves, and with it what kept the other from its slot: it starts and stays."""
    async with rig(slots=2, max_wait_s=60.0, first_token_s=500.0, batch_promote_s=None) as it:
        await it.running("a")
        strict = await it.submit("s", seed=1)
        batch = await it.submit("b", priority="batch")
        await advance(60)
        assert states(strict, batch) == [State.FAILED, State.RUNNING]


@virtual_time
async def test_a_promotion_that_comes_due_starts_the_task() -> None:
    """Nothing else happens: a slot is free all the time, and the strict interactive head goes on waiting."""
    async with rig(slots=2, batch_promote_s=7.3) as it:
        await it.running("a")
        await advance(0.1)
        strict = await it.submit("s", seed=1)
        batch = [await it.submit(name, priority="batch") for name in "bc"]
        await advance(7.2)
        assert states(strict, *batch) == [State.QUEUED] * 3
        assert [it.queue.position(task) for task in (strict, *batch)] == [0, 1, 2]
        await advance(0.1)
        assert states(strict, *batch) == [State.QUEUED, State.RUNNING, State.QUEUED]
        await finish(it, batch[0])
        assert states(strict, batch[1]) == [State.QUEUED] * 2, "it has the next turn"


@virtual_time
async def test_a_flood_of_batch_work_never_turns_interactive_work_away() -> None:
    """And goes behind it; its refusals speak of its own lane."""
    async with rig(capacity=2, batch_capacity=5) as it:
        await it.running("a")
        flood = [await it.submit(str(number), priority="batch") for number in range(5)]
        with pytest.raises(QueueFull, match="5 of 5 batch tasks wait"):
            await it.submit("b", priority="batch")
        interactive = [await it.submit("c"), await it.submit("d")]
        assert [task.queue_position for task in (*flood, *interactive)] == [0, 1, 2, 3, 4, 0, 1]
        with pytest.raises(QueueFull, match="2 of 2 tasks wait"):
            await it.submit("e")
        counts = it.pool.health().queue
        assert (counts.depth, counts.interactive.depth, counts.batch.depth) == (7, 2, 5)
        assert (counts.capacity, counts.interactive.capacity, counts.batch.capacity) == (2, 2, 5)


# -- others instead --------------------------------------------------------------------------------


async def switch(it: Rig, fresh: Sequence[MemoryEngine], *kept: int) -> None:
    """Go over to replicas for new engines, behind some of the old ones."""
    built = [it.build(f"new-{len(it.engines)}", engine) for engine in fresh]
    for replica in built:
        await replica.probe()
    it.pool.switch([*(it.pool.replicas[number] for number in kept), *built], it.pool.settings)
    await settled()


@virtual_time
async def test_after_a_switch_the_queue_is_as_it_was() -> None:
    """Who waits goes to the new ones, in order; who runs ends where it is; then that engine is closed."""
    async with rig(slots=2) as it:
        old = it.engine
        running = [await it.submit("a"), await it.submit("b")]
        waiting = [await it.submit(str(number)) for number in range(3)]
        await switch(it, engines(1, 1))
        assert where(*waiting) == ["1", "2", None]
        assert len(it.pool.health().replicas) == 2
        await finish(it, running[0])
        assert (states(*running), old.closed) == ([State.COMPLETED, State.RUNNING], False)
        call_of(it, running[1]).say("y")
        await finish(it, running[1])
        assert (text(running[1]), old.closed) == ("yx", True)
        assert len(old.calls) == 2, "it got nothing new"
        assert started(it) == [*running, *waiting[:2]]


@virtual_time
async def test_an_idle_replica_is_let_go_at_once_and_one_that_drains_when_it_has() -> None:
    """Its engine is asked nothing more then."""
    async with rig(engines=engines(1, 1)) as it:
        idle, drains = it.engines
        task = await it.submit("a")
        drains.clings = idle.clings = True
        it.cancel(task)
        await switch(it, engines(1))
        assert (idle.closed, drains.closed) == (False, True)
        idle.let_go()
        await advance(1)
        assert idle.closed
        asked = [sum(engine.asked.values()) for engine in (idle, drains)]
        await advance(10 * PROBE_INTERVAL_S)
        assert [sum(engine.asked.values()) for engine in (idle, drains)] == asked


@virtual_time
async def test_new_replicas_that_differ_are_kept_out_from_the_start() -> None:
    """No task goes to one in the step of the switch."""
    async with rig() as it:
        await it.submit("a")
        waiting = [await it.submit("b"), await it.submit("c")]
        other = MemoryEngine()
        other.change(engine_version="b2")
        await switch(it, [other], 0)
        assert states(*waiting) == [State.QUEUED] * 2
        assert faults(it) == [None, "it runs engine b2, the pool b1"]
        assert not other.calls


@virtual_time
async def test_one_that_was_kept_out_is_let_in_when_the_others_are_let_go() -> None:
    """In the step of the switch."""
    built = engines(1, 1)
    built[1].change(engine_version="b2")
    async with rig(engines=built) as it:
        await it.submit("a")
        waiting = await it.submit("b")
        await switch(it, [], 1)
        assert where(waiting) == ["1"]
        assert (it.pool.engine_version, it.pool.health().last_error) == ("b2", None)


@virtual_time
async def test_closing_closes_those_on_their_way_out_too() -> None:
    """`rig` looks at every engine."""
    async with rig() as it:
        task = await it.submit("a")
        await switch(it, engines(1))
        assert not it.engines[0].closed
    assert events(task)[-1].data["code"] == "WORKER_RESET"


# -- drain -----------------------------------------------------------------------------------------


@virtual_time
async def test_a_drained_pool_takes_nothing_new_and_ends_the_rest_in_time() -> None:
    """503 at once; what waits and runs goes on to the deadline; nothing is started only to fail."""
    async with rig(slots=2) as it:
        await it.running("a")
        strict, behind = await it.submit("s", seed=1), await it.submit("b", priority="batch")
        late = await it.submit("c")
        it.pool.drain(10.0)
        with pytest.raises(PoolUnavailable, match="is drained"):
            await it.submit("d")
        health = it.pool.health()
        assert health.drain is not None
        assert (health.ready, health.drain.deadline_ms) == (False, 10_000)
        await advance(4)
        assert it.pool.health().drain.deadline_ms == 6000  # type: ignore[union-attr]
        await advance(6)
        for task in (strict, behind, late):
            assert (names(task), task.started_at) == ("started error", None)
            assert events(task)[-1].data["code"] == "POOL_UNAVAILABLE"
        assert not it.engine.open
        with pytest.raises(PoolUnavailable):
            await it.submit("e")
        it.pool.end_drain()
        assert (await it.submit("f")).state is State.RUNNING


@pytest.mark.parametrize("how", ["end", "switch", "again"])
@virtual_time
async def test_a_drain_that_was_ended_fails_nobody(how: str) -> None:
    """By itself, by a switch, or because another deadline holds now."""
    async with rig() as it:
        tasks = [await it.submit("a"), await it.submit("b")]
        it.pool.drain(10.0)
        await advance(5)
        if how == "end":
            it.pool.end_drain()
        elif how == "switch":
            it.pool.switch(list(it.pool.replicas), it.pool.settings)
        else:
            it.pool.drain(100.0)
        await advance(20)
        assert states(*tasks) == [State.RUNNING, State.QUEUED]
        if how != "again":
            assert (await it.submit("c")).state is State.QUEUED


@virtual_time
async def test_a_request_that_is_looked_at_when_the_drain_begins_is_refused() -> None:
    """It was not admitted yet."""
    async with rig(ctx=30) as it:
        gate = it.engine.hold("tokenize")
        request = TaskRequest(prompt="four words of prompt", max_tokens=9)
        submit = asyncio.create_task(it.orchestrator.submit(request))
        await settled()
        it.pool.drain(10.0)
        gate.set()
        with pytest.raises(PoolUnavailable):
            await submit
        assert not it.moves

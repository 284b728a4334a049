"""One engine endpoint: who gets its slots, when a slot is free again, and when it counts as ready."""

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import pairwise

import pytest

from llorch.engine import (
    Engine,
    EngineBroken,
    EngineFailure,
    EngineGone,
    EngineLoading,
    EngineMisconfigured,
    EngineRefused,
    EngineStalled,
    Props,
)
from llorch.replica import BREAKER_POLL_S, LOADING_POLL_S, PROBE_INTERVAL_S, SELF_TEST_S, Health, Replica
from llorch.selftest import Verdict
from tests.memory_engine import MemoryEngine
from tests.virtualtime import advance, settled, virtual_time

GONE = EngineGone("nobody listens", sent=False)
LOADING = EngineLoading("loading", sent=False)
STALLED = EngineStalled("silence")
BROKEN = EngineBroken("garbage")
MISCONFIGURED = EngineMisconfigured("GET /props answered 501", sent=False)


class Watched(Replica):
    """A replica that remembers when its owner was told to look again."""

    def __init__(self, engine: MemoryEngine, **options: object) -> None:
        self.told = 0
        super().__init__("r-0", engine, on_change=self._tell, chance=random.Random(1), **options)  # type: ignore[arg-type]
        self.on_free = self._tell

    def _tell(self, _: Replica | None = None) -> None:
        self.told += 1


@asynccontextmanager
async def watched(
    engine: MemoryEngine, *, slots: int | None = None, drain_s: float = 60.0, **options: object
) -> AsyncIterator[Watched]:
    """A replica at work, after its first probe."""
    replica = Watched(engine, slots=slots, drain_s=drain_s, **options)
    work = {asyncio.create_task(replica.watch()), asyncio.create_task(replica.drain())}
    await settled()
    try:
        yield replica
    finally:
        for task in work:
            task.cancel()
        await asyncio.wait(work)
        await replica.close()
        assert all(task.cancelled() for task in work), "a coroutine of the replica died"


async def probe_times(engine: MemoryEngine, count: int) -> list[float]:
    """When the engine's health was asked for, the next `count` times."""
    loop, times = asyncio.get_running_loop(), []
    asked = engine.health

    async def health() -> None:
        times.append(loop.time())
        await asked()

    engine.health = health  # type: ignore[method-assign]
    while len(times) < count:
        await advance(0.05)
    engine.health = asked  # type: ignore[method-assign]
    return times[:count]


# -- leases ----------------------------------------------------------------------------------------


@virtual_time
async def test_there_are_as_many_leases_as_slots() -> None:
    """Beyond them there is none; one that is closed cleanly is free in the same step, and told."""
    async with watched(MemoryEngine(slots=2)) as replica:
        first, second = replica.try_lease(exclusive=False), replica.try_lease(exclusive=False)
        assert first is not None
        assert second is not None
        assert replica.try_lease(exclusive=False) is None
        assert (replica.busy, replica.draining, replica.free_slots) == (2, 0, 0)
        told = replica.told
        first.close(clean=True)
        assert (replica.busy, replica.free_slots, replica.told) == (1, 1, told + 1)
        second.close(clean=True)


@virtual_time
async def test_an_exclusive_lease_is_alone() -> None:
    """It is given on an idle replica only, and nothing is given beside it."""
    async with watched(MemoryEngine(slots=3)) as replica:
        shared = replica.try_lease(exclusive=False)
        assert shared is not None
        assert replica.try_lease(exclusive=True) is None
        shared.close(clean=True)
        alone = replica.try_lease(exclusive=True)
        assert alone is not None
        assert replica.free_slots == 0
        assert replica.try_lease(exclusive=False) is None
        assert replica.try_lease(exclusive=True) is None
        alone.close(clean=True)
        assert replica.free_slots == 3


@virtual_time
async def test_a_draining_slot_is_not_idle() -> None:
    """An exclusive lease waits for drained slots too."""
    engine = MemoryEngine(slots=2)
    async with watched(engine) as replica:
        engine.busy = 1
        shared = replica.try_lease(exclusive=False)
        assert shared is not None
        shared.close(clean=False)
        assert (replica.busy, replica.draining, replica.free_slots) == (0, 1, 1)
        assert replica.try_lease(exclusive=True) is None
        engine.busy = 0
        await advance(0.5)
        assert replica.try_lease(exclusive=True) is not None


@pytest.mark.parametrize(
    ("configured", "offered", "in_force"), [(None, 4, 4), (2, 4, 2), (4, 2, 2), (1, 1, 1)]
)
@virtual_time
async def test_slots_in_force_are_what_both_sides_allow(
    configured: int | None, offered: int, in_force: int
) -> None:
    """min(configured, what /props says); "auto" takes them all."""
    async with watched(MemoryEngine(slots=offered), slots=configured) as replica:
        assert replica.slots == in_force


@virtual_time
async def test_closing_twice_frees_once() -> None:
    """The first close decides; a later one changes nothing."""
    engine = MemoryEngine(slots=1)
    async with watched(engine) as replica:
        lease = replica.try_lease(exclusive=False)
        assert lease is not None
        lease.close(clean=False)
        lease.close(clean=True)
        assert replica.draining == 1
        await advance(0.2)
        assert replica.free_slots == 1
        told = replica.told
        lease.close(clean=True)
        assert (replica.free_slots, replica.told) == (1, told)


@virtual_time
async def test_interrupt_cancels_the_runner_but_never_itself() -> None:
    """A runner that ends its own task is not cancelled by that."""
    async with watched(MemoryEngine(slots=1)) as replica:
        lease = replica.try_lease(exclusive=False)
        assert lease is not None
        lease.interrupt()  # no runner yet
        lease.runner = asyncio.create_task(asyncio.Event().wait())  # type: ignore[arg-type]
        lease.interrupt()
        await asyncio.wait({lease.runner})
        assert lease.runner.cancelled()

        async def runs() -> None:
            lease.runner = asyncio.current_task()
            lease.interrupt()
            await asyncio.sleep(0)

        await asyncio.create_task(runs())
        lease.close(clean=True)


@virtual_time
async def test_interrupt_hangs_up_in_the_same_step() -> None:
    """The connection is closed by the time it returns; the runner finds itself cancelled, not broken off."""
    async with watched(MemoryEngine(slots=1)) as replica:
        lease = replica.try_lease(exclusive=False)
        assert lease is not None
        runner = lease.runner = asyncio.create_task(asyncio.Event().wait())  # type: ignore[assignment]
        cancelling: list[int] = []
        lease.hang_up = lambda: cancelling.append(runner.cancelling())
        lease.interrupt()
        assert cancelling == [1]
        await asyncio.wait({runner})
        lease.close(clean=True)


# -- draining --------------------------------------------------------------------------------------


async def drained_after(engine: MemoryEngine, replica: Watched) -> float:
    """How long it takes until a slot that is closed now is free."""
    loop = asyncio.get_running_loop()
    lease = replica.try_lease(exclusive=False)
    assert lease is not None
    closed = loop.time()
    lease.close(clean=False)
    while lease in replica.leases:
        await advance(0.01)
    return loop.time() - closed


@virtual_time
async def test_a_slot_is_free_after_two_idle_looks() -> None:
    """Twice in a row and at least 100 ms apart: a request not yet picked up reads as idle."""
    engine = MemoryEngine(slots=1)
    async with watched(engine) as replica:
        looks = engine.asked["busy_slots"]
        assert await drained_after(engine, replica) == pytest.approx(0.1, abs=0.02)
        assert engine.asked["busy_slots"] - looks == 2


@virtual_time
async def test_a_busy_look_begins_the_count_anew() -> None:
    """E19: idle, busy, idle, idle: only then."""
    engine = MemoryEngine(slots=1)
    async with watched(engine) as replica:
        lease = replica.try_lease(exclusive=False)
        assert lease is not None
        lease.close(clean=False)
        await settled()  # idle once
        engine.busy = 1
        await advance(3)
        assert (replica.draining, replica.free_slots) == (1, 0)
        engine.busy = 0
        looks = engine.asked["busy_slots"]
        await advance(0.3)
        assert replica.free_slots == 1
        assert engine.asked["busy_slots"] - looks >= 2


@pytest.mark.parametrize("failure", [GONE, LOADING])
@virtual_time
async def test_an_engine_that_is_gone_or_new_holds_no_slot(failure: EngineFailure) -> None:
    """E18: what it ran is no more; one look is enough."""
    engine = MemoryEngine(slots=1)
    async with watched(engine) as replica:
        engine.busy, engine.failure = 1, failure
        lease = replica.try_lease(exclusive=False)
        assert lease is not None
        lease.close(clean=False)
        await settled()
        assert not replica.leases


@pytest.mark.parametrize("failure", [STALLED, BROKEN, EngineRefused("hung up"), MISCONFIGURED])
@virtual_time
async def test_an_engine_that_can_not_be_asked_keeps_its_slot(failure: EngineFailure) -> None:
    """Not knowing is not idle; the answers count again when they come."""
    engine = MemoryEngine(slots=1)
    async with watched(engine) as replica:
        engine.failure = failure
        lease = replica.try_lease(exclusive=False)
        assert lease is not None
        lease.close(clean=False)
        await advance(10)
        assert replica.draining == 1
        engine.failure = None
        await advance(0.3)
        assert not replica.leases


@pytest.mark.parametrize("answered", [True, False])
@virtual_time
async def test_a_busy_slot_is_explained_only_by_work_that_has_begun(answered: bool) -> None:
    """With one slot busy a closed lease is let go if another's work accounts for it, not if it may not."""
    engine = MemoryEngine(slots=2)
    async with watched(engine) as replica:
        at_work, closed = replica.try_lease(exclusive=False), replica.try_lease(exclusive=False)
        assert at_work is not None
        assert closed is not None
        at_work.answered = answered
        engine.busy = 1
        closed.close(clean=False)
        await advance(2)
        assert (closed in replica.leases) is not answered
        engine.busy = 0
        at_work.close(clean=True)
        await advance(0.5)


@virtual_time
async def test_a_lease_that_ends_while_we_look_explains_nothing() -> None:
    """The busy slot that was seen may have been another's: work comes and goes, and proves no slot free."""
    engine = MemoryEngine(slots=4)
    async with watched(engine) as replica:
        leases = [replica.try_lease(exclusive=False) for _ in range(3)]
        assert all(leases)
        for lease in leases[:2]:
            lease.answered = True  # type: ignore[union-attr]
        engine.busy = 2
        leases[2].close(clean=False)  # type: ignore[union-attr]
        await settled()
        for lease in leases[:2]:
            lease.close(clean=True)  # type: ignore[union-attr]
            successor = replica.try_lease(exclusive=False)
            assert successor is not None
            successor.answered = True
            await advance(0.2)  # into the middle of the next look
            assert leases[2] in replica.leases
            leases.append(successor)
        engine.busy = 0
        for lease in leases:
            lease.close(clean=True)  # type: ignore[union-attr]
        await advance(0.5)
        assert not replica.leases


@virtual_time
async def test_a_slot_that_does_not_come_back_makes_the_replica_unready() -> None:
    """E19: after drain_s, with the reason; ready again, and told, when the engine is idle."""
    engine = MemoryEngine(slots=2)
    async with watched(engine, drain_s=5.0) as replica:
        engine.busy = 1
        lease = replica.try_lease(exclusive=False)
        assert lease is not None
        lease.close(clean=False)
        await advance(4.9)
        assert (replica.ready, replica.stuck) == (True, None)
        told = replica.told
        await advance(0.5)
        assert not replica.ready
        assert replica.stuck == "a slot did not come back within 5 s; waiting for the engine to be idle"
        assert replica.told == told + 1
        engine.busy = 0
        await advance(0.5)
        assert (replica.ready, replica.stuck, replica.free_slots) == (True, None, 2)


@virtual_time
async def test_a_lease_can_be_kept_while_what_was_sent_drains() -> None:
    """Before a retry: the slot stays taken, and the wait ends when the engine has let go."""
    engine = MemoryEngine(slots=1)
    async with watched(engine) as replica:
        lease = replica.try_lease(exclusive=False)
        assert lease is not None
        lease.sent, engine.busy = True, 1
        draining = asyncio.create_task(lease.drain())
        await advance(1)
        assert not draining.done()
        engine.busy = 0
        await draining
        assert (lease in replica.leases, lease.draining, lease.sent) == (True, False, False)
        assert replica.busy == 1
        lease.close(clean=True)
        assert replica.free_slots == 1


@virtual_time
async def test_each_lease_drains_by_itself() -> None:
    """One that is closed later needs its own two looks."""
    engine = MemoryEngine(slots=2)
    async with watched(engine) as replica:
        first, second = replica.try_lease(exclusive=False), replica.try_lease(exclusive=False)
        assert first is not None
        assert second is not None
        first.close(clean=False)
        await settled()
        second.close(clean=False)
        await advance(0.1)
        assert replica.leases == {second}
        await advance(0.1)
        assert not replica.leases


# -- readiness -------------------------------------------------------------------------------------


@virtual_time
async def test_nothing_is_known_before_the_first_probe() -> None:
    """Not ready, not live, no slot to give."""
    replica = Watched(MemoryEngine(slots=2), slots=None, drain_s=1)
    assert (replica.health, replica.ready, replica.live) == (Health.UNKNOWN, False, False)
    assert replica.try_lease(exclusive=False) is None


@virtual_time
async def test_a_good_probe_makes_it_ready() -> None:
    """health, props and slots have answered; its owner is told."""
    engine = MemoryEngine(slots=2, ctx=2048)
    async with watched(engine) as replica:
        assert (replica.ready, replica.live, replica.last_error, replica.told) == (True, True, None, 1)
        assert replica.props == Props(slots=2, ctx=2048, engine_version="b1", model="tiny")
        assert (engine.asked["health"], engine.asked["props"], engine.asked["busy_slots"]) == (1, 1, 1)


@pytest.mark.parametrize(
    ("failure", "health", "live", "error"),
    [
        (LOADING, Health.LOADING, True, "loading"),
        (GONE, Health.FAILED, False, "nobody listens"),
        (EngineRefused("reset"), Health.FAILED, False, "reset"),
        (STALLED, Health.FAILED, False, "silence"),
        (BROKEN, Health.FAILED, True, "garbage"),
        (MISCONFIGURED, Health.MISCONFIGURED, True, "misconfigured: GET /props answered 501"),
    ],
)
@virtual_time
async def test_a_bad_probe_says_why(failure: EngineFailure, health: Health, live: bool, error: str) -> None:
    """E1, E2, E5: unready, with the reason; live if something answered; ready again once it is mended."""
    engine = MemoryEngine(slots=1)
    async with watched(engine) as replica:
        told = replica.told
        engine.failure = failure
        await advance(PROBE_INTERVAL_S)
        assert (replica.health, replica.live, replica.last_error) == (health, live, error)
        assert (replica.ready, replica.free_slots, replica.told) == (False, 0, told + 1)
        engine.failure = None
        await advance(BREAKER_POLL_S)
        assert (replica.ready, replica.last_error) == (True, None)


@pytest.mark.parametrize("method", ["health", "props", "busy_slots"])
@virtual_time
async def test_all_three_questions_must_be_answered(method: str) -> None:
    """An engine without /slots or /props can't be used: it is misconfigured."""
    engine = MemoryEngine(slots=1)

    async def refuses() -> None:
        raise MISCONFIGURED

    setattr(engine, method, refuses)
    async with watched(engine) as replica:
        assert replica.health is Health.MISCONFIGURED


@virtual_time
async def test_a_ready_replica_is_probed_on_an_interval() -> None:
    """Every five seconds, as long as nothing happens."""
    engine = MemoryEngine(slots=1)
    async with watched(engine):
        times = await probe_times(engine, 4)
        assert [b - a for a, b in pairwise(times)] == pytest.approx([PROBE_INTERVAL_S] * 3)


@virtual_time
async def test_flowing_tokens_are_as_good_as_a_probe() -> None:
    """Nobody is asked while they flow; when they stop, the probe comes."""
    engine = MemoryEngine(slots=1)
    async with watched(engine) as replica:
        for _ in range(10):
            await advance(2)
            replica.progress()
        assert engine.asked["health"] == 1
        await advance(3 * PROBE_INTERVAL_S)
        assert engine.asked["health"] > 1


@virtual_time
async def test_a_loading_engine_is_asked_often() -> None:
    """E2: every 250 ms to 2 s, with jitter, however long it takes."""
    engine = MemoryEngine(slots=1)
    engine.failure = LOADING
    async with watched(engine):
        times = await probe_times(engine, 30)
        gaps = [b - a for a, b in pairwise(times)]
        assert LOADING_POLL_S[0] <= min(gaps) < max(gaps) <= LOADING_POLL_S[1] + 1e-6
        assert len({round(gap, 3) for gap in gaps}) > 5


@virtual_time
async def test_an_engine_that_stays_away_is_asked_less_and_less() -> None:
    """Back-off with jitter: soon at first, never more than ten seconds apart, soon again the next time."""
    engine = MemoryEngine(slots=1)
    engine.failure = GONE
    async with watched(engine) as replica:
        times = await probe_times(engine, 20)
        gaps = [b - a for a, b in pairwise(times)]
        assert gaps[0] <= 1
        assert max(gaps[:3]) <= LOADING_POLL_S[1] < min(gaps[-5:])
        assert max(gaps) <= BREAKER_POLL_S
        assert len({round(gap, 3) for gap in gaps[-10:]}) > 5
        engine.failure = None
        await advance(BREAKER_POLL_S)
        assert replica.ready
        engine.failure = GONE
        times = await probe_times(engine, 3)
        assert times[2] - times[1] <= 2, "the failures of before count no more"


@virtual_time
async def test_an_engine_may_stay_away_for_a_day() -> None:
    """E1: thousands of failed probes end nothing; the day after all is well."""
    engine = MemoryEngine(slots=1)
    engine.failure = GONE
    async with watched(engine) as replica:
        await advance(12 * 3600)
        assert engine.asked["health"] > 4000
        engine.failure = None
        await advance(BREAKER_POLL_S)
        assert replica.ready


@virtual_time
async def test_in_doubt_nothing_is_dispatched_until_a_probe_has_looked() -> None:
    """The probe comes at once; admission goes on meanwhile."""
    engine = MemoryEngine(slots=1)
    async with watched(engine) as replica:
        gate = engine.hold("health")
        replica.suspect("a stream broke")
        await settled()
        assert (engine.asked["health"], replica.ready, replica.dispatchable, replica.free_slots) == (
            2,
            True,
            False,
            0,
        )
        told = replica.told
        gate.set()
        await settled()
        assert (replica.dispatchable, replica.free_slots, replica.told) == (True, 1, told + 1)


@virtual_time
async def test_a_doubt_that_comes_during_a_probe_needs_another_one() -> None:
    """What a probe saw before the new failure settles nothing."""
    engine = MemoryEngine(slots=1)
    async with watched(engine) as replica:
        first = engine.hold("busy_slots")
        replica.suspect("one")
        await settled()
        replica.suspect("two")
        second = engine.hold("health")
        asked = engine.asked["health"]
        first.set()
        await settled()
        assert (engine.asked["health"], replica.dispatchable) == (asked + 1, False)
        second.set()
        await settled()
        assert replica.dispatchable


@virtual_time
async def test_waiting_for_a_replica_that_can_be_used() -> None:
    """`until_dispatchable` returns after the probe that found it good, for every waiter."""
    engine = MemoryEngine(slots=1)
    engine.failure = LOADING
    async with watched(engine) as replica:
        waiters = [asyncio.create_task(replica.until_dispatchable()) for _ in range(3)]
        await advance(30)
        assert not any(waiter.done() for waiter in waiters)
        engine.failure = None
        await advance(LOADING_POLL_S[1])
        assert all(waiter.done() for waiter in waiters)


@virtual_time
async def test_waiting_ends_when_a_stuck_slot_came_back() -> None:
    """Also while tokens of another task flow, so that no probe comes by."""
    engine = MemoryEngine(slots=2)
    async with watched(engine, drain_s=1.0) as replica:
        at_work, stuck = replica.try_lease(exclusive=False), replica.try_lease(exclusive=False)
        assert at_work is not None
        assert stuck is not None
        engine.busy = 2
        stuck.close(clean=False)
        await advance(2)
        waiter = asyncio.create_task(replica.until_dispatchable())
        await settled()
        assert not replica.ready
        replica.progress()
        engine.busy = 0
        await advance(0.5)
        assert replica.ready
        assert waiter.done()
        at_work.close(clean=True)


@virtual_time
async def test_what_no_task_can_work_with_is_unready_until_mended() -> None:
    """E5: a 404 for a generation says so in health, although the probe was good."""
    engine = MemoryEngine(slots=1)
    async with watched(engine) as replica:
        replica.misconfigured("POST /completion answered 404")
        assert (replica.ready, replica.last_error) == (False, "misconfigured: POST /completion answered 404")
        await advance(PROBE_INTERVAL_S)
        assert replica.ready


# -- what the engine is ----------------------------------------------------------------------------


@virtual_time
async def test_an_engine_that_comes_back_as_another_is_taken_as_it_is() -> None:
    """E21: slots, context and version are read again at each probe; its owner is told."""
    engine = MemoryEngine(slots=4)
    async with watched(engine) as replica:
        told = replica.told
        engine.change(slots=2, ctx=512, engine_version="b2")
        await advance(PROBE_INTERVAL_S)
        assert (replica.slots, replica.free_slots, replica.told) == (2, 2, told + 1)
        assert replica.props == Props(slots=2, ctx=512, engine_version="b2", model="tiny")


@virtual_time
async def test_fewer_slots_than_leases_gives_out_no_more() -> None:
    """E21: leases that are out stay; new ones wait until there are fewer than slots."""
    engine = MemoryEngine(slots=3)
    async with watched(engine) as replica:
        leases = [replica.try_lease(exclusive=False) for _ in range(3)]
        engine.change(slots=1)
        await advance(PROBE_INTERVAL_S)
        assert (replica.free_slots, len(replica.leases)) == (0, 3)
        for lease in leases:
            assert replica.try_lease(exclusive=False) is None
            assert lease is not None
            lease.close(clean=True)
        assert replica.free_slots == 1


@virtual_time
async def test_the_digest_of_the_model_is_read_beside() -> None:
    """The replica is ready before its model file is hashed [MVP-052]."""
    engine = MemoryEngine(slots=1)
    engine.change(model_path="/a.gguf")
    engine.digests["/a.gguf"] = "sha256:a"
    gate = engine.hold("model_digest")
    async with watched(engine) as replica:
        assert (replica.ready, replica.model_digest) == (True, None)
        gate.set()
        await settled()
        assert replica.model_digest == "sha256:a"
        await advance(3 * PROBE_INTERVAL_S)
        assert engine.asked["model_digest"] == 1


@virtual_time
async def test_another_model_has_another_digest() -> None:
    """E21: it is gone as soon as the model changes, and never the old one's."""
    engine = MemoryEngine(slots=1)
    engine.change(model_path="/a.gguf")
    engine.digests.update({"/a.gguf": "sha256:a", "/b.gguf": "sha256:b"})
    async with watched(engine) as replica:
        assert replica.model_digest == "sha256:a"
        gate = engine.hold("model_digest")
        engine.change(model_path="/b.gguf")
        await advance(PROBE_INTERVAL_S)
        assert replica.model_digest is None
        gate.set()
        await settled()
        assert replica.model_digest == "sha256:b"


@virtual_time
async def test_a_digest_that_took_too_long_is_not_taken_for_the_new_models() -> None:
    """E21: the model changes while the old file is still being hashed."""
    engine = MemoryEngine(slots=1)
    engine.change(model_path="/a.gguf")
    engine.digests.update({"/a.gguf": "sha256:a", "/b.gguf": "sha256:b"})
    gate = engine.hold("model_digest")
    async with watched(engine) as replica:
        engine.change(model_path="/b.gguf")
        await advance(PROBE_INTERVAL_S)
        gate.set()
        await advance(PROBE_INTERVAL_S)
        assert replica.model_digest == "sha256:b"


@virtual_time
async def test_a_digest_that_can_not_be_read_is_unknown() -> None:
    """Whatever the engine says to it, the replica works."""
    engine = MemoryEngine(slots=1)
    engine.change(model_path="/a.gguf")

    async def breaks(model_path: str) -> str | None:
        raise BROKEN

    engine.model_digest = breaks  # type: ignore[method-assign]
    async with watched(engine) as replica:
        await advance(PROBE_INTERVAL_S)
        assert (replica.ready, replica.model_digest) == (True, None)


# -- self-test -------------------------------------------------------------------------------------


class SelfTest:
    """A self-test that the test lets go on; `verdicts` are what it finds, one after the other."""

    def __init__(self, *verdicts: Verdict | Exception) -> None:
        self.verdicts = list(verdicts)
        self.runs = 0
        self.go_on = asyncio.Event()

    async def __call__(self, engine: Engine, slots: int) -> Verdict:
        """Wait, then answer."""
        self.runs += 1
        await self.go_on.wait()
        verdict = self.verdicts.pop(0)
        if isinstance(verdict, Exception):
            raise verdict
        return verdict


VERIFIED = Verdict("verified")


@virtual_time
async def test_a_replica_shows_what_it_can_before_anybody_else_uses_it() -> None:
    """The self-test runs alone, as soon as the replica is ready; then all slots are free [MVP-042]."""
    self_test = SelfTest(VERIFIED)
    async with watched(MemoryEngine(slots=2), self_test=self_test) as replica:
        assert (replica.ready, replica.determinism, replica.free_slots) == (True, "unknown", 0)
        self_test.go_on.set()
        await settled()
        assert (replica.determinism, replica.free_slots, self_test.runs) == ("verified", 2, 1)
        await advance(5 * PROBE_INTERVAL_S)
        assert self_test.runs == 1


@pytest.mark.parametrize("failure", [GONE, LOADING])
@virtual_time
async def test_an_engine_that_may_have_been_restarted_has_to_show_it_again(failure: EngineFailure) -> None:
    """What was verified holds for that process only."""
    self_test = SelfTest(VERIFIED, Verdict("failed", "two texts"))
    self_test.go_on.set()
    engine = MemoryEngine(slots=1)
    async with watched(engine, self_test=self_test) as replica:
        assert replica.determinism == "verified"
        engine.failure = failure
        await advance(PROBE_INTERVAL_S)
        assert replica.determinism == "unknown"
        engine.failure = None
        await advance(BREAKER_POLL_S)
        assert (replica.determinism, replica.self_test_fault) == ("failed", "two texts")


@virtual_time
async def test_other_properties_mean_another_test() -> None:
    """A new model may be another one in this too; a broken stream does not."""
    self_test = SelfTest(VERIFIED, VERIFIED)
    self_test.go_on.set()
    engine = MemoryEngine(slots=1)
    async with watched(engine, self_test=self_test) as replica:
        replica.suspect("a stream broke")
        await settled()
        assert self_test.runs == 1
        engine.change(ctx=100)
        await advance(PROBE_INTERVAL_S)
        assert self_test.runs == 2


@virtual_time
async def test_the_self_test_waits_until_the_replica_is_idle() -> None:
    """It comes before the next task, in the step that frees the last slot."""
    self_test = SelfTest(VERIFIED, VERIFIED)
    self_test.go_on.set()
    engine = MemoryEngine(slots=2)
    async with watched(engine, self_test=self_test) as replica:
        lease = replica.try_lease(exclusive=False)
        assert lease is not None
        engine.change(ctx=100)
        await advance(PROBE_INTERVAL_S)
        assert self_test.runs == 1
        lease.close(clean=True)
        assert replica.free_slots == 0
        await settled()
        assert (self_test.runs, replica.free_slots) == (2, 2)


@virtual_time
async def test_a_self_test_that_takes_too_long_says_nothing() -> None:
    """Unknown after 30 s, with the reason; the slots drain first."""
    engine = MemoryEngine(slots=1)
    async with watched(engine, self_test=SelfTest()) as replica:
        engine.busy = 1
        await advance(SELF_TEST_S)
        assert (replica.determinism, replica.draining) == ("unknown", 1)
        assert replica.self_test_fault == "self-test: not done within 30 s"
        engine.busy = 0
        await advance(0.5)
        assert replica.free_slots == 1


@virtual_time
async def test_an_engine_that_breaks_in_its_self_test_is_looked_at() -> None:
    """Unknown, with the reason, a probe at once, and the slots drain."""
    self_test = SelfTest(BROKEN)
    engine = MemoryEngine(slots=1)
    async with watched(engine, self_test=self_test) as replica:
        asked = engine.asked["health"]
        self_test.go_on.set()
        await settled()
        assert (replica.determinism, replica.self_test_fault) == ("unknown", "self-test: garbage")
        assert engine.asked["health"] > asked
        await advance(0.5)
        assert replica.free_slots == 1


@pytest.mark.parametrize("failure", [GONE, LOADING])
@virtual_time
async def test_an_engine_that_is_restarted_before_its_self_test_gets_another(failure: EngineFailure) -> None:
    """Nobody listened for a moment: nothing was shown, and nothing stays in health."""
    self_test = SelfTest(failure, VERIFIED)
    self_test.go_on.set()
    async with watched(MemoryEngine(slots=1), self_test=self_test) as replica:
        await advance(1)
        assert (replica.determinism, replica.self_test_fault, replica.free_slots) == ("verified", None, 1)


@pytest.mark.parametrize("failure", [GONE, LOADING])
@virtual_time
async def test_a_restart_that_is_seen_while_a_slot_drains_means_another_test(failure: EngineFailure) -> None:
    """E21: once the probe has found it ready, and not before."""
    self_test = SelfTest(VERIFIED, VERIFIED)
    self_test.go_on.set()
    engine = MemoryEngine(slots=1)
    async with watched(engine, self_test=self_test) as replica:
        lease = replica.try_lease(exclusive=False)
        assert lease is not None
        engine.failure = failure
        lease.close(clean=False)
        await settled()
        assert (self_test.runs, replica.determinism, replica.leases) == (1, "unknown", set())
        engine.failure = None
        await advance(3)
        assert (self_test.runs, replica.determinism) == (2, "verified")


@virtual_time
async def test_a_bug_in_the_self_test_ends_only_that(caplog: pytest.LogCaptureFixture) -> None:
    """It is in the log, and the replica works."""
    self_test = SelfTest(ZeroDivisionError())
    async with watched(MemoryEngine(slots=1), self_test=self_test) as replica:
        self_test.go_on.set()
        await advance(0.5)
        assert (replica.determinism, replica.free_slots) == ("unknown", 1)
    assert "a bug ended the self-test" in caplog.text


@virtual_time
async def test_a_self_test_of_an_engine_that_went_meanwhile_counts_for_nothing() -> None:
    """What it found may be true of the old process only."""
    self_test = SelfTest(VERIFIED, VERIFIED)
    engine = MemoryEngine(slots=1)
    async with watched(engine, self_test=self_test) as replica:
        replica.suspect_restart("nobody listens")
        self_test.go_on.set()
        await settled()
        assert (self_test.runs, replica.determinism) == (2, "verified")


@virtual_time
async def test_closing_ends_a_self_test_and_begins_no_other() -> None:
    """No coroutine is left."""
    async with watched(MemoryEngine(slots=1), self_test=SelfTest()) as replica:
        await replica.close()
        assert replica.determinism == "unknown"


@virtual_time
async def test_a_probe_that_is_under_way_at_the_close_begins_nothing() -> None:
    """Neither a self-test nor the reading of gigabytes."""
    engine = MemoryEngine(slots=1)
    engine.change(model_path="/a.gguf")
    gate = engine.hold("health")
    self_test = SelfTest()
    async with watched(engine, self_test=self_test) as replica:
        await replica.close()
        gate.set()
        await settled()
        assert replica.ready
        assert (self_test.runs, engine.asked["model_digest"]) == (0, 0)

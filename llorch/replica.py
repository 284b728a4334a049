"""One engine endpoint: its slots and leases, its readiness, its version.

The one rule: a slot is held by a lease from the start of a task until the engine has really let go.
`try_lease` and `Lease.close` are plain; what still has to drain is this module's own business from then on.
"""

import asyncio
import contextlib
import enum
import functools
import logging
import random
from collections.abc import Awaitable, Callable

from llorch.agreement import Made
from llorch.engine import (
    Engine,
    EngineFailure,
    EngineGone,
    EngineLoading,
    EngineMisconfigured,
    EngineRefused,
    EngineStalled,
    Props,
)
from llorch.plan import ReplicaPlan
from llorch.selftest import Determinism, Verdict

log = logging.getLogger("llorch.replica")

PROBE_INTERVAL_S = 5.0
LOADING_POLL_S = (0.25, 2.0)
BREAKER_FAILURES = 5
BREAKER_POLL_S = 10.0
DRAIN_POLL_S = (0.02, 0.1)
SELF_TEST_S = 30.0

SelfTest = Callable[[Engine, int], Awaitable[Verdict]]


class Health(enum.Enum):
    """What the last probe found."""

    UNKNOWN = "not probed yet"
    LOADING = "the model is loading"
    READY = "ready"
    FAILED = "the probe failed"
    MISCONFIGURED = "misconfigured"


class Lease:
    """The right of one task to one slot of a replica, alone on it if `exclusive`.

    It is *active* until closed; closed uncleanly it *drains*, and still counts, until the engine let go.
    `sent`: whether anything may have reached the engine under it; `answered`: the engine has begun on it.
    `on_freed` is called once, when the slot is free again.
    `hang_up` closes the connection at once; the runner would get to it a turn or two of the loop later.
    """

    __slots__ = (
        "_drained",
        "answered",
        "closed",
        "draining",
        "draining_since",
        "exclusive",
        "hang_up",
        "idle_looks",
        "on_freed",
        "replica",
        "replica_id",
        "runner",
        "sent",
        "since",
    )

    def __init__(self, replica: "Replica", *, exclusive: bool) -> None:
        self.replica = replica
        self.replica_id = replica.replica_id
        self.exclusive = exclusive
        self.closed = False
        self.draining = False
        self.idle_looks = 0
        self.since = self.draining_since = asyncio.get_running_loop().time()
        self.runner: asyncio.Task[None] | None = None
        self.sent = False
        self.answered = False
        self.on_freed: Callable[[], None] | None = None
        self.hang_up: Callable[[], None] | None = None
        self._drained: asyncio.Future[None] | None = None

    def interrupt(self) -> None:
        """Stop the engine's work: its connection is closed, and the runner cancelled. Plain."""
        if self.runner is not None and self.runner is not asyncio.current_task():
            self.runner.cancel()
            if self.hang_up is not None:
                self.hang_up()

    def close(self, *, clean: bool) -> None:
        """Give the slot back: at once if `clean`, else once it has drained. Plain, final, idempotent."""
        if not self.closed:
            self.closed = True
            self.replica._lease_closed(self, clean=clean)

    async def drain(self) -> None:
        """Keep the lease, and return when the engine has let go of what was sent under it."""
        self._drained = asyncio.get_running_loop().create_future()
        self.replica._start_draining(self)
        await self._drained

    def let_go(self) -> None:
        """The engine no longer works under this lease; whoever waits in `drain` goes on."""
        self.draining, self.sent, self.answered, self.idle_looks = False, False, False, 0
        if self._drained is not None and not self._drained.done():
            self._drained.set_result(None)


def _ignore(replica: "Replica") -> None:
    """Nobody waits for this replica yet."""


class Replica:
    """Slots and readiness of one engine; the head of a queue may go whenever one of the callbacks is called:
    `on_change` if it is ready, is no longer, or is another than it was; `on_free` if a slot is free.

    `devices` are the indices of the GPUs that the engine computes on. `excluded`, if not None, is why the
    pool keeps it out.
    """

    def __init__(
        self,
        replica_id: str,
        engine: Engine,
        *,
        slots: int | None,
        drain_s: float,
        on_change: Callable[["Replica"], None] = _ignore,
        devices: tuple[int, ...] = (),
        plan: ReplicaPlan | None = None,
        self_test: SelfTest | None = None,
        chance: random.Random | None = None,
    ) -> None:
        self.replica_id = replica_id
        self.engine = engine
        self.configured_slots = slots
        self.drain_s = drain_s
        self.devices = devices
        self.plan = plan
        self.on_change = on_change
        self.on_free: Callable[[], None] = lambda: None
        self.excluded: str | None = None
        self.health = Health.UNKNOWN
        self.last_error: str | None = None
        self.live = False
        self.props: Props | None = None
        self.model_digest: str | None = None
        self.leases: set[Lease] = set()
        self.stuck: str | None = None
        self.determinism: Determinism = "unknown"
        self.self_test_fault: str | None = None
        self._self_test = self_test
        self._untested = True
        self._examination: asyncio.Task[Verdict] | None = None
        self._suspect: str | None = None
        self._doubts = 0
        self._chance = chance or random.Random()
        self._failures = 0
        self._probe_now = asyncio.Event()
        self._probed = asyncio.Condition()
        self._drain_now = asyncio.Event()
        self._last_progress: float | None = None
        self._digest_task: asyncio.Task[None] | None = None
        self._retired = False
        self._closed = False
        self._vacated = asyncio.Event()

    # -- what is ------------------------------------------------------------------------------

    @property
    def ready(self) -> bool:
        """Whether new tasks may be admitted for this replica."""
        return self.able and self.excluded is None

    @property
    def able(self) -> bool:
        """Whether it could work, if the pool let it."""
        return self.health is Health.READY and self.stuck is None

    @property
    def made(self) -> Made:
        """What its answers are made with."""
        return Made.of(self.props, self.model_digest)

    @property
    def fault(self) -> str | None:
        """What is wrong with it, the worst first; None if nothing is."""
        return self.stuck or self.last_error or self.excluded or self.self_test_fault

    @property
    def dispatchable(self) -> bool:
        """Whether a task may be sent now: ready, and not in doubt until the next probe."""
        return self.ready and self._suspect is None

    @property
    def slots(self) -> int:
        """Slots in force: what the configuration allows of what the engine has."""
        offered = self.props.slots if self.props else (self.configured_slots or 1)
        return offered if self.configured_slots is None else min(self.configured_slots, offered)

    @property
    def busy(self) -> int:
        """Leases at work."""
        return sum(not lease.draining for lease in self.leases)

    @property
    def draining(self) -> int:
        """Leases whose slot the engine has not let go of yet."""
        return sum(lease.draining for lease in self.leases)

    @property
    def free_slots(self) -> int:
        """Slots that a best-effort task could take now."""
        return max(self.slots - len(self.leases), 0) if self.open else 0

    @property
    def open(self) -> bool:
        """Whether a task may be sent now, and none has the replica for itself."""
        return self.dispatchable and not any(lease.exclusive for lease in self.leases)

    # -- leases -------------------------------------------------------------------------------

    def try_lease(self, *, exclusive: bool) -> Lease | None:
        """A lease if there is a free slot now, or, if `exclusive`, if the replica is idle and drained."""
        if not self.free_slots or (exclusive and self.leases):
            return None
        lease = Lease(self, exclusive=exclusive)
        self.leases.add(lease)
        return lease

    def _lease_closed(self, lease: Lease, *, clean: bool) -> None:
        if clean and not lease.draining:
            self._release(lease)
        else:
            self._start_draining(lease)

    def _start_draining(self, lease: Lease) -> None:
        if not lease.draining:
            lease.draining = True
            lease.draining_since = asyncio.get_running_loop().time()
            self._drain_now.set()

    def _release(self, lease: Lease) -> None:
        self.leases.discard(lease)
        self._test_if_due()
        if self._retired and not self.leases:
            self._vacated.set()
        self.on_free()
        if lease.on_freed is not None:
            lease.on_freed()

    # -- readiness ----------------------------------------------------------------------------

    def progress(self) -> None:
        """Tokens flow: as good as a probe."""
        self._last_progress = asyncio.get_running_loop().time()

    def suspect(self, reason: str) -> None:
        """Something broke: nothing is dispatched until a probe, at once, has looked."""
        self._suspect = reason
        self._doubts += 1
        self._probe_now.set()

    def notice(self, failure: EngineFailure) -> None:
        """The engine failed: a probe has to look, and a new process has to show again what it can."""
        if isinstance(failure, EngineGone | EngineLoading):
            self.suspect_restart(failure.summary)
        else:
            self.suspect(failure.summary)

    def misconfigured(self, reason: str) -> None:
        """The engine refuses what every task needs: unready until a probe finds it mended."""
        self.health, self.last_error = Health.MISCONFIGURED, f"misconfigured: {reason}"
        self.on_change(self)

    async def until_dispatchable(self) -> None:
        """Return when a task may be sent to this replica."""
        async with self._probed:
            await self._probed.wait_for(lambda: self.dispatchable)

    async def probe(self) -> None:
        """Ask the engine how it is, and act on the answer; lets no failure out."""
        doubts = self._doubts
        health, error, props = Health.READY, None, None
        try:
            await self.engine.health()
            props = await self.engine.props()
            await self.engine.busy_slots()
            self.live = True
        except EngineLoading as failure:
            health, error, self.live = Health.LOADING, str(failure), True
            self._may_have_restarted()
        except EngineMisconfigured as failure:
            health, error, self.live = Health.MISCONFIGURED, f"misconfigured: {failure}", True
        except EngineFailure as failure:
            health, error = Health.FAILED, str(failure)
            self.live = not isinstance(failure, EngineRefused | EngineStalled)
            if isinstance(failure, EngineGone):
                self._may_have_restarted()
        before = self.dispatchable, self.health, self.props
        if health is Health.READY and props is not None:
            self._adopt(props)
        self._failures = self._failures + 1 if health is Health.FAILED else 0
        self.health, self.last_error = health, error
        if self._doubts == doubts:  # else something broke while we looked: look again
            self._suspect = None
        self._test_if_due()
        if (self.dispatchable, self.health, self.props) != before:
            self.on_change(self)
        await self._wake_waiters()

    async def _wake_waiters(self) -> None:
        async with self._probed:
            self._probed.notify_all()

    def _adopt(self, props: Props) -> None:
        if props != self.props:
            self.model_digest = None
            if self._digest_task is not None:  # it reads the old model
                self._digest_task.cancel()
                self._digest_task = None
            self._may_have_restarted()
        if self.model_digest is None or not self.able:
            self._start_reading_digest(props.model_path)
        self.props = props

    def _start_reading_digest(self, model_path: str | None) -> None:
        reads = self._digest_task is not None and not self._digest_task.done()
        if model_path is not None and not reads and not self._closed:
            self._digest_task = asyncio.create_task(self._read_digest(model_path), name="model-digest")

    async def _read_digest(self, model_path: str) -> None:
        with contextlib.suppress(EngineFailure):
            self.model_digest = await self.engine.model_digest(model_path)
            self.on_change(self)  # it may prove to be another model than the pool's

    def _probe_delay_s(self) -> float:
        """When to look again: soon while loading, later and with jitter the longer it fails."""
        low, high = LOADING_POLL_S
        if self.health is Health.READY:
            return PROBE_INTERVAL_S
        if self.health is Health.FAILED:
            ceiling = BREAKER_POLL_S if self._failures >= BREAKER_FAILURES else high
            doublings = min(self._failures, BREAKER_FAILURES * 2)  # after 1024 of them Python gives up
            return self._chance.uniform(0.5, 1.0) * min(low * 2.0**doublings, ceiling)
        return self._chance.uniform(low, high) if self.health is Health.LOADING else high

    async def run(self) -> None:
        """Look after the engine until the replica is retired and empty; raises if a look has a bug."""
        async with asyncio.TaskGroup() as group:
            looks = [
                group.create_task(self.watch(), name=f"probe-{self.replica_id}"),
                group.create_task(self.drain(), name=f"drain-{self.replica_id}"),
            ]
            await self._vacated.wait()
            for look in looks:
                look.cancel()

    def exclude(self, reason: str | None) -> None:
        """Keep it out of its pool for `reason`, or, with None, let it in."""
        self.excluded = reason
        self._test_if_due()

    def retire(self) -> None:
        """Take no new task; what runs goes on, and `run` returns after it."""
        self._retired = True
        if not self.leases:
            self._vacated.set()

    async def watch(self) -> None:
        """Probe for ever: on an interval, and at once after a failure. Runs until cancelled."""
        while True:
            self._probe_now.clear()
            if self._suspect is not None or not self._progressing():
                await self.probe()
            if self._suspect is None:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self._probe_delay_s()):
                        await self._probe_now.wait()

    def _progressing(self) -> bool:
        now = asyncio.get_running_loop().time()
        return self.ready and self._last_progress is not None and now - self._last_progress < PROBE_INTERVAL_S

    # -- self-test ----------------------------------------------------------------------------

    def suspect_restart(self, reason: str) -> None:
        """The engine was gone or loading: like `suspect`, and what its self-test showed holds no more."""
        self._may_have_restarted()
        self.suspect(reason)

    def _may_have_restarted(self) -> None:
        self._untested = True
        self.determinism, self.self_test_fault = "unknown", None

    def _test_if_due(self) -> None:
        """Take the idle replica for its self-test before anybody else does."""
        self_test = None if self._retired else self._self_test
        if self_test is None or not self._untested or not self.dispatchable or self.leases:
            return
        self._untested = False
        lease = Lease(self, exclusive=True)
        lease.sent = True
        self.leases.add(lease)
        examination = asyncio.create_task(self._examine(self_test, lease), name="self-test")
        examination.add_done_callback(functools.partial(self._examined, lease))
        self._examination = examination

    def reconfigure(self, plan: ReplicaPlan) -> None:
        """Have what the plan says of the same engine: name, slots, GPUs, time to drain. Plain."""
        self.plan, self.replica_id, self.devices = plan, plan.replica_id, plan.devices
        self.configured_slots, self.drain_s = plan.slots, plan.drain_s

    async def tested(self) -> bool:
        """Return once no self-test is under way: whether there has been one."""
        if self._examination is not None:
            await asyncio.wait({self._examination})
        return self._self_test is not None and not self._untested

    async def _examine(self, self_test: SelfTest, lease: Lease) -> Verdict:
        try:
            async with asyncio.timeout(SELF_TEST_S):
                verdict = await self_test(self.engine, self.slots)
        except EngineFailure as failure:
            self.notice(failure)
            return Verdict("unknown", f"self-test: {failure.summary}")
        except TimeoutError:
            return Verdict("unknown", f"self-test: not done within {SELF_TEST_S:g} s")
        lease.sent = False  # it waited for everything it had sent
        return verdict

    def _examined(self, lease: Lease, examination: asyncio.Task[Verdict]) -> None:
        """The last word on a self-test, however it ended."""
        self._examination = None
        verdict = Verdict("unknown", "self-test: not finished")
        if not examination.cancelled():
            if (bug := examination.exception()) is None:
                verdict = examination.result()
            else:
                log.error("a bug ended the self-test", exc_info=bug, extra={"event": "bug"})
        if not self._untested:  # else it may be another engine by now
            self.determinism, self.self_test_fault = verdict.determinism, verdict.fault
        lease.close(clean=not lease.sent)
        self.on_change(self)

    # -- draining -----------------------------------------------------------------------------

    async def drain(self) -> None:
        """Free draining slots once the engine has let go of them. Runs until cancelled.

        Let go means: `/slots` shows no more busy slots than leases that were surely at work, twice in a row
        and at least 100 ms apart (a request not yet picked up reads as idle), or the engine refuses
        connections.
        """
        poll_s, most_s = DRAIN_POLL_S
        while True:
            if self.stuck is not None and not self.draining:
                self._set_stuck(None)
                await self._wake_waiters()
            if not self.draining:
                poll_s = DRAIN_POLL_S[0]
                self._drain_now.clear()
                await self._drain_now.wait()
            pending = {lease for lease in self.leases if lease.draining}
            looks_needed = 2
            try:
                idle = await self._look_idle()
            except (EngineGone, EngineLoading) as failure:
                idle, looks_needed = True, 1  # gone, or started anew: what it ran is no more
                self.notice(failure)
            except EngineFailure as failure:
                idle = False
                log.debug("slots can't be read while draining: %s", failure)
            for lease in pending & self.leases:
                lease.idle_looks = lease.idle_looks + 1 if idle else 0
                if lease.idle_looks >= looks_needed:
                    self._let_go(lease)
            if self.draining:
                self._check_overdue()
                await asyncio.sleep(most_s if idle else poll_s)
                poll_s = min(2 * poll_s, most_s)

    async def _look_idle(self) -> bool:
        """Whether the engine is at work for live leases alone.

        A lease explains a busy slot only if the engine had begun on it before the look, and it is still at
        work some time after: else the slot may be another's, and this one's request still on its way.
        """
        answered = {lease for lease in self.leases if lease.answered and not lease.draining}
        busy_slots = await self.engine.busy_slots()
        if not busy_slots or busy_slots > len(answered):
            return not busy_slots
        await asyncio.sleep(DRAIN_POLL_S[1])
        at_work = {lease for lease in answered & self.leases if not lease.draining}
        return busy_slots <= len(at_work)

    def _let_go(self, lease: Lease) -> None:
        lease.let_go()
        if lease.closed:
            self._release(lease)

    def _check_overdue(self) -> None:
        now = asyncio.get_running_loop().time()
        overdue = any(lease.draining and now - lease.draining_since > self.drain_s for lease in self.leases)
        if overdue and self.stuck is None:
            self._set_stuck(
                f"a slot did not come back within {self.drain_s:g} s; waiting for the engine to be idle"
            )

    def _set_stuck(self, reason: str | None) -> None:
        if reason != self.stuck:
            self.stuck = reason
            self.on_change(self)

    async def close(self) -> None:
        """End every background look; called once no task uses the engine."""
        self._closed, self._self_test = True, None  # a probe that is under way begins nothing new
        if self._digest_task is not None:
            self._digest_task.cancel()
        while (examination := self._examination) is not None:
            examination.cancel()
            await asyncio.wait({examination})

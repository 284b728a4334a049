"""Other replicas and settings for pools that run, or nothing changed at all.

The one rule: everything is read, built and tried out before the one plain step that changes anything; what
goes wrong before it leaves no trace, and nothing can go wrong in it.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Protocol

import msgspec

from llorch.agreement import disagreement
from llorch.engine import EngineFailure
from llorch.errors import ReloadFailed, ReloadStep
from llorch.orchestrator import Orchestrator
from llorch.plan import PoolPlan, ReplicaPlan
from llorch.pool import Pool
from llorch.replica import Replica
from llorch.selftest import decodes

log = logging.getLogger("llorch.reload")

PROOF_S = 30.0


class PlanRefused(Exception):
    """What is wrong with a new configuration, a line for each fault, none with a secret."""

    def __init__(self, faults: Sequence[str]) -> None:
        super().__init__("; ".join(faults))
        self.faults = faults


class Blueprint(Protocol):
    """Where plans come from, and what makes a replica of one."""

    def read(self) -> list[PoolPlan]:
        """Every pool as the configuration says now; raises PlanRefused."""
        ...

    def with_replicas(self, plan: PoolPlan, replicas: Sequence[ReplicaPlan]) -> PoolPlan:
        """The plan with other replicas; raises PlanRefused."""
        ...

    def build(self, plan: ReplicaPlan, pool: PoolPlan) -> Replica:
        """A replica that nobody uses yet."""
        ...

    def adopted(self) -> None:
        """What was read last is in force now."""
        ...


class Reloaded(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a reload has done; `retired`: the replicas that finish what they run and are let go."""

    pool_id: str
    replicas: list[str]
    retired: list[str]
    model: str | None = None
    steps: list[ReloadStep]


class _Steps:
    """What was done so far, and how long each took."""

    def __init__(self, engine: str | None) -> None:
        self.taken: list[ReloadStep] = []
        self._engine = engine

    @asynccontextmanager
    async def step(self, name: str, replica_id: str | None = None) -> AsyncIterator[None]:
        """Note the step; what goes wrong in it fails the reload. Raises ReloadFailed."""
        loop = asyncio.get_running_loop()
        began, fault = loop.time(), None
        try:
            async with asyncio.timeout(PROOF_S):
                yield
        except (EngineFailure, PlanRefused) as error:
            fault = getattr(error, "summary", str(error))
        except TimeoutError:
            fault = f"not done within {PROOF_S:g} s"
        took_ms = round((loop.time() - began) * 1000)
        self.taken.append(
            ReloadStep(name=name, ok=fault is None, ms=took_ms, replica_id=replica_id, fault=fault)
        )
        if fault is not None:
            where = f"{name} of {replica_id}" if replica_id else name
            raise ReloadFailed(
                f"nothing was changed: {where}: {fault}", engine=self._engine, steps=self.taken
            )


class _Change:
    """What one pool is to become, its new replicas built and tried out."""

    def __init__(self, pool: Pool, plan: PoolPlan) -> None:
        self.pool, self.plan = pool, plan
        self.replicas: list[tuple[ReplicaPlan, Replica]] = []
        self.built: list[Replica] = []

    def switch(self) -> None:
        """Make it so. Plain."""
        for plan, replica in self.replicas:
            replica.reconfigure(plan)
        self.pool.switch([replica for _, replica in self.replicas], self.plan.settings)

    async def discard(self) -> None:
        """Let go of what was built for nothing."""
        for replica in self.built:
            await replica.close()
            await replica.engine.close()


class Reloader:
    """Changes the pools of `orchestrator`, which stand as `plans` say, one reload at a time."""

    def __init__(self, orchestrator: Orchestrator, plans: Sequence[PoolPlan], blueprint: Blueprint) -> None:
        self._orchestrator = orchestrator
        self._plans = {plan.pool_id: plan for plan in plans}
        self._blueprint = blueprint
        self._under_way: asyncio.Task[list[Reloaded]] | None = None

    @property
    def under_way(self) -> bool:
        """Whether one is."""
        return self._under_way is not None

    async def reload_pool(self, pool_id: str, replicas: Sequence[ReplicaPlan] | None) -> Reloaded:
        """Give one pool these replicas, or, with None, what the configuration file says of it now.

        A caller who goes away does not stop it. Raises UnknownPool, ReloadFailed.
        """
        pool = self._orchestrator.pool(pool_id)

        def plans() -> list[PoolPlan]:
            if replicas is not None:
                return [self._blueprint.with_replicas(self._plans[pool_id], replicas)]
            return [plan for plan in self._blueprint.read() if plan.pool_id == pool_id]

        return (await self._reload(plans, pool.engine_name))[0]

    async def reload_all(self) -> list[Reloaded]:
        """Give every pool what the configuration file says now, all in one step. Raises ReloadFailed."""
        return await self._reload(self._blueprint.read)

    async def close(self) -> None:
        """Give up a reload that is under way."""
        if self._under_way is not None:
            self._under_way.cancel()
            await asyncio.wait({self._under_way})

    async def _reload(self, plans: Callable[[], list[PoolPlan]], engine: str | None = None) -> list[Reloaded]:
        if self._under_way is not None:
            message = "nothing was changed: another reload is under way; try again when it is done"
            _say_failed(message)
            raise ReloadFailed(message, engine=engine)
        self._under_way = asyncio.create_task(self._work(plans, engine), name="reload")
        self._under_way.add_done_callback(self._done)
        return await asyncio.shield(self._under_way)

    def _done(self, work: "asyncio.Task[list[Reloaded]]") -> None:
        self._under_way = None
        if not work.cancelled() and isinstance(failure := work.exception(), ReloadFailed):
            _say_failed(failure.message)

    async def _work(self, plans: Callable[[], list[PoolPlan]], engine: str | None) -> list[Reloaded]:
        steps, changes = _Steps(engine), list[_Change]()
        try:
            async with steps.step("validate"):
                for plan in plans():
                    changes.append(_Change(self._orchestrator.pools[plan.pool_id], plan))
            for change in changes:
                await self._prepare(change, steps)
            async with steps.step("switch"):
                if self._orchestrator.stopping:
                    raise PlanRefused(["llorch is stopping"])
                return [self._switch(change, steps) for change in changes]
        except BaseException:
            for change in changes:
                await change.discard()
            raise

    async def _prepare(self, change: _Change, steps: _Steps) -> None:
        """Build what is new, and try out everything."""
        kept = {replica.plan.engine: replica for replica in change.pool.replicas if replica.plan is not None}
        for plan in change.plan.replicas:
            if (replica := kept.get(plan.engine)) is not None:
                change.replicas.append((plan, replica))
                await self._look_at(replica, plan.replica_id, steps)
                continue
            replica = self._blueprint.build(plan, change.plan)
            change.built.append(replica)
            change.replicas.append((plan, replica))
            await self._prove(replica, steps)
        async with steps.step("agree"):
            able = [replica for _, replica in change.replicas if replica.able]
            for replica in able[1:]:
                if (reason := disagreement(replica.made, able[0].made)) is not None:
                    raise PlanRefused([f"{replica.replica_id} differs from {able[0].replica_id}: {reason}"])

    async def _look_at(self, replica: Replica, replica_id: str, steps: _Steps) -> None:
        """One that stays may be as bad as it was before, not worse."""
        was_able = replica.able
        async with steps.step("probe", replica_id):
            await replica.probe()
            if was_able and not replica.able:
                raise PlanRefused([replica.fault or replica.health.value])

    async def _prove(self, replica: Replica, steps: _Steps) -> None:
        """A new one has to be up, to decode, and to give the same bytes for the same seed."""
        async with steps.step("probe", replica.replica_id):
            await replica.probe()
            if not replica.able:
                raise PlanRefused([replica.fault or replica.health.value])
        async with steps.step("decode", replica.replica_id):
            if not await replica.tested():
                await decodes(replica.engine)
            if replica.self_test_fault is not None or replica.determinism == "failed":
                raise PlanRefused([replica.self_test_fault or "the same seed gave two different texts"])

    def _switch(self, change: _Change, steps: _Steps) -> Reloaded:
        staying = [replica for _, replica in change.replicas]
        retired = [replica.replica_id for replica in change.pool.replicas if replica not in staying]
        change.switch()
        change.built.clear()
        self._plans[change.plan.pool_id] = change.plan
        self._blueprint.adopted()
        now = [plan.replica_id for plan in change.plan.replicas]
        pool, props = change.pool, change.pool.props
        message = f"pool {pool.pool_id} was reloaded: {len(now)} replicas, {len(retired)} let go"
        log.info(message, extra={"event": "reloaded", "pool_id": pool.pool_id, **pool.log_fields()})
        model = props.model if props else None
        return Reloaded(pool_id=pool.pool_id, replicas=now, retired=retired, model=model, steps=steps.taken)


def _say_failed(message: str) -> None:
    log.warning("reload failed: %s", message, extra={"event": "reload_failed"})

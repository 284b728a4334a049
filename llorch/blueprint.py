"""From the configuration to pools and replicas: at start, and again whenever it is read anew.

The one rule: what can't change while llorch runs is named, never ignored.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import msgspec

from llorch import journal, rules, selftest
from llorch.adapters.llamacpp import LlamaCpp
from llorch.admission import QueueLimits
from llorch.plan import PoolPlan, PoolSettings, ReplicaPlan
from llorch.pool import Pool
from llorch.reload import PlanRefused
from llorch.replica import Replica
from llorch.replicaset import FreeVram
from llorch.schema import Adapter, Config, ConfigError, PoolTable, ReplicaTable, pools_in_force, secrets_of

_CHANGEABLE_TABLES = ("adapter", "pools", "queue")
_CHANGEABLE_KEYS = frozenset(
    {
        "limits.ctx",
        "limits.max_tokens_default",
        "timeouts.first_token_s",
        "timeouts.idle_s",
        "timeouts.wall_s",
    }
)


class ConfiguredPools:
    """Makes pools of `config`; `reread` reads it again, `on_secrets` is told of those that come with it.

    `accelerator` is what computes, for health; `free_vram` what placement goes by.
    """

    def __init__(
        self,
        config: Config,
        accelerator: str,
        *,
        free_vram: FreeVram,
        reread: Callable[[], Config],
        on_secrets: Callable[[Iterable[str]], None],
    ) -> None:
        self._config = self._read = config
        self._accelerator = accelerator
        self._free_vram = free_vram
        self._reread = reread
        self._on_secrets = on_secrets
        self.plans = self._plans(config)

    def pools(self) -> list[Pool]:
        """Every pool, the default one first; needs a running loop."""
        return [self._pool(plan) for plan in self.plans]

    def read(self) -> list[PoolPlan]:
        """Every pool as the configuration says now; raises PlanRefused."""
        try:
            config = self._reread()
        except ConfigError as error:
            raise PlanRefused(error.faults) from None
        plans = self._plans(config)
        if faults := [*_fixed(self._config, config), *_other_pools(self.plans, plans)]:
            raise PlanRefused(faults)
        self._on_secrets(secrets_of(msgspec.to_builtins(config)))
        self._read = config
        return plans

    def with_replicas(self, plan: PoolPlan, replicas: Sequence[ReplicaPlan]) -> PoolPlan:
        """The plan with other replicas; raises PlanRefused.

        An engine that the pool has already keeps its key; no other is ever sent one that it was not given.
        """
        keys = {replica.endpoint: replica.api_key for replica in plan.replicas}
        tables = pools_in_force(self._config)
        told = tuple(
            ReplicaTable(
                id=replica.replica_id,
                endpoint=replica.endpoint,
                api_key=replica.api_key or keys.get(replica.endpoint, ""),
                slots=replica.slots or "auto",
                devices=replica.devices,
            )
            for replica in replicas
        )
        tables[plan.pool_id] = msgspec.structs.replace(tables[plan.pool_id], replicas=told)
        wanted = msgspec.structs.replace(self._config, adapter=Adapter(), pools=tables)
        faults: list[str] = []
        rules.check(wanted, faults)
        if faults:
            raise PlanRefused([fault.replace(f"pools.{plan.pool_id}.", "$.") for fault in faults])
        self._on_secrets([replica.api_key for replica in replicas])
        self._read = wanted
        made = self._plan(plan.pool_id, pools_in_force(wanted)[plan.pool_id], wanted)
        named = (
            msgspec.structs.replace(replica, told_at=f"$.replicas[{number}]")
            for number, replica in enumerate(made.replicas)
        )
        return msgspec.structs.replace(made, replicas=tuple(named))

    def build(self, plan: ReplicaPlan, pool: PoolPlan) -> Replica:
        """A replica that nobody uses yet; needs a running loop."""
        timeouts = self._config.timeouts
        engine = LlamaCpp(
            plan.endpoint,
            api_key=plan.api_key,
            connect_s=timeouts.connect_s,
            control_s=timeouts.control_s,
            told_at=plan.told_at,
        )
        return Replica(
            plan.replica_id,
            engine,
            slots=plan.slots,
            drain_s=plan.drain_s,
            devices=plan.devices,
            plan=plan,
            self_test=selftest.examine if pool.self_test else None,
        )

    def adopted(self) -> None:
        """What was read last is in force now."""
        self._config = self._read

    def _pool(self, plan: PoolPlan) -> Pool:
        pool = Pool(
            plan.pool_id,
            plan.engine,
            plan.settings,
            [self.build(replica, plan) for replica in plan.replicas],
            on_readiness=journal.readiness_changed,
            free_vram=self._free_vram,
        )
        pool.placement_listeners.append(journal.task_placed)
        return pool

    def _plans(self, config: Config) -> list[PoolPlan]:
        return [self._plan(name, pool, config) for name, pool in pools_in_force(config).items()]

    def _plan(self, name: str, pool: PoolTable, config: Config) -> PoolPlan:
        queue, limits, timeouts = config.queue, config.limits, config.timeouts
        settings = PoolSettings(
            queue=QueueLimits(
                capacity=queue.capacity,
                batch_capacity=queue.batch_capacity,
                max_bytes=queue.max_bytes,
                batch_promote_s=None if config.profile == "home" else queue.batch_promote_s,
            ),
            max_wait_s=queue.max_wait_s,
            default_retry_after_ms=queue.default_retry_after_ms,
            ctx=limits.ctx,
            max_tokens_default=limits.max_tokens_default,
            max_tokens=limits.max_tokens,
            retries=pool.retries,
            first_token_s=timeouts.first_token_s,
            idle_s=timeouts.idle_s,
            wall_s=timeouts.wall_s,
            accelerator=self._accelerator,
        )
        replicas = tuple(
            ReplicaPlan(
                replica_id=replica.id,
                endpoint=replica.endpoint,
                slots=None if replica.slots == "auto" else replica.slots,
                devices=replica.devices,
                api_key=replica.api_key,
                drain_s=pool.drain_s,
                told_at=f"pools.{name}.replicas[{number}]" if config.pools else "adapter",
            )
            for number, replica in enumerate(pool.replicas)
        )
        return PoolPlan(
            pool_id=name,
            engine=pool.engine,
            settings=settings,
            replicas=replicas,
            self_test=pool.self_test,
            told_at=f"pools.{name}" if config.pools else "adapter",
        )


def _fixed(old: Config, new: Config) -> list[str]:
    """A line for each key that differs and can't, without its value: it may be a secret."""
    was, is_now = _flat(old), _flat(new)
    return [
        f"{key}: can't change while llorch runs: restart it, or put back what it was"
        for key in was
        if was[key] != is_now[key]
    ]


def _flat(config: Config) -> dict[str, Any]:
    tables: dict[str, Any] = msgspec.to_builtins(config)
    flat: dict[str, Any] = {}
    for key, value in tables.items():
        if key in _CHANGEABLE_TABLES:
            continue
        flat |= (
            {f"{key}.{name}": inner for name, inner in value.items()}
            if isinstance(value, dict)
            else {key: value}
        )
    return {key: value for key, value in flat.items() if key not in _CHANGEABLE_KEYS}


def _other_pools(old: Sequence[PoolPlan], new: Sequence[PoolPlan]) -> list[str]:
    was, is_now = [plan.pool_id for plan in old], [plan.pool_id for plan in new]
    changes = [f"pools.{name}: can't be added while llorch runs" for name in is_now if name not in was]
    changes += [f"pools.{name}: can't be taken away while llorch runs" for name in was if name not in is_now]
    if not changes and was[0] != is_now[0]:
        changes.append(f"pools.{is_now[0]}.default: can't change while llorch runs")
    tested = {plan.pool_id: plan.self_test for plan in old}
    changes += [
        f"{plan.told_at}.self_test: can't change while llorch runs"
        for plan in new
        if plan.self_test is not tested.get(plan.pool_id, plan.self_test)
    ]
    return [f"{change}: restart it" for change in changes]

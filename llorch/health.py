"""How a pool is, as `GET /v1/pools/{pool_id}/health` says it."""

import msgspec

from llorch.selftest import Determinism


class SlotCounts(msgspec.Struct, frozen=True, kw_only=True):
    """Slots in force, those at work, and those the engine has not let go of yet."""

    total: int
    busy: int
    draining: int


class LaneCounts(msgspec.Struct, frozen=True, kw_only=True):
    """Waiting tasks of one priority, and how many may wait."""

    depth: int
    capacity: int


class QueueCounts(msgspec.Struct, frozen=True, kw_only=True):
    """Waiting tasks, how many interactive ones may wait, the bytes of all their prompts, and each lane."""

    depth: int
    capacity: int
    bytes: int
    interactive: LaneCounts
    batch: LaneCounts


class ReplicaHealth(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One engine endpoint, and the GPUs that it computes on where that is configured."""

    replica_id: str
    ready: bool
    slots: int
    busy: int
    draining: int
    determinism: Determinism
    devices: tuple[int, ...] = ()
    last_error: str | None = None


class DrainState(msgspec.Struct, frozen=True):
    """A pool that takes no new tasks: ms until what it still has is failed, 0 once that is done."""

    deadline_ms: int


class PoolHealth(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How a pool is [MVP-041]; `live`: the engine's HTTP answers; `ctx` in tokens, null until known."""

    pool_id: str
    live: bool
    ready: bool
    engine: str
    engine_version: str | None = None
    model: str | None = None
    model_digest: str | None = None
    ctx: int | None
    slots: SlotCounts
    queue: QueueCounts
    replicas: list[ReplicaHealth]
    determinism: Determinism
    sampler_profile_version: str
    last_error: str | None = None
    accelerator: str
    drain: DrainState | None = None

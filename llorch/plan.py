"""What a pool is to be, as the configuration says it, before anything of it runs.

The one rule: frozen values alone, so that two plans can be compared.
"""

import msgspec

from llorch.admission import QueueLimits


class PoolSettings(msgspec.Struct, frozen=True, kw_only=True):
    """The limits of one pool, in seconds and tokens; `ctx` 0 is the engine's own."""

    queue: QueueLimits
    max_wait_s: float
    default_retry_after_ms: int
    ctx: int
    max_tokens_default: int
    max_tokens: int
    retries: int
    first_token_s: float
    idle_s: float
    wall_s: float
    accelerator: str = "unknown"


class ReplicaPlan(msgspec.Struct, frozen=True, kw_only=True):
    """One engine of a pool; `slots` None: as many as it has. `devices`: indices of its GPUs.

    `told_at` is the table of the configuration that says so.
    """

    replica_id: str
    endpoint: str
    slots: int | None = 1
    devices: tuple[int, ...] = ()
    api_key: str = ""
    drain_s: float = 60.0
    told_at: str = "adapter"

    @property
    def engine(self) -> tuple[str, str]:
        """What makes it another engine: where it is, and the key to it."""
        return self.endpoint, self.api_key


class PoolPlan(msgspec.Struct, frozen=True, kw_only=True):
    """A pool and its replicas."""

    pool_id: str
    engine: str
    settings: PoolSettings
    replicas: tuple[ReplicaPlan, ...]
    self_test: bool = True
    told_at: str = "adapter"

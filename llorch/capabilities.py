"""What a client can plan with, as `GET /v1/capabilities` says it: the API's version, what each pool can do.

The one rule: only what stays while the engine runs as it is; what comes and goes is in a pool's health.
"""

import msgspec

from llorch.engine import Props
from llorch.health import PoolHealth
from llorch.selftest import Determinism

API_VERSION = "1.0.0"  # of the HTTP API, by SemVer; not the program's


class Features(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine can do beyond plain prompts; null until it was seen.

    `chat_template`: it takes `messages`. `grammar`: it takes `grammar` and `json_schema`. `determinism`:
    whether seeds can be relied on, as the self-test found.
    """

    chat_template: bool | None
    grammar: bool | None
    determinism: Determinism


class PoolCapabilities(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One pool: `ctx` tokens of context for a task, null until known; `max_tokens` a task may ask for."""

    pool_id: str
    engine: str
    engine_version: str | None = None
    model: str | None = None
    model_digest: str | None = None
    ctx: int | None
    max_tokens: int
    slots: int
    features: Features
    accelerator: str


class Capabilities(msgspec.Struct, frozen=True, kw_only=True):
    """The version of the API, and what each pool can do; the default pool comes first."""

    api_version: str = API_VERSION
    pools: list[PoolCapabilities]


def pool_capabilities(health: PoolHealth, props: Props | None, max_tokens: int) -> PoolCapabilities:
    """What the pool can do, by its health and what its engine says of itself (None: nothing yet)."""
    return PoolCapabilities(
        pool_id=health.pool_id,
        engine=health.engine,
        engine_version=health.engine_version,
        model=health.model,
        model_digest=health.model_digest,
        ctx=health.ctx,
        max_tokens=max_tokens,
        slots=health.slots.total,
        features=Features(
            chat_template=props.chat_template if props else None,
            grammar=props.grammar if props else None,
            determinism=health.determinism,
        ),
        accelerator=health.accelerator,
    )

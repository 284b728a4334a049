"""The JSON of the control plane: what a reload and a drain are told, and what they answer.

The one rule: as strict as a task's body, and nothing in it is a path on this machine: a client may name an
engine, never a file.
"""

from typing import Annotated, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from llorch.errors import InvalidParams
from llorch.plan import ReplicaPlan
from llorch.wire import decoded

MAX_DEADLINE_MS = 24 * 3600 * 1000
MAX_REPLICAS = 64


class ReplicaBody(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """One engine: as in `[[pools.NAME.replicas]]`, but for the file of its key."""

    endpoint: Annotated[str, Meta(min_length=1, max_length=512)]
    id: Annotated[str, Meta(min_length=1, max_length=64)] | UnsetType = UNSET
    api_key: Annotated[str, Meta(max_length=4096)] = ""
    slots: Annotated[int, Meta(ge=1, le=1024)] | Literal["auto"] = 1
    devices: Annotated[tuple[Annotated[int, Meta(ge=0, le=255)], ...], Meta(max_length=64)] = ()


class ReloadBody(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """The body of a reload; without `replicas`, or without a body, the configuration is read again."""

    replicas: Annotated[tuple[ReplicaBody, ...], Meta(min_length=1, max_length=MAX_REPLICAS)] | UnsetType = (
        UNSET
    )


class DrainBody(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """The body of a drain: ms until what waits and runs is failed, or `cancel` to end the drain."""

    deadline_ms: Annotated[int, Meta(ge=0, le=MAX_DEADLINE_MS)] | UnsetType = UNSET
    cancel: bool | UnsetType = UNSET


class Drained(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Whether the pool refuses new tasks now, and ms until what it still has is failed."""

    pool_id: str
    draining: bool
    deadline_ms: int | None = None


_decode_reload = msgspec.json.Decoder(ReloadBody).decode
_decode_drain = msgspec.json.Decoder(DrainBody).decode


def new_replicas(body: bytes, pool_id: str) -> list[ReplicaPlan] | None:
    """The replicas that `body` asks for, None if it names none; raises InvalidParams."""
    if not body:
        return None
    said = decoded(body, _decode_reload, {"$": ReloadBody, "$.replicas": ReplicaBody})
    if said.replicas is UNSET:
        return None
    return [
        ReplicaPlan(
            replica_id=f"{pool_id}-{number}" if replica.id is UNSET else replica.id,
            endpoint=replica.endpoint,
            slots=None if replica.slots == "auto" else replica.slots,
            devices=replica.devices,
            api_key=replica.api_key,
        )
        for number, replica in enumerate(said.replicas)
    ]


def drain_deadline_s(body: bytes) -> float | None:
    """Seconds until the deadline that `body` gives, None to end the drain; raises InvalidParams."""
    said = decoded(body, _decode_drain, {"$": DrainBody})
    if (said.deadline_ms is UNSET) == (said.cancel is UNSET):
        raise InvalidParams("$: exactly one of deadline_ms and cancel is needed")
    if said.deadline_ms is not UNSET:
        return said.deadline_ms / 1000
    if not said.cancel:
        raise InvalidParams("$.cancel: expected true; leave it out and give deadline_ms to drain")
    return None

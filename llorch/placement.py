"""Which replica of a pool takes a task: the least loaded that can, by a rule anyone can check by hand.

The one rule: a pure function of what it is given. The same snapshots give the same choice.
"""

from collections.abc import Sequence

import msgspec

from llorch.selftest import Determinism


class Candidate(msgspec.Struct, frozen=True, kw_only=True):
    """A replica as it stands: `active` slots are those at work or still draining.

    `ready`: it works, and its pool does not keep it out; `open`: a task may be sent this moment, as none has
    it for itself and nothing has just broken. `devices` are the GPUs that its engine computes on, and
    `free_vram_bytes` is what those have free, None where nothing is known of them.
    """

    replica_id: str
    ready: bool
    open: bool = True
    slots: int
    active: int
    determinism: Determinism = "unknown"
    devices: tuple[int, ...] = ()
    free_vram_bytes: int | None = None


class Decision(msgspec.Struct, frozen=True, kw_only=True):
    """What was decided and why; `replica_id` None: the task waits. `considered`: how many could take it.

    `pinned`: nothing else was allowed; `fallback`: no free VRAM was known, so that load alone decided.
    """

    replica_id: str | None
    reason: str
    considered: int
    pinned: bool = False
    fallback: bool = False


def choose(candidates: Sequence[Candidate], *, strict: bool) -> Decision:
    """The replica for the next task.

    Ready ones with a free slot are considered; for a `strict` task idle ones whose seeds are verified, or,
    where none of the ready ones is, those of which nothing is known yet. Of these the one goes first that has
    most free VRAM, then the one with the fewest active slots, then the first by name.
    """
    ready = [candidate for candidate in candidates if candidate.ready]
    fit = [candidate for candidate in ready if candidate.open and candidate.active < candidate.slots]
    if strict:
        verified = any(candidate.determinism == "verified" for candidate in ready)
        wanted = "verified" if verified else "unknown"
        fit = [candidate for candidate in fit if not candidate.active and candidate.determinism == wanted]
    if not fit:
        what = "no verified replica is idle" if strict else "no ready replica has a free slot"
        return Decision(replica_id=None, reason=what, considered=0)
    best = min(fit, key=_order)
    return Decision(
        replica_id=best.replica_id,
        reason=_reason(best, fit),
        considered=len(fit),
        pinned=len(candidates) == 1,
        fallback=best.free_vram_bytes is None,
    )


def _order(candidate: Candidate) -> tuple[int, int, str]:
    return -(candidate.free_vram_bytes or 0), candidate.active, candidate.replica_id


def _reason(best: Candidate, fit: Sequence[Candidate]) -> str:
    if len(fit) == 1:
        return "the only one that can take it"
    others = [candidate for candidate in fit if candidate is not best]
    most_free = max(candidate.free_vram_bytes or 0 for candidate in others)
    if (best.free_vram_bytes or 0) > most_free:
        return f"most free VRAM ({(best.free_vram_bytes or 0) / 2**30:.1f} GiB)"
    same = [candidate for candidate in others if (candidate.free_vram_bytes or 0) == most_free]
    if best.active < min(candidate.active for candidate in same):
        return f"fewest active slots ({best.active} of {best.slots})"
    return "the first by name of those alike"

"""Which replica takes a task: the rule beside a plain description of it, for any replicas at all."""

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llorch.placement import Candidate, Decision, choose
from llorch.selftest import Determinism

VERDICTS: list[Determinism] = ["verified", "unknown", "failed"]


@st.composite
def candidates(draw: st.DrawFn) -> list[Candidate]:
    """Replicas of a pool, many of them alike."""
    found = []
    for replica_id in draw(st.lists(st.sampled_from("abcdef"), unique=True, max_size=6)):
        slots = draw(st.integers(0, 3))
        found.append(
            Candidate(
                replica_id=replica_id,
                ready=draw(st.sampled_from([True, True, False])),
                open=draw(st.sampled_from([True, True, False])),
                slots=slots,
                active=draw(st.integers(0, slots + 1)),
                determinism=draw(st.sampled_from(VERDICTS)),
                free_vram_bytes=draw(st.sampled_from([None, None, 0, 2**30, 3 * 2**30])),
            )
        )
    return found


def allowed(candidate: Candidate, everyone: list[Candidate], *, strict: bool) -> bool:
    """Whether it may take the task at all."""
    if not (candidate.ready and candidate.open and candidate.active < candidate.slots):
        return False
    if not strict:
        return True
    verified = any(other.ready and other.determinism == "verified" for other in everyone)
    return candidate.active == 0 and candidate.determinism == ("verified" if verified else "unknown")


def chosen(decision: Decision, everyone: list[Candidate]) -> Candidate:
    """The replica that was chosen."""
    [found] = [candidate for candidate in everyone if candidate.replica_id == decision.replica_id]
    return found


@given(candidates(), st.booleans())
@settings(max_examples=120, deadline=None)
def test_only_one_that_may_take_it_is_chosen(everyone: list[Candidate], strict: bool) -> None:
    """Never an unready or a full one; strict ones on an idle, verified one, or an unknown one if none is."""
    fit = [candidate for candidate in everyone if allowed(candidate, everyone, strict=strict)]
    decision = choose(everyone, strict=strict)
    assert decision.considered == len(fit)
    assert (decision.replica_id is None) == (not fit)
    if not fit:
        assert decision.reason in ("no verified replica is idle", "no ready replica has a free slot")
        return
    assert chosen(decision, everyone) in fit
    assert decision.pinned == (len(everyone) == 1)


@given(candidates(), st.booleans())
@settings(max_examples=120, deadline=None)
def test_the_best_by_free_memory_load_and_name_is_chosen(everyone: list[Candidate], strict: bool) -> None:
    """Most free VRAM; of those with as much the fewest active slots; of those the first name."""
    decision = choose(everyone, strict=strict)
    if decision.replica_id is None:
        return
    best = chosen(decision, everyone)
    vram, same = best.free_vram_bytes or 0, []
    for other in everyone:
        if other is not best and allowed(other, everyone, strict=strict):
            assert (other.free_vram_bytes or 0) <= vram
            if (other.free_vram_bytes or 0) == vram:
                same.append(other)
                assert (other.active, other.replica_id) > (best.active, best.replica_id)
    assert decision.fallback == (best.free_vram_bytes is None)
    if decision.considered == 1:
        expected = "the only one that can take it"
    elif not same:
        expected = f"most free VRAM ({vram / 2**30:.1f} GiB)"
    elif all(other.active > best.active for other in same):
        expected = f"fewest active slots ({best.active} of {best.slots})"
    else:
        expected = "the first by name of those alike"
    assert decision.reason == expected


@given(st.data(), candidates(), st.booleans())
@settings(max_examples=80, deadline=None)
def test_the_same_replicas_give_the_same_choice(
    data: st.DataObject, everyone: list[Candidate], strict: bool
) -> None:
    """In whatever order they come, as often as it is asked, and nothing is changed by it."""
    before = msgspec.json.encode(everyone)
    decision = choose(everyone, strict=strict)
    assert choose(data.draw(st.permutations(everyone)), strict=strict) == decision
    assert choose(tuple(everyone), strict=strict) == decision
    assert msgspec.json.encode(everyone) == before


@given(candidates(), st.booleans())
@settings(max_examples=80, deadline=None)
def test_who_can_not_take_it_changes_nothing_but_a_verdict(everyone: list[Candidate], strict: bool) -> None:
    """Without the unready ones the same one is chosen for the same reason."""
    decision = choose(everyone, strict=strict)
    without = choose([candidate for candidate in everyone if candidate.ready], strict=strict)
    assert msgspec.structs.replace(without, pinned=decision.pinned) == decision


def a(replica_id: str, **fields: object) -> Candidate:
    """A ready, idle replica of two slots."""
    return Candidate(**{"replica_id": replica_id, "ready": True, "slots": 2, "active": 0} | fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("busy", [{"active": 1}, {"active": 1, "open": False}, {"open": False}])
def test_a_strict_task_waits_for_a_verified_replica_that_works(busy: dict[str, object]) -> None:
    """Whatever keeps it, another strict task too: one of which nothing is known is no way out."""
    verified, unknown = a("v", determinism="verified", **busy), a("u")
    assert choose([verified, unknown], strict=True).replica_id is None
    assert choose([verified, unknown], strict=False).replica_id == "u"
    gone = msgspec.structs.replace(verified, ready=False)
    assert choose([gone, unknown], strict=True).replica_id == "u"
    assert choose([gone, a("f", determinism="failed")], strict=True).replica_id is None

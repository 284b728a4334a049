"""The soak finds nothing in llorch, and does find what is planted."""

import pytest

from tests.soak.__main__ import Soak

GAPS = """
from llorch import task
frame = task.token_frame
task.token_frame = lambda event_id, text, i: frame(event_id, text, 4 if i == 3 else i)
"""
LEAKS = """
from llorch.replica import Replica
release, count = Replica._release, 0

def leaky(self, lease):
    global count
    count += 1
    if count != 30:
        release(self, lease)

Replica._release = leaky
"""
LATE = """
from llorch.eventlog import EventLog
EventLog.seal = lambda self, end, recall=False, seal=EventLog.seal: seal(self, end)
"""


async def test_no_task_is_lost_while_the_engine_is_killed() -> None:
    """Each admitted task ends once, as the contract says; slots, files and memory come back; exit 0."""
    assert await Soak(tasks=300, kills=3, seed=1).run() == []


async def test_no_task_is_lost_by_reloads_and_deaths_of_two_engines() -> None:
    """What had not begun goes to the other engine, what a reload takes away finishes; both lanes."""
    soak = Soak(tasks=300, kills=3, seed=4, engines=2, reloads=6)
    assert await soak.run() == []
    assert soak.reloaded == 6


@pytest.mark.parametrize(
    ("bug", "says"),
    [
        (GAPS, ["token {'t':"]),
        (LEAKS, ["not ready and idle", "TimeoutError"]),  # what runs alone waits for that slot for ever
        (LATE, ["a reader after the cancel got"]),
    ],
    ids=["gap", "slot-leak", "token-after-cancel"],
)
async def test_a_planted_bug_is_found(bug: str, says: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each kind of bug is reported as what it is."""
    monkeypatch.setattr("tests.soak.__main__.SETTLE_S", 2.0)
    faults = await Soak(tasks=300, seed=2, before=bug, ends_within_s=4.0).run()
    for what in says:
        assert any(what in fault for fault in faults), faults

"""The arithmetic of waiting: what is predicted, what is clamped, and that more work never means less."""

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from llorch.estimate import MAX_RETRY_AFTER_MS, MIN_RETRY_AFTER_MS, Busy, ServiceEstimate

SECONDS = st.floats(0, 10_000)
RUNNING = st.lists(SECONDS, max_size=6)
SLOTS = st.integers(1, 6)


def measured(*service_s: float, default_ms: int = 2000) -> ServiceEstimate:
    """An estimate that has seen these."""
    estimate = ServiceEstimate(default_ms)
    for seconds in service_s:
        estimate.record(seconds)
    return estimate


# -- before and after measuring --------------------------------------------------------------------


def test_nothing_is_predicted_before_anything_was_measured() -> None:
    """No start is promised, and the backoff is the configured one [MVP-031]."""
    estimate = measured(default_ms=2500)
    assert estimate.predicted_start_ms([Busy([], 1)], ahead=0, strict_ahead=0, strict=False) is None
    assert estimate.retry_after_ms([Busy([], 1)]) == 2500


def test_the_first_measurement_counts_whole() -> None:
    """Later ones move the mean by a fifth."""
    estimate = measured(10)
    assert estimate.mean_s == 10
    estimate.record(20)
    assert estimate.mean_s == pytest.approx(12)


def test_a_negative_time_counts_as_none() -> None:
    """E23: no measurement can make a prediction negative."""
    assert measured(-5).mean_s == 0


@pytest.mark.parametrize(
    ("running_s", "slots", "ahead", "strict_ahead", "strict", "expected_ms"),
    [
        ([], 1, 0, 0, False, 0),  # a free slot
        ([4], 1, 0, 0, False, 6_000),  # what is left of the one that runs
        ([40], 1, 0, 0, False, 0),  # overdue: any moment now
        ([4], 1, 2, 0, False, 26_000),  # and two of ten seconds before it
        ([1, 4], 2, 0, 0, False, 6_000),  # the slot that frees first
        ([1, 4], 2, 1, 0, False, 9_000),  # the other one
        ([1, 4], 2, 2, 0, False, 16_000),  # the first one again
        ([4], 2, 0, 0, False, 0),  # a free slot beside a busy one
        ([1, 4], 2, 0, 0, True, 9_000),  # a strict task waits for both
        ([1, 4], 2, 1, 1, False, 19_000),  # behind a strict one that waits for both
        ([], 2, 3, 0, False, 10_000),  # two go at once, then the next two
    ],
)
def test_the_prediction_is_plain_queueing(
    running_s: list[float], slots: int, ahead: int, strict_ahead: int, strict: bool, expected_ms: int
) -> None:
    """With a mean of 10 s: what is left of those that run, then one mean for each round before it."""
    predicted = measured(10).predicted_start_ms(
        [Busy(running_s, slots)], ahead=ahead, strict_ahead=strict_ahead, strict=strict
    )
    assert predicted == expected_ms


@pytest.mark.parametrize(
    ("running_s", "expected_ms"), [([0.0], 10_000), ([9.0], 1000), ([9.9], 250), ([50.0], 250)]
)
def test_the_backoff_is_when_the_head_starts(running_s: list[float], expected_ms: int) -> None:
    """A place in the full queue frees as its head starts; never sooner than 250 ms."""
    assert measured(10).retry_after_ms([Busy(running_s, 1)]) == expected_ms


def test_the_backoff_of_a_strict_head_is_when_all_are_idle() -> None:
    """The queue moves when the slowest of the running ones is done."""
    assert measured(10).retry_after_ms([Busy([8, 3], 2)]) == 2000
    assert measured(10).retry_after_ms([Busy([8, 3], 2)], head_is_strict=True) == 7000


# -- properties ------------------------------------------------------------------------------------


@given(st.lists(st.floats(-1e9, 1e9), max_size=5), RUNNING, SLOTS, st.booleans(), st.integers(1, 10**7))
@settings(deadline=None)
def test_the_backoff_is_always_within_its_bounds(
    seen: list[float], running_s: list[float], slots: int, strict: bool, default_ms: int
) -> None:
    """250 ms to 5 min, whole milliseconds, whatever was measured."""
    wait_ms = measured(*seen, default_ms=default_ms).retry_after_ms(
        [Busy(running_s, slots)], head_is_strict=strict
    )
    assert MIN_RETRY_AFTER_MS == 250 <= wait_ms <= MAX_RETRY_AFTER_MS == 300_000
    assert isinstance(wait_ms, int)


@given(SECONDS, RUNNING, SLOTS, st.integers(0, 50), st.integers(0, 50), st.booleans())
@settings(deadline=None)
def test_one_more_task_ahead_never_means_an_earlier_start(
    mean_s: float, running_s: list[float], slots: int, ahead: int, strict_ahead: int, strict: bool
) -> None:
    """Monotone in the number ahead, be they strict or not."""
    assume(strict_ahead <= ahead)
    estimate = measured(mean_s)

    def start_s(ahead: int, strict_ahead: int) -> float:
        start = estimate.start_in_s(
            [Busy(running_s, slots)], ahead=ahead, strict_ahead=strict_ahead, strict=strict
        )
        assert start is not None
        return start

    now = start_s(ahead, strict_ahead)
    assert 0 <= now <= start_s(ahead + 1, strict_ahead) + 1e-6
    assert now <= start_s(ahead + 1, strict_ahead + 1) + 1e-6


@given(SECONDS, SECONDS, RUNNING, SLOTS, st.integers(0, 50), st.booleans())
@settings(deadline=None)
def test_longer_tasks_never_mean_an_earlier_start(
    mean_s: float, more_s: float, running_s: list[float], slots: int, ahead: int, strict: bool
) -> None:
    """Monotone in the measured service time."""
    shorter = measured(mean_s).start_in_s([Busy(running_s, slots)], ahead=ahead, strict=strict)
    longer = measured(mean_s + more_s).start_in_s([Busy(running_s, slots)], ahead=ahead, strict=strict)
    assert shorter is not None
    assert longer is not None
    assert shorter <= longer + 1e-6


@given(SECONDS, RUNNING, SLOTS, st.integers(0, 50))
@settings(deadline=None)
def test_a_strict_task_never_starts_before_a_shared_one_in_its_place(
    mean_s: float, running_s: list[float], slots: int, ahead: int
) -> None:
    """Who needs all slots waits at least as long as who needs one."""
    estimate = measured(mean_s)
    shared = estimate.start_in_s([Busy(running_s, slots)], ahead=ahead)
    strict = estimate.start_in_s([Busy(running_s, slots)], ahead=ahead, strict=True)
    assert shared is not None
    assert strict is not None
    assert shared <= strict


@given(st.lists(SECONDS, min_size=1, max_size=50))
@settings(deadline=None)
def test_the_mean_stays_among_what_was_measured(seen: list[float]) -> None:
    """A moving average never leaves the range of its measurements."""
    mean_s = measured(*seen).mean_s
    assert mean_s is not None
    assert min(seen) - 1e-6 <= mean_s <= max(seen) + 1e-6

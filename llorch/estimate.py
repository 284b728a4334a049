"""Moving averages of service time, and what follows from them for those who wait or were refused.

The one rule: pure arithmetic. Times are seconds and come in as arguments; nothing here reads a clock.
"""

from collections.abc import Sequence
from typing import NamedTuple

_WEIGHT = 0.2
MIN_RETRY_AFTER_MS = 250
MAX_RETRY_AFTER_MS = 5 * 60 * 1000


class Busy(NamedTuple):
    """A replica at work: how long each of its busy slots has been at it, and how many slots there are."""

    running_s: Sequence[float]
    slots: int


class ServiceEstimate:
    """How long one task holds its slot, from what was measured; None until something was."""

    def __init__(self, default_retry_after_ms: int) -> None:
        self.default_retry_after_ms = default_retry_after_ms
        self.mean_s: float | None = None

    def record(self, service_s: float) -> None:
        """Take in one measured service time, start to slot free, in seconds."""
        service_s = max(service_s, 0.0)
        self.mean_s = service_s if self.mean_s is None else self.mean_s + _WEIGHT * (service_s - self.mean_s)

    def start_in_s(
        self,
        replicas: Sequence[Busy],
        *,
        ahead: int = 0,
        strict_ahead: int = 0,
        strict: bool = False,
    ) -> float | None:
        """Seconds until a task starts that has `ahead` tasks before it; None until something was measured.

        A strict task waits for all slots of a replica, its own start included, and holds them all.
        """
        if self.mean_s is None:
            return None
        each = [self._left_s(replica) for replica in replicas] or [[0.0]]
        left = sorted(slot for slots in each for slot in slots)
        alone = strict_ahead * self.mean_s / len(each)
        rounds, place = divmod(ahead - strict_ahead, len(left))
        first = min(max(slots) for slots in each) if strict or strict_ahead else left[place]
        return first + rounds * self.mean_s + alone

    def _left_s(self, replica: Busy) -> list[float]:
        """Seconds until each slot of a replica is free."""
        assert self.mean_s is not None
        slots = max(replica.slots, 1)
        left = sorted(max(self.mean_s - elapsed, 0.0) for elapsed in replica.running_s)[:slots]
        return [0.0] * (slots - len(left)) + left

    def predicted_start_ms(
        self, replicas: Sequence[Busy], *, ahead: int, strict_ahead: int, strict: bool
    ) -> int | None:
        """Milliseconds from admission to start, None until something was measured."""
        start_s = self.start_in_s(replicas, ahead=ahead, strict_ahead=strict_ahead, strict=strict)
        return None if start_s is None else round(start_s * 1000)

    def retry_after_ms(
        self, replicas: Sequence[Busy], *, ahead: int = 0, head_is_strict: bool = False
    ) -> int:
        """When a place in the full lane frees: as its head starts, after `ahead` others; 250 ms to 5 min."""
        start_s = self.start_in_s(replicas, ahead=ahead, strict=head_is_strict)
        wait_ms = self.default_retry_after_ms if start_s is None else round(start_s * 1000)
        return min(max(wait_ms, MIN_RETRY_AFTER_MS), MAX_RETRY_AFTER_MS)

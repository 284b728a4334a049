"""Moving averages of service time, and what follows from them for those who wait or were refused.

The one rule: pure arithmetic. Times are seconds and come in as arguments; nothing here reads a clock.
"""

from collections.abc import Iterable

_WEIGHT = 0.2
MIN_RETRY_AFTER_MS = 250
MAX_RETRY_AFTER_MS = 5 * 60 * 1000


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
        running_s: Iterable[float],
        slots: int,
        *,
        ahead: int = 0,
        strict_ahead: int = 0,
        strict: bool = False,
    ) -> float | None:
        """Seconds until a task starts that has `ahead` tasks before it; None until something was measured.

        `running_s` is how long each busy slot has been at work. A strict task, its own start included,
        waits for all slots and holds them all.
        """
        if self.mean_s is None:
            return None
        slots = max(slots, 1)
        left = sorted(max(self.mean_s - elapsed, 0.0) for elapsed in running_s)[:slots]
        left = [0.0] * (slots - len(left)) + left
        alone = strict_ahead * self.mean_s
        shared_ahead = ahead - strict_ahead
        rounds, place = divmod(shared_ahead, slots)
        first = left[-1] if strict or strict_ahead else left[place]
        return first + rounds * self.mean_s + alone

    def predicted_start_ms(
        self, running_s: Iterable[float], slots: int, *, ahead: int, strict_ahead: int, strict: bool
    ) -> int | None:
        """Milliseconds from admission to start, None until something was measured."""
        start_s = self.start_in_s(running_s, slots, ahead=ahead, strict_ahead=strict_ahead, strict=strict)
        return None if start_s is None else round(start_s * 1000)

    def retry_after_ms(self, running_s: Iterable[float], slots: int, *, head_is_strict: bool = False) -> int:
        """When a place in the full queue frees: as its head starts; 250 ms to 5 min."""
        start_s = self.start_in_s(running_s, slots, strict=head_is_strict)
        wait_ms = self.default_retry_after_ms if start_s is None else round(start_s * 1000)
        return min(max(wait_ms, MIN_RETRY_AFTER_MS), MAX_RETRY_AFTER_MS)

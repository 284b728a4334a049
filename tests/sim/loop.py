"""An event loop without sockets: virtual time, and an order of callbacks that a seed decides.

Shuffling what is ready finds little: a race needs one coroutine to be late. So each ready callback is also
held back for a turn with a probability of `HELD_BACK`.
"""

import asyncio
import heapq
import random
from collections.abc import Callable

HELD_BACK = 0.3


class Deadlock(AssertionError):
    """Nothing is ready and nothing is due: somebody waits for ever."""


class SimLoop(asyncio.BaseEventLoop):
    """Runs one callback at a time, and `after_step` after each; a seed gives the same run every time."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.chance = random.Random(seed)
        self.now = 0.0
        self.steps = 0
        self.max_steps = 200_000
        self.after_step: Callable[[], None] = lambda: None
        self.bugs: list[dict[str, object]] = []
        self.set_exception_handler(lambda _, context: self.bugs.append(context))

    def time(self) -> float:
        """Seconds of virtual time."""
        return self.now

    def _run_once(self) -> None:
        self._collect_due_timers()
        turn = [handle for handle in self._ready if not handle._cancelled]
        self._ready.clear()
        self.chance.shuffle(turn)
        try:
            while turn:
                handle = turn.pop()
                if self.chance.random() < HELD_BACK:
                    self._ready.append(handle)
                elif not handle._cancelled:
                    handle._run()
                    self.steps += 1
                    self.after_step()
        finally:
            self._ready.extend(turn)  # after a violation everything still has to be cleaned up
        if self.steps > self.max_steps:
            raise AssertionError(f"no end after {self.steps} steps, {self.now:.1f} s")

    def _collect_due_timers(self) -> None:
        """Move what is due to the ready queue; if nothing is ready, first jump to the next timer."""
        timers = self._scheduled
        while timers and (timers[0]._cancelled or timers[0]._when <= self.now or not self._ready):
            timer = heapq.heappop(timers)
            timer._scheduled = False
            if not timer._cancelled:
                self.now = max(self.now, timer._when)
                self._ready.append(timer)
        if not self._ready and not self._stopping:
            raise Deadlock(f"at {self.now:.3f} s")

    def _process_events(self, event_list: object) -> None:
        pass

    def _write_to_self(self) -> None:
        pass

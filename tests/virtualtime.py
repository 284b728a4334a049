"""An event loop for tests of deadlines: when nothing is ready, its clock jumps to the next timer.

Nothing here waits in real time. A test that would wait for ever fails as a `Deadlock`, or once the clock
has run for `LIMIT_S`.
"""

import asyncio
import functools
import selectors
from collections.abc import Callable, Coroutine
from typing import Any

LIMIT_S = 100_000.0


class Deadlock(AssertionError):
    """Nothing is ready and nothing is due: somebody waits for ever."""


class _Clock(selectors.SelectSelector):
    """The selector: the loop asks it to wait, and it moves the time on instead."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0
        self.watchers: list[asyncio.Future[None]] = []

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if ready or timeout == 0:
            return ready
        if self.watchers:
            watchers, self.watchers = self.watchers, []
            for watcher in watchers:
                if not watcher.done():
                    watcher.set_result(None)
        elif timeout is None:
            raise Deadlock("nothing is ready and nothing is due")
        else:
            self.now += timeout
            assert self.now < LIMIT_S, f"the test has run for {LIMIT_S:g} s of its own time"
        return []


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """`time()` is virtual; `bugs` is what would have been logged as an unhandled exception."""

    def __init__(self) -> None:
        self.clock = _Clock()
        self.bugs: list[str] = []
        super().__init__(self.clock)
        self.set_exception_handler(lambda _, context: self.bugs.append(repr(context)))

    def time(self) -> float:
        """Seconds of virtual time."""
        return self.clock.now

    async def settled(self) -> None:
        """Return when all that can happen now has happened; the clock stands still meanwhile."""
        watcher = self.create_future()
        self.clock.watchers.append(watcher)
        await watcher


def current() -> VirtualTimeLoop:
    """The running loop."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualTimeLoop)
    return loop


async def settled() -> None:
    """Return when all that can happen now has happened."""
    await current().settled()


async def turns(count: int) -> None:
    """Let the loop turn so many times, and no time pass."""
    for _ in range(count):
        await asyncio.sleep(0)


async def advance(seconds: float) -> None:
    """Let so many seconds pass, and all happen that is due by then."""
    due = current().create_future()
    current().call_later(seconds, due.set_result, None)
    await due
    await settled()


async def _leaving_nothing(test: Coroutine[Any, Any, None]) -> None:
    await test
    await settled()
    left = asyncio.all_tasks() - {asyncio.current_task()}
    assert not left, f"still running: {sorted(task.get_name() for task in left)}"


def virtual_time(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run a coroutine test on a loop with virtual time; it must leave no task and no unhandled exception."""

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
            runner.run(_leaving_nothing(test(*args, **kwargs)))
            bugs = runner.get_loop().bugs  # type: ignore[attr-defined]
        assert not bugs

    return run

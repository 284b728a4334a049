"""What a task may expect while it waits: `metrics` events, for a reader that asks with `?metrics=1`.

The one rule: they are a reader's own. They have no id and are in no log; they come before the first token
only, and by a slow tick: to tell each change of the queue at once would wake every reader for every task.
"""

import asyncio
from collections.abc import Callable

import msgspec

from llorch.orchestrator import Orchestrator
from llorch.pool import Pool
from llorch.task import State, Task

TICK_S = 0.5
_PLACES_MAX_AGE_S = 0.1


class Metrics(msgspec.Struct, frozen=True, kw_only=True):
    """The data of the event: place, and ms from now until the start, null once started; tokens of the prompt,
    and how many of them the engine has read, null until it says so."""

    queue_position: int | None
    predicted_start_ms: int | None
    queue_depth: int
    prompt_tokens: int | None
    prompt_tokens_done: int | None


class _Places:
    """Where every task of one queue stood, and how many strict ones before it."""

    def __init__(self, pool: Pool, now: float) -> None:
        self.version, self.at = pool.queue.version, now
        self.by_id: dict[str, tuple[int, int]] = {}
        strict = 0
        for position, task in enumerate(pool.queue):
            self.by_id[task.id] = position, strict
            strict += task.strict


class Outlook:
    """Answers for many readers at once: a queue is walked at most ten times a second."""

    def __init__(self, orchestrator: Orchestrator) -> None:
        self._orchestrator = orchestrator
        self._places: dict[str, _Places] = {}

    def of(self, task: Task) -> Metrics:
        """What there is to say of `task` now."""
        pool = self._orchestrator.pools[task.pool_id]
        place = self._place(pool, task) if task.state is State.QUEUED else None
        start_ms = None
        if place is not None:
            start_ms = pool.predicted_start_ms(ahead=place[0], strict_ahead=place[1], strict=task.strict)
        return Metrics(
            queue_position=None if place is None else place[0],
            predicted_start_ms=start_ms,
            queue_depth=len(pool.queue),
            prompt_tokens=task.prompt_tokens,
            prompt_tokens_done=task.prompt_tokens_done,
        )

    def _place(self, pool: Pool, task: Task) -> tuple[int, int] | None:
        now, places = asyncio.get_running_loop().time(), self._places.get(pool.pool_id)
        old = places is None or (
            places.version != pool.queue.version and now - places.at >= _PLACES_MAX_AGE_S
        )
        if places is None or old or task.id not in places.by_id:
            places = self._places[pool.pool_id] = _Places(pool, now)
        return places.by_id.get(task.id)


class Teller:
    """The `metrics` events of one reader of `task`."""

    def __init__(self, task: Task, outlook: Outlook) -> None:
        self._task, self._outlook = task, outlook
        self._said: Metrics | None = None
        self._timer: asyncio.TimerHandle | None = None

    def start(self, say: Callable[[bytes], bool]) -> None:
        """Say what there is, and every half second what has changed, until the first token or the end.

        `say` writes a frame if it can do so without piling it up, and returns whether it did.
        """
        if self._task.log.next_id > 1:  # more than `started` is there
            return
        metrics = self._outlook.of(self._task)
        if metrics != self._said and say(b"event: metrics\ndata: %b\n\n" % msgspec.json.encode(metrics)):
            self._said = metrics
        self._timer = asyncio.get_running_loop().call_later(TICK_S, self.start, say)

    def stop(self) -> None:
        """Say nothing more."""
        if self._timer is not None:
            self._timer.cancel()

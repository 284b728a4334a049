"""The bounded queue of one pool: two lanes, FIFO and bounded in tasks each, in bytes of prompts together.

The one rule: every change is a plain method, complete in itself, and as quick in a long queue as in a short
one. The waiting tasks are linked dictionaries, so a cancelled one leaves at once: it blocks nobody.
Coroutines that wait for a change wait in `until`; plain code reaches them through `wake`.
"""

import asyncio
import math
from bisect import bisect_left, insort
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from itertools import chain, islice

import msgspec

from llorch.errors import QueueFull
from llorch.task import Priority, Task

_SLACK = 64  # entries of tasks that have left, before they are swept out


class QueueLimits(msgspec.Struct, frozen=True, kw_only=True):
    """How many tasks may wait in each lane, and how many bytes of prompts in both.

    A batch task that has waited `batch_promote_s` may go before interactive ones; None: none ever may.
    """

    capacity: int
    batch_capacity: int = 256
    max_bytes: int
    batch_promote_s: float | None = 300.0


class Lane:
    """The waiting tasks of one priority, in order of admission; `ripens`: it is asked how long they wait."""

    __slots__ = (
        "_admitted",
        "_ages",
        "_gaps",
        "_numbers",
        "_ripe_end",
        "_ripens",
        "_waiting",
        "reserved",
        "strict",
    )

    def __init__(self, *, ripens: bool = False) -> None:
        self.reserved = 0
        self.strict = 0
        self._ripens = ripens
        self._waiting: OrderedDict[str, Task] = OrderedDict()
        self._admitted = 0
        self._numbers: dict[str, int] = {}  # of waiting tasks, in order of admission
        self._gaps: list[int] = []  # sorted numbers of those that left from behind the head
        self._ages: deque[tuple[float, int]] = deque()  # time of admission and number, of those not ripe yet
        self._ripe_end = 0  # the number after the last that is ripe

    def __len__(self) -> int:
        """How many tasks wait here."""
        return len(self._waiting)

    def __iter__(self) -> Iterator[Task]:
        """The waiting tasks, head first."""
        return iter(self._waiting.values())

    def __contains__(self, task: Task) -> bool:
        """Whether `task` waits here."""
        return task.id in self._waiting

    @property
    def head(self) -> Task | None:
        """The task of this lane that goes next."""
        return next(iter(self._waiting.values()), None)

    def append(self, task: Task) -> None:
        """Put `task` last."""
        self._waiting[task.id] = task
        self._numbers[task.id] = self._admitted
        if self._ripens:
            self._ages.append((task.admitted_at, self._admitted))
        self._admitted += 1
        self.strict += task.strict

    def remove(self, task: Task) -> bool:
        """Take `task` out, wherever it stands; False if it does not wait here."""
        if self._waiting.pop(task.id, None) is None:
            return False
        self.strict -= task.strict
        self._close_ranks(self._numbers.pop(task.id))
        return True

    def position(self, task: Task) -> int | None:
        """How many tasks of this lane wait before `task`, None if it does not wait here."""
        number = self._numbers.get(task.id)
        return None if number is None else self._before(number)

    def ripe(self, now: float, after_s: float) -> int:
        """How many wait that have waited `after_s` by `now`, which must not go back; once ripe, for good."""
        while self._ages and self._ages[0][0] + after_s <= now:
            self._ripe_end = self._ages.popleft()[1] + 1
        return max(self._before(self._ripe_end), 0)

    def _before(self, number: int) -> int:
        return number - self._first() - bisect_left(self._gaps, number)

    def _first(self) -> int:
        head = self.head
        return self._admitted if head is None else self._numbers[head.id]

    def _close_ranks(self, left: int) -> None:
        """Remember that number `left` has gone, as long as it would be counted before somebody."""
        first = self._first()
        if left > first:
            insort(self._gaps, left)
        else:
            del self._gaps[: bisect_left(self._gaps, first)]
        while self._ages and self._ages[0][1] < first:
            self._ages.popleft()
        if len(self._gaps) > 2 * len(self._waiting) + _SLACK:
            self._renumber()

    def _renumber(self) -> None:
        """Forget those that have left: behind a head that waits for long, many come and go."""
        self._ripe_end = max(self._before(self._ripe_end), 0)
        renumbered = {old: new for new, old in enumerate(self._numbers.values())}
        self._numbers = {task_id: renumbered[old] for task_id, old in self._numbers.items()}
        self._ages = deque((at, renumbered[old]) for at, old in self._ages if old in renumbered)
        self._admitted = len(renumbered)
        self._gaps.clear()


class Reservation:
    """A place in a lane, and bytes, until its task is admitted or `release` gives it back."""

    __slots__ = ("_priority", "_queue", "open", "size_bytes")

    def __init__(self, queue: "AdmissionQueue", priority: Priority, size_bytes: int) -> None:
        self._queue = queue
        self._priority: Priority = priority
        self.size_bytes = size_bytes
        self.open = True

    def resize(self, size_bytes: int) -> None:
        """Take or give back bytes, now that the prompt's real size is known; raises QueueFull."""
        self._queue.check_bytes(size_bytes - self.size_bytes, self._priority)
        self._queue.reserved_bytes += size_bytes - self.size_bytes
        self.size_bytes = size_bytes

    def release(self) -> None:
        """Give the place back; nothing happens if that was done or the task was admitted."""
        if self.open:
            self.open = False
            self._queue.lanes[self._priority].reserved -= 1
            self._queue.reserved_bytes -= self.size_bytes
            self._queue.wake()


class AdmissionQueue:
    """The waiting tasks of a pool [MVP-031]: interactive ones first, FIFO within a priority.

    A batch task that has waited `batch_promote_s` goes next, ahead of interactive ones; after it one of those
    has its turn. So no lane starves, whatever comes in on the other.
    """

    def __init__(
        self, limits: QueueLimits, refuse: Callable[[Priority, str], QueueFull], now: Callable[[], float]
    ) -> None:
        self.limits = limits
        self.changed = asyncio.Condition()
        self.lanes: dict[Priority, Lane] = {"interactive": Lane(), "batch": Lane(ripens=True)}
        self.reserved_bytes = 0
        self.waiting_bytes = 0
        self._changes = 0
        self._interactive, self._batch = self.lanes["interactive"], self.lanes["batch"]
        self._interactive_has_turn = False  # after a batch task has gone before it
        self._refuse = refuse
        self._now = now
        self._waiters = 0
        self._waker: asyncio.Task[None] | None = None

    def __len__(self) -> int:
        """How many tasks wait."""
        return len(self._interactive) + len(self._batch)

    def __iter__(self) -> Iterator[Task]:
        """The waiting tasks, in the order in which they would go now."""
        others, promoted = iter(self._interactive), islice(self._batch, self._promoted())
        if self._interactive_has_turn:
            yield from islice(others, 1)
        for task in promoted:
            yield task
            yield from islice(others, 1)
        yield from chain(others, islice(self._batch, self._promoted(), None))

    @property
    def version(self) -> tuple[int, int]:
        """Another after each change of the order; time changes it too, by promotion."""
        return self._changes, self._promoted()

    def depth(self, priority: Priority) -> int:
        """How many tasks of that priority wait."""
        return len(self.lanes[priority])

    def capacity(self, priority: Priority) -> int:
        """How many tasks of that priority may wait."""
        return self.limits.batch_capacity if priority == "batch" else self.limits.capacity

    @property
    def reserved(self) -> int:
        """Places held for tasks that are not admitted yet."""
        return self._interactive.reserved + self._batch.reserved

    @property
    def strict(self) -> int:
        """How many of the waiting tasks must run alone."""
        return self._interactive.strict + self._batch.strict

    @property
    def head(self) -> Task | None:
        """The task that goes next."""
        if not self._interactive or (not self._interactive_has_turn and self._promoted()):
            return self._batch.head or self._interactive.head
        return self._interactive.head

    def _promoted(self) -> int:
        """How many batch tasks, from the head on, have waited long enough to go before interactive ones."""
        after_s = self.limits.batch_promote_s
        return 0 if after_s is None or not self._batch else self._batch.ripe(self._now(), after_s)

    def promotes_at(self) -> float | None:
        """When the batch lane's head will have waited long enough; None if it has, or never will."""
        after_s, head = self.limits.batch_promote_s, self._batch.head
        if after_s is None or head is None or not self._interactive:
            return None
        at = head.admitted_at + after_s
        return at if at > self._now() else None

    def oldest(self) -> list[Task]:
        """Of each lane the task that has waited longest."""
        return [head for lane in self.lanes.values() if (head := lane.head) is not None]

    # -- coming and going -----------------------------------------------------------------------

    def reserve(
        self, size_bytes: int, priority: Priority = "interactive", free_slots: int = 0
    ) -> Reservation:
        """Hold a place for a task that may wait, or go straight to one of `free_slots`; raises QueueFull."""
        lane = self.lanes[priority]
        others = self.reserved - lane.reserved  # they count on the same slots
        room = self.capacity(priority) + max(free_slots - others, 0)
        if len(lane) + lane.reserved >= room:
            raise self._refuse(priority, self._full(priority))
        self.check_bytes(size_bytes, priority)
        lane.reserved += 1
        self.reserved_bytes += size_bytes
        return Reservation(self, priority, size_bytes)

    def check_bytes(self, more: int, priority: Priority = "interactive") -> None:
        """Raise QueueFull if `more` bytes of prompt do not fit."""
        held, limit = self.waiting_bytes + self.reserved_bytes, self.limits.max_bytes
        if more > 0 and held + more > limit:
            held_of = f"{held} of {limit} bytes (queue.max_bytes)"
            raise self._refuse(priority, f"the queue is full: its prompts hold {held_of}; try again later")

    def admit(self, reservation: Reservation, task: Task) -> int:
        """Put `task` last in its lane, in the place that was reserved, and say how many go before it.

        Raises QueueFull when the slots that the reservation counted on have gone meanwhile.
        """
        priority = task.request.priority
        lane = self.lanes[priority]
        if len(lane) >= self.capacity(priority):
            raise self._refuse(priority, self._full(priority))
        task.size_bytes = reservation.size_bytes
        reservation.release()
        lane.append(task)
        self.waiting_bytes += task.size_bytes
        self.wake()
        ahead = self.position(task)
        assert ahead is not None
        return ahead

    def start(self, head: Task) -> None:
        """Take out the head, which goes now; whoever it went before has the next turn."""
        self._interactive_has_turn = head in self._batch and len(self._interactive) > 0
        self.remove(head)

    def remove(self, task: Task) -> bool:
        """Take `task` out, wherever it stands; False if it does not wait here."""
        if not self.lanes[task.request.priority].remove(task):
            return False
        self.waiting_bytes -= task.size_bytes
        self.wake()
        return True

    # -- places ---------------------------------------------------------------------------------

    def position(self, task: Task) -> int | None:
        """How many tasks would go before `task` as things stand, None if it does not wait here."""
        in_lane = self.lanes[task.request.priority].position(task)
        if in_lane is None:
            return None
        return in_lane + self._of_other_lane_ahead(task.request.priority, in_lane)

    def _of_other_lane_ahead(self, priority: Priority, in_lane: int) -> int:
        """The lanes take turns as long as batch tasks have waited long enough; then interactive ones go."""
        promoted, turn = self._promoted(), not self._interactive_has_turn
        if priority == "interactive":
            return min(promoted, in_lane + turn)
        if in_lane < promoted:
            return min(len(self._interactive), in_lane + (not turn))
        return len(self._interactive)

    def ahead_of_next(self, priority: Priority) -> tuple[int, int]:
        """How many would go before one more task of that priority, and how many of them strict, about."""
        lane, other = self.lanes[priority], self.lanes["interactive" if priority == "batch" else "batch"]
        of_other = self._of_other_lane_ahead(priority, len(lane))
        strict = lane.strict + (math.ceil(other.strict * of_other / len(other)) if of_other else 0)
        return len(lane) + of_other, strict

    def ahead_of_head(self, priority: Priority) -> int:
        """How many would go before the head of that lane."""
        return self._of_other_lane_ahead(priority, 0)

    # -- waiting --------------------------------------------------------------------------------

    def wake(self) -> None:
        """Let every coroutine that waits in `until` look again, soon; plain code may call this."""
        self._changes += 1
        if self._waiters and self._waker is None:
            self._waker = asyncio.create_task(self._notify(), name="queue-wake")

    async def _notify(self) -> None:
        self._waker = None  # a change from here on needs another round
        async with self.changed:
            self.changed.notify_all()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Return when `condition` holds; it is looked at after each change."""
        self._waiters += 1
        try:
            async with self.changed:
                await self.changed.wait_for(condition)
        finally:
            self._waiters -= 1

    async def drained(self) -> None:
        """Return when nothing waits and nothing is reserved."""
        await self.until(lambda: not len(self) and not self.reserved)

    def _full(self, priority: Priority) -> str:
        batch = priority == "batch"
        what = "batch tasks wait (queue.batch_capacity)" if batch else "tasks wait (queue.capacity)"
        waiting, most = len(self.lanes[priority]), self.capacity(priority)
        return f"the queue is full: {waiting} of {most} {what}; try again later"

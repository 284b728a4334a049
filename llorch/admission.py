"""The bounded queue of one pool: FIFO, counted in tasks and in bytes of waiting prompts.

The one rule: every change is a plain method, O(1), and complete in itself. The waiting tasks are a linked
dictionary, so a cancelled one leaves at once: it needs no tombstone and blocks nobody.
Coroutines that wait for a change hold `changed`; plain code reaches them through `wake`.
"""

import asyncio
from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Callable, Iterator

from llorch.errors import QueueFull
from llorch.task import Task


class Reservation:
    """A place in the queue, in tasks and bytes, until its task is admitted or `release` gives it back."""

    __slots__ = ("_queue", "open", "size_bytes")

    def __init__(self, queue: "AdmissionQueue", size_bytes: int) -> None:
        self._queue = queue
        self.size_bytes = size_bytes
        self.open = True

    def resize(self, size_bytes: int) -> None:
        """Take or give back bytes, now that the prompt's real size is known; raises QueueFull."""
        self._queue.check_bytes(size_bytes - self.size_bytes)
        self._queue.reserved_bytes += size_bytes - self.size_bytes
        self.size_bytes = size_bytes

    def release(self) -> None:
        """Give the place back; nothing happens if that was done or the task was admitted."""
        if self.open:
            self.open = False
            self._queue.reserved -= 1
            self._queue.reserved_bytes -= self.size_bytes
            self._queue.wake()


class AdmissionQueue:
    """FIFO of waiting tasks; at most `capacity` of them with at most `max_bytes` of prompts [MVP-031]."""

    def __init__(self, capacity: int, max_bytes: int, refuse: Callable[[str], QueueFull] = QueueFull) -> None:
        self.capacity = capacity
        self.max_bytes = max_bytes
        self.changed = asyncio.Condition()
        self.reserved = 0
        self.reserved_bytes = 0
        self.waiting_bytes = 0
        self.waiting_strict = 0
        self.version = 0  # another after each change
        self._refuse = refuse
        self._waiting: OrderedDict[str, Task] = OrderedDict()
        self._admitted = 0
        self._numbers: dict[str, int] = {}  # of waiting tasks, in order of admission
        self._gaps: list[int] = []  # sorted numbers of those that left from behind the head
        self._waker: asyncio.Task[None] | None = None

    def __len__(self) -> int:
        """How many tasks wait."""
        return len(self._waiting)

    def __iter__(self) -> Iterator[Task]:
        """The waiting tasks, head first."""
        return iter(self._waiting.values())

    @property
    def head(self) -> Task | None:
        """The task that goes next."""
        return next(iter(self._waiting.values()), None)

    def reserve(self, size_bytes: int, free_slots: int = 0) -> Reservation:
        """Hold a place for a task that may wait, or go straight to one of `free_slots`; raises QueueFull."""
        if len(self._waiting) + self.reserved >= self.capacity + free_slots:
            raise self._refuse(_full(len(self._waiting), self.capacity))
        self.check_bytes(size_bytes)
        self.reserved += 1
        self.reserved_bytes += size_bytes
        return Reservation(self, size_bytes)

    def check_bytes(self, more: int) -> None:
        """Raise QueueFull if `more` bytes of prompt do not fit."""
        held = self.waiting_bytes + self.reserved_bytes
        if more > 0 and held + more > self.max_bytes:
            held_of = f"{held} of {self.max_bytes} bytes (queue.max_bytes)"
            raise self._refuse(f"the queue is full: its prompts hold {held_of}; try again later")

    def admit(self, reservation: Reservation, task: Task) -> int:
        """Put `task` last, in the place that was reserved, and say how many wait before it.

        Raises QueueFull when the slots that the reservation counted on have gone meanwhile.
        """
        position = len(self._waiting)
        if position >= self.capacity:
            raise self._refuse(_full(position, self.capacity))
        task.size_bytes = reservation.size_bytes
        reservation.release()
        self._waiting[task.id] = task
        self._numbers[task.id] = self._admitted
        self._admitted += 1
        self.waiting_bytes += task.size_bytes
        self.waiting_strict += task.strict
        self.wake()
        return position

    def remove(self, task: Task) -> bool:
        """Take `task` out, wherever it stands; False if it does not wait here."""
        if self._waiting.pop(task.id, None) is None:
            return False
        self._close_ranks(self._numbers.pop(task.id))
        self.waiting_bytes -= task.size_bytes
        self.waiting_strict -= task.strict
        self.wake()
        return True

    def position(self, task: Task) -> int | None:
        """How many tasks wait before `task` now, None if it does not wait here; as quick in a long queue."""
        number, head = self._numbers.get(task.id), self.head
        if number is None or head is None:
            return None
        return number - self._numbers[head.id] - bisect_left(self._gaps, number)

    def _close_ranks(self, left: int) -> None:
        """Remember that number `left` has gone, as long as it would be counted before somebody."""
        head = self.head
        first = self._admitted if head is None else self._numbers[head.id]
        if left > first:
            insort(self._gaps, left)
        else:
            del self._gaps[: bisect_left(self._gaps, first)]

    def wake(self) -> None:
        """Let every coroutine that waits on `changed` look again, soon; plain code may call this."""
        self.version += 1
        if self._waker is None and _in_loop():
            self._waker = asyncio.create_task(self._notify(), name="queue-wake")

    async def _notify(self) -> None:
        self._waker = None  # a change from here on needs another round
        async with self.changed:
            self.changed.notify_all()

    async def drained(self) -> None:
        """Return when nothing waits and nothing is reserved."""
        async with self.changed:
            await self.changed.wait_for(lambda: not self._waiting and not self.reserved)


def _in_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def _full(waiting: int, capacity: int) -> str:
    return f"the queue is full: {waiting} of {capacity} tasks wait (queue.capacity); try again later"

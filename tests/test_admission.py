"""The bounded queue: its order, its bounds, its reservations, and those who wait for a change."""

import asyncio
from collections import OrderedDict
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llorch.admission import AdmissionQueue, QueueLimits, Reservation
from llorch.errors import QueueFull
from llorch.task import Priority, Task, TaskRequest
from tests.virtualtime import settled, virtual_time

NUMBERS = iter(range(10**9))


def a_task(*, strict: bool = False) -> Task:
    """A task that waits."""
    determinism = "strict" if strict else "best_effort"
    return Task(
        str(next(NUMBERS)), TaskRequest(prompt="x", determinism=determinism), prompt="x", max_tokens=1,
        pool_id="default", now=lambda: 0.0, on_transition=lambda task, previous: None,
    )  # fmt: skip


def a_queue(capacity: int = 3, max_bytes: int = 100) -> AdmissionQueue:
    """An empty one."""
    limits = QueueLimits(capacity=capacity, max_bytes=max_bytes)
    return AdmissionQueue(limits, lambda priority, message: QueueFull(message), lambda: 0.0)


def admitted(queue: AdmissionQueue, *, size_bytes: int = 1, strict: bool = False) -> Task:
    """A task that waits there."""
    task = a_task(strict=strict)
    queue.admit(queue.reserve(size_bytes), task)
    return task


def counts(queue: AdmissionQueue) -> tuple[int, int, int, int, int]:
    """Everything it counts."""
    return len(queue), queue.waiting_bytes, queue.strict, queue.reserved, queue.reserved_bytes


# -- order -----------------------------------------------------------------------------------------


def test_first_come_first_served() -> None:
    """The order is that of admission, not of reservation; the position is the number ahead."""
    queue = a_queue()
    places = [queue.reserve(1) for _ in range(3)]
    tasks = [a_task() for _ in places]
    assert [queue.admit(place, task) for place, task in zip(reversed(places), tasks, strict=True)] == [
        0,
        1,
        2,
    ]
    assert list(queue) == tasks
    assert [queue.position(task) for task in tasks] == [0, 1, 2]
    for task in tasks:
        assert queue.head is task
        assert queue.remove(task)
    assert queue.head is None


def test_one_that_leaves_blocks_nobody() -> None:
    """A removed task is gone at once, wherever it stood, and those behind it move up."""
    queue = a_queue()
    first, second, third = (admitted(queue) for _ in range(3))
    assert queue.remove(second)
    assert list(queue) == [first, third]
    assert (queue.position(second), queue.position(third)) == (None, 1)
    assert queue.remove(first)
    assert queue.head is third


def test_removing_twice_says_so() -> None:
    """The second removal is False and counts nothing twice."""
    queue = a_queue()
    task = admitted(queue, size_bytes=7, strict=True)
    assert counts(queue) == (1, 7, 1, 0, 0)
    assert queue.remove(task)
    assert not queue.remove(task)
    assert counts(queue) == (0, 0, 0, 0, 0)


class Unwalkable(OrderedDict[str, Task]):
    """A dictionary that nobody walks over, past its first entry."""

    def values(self) -> Any:
        for count, task in enumerate(super().values()):
            assert not count, "somebody walks over the queue"
            yield task

    items = keys = __reversed__ = __iter__ = values


def test_removal_and_position_do_not_look_at_the_others() -> None:
    """A task leaves, and is told its place, as quickly in a long queue as in a short one."""
    queue = a_queue(capacity=1000, max_bytes=1000)
    tasks = [admitted(queue) for _ in range(1000)]
    lane = queue.lanes["interactive"]
    lane._waiting = Unwalkable(lane._waiting)
    for ahead, task in reversed(list(enumerate(tasks))):
        assert queue.position(task) == ahead
        assert queue.remove(task)


@given(st.lists(st.one_of(st.none(), st.integers(0, 30)), max_size=60))
def test_the_position_is_the_count_of_those_ahead(steps: list[int | None]) -> None:
    """Whoever left, from wherever: None admits one, a number takes out the one that stands there."""
    queue = a_queue(capacity=100, max_bytes=100)
    for step in steps:
        waiting = list(queue)
        if step is None:
            admitted(queue)
        elif step < len(waiting):
            queue.remove(waiting[step])
        assert [queue.position(task) for task in queue] == list(range(len(queue)))
        assert len(queue.lanes["interactive"]._gaps) <= len(steps)
    for task in list(queue):
        queue.remove(task)
    assert queue.lanes["interactive"]._gaps == []


# -- bounds ----------------------------------------------------------------------------------------


@given(capacity=st.integers(1, 5), free_slots=st.integers(0, 5))
@settings(deadline=None)
def test_exactly_slots_plus_capacity_are_let_in(capacity: int, free_slots: int) -> None:
    """With S free slots and capacity N exactly S + N places are given at once [MVP-031]."""
    queue = a_queue(capacity)
    places = [queue.reserve(1, free_slots=free_slots) for _ in range(capacity + free_slots)]
    with pytest.raises(QueueFull):
        queue.reserve(1, free_slots=free_slots)
    places[0].release()
    queue.reserve(1, free_slots=free_slots)
    with pytest.raises(QueueFull):
        queue.reserve(1, free_slots=free_slots)


def test_waiting_tasks_never_outnumber_the_capacity() -> None:
    """A place that counted on a free slot is refused at admission once that slot has gone."""
    queue = a_queue(capacity=1)
    counted_on_a_slot = [queue.reserve(5, free_slots=1), queue.reserve(5, free_slots=1)]
    queue.admit(counted_on_a_slot[0], a_task())
    with pytest.raises(QueueFull):
        queue.admit(counted_on_a_slot[1], a_task())
    assert counted_on_a_slot[1].open, "its owner gives it back, as after any refusal"
    counted_on_a_slot[1].release()
    assert counts(queue) == (1, 5, 0, 0, 0)


def test_bytes_are_bounded_in_waiting_and_in_reserved_prompts_together() -> None:
    """The bound holds over both, to the byte, and a refused place takes nothing."""
    queue = a_queue(max_bytes=100)
    admitted(queue, size_bytes=60)
    place = queue.reserve(40)
    with pytest.raises(QueueFull):
        queue.reserve(1)
    assert counts(queue) == (1, 60, 0, 1, 40)
    place.release()
    queue.reserve(40)


def test_a_place_can_be_resized_within_the_bound() -> None:
    """A rendered prompt takes more, or gives back; a refused resize leaves all as it was."""
    queue = a_queue(max_bytes=100)
    place = queue.reserve(50)
    place.resize(100)
    assert queue.reserved_bytes == 100
    with pytest.raises(QueueFull):
        place.resize(101)
    assert (queue.reserved_bytes, place.size_bytes) == (100, 100)
    place.resize(10)
    assert queue.reserved_bytes == 10
    task = a_task()
    queue.admit(place, task)
    assert (task.size_bytes, counts(queue)) == (10, (1, 10, 0, 0, 0))


def test_giving_back_is_always_possible_when_full() -> None:
    """Shrinking never meets the bound."""
    queue = a_queue(max_bytes=10)
    place = queue.reserve(10)
    place.resize(10)
    place.resize(9)
    assert queue.reserved_bytes == 9


def test_a_place_is_given_back_once() -> None:
    """Release is idempotent, and does nothing after the admission."""
    queue = a_queue()
    place = queue.reserve(5)
    place.release()
    place.release()
    assert counts(queue) == (0, 0, 0, 0, 0)
    place = queue.reserve(5)
    queue.admit(place, a_task())
    place.release()
    assert counts(queue) == (1, 5, 0, 0, 0)


def test_the_refusal_says_which_bound_and_how_full() -> None:
    """The message names the bound that was met with its figures [MVP-031]."""
    queue = a_queue(capacity=1, max_bytes=100)
    admitted(queue, size_bytes=90)
    with pytest.raises(QueueFull, match=r"^the queue is full: 1 of 1 tasks wait \(queue\.capacity\); "):
        queue.reserve(1)
    roomy = a_queue(capacity=2, max_bytes=100)
    admitted(roomy, size_bytes=90)
    with pytest.raises(
        QueueFull, match=r"^the queue is full: its prompts hold 90 of 100 bytes \(queue\.max_bytes\); "
    ):
        roomy.reserve(11)


def test_the_refusal_is_made_by_whoever_knows_the_backoff() -> None:
    """The queue asks its owner for the exception, with the sentence."""
    said: list[str] = []

    def refuse(priority: Priority, message: str) -> QueueFull:
        assert priority == "interactive"
        said.append(message)
        return QueueFull(message, retry_after_ms=1234)

    queue = AdmissionQueue(QueueLimits(capacity=1, max_bytes=100), refuse, lambda: 0.0)
    admitted(queue)
    with pytest.raises(QueueFull) as refusal:
        queue.reserve(1)
    assert (said, refusal.value.retry_after_ms) == ([refusal.value.message], 1234)


@given(data=st.data())
@settings(deadline=None, max_examples=50)
def test_what_is_counted_is_what_is_there(data: st.DataObject) -> None:
    """Whatever is reserved, resized, admitted, removed and given back, the counts are exact."""
    queue = a_queue(4, 50)
    places: list[Reservation] = []
    for _ in range(data.draw(st.integers(1, 40))):
        action = data.draw(st.sampled_from(["reserve", "resize", "admit", "release", "remove"]))
        try:
            if action == "reserve":
                free_slots = data.draw(st.integers(0, 2))
                places.append(queue.reserve(data.draw(st.integers(0, 30)), free_slots=free_slots))
            elif action == "remove" and len(queue):
                queue.remove(data.draw(st.sampled_from(list(queue))))
            elif places and action in ("resize", "admit", "release"):
                place = data.draw(st.sampled_from(places))
                if action == "resize":
                    place.resize(data.draw(st.integers(0, 60)))
                else:
                    if action == "admit":
                        queue.admit(place, a_task(strict=data.draw(st.booleans())))
                    place.release()
                    places.remove(place)
        except QueueFull:
            pass
        waiting = list(queue)
        assert len(waiting) <= queue.limits.capacity
        assert counts(queue) == (
            len(waiting),
            sum(task.size_bytes for task in waiting),
            sum(task.strict for task in waiting),
            len(places),
            sum(place.size_bytes for place in places),
        )
        assert queue.waiting_bytes + queue.reserved_bytes <= queue.limits.max_bytes


# -- waking ----------------------------------------------------------------------------------------


@virtual_time
async def test_drained_returns_when_nothing_waits_and_nothing_is_reserved() -> None:
    """Both a waiting task and a held place keep it."""
    queue = a_queue()
    task, place = admitted(queue), queue.reserve(1)
    waiting = asyncio.create_task(queue.drained())
    queue.remove(task)
    await settled()
    assert not waiting.done()
    place.release()
    await waiting


@virtual_time
async def test_every_change_wakes_everybody_who_waits() -> None:
    """Admission, removal and a place given back each reach all waiting coroutines, not just one."""
    queue = a_queue()
    seen: list[tuple[str, int]] = []

    async def watch(name: str) -> None:
        async with queue.changed:
            while True:
                await queue.changed.wait()
                seen.append((name, len(queue)))

    watchers = [asyncio.create_task(watch(name)) for name in "ab"]
    await settled()
    task = admitted(queue)
    await settled()
    assert seen == [("a", 1), ("b", 1)]
    queue.remove(task)
    await settled()
    assert seen[2:] == [("a", 0), ("b", 0)]
    queue.reserve(1).release()
    await settled()
    assert len(seen) == 6
    for watcher in watchers:
        watcher.cancel()
    await asyncio.wait(watchers)


@virtual_time
async def test_a_cancelled_waiter_takes_no_wake_up_with_it() -> None:
    """The others are woken although one of them goes in the same step."""
    queue = a_queue()
    task = admitted(queue)
    waiters = [asyncio.create_task(queue.drained()) for _ in range(3)]
    await settled()
    queue.remove(task)
    waiters[0].cancel()
    await asyncio.wait(waiters)
    assert [waiter.cancelled() for waiter in waiters] == [True, False, False]


@virtual_time
async def test_a_change_while_the_waker_runs_is_not_lost() -> None:
    """A second change after the first was announced is announced too."""
    queue = a_queue()
    tasks = [admitted(queue), admitted(queue)]
    drained = asyncio.create_task(queue.drained())
    await settled()
    await queue.changed.acquire()
    queue.remove(tasks[0])
    await settled()  # the waker stands at the lock
    queue.remove(tasks[1])
    queue.changed.release()
    await drained


def test_a_queue_works_without_a_loop() -> None:
    """Plain code may use it anywhere: with nobody waiting, nobody has to be woken."""
    queue = a_queue()
    assert queue.remove(admitted(queue))

"""The bounded queue: its two lanes, their order and bounds, reservations, and those who wait for a change."""

import asyncio
import itertools
from collections import OrderedDict
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from llorch.admission import AdmissionQueue, QueueLimits, Reservation
from llorch.errors import QueueFull
from llorch.task import Priority, Task, TaskRequest
from tests.virtualtime import settled, virtual_time

NUMBERS = iter(range(10**9))


LANES: list[Priority] = ["interactive", "batch"]


class Clock:
    """A time that a test sets."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        """It, in seconds."""
        return self.now


STOPPED = Clock()


def a_task(*, strict: bool = False, priority: Priority = "interactive", now: Clock = STOPPED) -> Task:
    """A task that waits."""
    determinism = "strict" if strict else "best_effort"
    return Task(
        str(next(NUMBERS)), TaskRequest(prompt="x", determinism=determinism, priority=priority), prompt="x",
        max_tokens=1, pool_id="default", now=now, on_transition=lambda task, previous: None,
    )  # fmt: skip


def a_queue(
    capacity: int = 3,
    max_bytes: int = 100,
    *,
    batch: int = 256,
    promote_s: float | None = None,
    now: Clock = STOPPED,
) -> AdmissionQueue:
    """An empty one."""
    limits = QueueLimits(
        capacity=capacity, batch_capacity=batch, max_bytes=max_bytes, batch_promote_s=promote_s
    )
    return AdmissionQueue(limits, lambda priority, message: QueueFull(message), now)


def admitted(
    queue: AdmissionQueue,
    priority: Priority = "interactive",
    *,
    size_bytes: int = 1,
    strict: bool = False,
    now: Clock = STOPPED,
) -> Task:
    """A task that waits there."""
    task = a_task(strict=strict, priority=priority, now=now)
    queue.admit(queue.reserve(size_bytes, priority), task)
    return task


def all_start(queue: AdmissionQueue) -> list[Task]:
    """Start one head after the other, and say which."""
    started = []
    while (head := queue.head) is not None:
        queue.start(head)
        started.append(head)
    return started


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
    for task in list(queue):
        queue.remove(task)
    assert queue.lanes["interactive"]._gaps == []


# -- two lanes -------------------------------------------------------------------------------------


def test_interactive_work_goes_first() -> None:
    """Whenever it came; in each lane it is first come, first served."""
    queue = a_queue()
    batch = [admitted(queue, "batch"), admitted(queue, "batch")]
    interactive = [admitted(queue), admitted(queue)]
    assert [queue.position(task) for task in (*interactive, *batch)] == [0, 1, 2, 3]
    assert (queue.ahead_of_next("interactive"), queue.ahead_of_next("batch")) == ((2, 0), (4, 0))
    assert [queue.ahead_of_head(lane) for lane in LANES] == [0, 2]
    assert queue.oldest() == [interactive[0], batch[0]]
    assert list(queue) == [*interactive, *batch]
    assert all_start(queue) == [*interactive, *batch]


def test_a_batch_task_that_has_waited_long_goes_next() -> None:
    """From the very moment on at which it is due: a timer set for it finds it so."""
    now = Clock()
    now.now = 0.1
    queue = a_queue(promote_s=0.3, now=now)
    batch, interactive = admitted(queue, "batch", now=now), admitted(queue, now=now)
    due = queue.promotes_at()
    assert due is not None
    assert queue.head is interactive
    now.now = due
    assert queue.head is batch
    assert queue.promotes_at() is None
    assert [queue.position(task) for task in (batch, interactive)] == [0, 1]


@given(st.integers(0, 10**6).map(lambda ms: ms / 1000), st.floats(0.01, 1e6))
@settings(max_examples=50)
def test_what_is_due_is_promoted(admitted_at: float, promote_s: float) -> None:
    """However the sum is rounded: there is no moment at which it is neither due later nor promoted."""
    now = Clock()
    now.now = admitted_at
    queue = a_queue(promote_s=promote_s, now=now)
    batch, _ = admitted(queue, "batch", now=now), admitted(queue, now=now)
    due = queue.promotes_at()
    assert due is not None
    now.now = due
    assert queue.head is batch


def test_old_batch_work_takes_turns_with_interactive_work() -> None:
    """However much of it has waited long, it shuts nobody out; what is not due yet goes last."""
    now = Clock()
    queue = a_queue(capacity=9, promote_s=10, now=now)
    batch = [admitted(queue, "batch", now=now) for _ in range(3)]
    now.now = 10
    batch += [admitted(queue, "batch", now=now) for _ in range(2)]
    interactive = [admitted(queue, now=now) for _ in range(4)]
    turns = [batch[0], interactive[0], batch[1], interactive[1], batch[2], interactive[2], interactive[3]]
    expected = [*turns, *batch[3:]]
    assert list(queue) == expected
    assert [queue.position(task) for task in expected] == list(range(9))
    assert all_start(queue) == expected


def test_who_comes_after_a_promoted_one_has_the_next_turn() -> None:
    """Also one that was not there yet when it had gone before another; without any, batch work goes on."""
    now = Clock()
    queue = a_queue(promote_s=10, now=now)
    batch = [admitted(queue, "batch", now=now) for _ in range(3)]
    now.now = 10
    leaves = admitted(queue, now=now)
    queue.start(batch[0])
    queue.remove(leaves)
    assert queue.head is batch[1]
    late = admitted(queue, now=now)
    assert all_start(queue) == [late, *batch[1:]]
    assert queue.head is None


def test_where_nothing_is_promoted_batch_work_waits_for_ever() -> None:
    """None, as in the home profile: no age counts, and no timer is set."""
    now = Clock()
    queue = a_queue(capacity=9, promote_s=None, now=now)
    batch = admitted(queue, "batch", now=now)
    interactive = [admitted(queue, now=now) for _ in range(3)]
    now.now = 1e9
    assert queue.promotes_at() is None
    assert list(queue) == all_start(queue) == [*interactive, batch]


def test_without_interactive_work_nothing_has_to_be_promoted() -> None:
    """No timer then; nor for a head that has waited long, or for an empty lane."""
    now = Clock()
    queue = a_queue(promote_s=10, now=now)
    admitted(queue, now=now)
    assert queue.promotes_at() is None
    interactive = queue.head
    admitted(queue, "batch", now=now)
    assert queue.promotes_at() == 10
    assert interactive is not None
    queue.remove(interactive)
    assert queue.promotes_at() is None


def test_other_limits_hold_at_once() -> None:
    """What waits stays; a lane that is over its new bound takes nobody."""
    now = Clock()
    queue = a_queue(capacity=3, promote_s=None, now=now)
    interactive = [admitted(queue, now=now) for _ in range(3)]
    batch = admitted(queue, "batch", now=now)
    now.now = 100
    queue.limits = QueueLimits(capacity=1, batch_capacity=1, max_bytes=100, batch_promote_s=50)
    assert list(queue) == [batch, *interactive]
    for lane in LANES:
        with pytest.raises(QueueFull):
            queue.reserve(1, lane)
    queue.limits = QueueLimits(capacity=4, batch_capacity=1, max_bytes=100, batch_promote_s=None)
    assert queue.head is interactive[0]
    queue.reserve(1)


class Lanes(RuleBasedStateMachine):
    """The queue beside two plain lists and a turn: whatever happens, all that it says is what those say."""

    @initialize(promote_s=st.sampled_from([None, 0.3, 5.0]))
    def begin(self, promote_s: float | None) -> None:
        """An empty queue."""
        self.now = Clock()
        self.now.now = 1000.1
        self.promote_s = promote_s
        self.queue = a_queue(10**6, 10**9, batch=10**6, promote_s=promote_s, now=self.now)
        self.waiting: dict[Priority, list[Task]] = {"interactive": [], "batch": []}
        self.interactive_has_turn = False

    @rule(priority=st.sampled_from(LANES), strict=st.booleans(), count=st.sampled_from([1, 1, 3]))
    def admit(self, priority: Priority, strict: bool, count: int) -> None:
        """New tasks, each told how many go before it."""
        for _ in range(count):
            ahead, strict_ahead = self.queue.ahead_of_next(priority)
            task = a_task(strict=strict, priority=priority, now=self.now)
            self.waiting[priority].append(task)
            order = self.order()
            assert ahead == order.index(task)
            assert strict_ahead <= ahead
            if all(each.strict == order[0].strict for each in order):
                assert strict_ahead == ahead * order[0].strict
            assert self.queue.admit(self.queue.reserve(1, priority), task) == ahead

    @precondition(lambda self: len(self.queue))
    @rule(pick=st.integers(0, 1000))
    def leave(self, pick: int) -> None:
        """Anybody, from anywhere."""
        task = self.order()[pick % len(self.queue)]
        assert self.queue.remove(task)
        assert not self.queue.remove(task)
        assert self.queue.position(task) is None
        self.waiting[task.request.priority].remove(task)

    @rule(priority=st.sampled_from(LANES), count=st.integers(1, 200), stay=st.integers(0, 1))
    def come_and_go(self, priority: Priority, count: int, stay: int) -> None:
        """Many who leave again behind whoever waits."""
        tasks = [a_task(priority=priority, now=self.now) for _ in range(count + stay)]
        for task in tasks:
            self.queue.admit(self.queue.reserve(1, priority), task)
        for task in tasks[:count]:
            self.queue.remove(task)
        self.waiting[priority] += tasks[count:]

    @precondition(lambda self: len(self.queue))
    @rule()
    def start(self) -> None:
        """The head goes."""
        head = self.order()[0]
        self.interactive_has_turn = head in self.waiting["batch"] and bool(self.waiting["interactive"])
        self.waiting[head.request.priority].remove(head)
        self.queue.start(head)

    @rule(seconds=st.sampled_from([0.1, 0.2, 1.7, 5.0]))
    def pass_time(self, seconds: float) -> None:
        """Some time."""
        self.now.now += seconds

    @rule()
    def pass_time_until_the_promotion(self) -> None:
        """To the very moment that a timer would be set for."""
        self.now.now = self.queue.promotes_at() or self.now.now

    def order(self) -> list[Task]:
        """Whom one dispatch after the other would send out if no time passed."""
        interactive, batch = [*self.waiting["interactive"]], [*self.waiting["batch"]]
        turn, order = self.interactive_has_turn, list[Task]()
        while interactive or batch:
            promoted = batch and self.promote_s is not None and self.due(batch[0]) <= self.now()
            batch_goes = not interactive or (promoted and not turn)
            turn = bool(batch_goes and interactive)
            order.append((batch if batch_goes else interactive).pop(0))
        return order

    def due(self, task: Task) -> float:
        """When it has waited long enough."""
        assert self.promote_s is not None
        return task.admitted_at + self.promote_s

    @invariant()
    def all_that_it_says_is_true(self) -> None:
        """Order, places, counts, and when a place may change by itself."""
        if not hasattr(self, "queue"):
            return
        queue, order = self.queue, self.order()
        assert list(queue) == order
        assert queue.head is (order[0] if order else None)
        assert [queue.position(task) for task in order] == list(range(len(order)))
        assert (len(queue), queue.strict) == (len(order), sum(task.strict for task in order))
        assert [queue.depth(lane) for lane in LANES] == [len(self.waiting[lane]) for lane in LANES]
        heads = [self.waiting[lane][0] for lane in LANES if self.waiting[lane]]
        assert queue.oldest() == heads
        assert [queue.ahead_of_head(head.request.priority) for head in heads] == [*map(order.index, heads)]
        at = None
        if self.promote_s is not None and len(heads) == 2 and self.due(heads[1]) > self.now():
            at = self.due(heads[1])
        assert queue.promotes_at() == at

    @invariant()
    def it_remembers_no_more_than_it_needs(self) -> None:
        """Whoever has left is forgotten, soon."""
        if not hasattr(self, "queue"):
            return
        for lane in self.queue.lanes.values():
            assert len(lane._gaps) <= 2 * len(lane) + 64
            assert len(lane._ages) <= 3 * len(lane) + 64
            assert len(lane._numbers) == len(lane)

    def teardown(self) -> None:
        """All leave in their order."""
        if hasattr(self, "queue"):
            assert list(self.queue) == all_start(self.queue)
            assert (len(self.queue), self.queue.waiting_bytes, self.queue.reserved) == (0, 0, 0)


Lanes.TestCase.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
TestLanes = Lanes.TestCase


def test_two_long_lanes_cost_no_more_than_short_ones() -> None:
    """Places, heads, removals and starts look at no other task, in whatever order they go."""
    now = Clock()
    queue = a_queue(1000, 10_000, batch=1000, promote_s=10, now=now)
    batch = [admitted(queue, "batch", now=now) for _ in range(1000)]
    now.now = 10
    interactive = [admitted(queue, now=now) for _ in range(1000)]
    for lane in queue.lanes.values():
        lane._waiting = Unwalkable(lane._waiting)
    turns = list(itertools.chain.from_iterable(zip(batch, interactive, strict=True)))
    for started, task in enumerate(turns[:500]):
        assert queue.head is task
        assert queue.position(turns[1500]) == 1500 - started
        queue.start(task)
    for left in range(0, 1000, 2):
        assert queue.position(turns[1500]) == 1000 - left
        assert queue.ahead_of_next("batch")[0] == 1500 - left
        for task in turns[500 + left : 502 + left]:
            assert queue.remove(task)
    assert queue.head is turns[1500]


# -- bounds ----------------------------------------------------------------------------------------


def test_neither_lane_turns_the_other_away() -> None:
    """Each has its own bound, whatever waits in the other; the refusal names it."""
    for first, second in (LANES, LANES[::-1]):
        queue = a_queue(2, batch=2)
        for _ in range(2):
            admitted(queue, first)
        with pytest.raises(QueueFull):
            queue.reserve(1, first)
        for _ in range(2):
            admitted(queue, second)
        with pytest.raises(QueueFull):
            queue.reserve(1, second)
    with pytest.raises(QueueFull, match=r"2 of 2 batch tasks wait \(queue\.batch_capacity\)"):
        queue.reserve(1, "batch")


def test_both_lanes_share_the_bytes() -> None:
    """A prompt of either takes from the one bound, reserved ones and resized ones too."""
    said: list[Priority] = []

    def refuse(priority: Priority, message: str) -> QueueFull:
        said.append(priority)
        return QueueFull(message)

    queue = AdmissionQueue(QueueLimits(capacity=9, max_bytes=100), refuse, STOPPED)
    admitted(queue, size_bytes=40)
    admitted(queue, "batch", size_bytes=30)
    place = queue.reserve(20, "batch")
    for lane in LANES:
        with pytest.raises(QueueFull, match="90 of 100 bytes"):
            queue.reserve(11, lane)
    with pytest.raises(QueueFull):
        place.resize(31)
    assert said == ["interactive", "batch", "batch"], "the backoff is that of the other lane"
    place.resize(30)
    assert counts(queue) == (2, 70, 0, 1, 30)


@given(
    capacity=st.integers(1, 4),
    batch=st.integers(1, 4),
    free_slots=st.integers(0, 4),
    order=st.lists(st.sampled_from(LANES), max_size=25),
)
@settings(deadline=None, max_examples=200)
def test_both_lanes_count_on_the_same_slots(
    capacity: int, batch: int, free_slots: int, order: list[Priority]
) -> None:
    """S free slots, N and M places: each lane gets its own, and never more than S + N + M are given."""
    queue = a_queue(capacity, batch=batch)
    given = dict.fromkeys(LANES, 0)
    for lane in [*order, *LANES * 20]:
        try:
            queue.reserve(1, lane, free_slots)
        except QueueFull:
            assert given[lane] >= queue.capacity(lane), "refused though its own lane has room"
        else:
            given[lane] += 1
    for lane in LANES:
        assert queue.capacity(lane) <= given[lane] <= queue.capacity(lane) + free_slots
    assert sum(given.values()) <= free_slots + capacity + batch
    alone = a_queue(capacity, batch=batch)
    for lane in LANES:
        places = [alone.reserve(1, lane, free_slots) for _ in range(alone.capacity(lane) + free_slots)]
        with pytest.raises(QueueFull):
            alone.reserve(1, lane, free_slots)
        for place in places:
            place.release()


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
        await queue.until(lambda: seen.append((name, len(queue))) is not None)

    watchers = [asyncio.create_task(watch(name)) for name in "ab"]
    await settled()
    assert seen == [("a", 0), ("b", 0)]
    task = admitted(queue)
    await settled()
    assert seen[2:] == [("a", 1), ("b", 1)]
    queue.remove(task)
    await settled()
    assert seen[4:] == [("a", 0), ("b", 0)]
    queue.reserve(1).release()
    await settled()
    assert len(seen) == 8
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

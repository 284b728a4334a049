"""A task's states: every transition, legal or not, and what it leaves in log and counts."""

import time
from collections.abc import Callable

import pytest

from llorch.events import Error
from llorch.task import TRANSITIONS, Message, Sampling, State, Task, TaskRequest
from tests.rig import Event, events, names

ERROR = Error("WORKER_RESET", True, 2000, "the engine broke off")
ACTIONS: dict[str, tuple[State, Callable[[Task], bool]]] = {
    "start": (State.RUNNING, lambda task: task.start(FakeLease())),
    "complete": (State.COMPLETED, lambda task: task.complete("stop", tokens_out=1, tokens_in=2)),
    "fail": (State.FAILED, lambda task: task.fail(ERROR)),
    "cancel": (State.CANCELLED, lambda task: task.cancel()),
}
WAY_TO = {
    State.QUEUED: (),
    State.RUNNING: ("start",),
    State.COMPLETED: ("start", "complete"),
    State.FAILED: ("start", "fail"),
    State.CANCELLED: ("start", "cancel"),
}


class Clock:
    """A monotonic clock that the test sets."""

    def __init__(self) -> None:
        self.now = 50.0

    def __call__(self) -> float:
        return self.now


class FakeLease:
    """What a running task holds."""

    replica_id = "default-0"

    def __init__(self) -> None:
        self.interrupts: list[State | None] = []
        self.task: Task | None = None

    def interrupt(self) -> None:
        """Remember the state the task was in when told."""
        self.interrupts.append(self.task.state if self.task else None)


class Kept:
    """A task with everything it told."""

    def __init__(self, state: State = State.QUEUED, **request: object) -> None:
        self.clock = Clock()
        self.moves: list[tuple[State | None, State]] = []
        self.task = Task(
            "1f3a",
            TaskRequest(prompt="canary prompt", **request),  # type: ignore[arg-type]
            prompt="canary prompt",
            max_tokens=5,
            pool_id="default",
            now=self.clock,
            on_transition=lambda task, previous: self.moves.append((previous, task.state)),
            correlation_id="c-1",
            identity="localhost",
        )
        self.task.admit(2, 1500)
        for action in WAY_TO[state]:
            ACTIONS[action][1](self.task)
        self.moves.clear()


def running() -> tuple[Task, FakeLease, Clock]:
    """A running task, its lease and its clock."""
    kept = Kept()
    lease = FakeLease()
    lease.task = kept.task
    kept.task.start(lease)
    return kept.task, lease, kept.clock


# -- the table -------------------------------------------------------------------------------------


def test_the_table_is_this_one() -> None:
    """QUEUED → RUNNING → ended; a task can also fail or be cancelled while it waits; no end is left."""
    ends = {State.COMPLETED, State.FAILED, State.CANCELLED}
    assert TRANSITIONS[State.QUEUED] == {State.RUNNING, State.FAILED, State.CANCELLED}
    assert TRANSITIONS[State.RUNNING] == ends
    assert not any(TRANSITIONS[end] for end in ends)
    assert {state for state in State if state.final} == ends


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("state", State)
def test_each_transition_is_made_or_refused(state: State, action: str) -> None:
    """A legal transition happens once and is told once; an illegal one says False and changes nothing."""
    kept = Kept(state)
    before = events(kept.task)
    target, act = ACTIONS[action]
    legal = target in TRANSITIONS[state]
    assert act(kept.task) is legal
    assert kept.task.state is (target if legal else state)
    assert kept.moves == ([(state, target)] if legal else [])
    after = events(kept.task)
    assert after == before or legal
    assert len(after) - len(before) == (legal and target.final)


@pytest.mark.parametrize("first", ["complete", "fail", "cancel"])
@pytest.mark.parametrize("second", ["complete", "fail", "cancel", "start"])
def test_the_first_end_wins(first: str, second: str) -> None:
    """Whatever comes after the end changes neither state nor counts nor log [MVP-032]."""
    kept = Kept(State.RUNNING)
    task = kept.task
    assert ACTIONS[first][1](task)
    seen = (task.state, task.tokens_out, task.tokens_in, task.finish_reason, task.error, task.ended_at)
    frames = events(task)
    kept.clock.now += 1
    assert not ACTIONS[second][1](task)
    assert not task.token("late")
    assert seen == (
        task.state, task.tokens_out, task.tokens_in, task.finish_reason, task.error, task.ended_at
    )  # fmt: skip
    assert events(task) == frames


# -- the log ---------------------------------------------------------------------------------------


def test_started_is_as_of_admission() -> None:
    """Admission appends `started`, id 0, and is told with no previous state; the start appends nothing."""
    kept = Kept()
    assert events(kept.task) == [Event(0, "started", {"queue_position": 2, "predicted_start_ms": 1500})]
    kept.task.start(FakeLease())
    assert names(kept.task) == "started"


def test_admission_is_told_once() -> None:
    """`on_transition` hears of the admission before anything else."""
    told: list[State | None] = []
    task = Task(
        "1", TaskRequest(prompt="x"), prompt="x", max_tokens=1, pool_id="p", now=Clock(),
        on_transition=lambda _, previous: told.append(previous),
    )  # fmt: skip
    task.admit(0, None)
    assert told == [None]
    assert events(task) == [Event(0, "started", {"queue_position": 0})]


@pytest.mark.parametrize("state", [State.QUEUED, State.COMPLETED, State.FAILED, State.CANCELLED])
def test_a_token_is_refused_unless_running(state: State) -> None:
    """No token enters the log of a task that waits or has ended."""
    kept = Kept(state)
    frames, count = events(kept.task), kept.task.tokens_out
    assert not kept.task.token("late")
    assert (events(kept.task), kept.task.tokens_out) == (frames, count)


def test_tokens_are_numbered_without_a_gap() -> None:
    """i = 0, 1, 2 …, ids follow `started`, and the end comes after them."""
    task, _, _ = running()
    for text in ("a", "b", "c"):
        assert task.token(text)
    task.complete("length", tokens_out=3, tokens_in=4)
    assert events(task)[1:] == [
        Event(1, "token", {"t": "a", "i": 0}),
        Event(2, "token", {"t": "b", "i": 1}),
        Event(3, "token", {"t": "c", "i": 2}),
        Event(4, "end", {"tokens_out": 3, "finish_reason": "length", "decode_time_ms": 0, "tokens_in": 4}),
    ]


def test_the_engines_count_is_the_one_number() -> None:
    """E17: once the final chunk came, `tokens_out` is the engine's, in the event and in the snapshot."""
    task, _, _ = running()
    task.token("é")
    task.complete("stop", tokens_out=3, tokens_in=7)
    assert (task.tokens_out, task.tokens_in, task.finish_reason) == (3, 7, "stop")
    assert events(task)[-1].data["tokens_out"] == 3


def test_a_cancelled_task_counts_what_was_shown() -> None:
    """Without a final chunk `tokens_out` is the number of token events; the end is all that is left."""
    task, _, _ = running()
    task.token("a")
    task.token("b")
    assert task.cancel()
    assert task.tokens_out == 2
    assert events(task)[1:] == [
        Event(3, "end", {"tokens_out": 2, "finish_reason": "cancelled", "decode_time_ms": 0})
    ]


def test_a_failure_keeps_its_tokens() -> None:
    """E8: what was shown stays, then `error` with code, retriable, backoff and message."""
    task, _, _ = running()
    task.token("a")
    assert task.fail(ERROR, cause="for the log")
    assert names(task) == "started token error"
    assert events(task)[-1].data == {
        "code": "WORKER_RESET", "retriable": True, "retry_after_ms": 2000, "message": "the engine broke off"
    }  # fmt: skip
    assert (task.error, task.cause) == (ERROR, "for the log")


def test_a_waiting_task_that_nobody_reads_has_no_frames() -> None:
    """`started` is as of admission whenever it is looked at, and until then costs no memory."""
    kept = Kept()
    assert kept.task._log is None
    kept.clock.now += 60
    assert events(kept.task) == [Event(0, "started", {"queue_position": 2, "predicted_start_ms": 1500})]
    assert kept.task.log is kept.task.log


def test_waiting_tasks_share_what_was_not_asked_for() -> None:
    """Sampling and metadata that were not given are the same objects; rendered messages are let go of."""
    tasks = [
        Task(
            "1", TaskRequest(messages=(Message("user", "x"),)), prompt="<x>", max_tokens=1, pool_id="p",
            now=Clock(), on_transition=lambda *_: None,
        )
        for _ in range(2)
    ]  # fmt: skip
    assert tasks[0].request.sampling is tasks[1].request.sampling
    assert tasks[0].request.metadata is tasks[1].request.metadata
    assert tasks[0].request.messages == ()


# -- the lease -------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["cancel", "fail"])
def test_the_engine_is_told_to_stop_after_the_task_has_ended(end: str) -> None:
    """In the same step, but last: whoever the interrupt wakes finds the task ended."""
    task, lease, _ = running()
    ACTIONS[end][1](task)
    assert lease.interrupts == [ACTIONS[end][0]]
    assert task.lease is None


def test_a_completed_task_interrupts_nobody() -> None:
    """The engine has finished by itself."""
    task, lease, _ = running()
    task.complete("stop")
    assert (lease.interrupts, task.lease) == ([], None)


def test_the_replica_is_remembered() -> None:
    """`replica_id` outlives the lease, for snapshots and logs."""
    kept = Kept(State.COMPLETED)
    assert kept.task.replica_id == "default-0"


# -- what is kept ----------------------------------------------------------------------------------


@pytest.mark.parametrize("state", [State.COMPLETED, State.FAILED, State.CANCELLED])
def test_an_ended_task_holds_no_prompt(state: State) -> None:
    """Prompt, messages, stop strings and grammar are freed at the end: they may be megabytes."""
    kept = Kept(
        messages=(Message("user", "canary"),), sampling=Sampling(grammar="canary", seed=1),
        determinism="strict", session_id="s", metadata={"k": "v"},
    )  # fmt: skip
    for action in WAY_TO[state]:
        ACTIONS[action][1](kept.task)
    assert "canary" not in repr((kept.task.prompt, kept.task.request))
    assert (kept.task.strict, kept.task.request.session_id) == (True, "s")
    assert kept.task.request.metadata == {"k": "v"}


def test_times_are_those_of_the_injected_clock() -> None:
    """queue, first-token and decode times are differences of the clock that was given, in ms [MVP-070]."""
    kept = Kept()
    task, clock = kept.task, kept.clock
    assert (task.queue_ms, task.first_token_ms, task.decode_time_ms) == (None, None, None)
    clock.now += 1.5
    task.start(FakeLease())
    assert task.queue_ms == 1500
    clock.now += 0.25
    task.token("a")
    assert (task.first_token_ms, task.decode_time_ms) == (250, 0)
    clock.now += 2
    task.token("b")
    clock.now += 60
    task.complete("stop")
    assert (task.queue_ms, task.first_token_ms, task.decode_time_ms) == (1500, 250, 2000)
    assert task.ended_at == clock.now


def test_a_task_that_never_started_waited_until_its_end() -> None:
    """`queue_ms` of a cancelled waiting task is the whole of its life."""
    kept = Kept()
    kept.clock.now += 3
    kept.task.cancel()
    kept.clock.now += 9
    assert (kept.task.queue_ms, kept.task.first_token_ms) == (3000, None)


def test_log_fields_are_these_and_carry_no_text() -> None:
    """Lines about a task have the fields of the contract, and none of what was asked or said [MVP-070]."""
    kept = Kept(State.RUNNING, session_id="s-1")
    kept.task.token("canary output")
    kept.task.complete("stop", tokens_out=1, tokens_in=2)
    assert kept.task.log_fields() == {
        "correlation_id": "c-1",
        "job_id": "1f3a",
        "session_id": "s-1",
        "pool_id": "default",
        "replica_id": "default-0",
        "queue_position": 2,
        "predicted_start_ms": 1500,
        "tokens_in": 2,
        "tokens_out": 1,
        "queue_ms": 0,
        "first_token_ms": 0,
        "decode_time_ms": 0,
        "identity": "localhost",
    }


def test_created_at_is_unix_time() -> None:
    """The one thing that is not on the monotonic clock."""
    assert abs(time.time() - Kept().task.created_at) < 600


def test_size_is_in_bytes_of_utf8() -> None:
    """The queue's bound counts bytes, of the prompt or of all roles and contents."""
    assert TaskRequest(prompt="größe").size_bytes == 7
    assert TaskRequest(messages=(Message("user", "ö"), Message("a", "bc"))).size_bytes == 4 + 2 + 1 + 2

"""One pool: who goes out when, what is tried again, what ends a task, and what is refused before that."""

import asyncio
from collections.abc import Callable

import pytest

from llorch.engine import (
    Chunk,
    EngineBroken,
    EngineContextOverflow,
    EngineFailure,
    EngineGone,
    EngineInvalidRequest,
    EngineLoading,
    EngineMisconfigured,
    EngineRefused,
    EngineStalled,
    Final,
    Generation,
    Prefill,
)
from llorch.errors import (
    BodyTooLarge,
    ContextOverflow,
    DeterminismUnavailable,
    InvalidParams,
    LlorchError,
    PoolUnavailable,
    PoolUnready,
    QueueFull,
)
from llorch.replica import Lease
from llorch.task import Message, Sampling, State, Task, TaskRequest
from tests.memory_engine import Call, MemoryEngine
from tests.rig import Event, Rig, events, names, rig, text
from tests.virtualtime import advance, current, settled, virtual_time

GONE = EngineGone("can't connect to the engine", sent=False)
LOADING = EngineLoading("POST /completion answered 503", sent=False)
HUNG_UP = EngineRefused("the engine hung up before it answered", sent=True)
BROKEN = EngineBroken("the engine broke off")


def states(*tasks: Task) -> list[State]:
    """Where each of them is."""
    return [task.state for task in tasks]


def lease_of(task: Task) -> Lease:
    """What a running task holds."""
    assert isinstance(task.lease, Lease)
    return task.lease


def code(task: Task) -> str:
    """The code of a task that failed."""
    assert task.state is State.FAILED
    assert task.error is not None
    return task.error.code


def nothing_left(it: Rig) -> bool:
    """Whether a refused request left nothing behind."""
    counts = (
        len(it.queue),
        it.queue.reserved,
        it.queue.reserved_bytes,
        it.queue.waiting_bytes,
        it.replica.busy,
    )
    return counts == (0, 0, 0, 0, 0) and not it.moves


# -- dispatch --------------------------------------------------------------------------------------


@virtual_time
async def test_a_task_is_out_in_the_step_that_admits_it() -> None:
    """With a free slot nothing has to happen in between."""
    async with rig() as it:
        task = await it.orchestrator.submit(TaskRequest(prompt="hello"))
        assert task.state is State.RUNNING
        await settled()
        assert it.engine.prompts == ["hello"]


@virtual_time
async def test_the_next_task_goes_out_in_the_step_that_frees_a_slot() -> None:
    """Nothing polls: closing the lease starts the head of the queue at once."""
    async with rig() as it:
        first, second = await it.submit(), await it.submit()
        assert states(first, second) == [State.RUNNING, State.QUEUED]
        lease_of(first).close(clean=True)
        assert second.state is State.RUNNING


@virtual_time
async def test_tasks_start_in_the_order_of_their_admission() -> None:
    """FIFO, over all slots."""
    async with rig(slots=2) as it:
        for number in range(6):
            await it.submit(str(number))
        while it.engine.open:
            it.engine.open[-1].finish("x")
            await settled()
        assert it.engine.prompts == [str(number) for number in range(6)]


@virtual_time
async def test_exactly_slots_plus_capacity_are_admitted() -> None:
    """With S = 2 free slots and N = 3 places the sixth is refused; one done, one more [MVP-031]."""
    async with rig(slots=2, capacity=3) as it:
        tasks = [await it.submit(str(number)) for number in range(5)]
        assert [task.queue_position for task in tasks] == [0, 0, 0, 1, 2]
        with pytest.raises(QueueFull, match="3 of 3 tasks wait") as refusal:
            await it.submit()
        assert (refusal.value.retry_after_ms, refusal.value.engine) == (2000, "memory")
        it.engine.calls[0].finish()
        await settled()
        await it.submit()
        with pytest.raises(QueueFull):
            await it.submit()


@pytest.mark.parametrize(("running", "places"), [(0, 3), (1, 2)])
@virtual_time
async def test_places_given_at_once_are_not_given_twice(running: int, places: int) -> None:
    """S + N holds for requests that the engine is still asked about; the others are refused at once."""
    async with rig(slots=1, capacity=2, ctx=30) as it:
        for _ in range(running):
            await it.submit("x")
        gate = it.engine.hold("tokenize")
        request = TaskRequest(prompt="four words of prompt", max_tokens=5)
        submits = [asyncio.create_task(it.orchestrator.submit(request)) for _ in range(5)]
        await settled()
        assert [submit.done() for submit in submits] == [False] * places + [True] * (5 - places)
        gate.set()
        await settled()
        assert [submit.exception() is None for submit in submits] == [True] * places + [False] * (5 - places)


@virtual_time
async def test_the_backoff_and_the_prediction_are_measured() -> None:
    """After one task of eight seconds, both speak of eight seconds [MVP-031]."""
    async with rig(capacity=1) as it:
        _, call = await it.running()
        await advance(8)
        call.finish()
        await settled()
        running, _ = await it.running()
        waiting = await it.submit()
        assert (running.predicted_start_ms, waiting.predicted_start_ms) == (0, 8000)
        assert events(waiting) == [Event(0, "started", {"queue_position": 0, "predicted_start_ms": 8000})]
        await advance(3)
        with pytest.raises(QueueFull) as refusal:
            await it.submit()
        assert refusal.value.retry_after_ms == 5000


@virtual_time
async def test_a_strict_task_runs_alone() -> None:
    """It waits until all slots are idle and drained, and nothing runs beside it [MVP-042]."""
    async with rig(slots=3) as it:
        first, call = await it.running("first")
        second = await it.submit("second")
        strict = await it.submit("strict", seed=7)
        behind = await it.submit("behind")
        it.engine.clings = True
        it.cancel(second)
        call.finish()
        await advance(5)
        assert states(first, strict, behind) == [State.COMPLETED, State.QUEUED, State.QUEUED]
        it.engine.let_go()
        await advance(0.5)
        assert states(strict, behind) == [State.RUNNING, State.QUEUED]
        it.engine.calls[-1].finish()
        await settled()
        assert states(strict, behind) == [State.COMPLETED, State.RUNNING]


@virtual_time
async def test_nothing_overtakes_a_strict_task_that_waits() -> None:
    """Strict FIFO: with a slot free, those behind it wait too."""
    async with rig(slots=2) as it:
        await it.submit("first")
        await it.submit("strict", seed=1)
        behind = await it.submit("behind")
        await advance(10)
        assert it.replica.free_slots == 1
        assert behind.state is State.QUEUED
        assert it.engine.prompts == ["first"]


@virtual_time
async def test_a_head_that_leaves_lets_the_next_go_at_once() -> None:
    """A cancelled strict head frees the way for those who were only waiting behind it."""
    async with rig(slots=2) as it:
        await it.submit("first")
        strict = await it.submit("strict", seed=1)
        behind = await it.submit("behind")
        it.cancel(strict)
        assert behind.state is State.RUNNING


@pytest.mark.parametrize(
    ("slots", "seed", "slot", "cache_prompt"),
    [(2, None, None, True), (2, 5, 0, False), (1, None, 0, True), (1, 5, 0, False)],
)
@virtual_time
async def test_what_the_engine_is_sent(
    slots: int, seed: int | None, slot: int | None, cache_prompt: bool
) -> None:
    """A strict task: slot 0 and no prompt cache. With one slot, always slot 0 [MVP-042]."""
    async with rig(slots=slots) as it:
        _, call = await it.running("a prompt", seed=seed, max_tokens=9)
        assert call.generation == Generation(
            prompt="a prompt",
            max_tokens=9,
            sampling=Sampling(seed=seed),
            slot=slot,
            cache_prompt=cache_prompt,
        )


@virtual_time
async def test_tokens_go_straight_into_the_log() -> None:
    """In their order, several of one read too, and the end has the engine's counts [MVP-020]."""
    async with rig() as it:
        task, call = await it.running()
        call.begin()
        call.say("a")
        call.say("b", "c")
        call.say()
        await settled()
        assert text(task) == "abc"
        call.finish("d", reason="length", tokens_out=5)
        await settled()
        assert names(task) == "started token token token token end"
        assert events(task)[-1].data == {
            "tokens_out": 5, "finish_reason": "length", "decode_time_ms": 0, "tokens_in": 3
        }  # fmt: skip
        assert call.closed
        assert it.replica.free_slots == 1


# -- retries ---------------------------------------------------------------------------------------


@virtual_time
async def test_an_engine_that_refuses_is_tried_again_unseen() -> None:
    """E1: same lease, after a probe that found it good; the client sees nothing of it."""
    async with rig() as it:
        task, call = await it.running()
        waiting = await it.submit("waiting")
        lease = task.lease
        call.fail(GONE)
        await advance(1)
        assert (task.state, task.lease) == (State.RUNNING, lease)
        assert it.engine.prompts == ["hello", "hello"]
        it.engine.calls[1].finish("done")
        await settled()
        assert (names(task), waiting.state) == ("started token end", State.RUNNING)


@virtual_time
async def test_a_retry_waits_for_an_engine_that_is_ready() -> None:
    """E1, E2: it is not sent to one that is gone or loading, and goes out when it is back."""
    async with rig() as it:
        task, call = await it.running()
        it.engine.failure = GONE
        call.fail(GONE)
        await advance(4)
        it.engine.failure = EngineLoading("loading")
        await advance(4)
        assert (len(it.engine.calls), task.state) == (1, State.RUNNING)
        assert it.replica.last_error == "loading"
        it.engine.failure = None
        await advance(3)
        assert len(it.engine.calls) == 2


@virtual_time
async def test_tasks_wait_while_the_engine_loads() -> None:
    """E2: those in the queue stay there and go out when it is ready; new ones are told POOL_UNREADY."""
    async with rig() as it:
        await it.submit("first")
        waiting = [await it.submit(name) for name in ("second", "third")]
        it.engine.failure = LOADING
        it.engine.calls[0].fail(BROKEN)
        await advance(30)
        assert states(*waiting) == [State.QUEUED, State.QUEUED]
        with pytest.raises(PoolUnready):
            await it.submit()
        it.engine.failure = None
        await advance(3)
        assert it.engine.prompts == ["first", "second"]


@virtual_time
async def test_what_may_have_been_sent_drains_before_it_is_sent_again() -> None:
    """E1: a reset after the request was out: never twice in the engine at once."""
    async with rig() as it:
        it.engine.clings = True
        _, call = await it.running()
        call.fail(HUNG_UP)
        await advance(5)
        assert (len(it.engine.calls), it.replica.draining) == (1, 1)
        it.engine.let_go()
        await advance(1)
        assert (len(it.engine.calls), it.replica.draining, it.replica.busy) == (2, 0, 1)


@pytest.mark.parametrize("retries", [0, 1, 3])
@virtual_time
async def test_there_are_so_many_retries_and_no_more(retries: int) -> None:
    """Then POOL_UNAVAILABLE, retriable, and the slot is free."""
    async with rig(retries=retries) as it:
        task, _ = await it.running()
        for number in range(retries + 1):
            assert len(it.engine.calls) == number + 1
            it.engine.calls[-1].fail(GONE)
            await advance(1)
        assert len(it.engine.calls) == retries + 1
        assert (names(task), code(task)) == ("started error", "POOL_UNAVAILABLE")
        assert events(task)[-1].data["retriable"] is True
        assert events(task)[-1].data["retry_after_ms"] == 2000
        assert it.replica.free_slots == 1


@virtual_time
async def test_retries_do_not_come_all_at_once() -> None:
    """Each has its own small delay."""
    async with rig(retries=2) as it:
        await it.running()
        gaps = []
        for _ in range(2):
            it.engine.calls[-1].fail(GONE)
            count, began = len(it.engine.calls), current().time()
            while len(it.engine.calls) == count:
                await advance(0.001)
            gaps.append(round(current().time() - began, 3))
        assert all(0.05 <= gap <= 0.26 for gap in gaps)
        assert gaps[0] != gaps[1]


@virtual_time
async def test_all_tries_together_have_first_token_s() -> None:
    """E1: an engine that does not come back in that time fails the task, and the queue waits on."""
    async with rig(first_token_s=20) as it:
        task, call = await it.running()
        waiting = await it.submit()
        it.engine.failure = GONE
        await advance(5)
        call.fail(GONE)
        await advance(14.9)
        assert task.state is State.RUNNING
        await advance(0.2)
        assert (code(task), waiting.state) == ("POOL_UNAVAILABLE", State.QUEUED)


@virtual_time
async def test_the_time_for_the_first_token_is_not_given_anew() -> None:
    """A retry has what is left of it."""
    async with rig(first_token_s=20) as it:
        task, call = await it.running()
        await advance(15)
        call.fail(GONE)
        await advance(1)
        assert len(it.engine.calls) == 2
        await advance(4.1)
        assert code(task) == "DECODE_TIMEOUT"


def after_headers(call: Call) -> None:
    """The engine has begun and breaks."""
    call.begin()
    call.fail(BROKEN)


def after_tokens(call: Call) -> None:
    """Two tokens, then it breaks."""
    call.say("a", "b")
    call.fail(BROKEN)


def ends_early(call: Call) -> None:
    """A clean end without a final chunk."""
    call.say("a", "b")
    call.end()


def answers_500(call: Call) -> None:
    """Before anything else."""
    call.fail(EngineBroken("POST /completion answered 500", detail="out of memory"))


@pytest.mark.parametrize(
    ("breaks", "seen"),
    [
        (after_headers, "started error"),
        (after_tokens, "started token token error"),
        (ends_early, "started token token error"),
        (answers_500, "started error"),
    ],
)
@virtual_time
async def test_a_broken_answer_is_not_tried_again(breaks: Callable[[Call], None], seen: str) -> None:
    """E6, E8, E9, E10: what was shown stays, then WORKER_RESET, once; the connection is closed."""
    async with rig() as it:
        task, call = await it.running()
        breaks(call)
        await advance(30)
        assert (names(task), code(task)) == (seen, "WORKER_RESET")
        assert events(task)[-1].data["retriable"] is True
        assert (len(it.engine.calls), call.closed) == (1, True)
        assert it.replica.free_slots == 1


@virtual_time
async def test_after_a_broken_answer_dispatch_waits_for_a_probe_and_admission_does_not() -> None:
    """The probe comes at once."""
    async with rig(slots=2) as it:
        _, call = await it.running()
        gate = it.engine.hold("health")
        call.fail(BROKEN)
        await settled()
        waiting = await it.submit("waiting")
        await advance(1)
        assert waiting.state is State.QUEUED
        gate.set()
        await settled()
        assert waiting.state is State.RUNNING


@virtual_time
async def test_a_killed_engine_fails_its_tasks_and_keeps_the_queue() -> None:
    """E18: WORKER_RESET at once; those who wait go out in their order when it is back."""
    async with rig(slots=2) as it:
        running = [await it.submit(name) for name in "ab"]
        waiting = [await it.submit(name) for name in "cde"]
        it.engine.failure = GONE
        for call in it.engine.open:
            call.say("x")
            call.fail(BROKEN)
        await settled()
        assert [code(task) for task in running] == ["WORKER_RESET", "WORKER_RESET"]
        await advance(60)
        assert states(*waiting) == [State.QUEUED] * 3
        it.engine.failure = None
        await advance(10)
        assert it.engine.prompts == ["a", "b", "c", "d"]


@virtual_time
async def test_what_comes_after_the_final_chunk_is_nobodys() -> None:
    """E11: the first final wins, one `end`, and the connection is closed."""
    async with rig() as it:
        task, call = await it.running()
        call.finish("a", tokens_out=1)
        call.say("late")
        call.send(Chunk(["later"], Final("length", 9, 9)))
        await settled()
        assert (names(task), text(task), task.tokens_out, call.closed) == ("started token end", "a", 1, True)


@pytest.mark.parametrize(
    ("failure", "expected", "retriable"),
    [
        (EngineInvalidRequest("answered 400", detail="bad grammar", sent=False), "INVALID_PARAMS", False),
        (EngineContextOverflow("answered 400", detail="5000 > 4096", sent=False), "CONTEXT_OVERFLOW", False),
        (EngineMisconfigured("answered 404", detail="no such route", sent=False), "POOL_UNAVAILABLE", True),
        (EngineStalled("silence", detail="for long"), "DECODE_TIMEOUT", True),
        (EngineBroken("broke off", detail="in the middle"), "WORKER_RESET", True),
    ],
)
@virtual_time
async def test_each_failure_has_its_code(failure: EngineFailure, expected: str, retriable: bool) -> None:
    """E4, E5, E6: the client gets the engine's own words, the log only ours."""
    async with rig() as it:
        task, call = await it.running()
        call.fail(failure)
        await settled()
        error = events(task)[-1].data
        assert (error["code"], error["retriable"], error["message"]) == (expected, retriable, str(failure))
        assert ("retry_after_ms" in error) is retriable
        assert task.cause == failure.summary
        assert len(it.engine.calls) == 1


@virtual_time
async def test_a_misconfigured_engine_is_unready_and_says_so() -> None:
    """E5: 401, 403, 404, 501 for one task mean all tasks."""
    async with rig() as it:
        _, call = await it.running()
        waiting = await it.submit()
        call.fail(EngineMisconfigured("POST /completion answered 401", sent=False))
        await settled()
        assert it.pool.health().last_error == "misconfigured: POST /completion answered 401"
        assert (it.pool.health().ready, waiting.state) == (False, State.QUEUED)
        with pytest.raises(PoolUnavailable, match="misconfigured"):
            await it.submit()


# -- deadlines -------------------------------------------------------------------------------------


@pytest.mark.parametrize("begins", [False, True])
@virtual_time
async def test_without_a_token_a_task_ends_after_first_token_s(begins: bool) -> None:
    """E3, E12: from dispatch; headers are no token. The connection is closed and the slot drains."""
    async with rig(first_token_s=20) as it:
        it.engine.clings = True
        task, call = await it.running()
        await advance(15)
        if begins:
            call.begin()
        await advance(4.9)
        assert task.state is State.RUNNING
        await advance(0.2)
        assert (code(task), call.closed, it.replica.draining) == ("DECODE_TIMEOUT", True, 1)
        assert task.error is not None
        assert task.error.message == "no token within 20 s of dispatch"


@virtual_time
async def test_progress_with_the_prompt_is_noted_and_is_no_token() -> None:
    """It counts as first_token_s does, from dispatch, not as idle_s does; the log does not have it."""
    async with rig(first_token_s=20, idle_s=5) as it:
        task, call = await it.running()
        call.begin()
        for done in (0, 512):
            await advance(8)
            call.send(Chunk([], begun=True, prefill=Prefill(700, done)))
        await settled()
        assert (task.prompt_tokens, task.prompt_tokens_done) == (700, 512)
        assert names(task) == "started"
        await advance(4.1)
        assert code(task) == "DECODE_TIMEOUT"
        assert task.error is not None
        assert task.error.message == "no token within 20 s of dispatch"


@virtual_time
async def test_the_time_in_the_queue_is_not_the_engines() -> None:
    """first_token_s counts from dispatch."""
    async with rig(first_token_s=20) as it:
        _, call = await it.running()
        waiting = await it.submit()
        for _ in range(10):
            await advance(5)
            call.say("x")
        call.finish()
        await advance(19)
        assert waiting.state is State.RUNNING
        it.engine.calls[-1].say("x")
        await settled()
        assert waiting.tokens_out == 1


@virtual_time
async def test_between_two_tokens_there_may_be_idle_s() -> None:
    """E12, E20: the gap decides, not health; part of a character is progress, headers are not."""
    async with rig(first_token_s=100, idle_s=10) as it:
        task, call = await it.running()
        call.say("a")
        await advance(9.9)
        call.say()
        await advance(9.9)
        assert task.state is State.RUNNING
        call.begin()
        await advance(0.1 + 10 / 16)
        assert (code(task), text(task), call.closed) == ("DECODE_TIMEOUT", "a", True)


@virtual_time
async def test_silence_before_the_final_chunk_is_silence() -> None:
    """E12: all tokens are there and the end is not."""
    async with rig(idle_s=10) as it:
        task, call = await it.running(max_tokens=2)
        call.say("a", "b")
        await advance(10)
        assert task.state is State.RUNNING  # the timer is moved seldom, so it may be late by a sixteenth
        await advance(10 / 16)
        assert (names(task), code(task)) == ("started token token error", "DECODE_TIMEOUT")


@virtual_time
async def test_a_whole_answer_has_wall_s() -> None:
    """However steadily the tokens flow."""
    async with rig(wall_s=30, first_token_s=20, idle_s=10) as it:
        task, call = await it.running()
        for _ in range(14):
            await advance(2)
            call.say("x")
        await advance(1.9)
        assert task.state is State.RUNNING
        await advance(0.2)
        assert (code(task), task.tokens_out, call.closed) == ("DECODE_TIMEOUT", 14, True)


@virtual_time
async def test_the_wall_stands_before_the_first_token_too() -> None:
    """A wall_s shorter than first_token_s counts."""
    async with rig(wall_s=5, first_token_s=20) as it:
        task, _ = await it.running()
        await advance(5.1)
        assert code(task) == "DECODE_TIMEOUT"


@virtual_time
async def test_a_task_waits_no_longer_than_max_wait_s() -> None:
    """QUEUE_TIMEOUT, each at its own time; it never reaches the engine, and its place is free."""
    async with rig(max_wait_s=60, first_token_s=500, wall_s=500) as it:
        running, _ = await it.running()
        first = await it.submit("first")
        await advance(30)
        second = await it.submit("second")
        await advance(29.9)
        assert states(first, second) == [State.QUEUED, State.QUEUED]
        await advance(0.2)
        assert (code(first), second.state) == ("QUEUE_TIMEOUT", State.QUEUED)
        assert events(first)[-1].data["retry_after_ms"] == 2000
        await advance(30)
        assert (code(second), running.state) == ("QUEUE_TIMEOUT", State.RUNNING)
        assert it.engine.prompts == ["hello"]
        assert len(it.queue) == 0


@virtual_time
async def test_the_deadline_of_the_queue_follows_its_head() -> None:
    """When the head goes, the next one's deadline counts, and an empty queue has none."""
    async with rig(max_wait_s=60, first_token_s=500, wall_s=500) as it:
        _, call = await it.running()
        await it.submit("first")
        await advance(30)
        second = await it.submit("second")
        call.finish()
        await advance(59)
        assert second.state is State.QUEUED
        await advance(2)
        assert code(second) == "QUEUE_TIMEOUT"
        await advance(200)
        third = await it.submit("third")
        await advance(59)
        assert third.state is State.QUEUED


@virtual_time
async def test_while_the_engine_is_gone_tasks_wait_their_time() -> None:
    """Queued tasks wait until max_wait_s, new ones get POOL_UNAVAILABLE with the reason."""
    async with rig(max_wait_s=60) as it:
        _, call = await it.running()
        waiting = await it.submit()
        it.engine.failure = GONE
        call.fail(BROKEN)
        await advance(59)
        assert waiting.state is State.QUEUED
        with pytest.raises(PoolUnavailable, match="can't connect to the engine"):
            await it.submit()
        await advance(2)
        assert code(waiting) == "QUEUE_TIMEOUT"


# -- the context -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "asked"), [(72, 0), (73, 1)])
@virtual_time
async def test_bytes_alone_settle_what_surely_fits(size: int, asked: int) -> None:
    """Bytes + 8 + max_tokens ≤ context: no round trip; one byte more, and the engine counts [MVP-030]."""
    async with rig(ctx=100) as it:
        task = await it.submit("x" * size, max_tokens=20)
        assert (it.engine.asked["tokenize"], task.max_tokens) == (asked, 20)


@virtual_time
async def test_bytes_are_not_characters() -> None:
    """A prompt of 40 characters in 80 bytes is looked at."""
    async with rig(ctx=100) as it:
        await it.submit("ö" * 40, max_tokens=20)
        assert it.engine.asked["tokenize"] == 1


@pytest.mark.parametrize(
    ("words", "asked", "granted"),
    [(90, 10, 10), (80, None, 16), (90, None, 10), (99, None, 1)],
)
@virtual_time
async def test_max_tokens_is_what_was_asked_or_what_is_left(
    words: int, asked: int | None, granted: int
) -> None:
    """Not given: min(max_tokens_default, what the context leaves)."""
    async with rig(ctx=100) as it:
        assert (await it.submit("x " * words, max_tokens=asked)).max_tokens == granted


@virtual_time
async def test_the_default_stays_under_the_ceiling() -> None:
    """max_tokens_default is cut to limits.max_tokens."""
    async with rig(max_tokens_default=64, max_tokens=32) as it:
        assert (await it.submit()).max_tokens == 32


@pytest.mark.parametrize(
    ("words", "asked", "message"),
    [
        (91, 10, "91 prompt tokens + 10 max_tokens > 100 tokens of context"),
        (100, None, "100 prompt tokens + at least 1 max_tokens > 100 tokens of context"),
        (500, 1, "500 prompt tokens + 1 max_tokens > 100 tokens of context"),
    ],
)
@virtual_time
async def test_what_does_not_fit_is_refused_with_three_numbers(
    words: int, asked: int | None, message: str
) -> None:
    """CONTEXT_OVERFLOW before anything is stored [MVP-030]."""
    async with rig(ctx=100) as it:
        with pytest.raises(ContextOverflow) as refusal:
            await it.submit("x " * words, max_tokens=asked)
        assert refusal.value.message == message
        assert nothing_left(it)


@pytest.mark.parametrize(("ours", "engines", "limit"), [(0, 50, 50), (40, 50, 40), (60, 50, 50)])
@virtual_time
async def test_the_limit_is_the_smaller_of_ours_and_the_engines(ours: int, engines: int, limit: int) -> None:
    """limits.ctx, 0 for the engine's own n_ctx per slot."""
    async with rig(engine=MemoryEngine(ctx=engines), ctx=ours) as it:
        assert it.pool.ctx == limit
        assert it.pool.health().ctx == limit
        with pytest.raises(ContextOverflow, match=f"> {limit} tokens"):
            await it.submit("x " * 60)


@virtual_time
async def test_messages_are_rendered_by_the_engine_first() -> None:
    """The prompt is what its template makes of them; the queue counts those bytes."""
    said = (Message("user", "Größe?"),)
    rendered = "user: Größe?\n"
    async with rig() as it:
        await it.submit("first")
        waiting = await it.submit(messages=said)
        assert it.queue.waiting_bytes == len(rendered.encode()) == waiting.size_bytes
        assert waiting.prompt == rendered
        it.engine.calls[0].finish()
        await settled()
        assert it.engine.prompts == ["first", rendered]


@virtual_time
async def test_a_prompt_that_can_never_be_queued_is_too_large() -> None:
    """BODY_TOO_LARGE, not a 429 that would be the same for ever, also after rendering."""
    async with rig(max_bytes=20) as it:
        with pytest.raises(BodyTooLarge, match=r"21 bytes, queue\.max_bytes is 20"):
            await it.submit("x" * 21)
        with pytest.raises(BodyTooLarge, match=r"21 bytes, queue\.max_bytes is 20"):
            await it.submit(messages=(Message("user", "x" * 14),))
        assert nothing_left(it)


@virtual_time
async def test_the_queue_is_full_in_bytes_too() -> None:
    """Also when only rendering shows it; running tasks don't count."""
    async with rig(max_bytes=40) as it:
        await it.submit("x" * 40)
        await it.submit("x" * 30)
        with pytest.raises(QueueFull, match="30 of 40 bytes"):
            await it.submit("x" * 11)
        with pytest.raises(QueueFull, match="of 40 bytes"):
            await it.submit(messages=(Message("u", "x" * 8),))
        await it.submit("x" * 10)


@pytest.mark.parametrize(
    ("failure", "refusal"),
    [
        (EngineInvalidRequest("answered 400", detail="no such role", sent=False), InvalidParams),
        (EngineContextOverflow("answered 400", detail="too long", sent=False), ContextOverflow),
        (EngineStalled("silence"), PoolUnavailable),
        (EngineBroken("garbage"), PoolUnavailable),
        (GONE, PoolUnavailable),
        (LOADING, PoolUnready),
        (EngineMisconfigured("answered 501", sent=False), PoolUnavailable),
    ],
)
@pytest.mark.parametrize("method", ["tokenize", "render"])
@virtual_time
async def test_an_engine_that_can_not_be_asked_refuses_the_task(
    method: str, failure: EngineFailure, refusal: type[LlorchError]
) -> None:
    """Nothing is stored; if it may be the engine, a probe looks at once, and the next task is welcome."""
    async with rig(ctx=30) as it:

        async def fails(_: object) -> None:
            raise failure

        works = getattr(it.engine, method)
        setattr(it.engine, method, fails)
        probes = it.engine.asked["health"]
        asked = {"messages": (Message("u", "x"),)} if method == "render" else {"prompt": "a b c d e f g h i"}
        with pytest.raises(refusal):
            await it.submit(**asked)  # type: ignore[arg-type]
        await settled()
        doubted = issubclass(refusal, PoolUnready | PoolUnavailable) and not isinstance(
            failure, EngineStalled
        )
        assert it.engine.asked["health"] == probes + doubted  # a huge prompt may only take it long
        assert nothing_left(it)
        setattr(it.engine, method, works)
        assert (await it.submit("x")).state is State.RUNNING


# -- what is refused before that -------------------------------------------------------------------


@virtual_time
async def test_before_the_first_probe_the_pool_is_unready() -> None:
    """POOL_UNREADY, with a backoff [MVP-041]."""
    engine = MemoryEngine()
    engine.hold("health")
    async with rig(engine=engine) as it:
        with pytest.raises(PoolUnready, match="not probed yet") as refusal:
            await it.submit()
        assert (refusal.value.retry_after_ms, refusal.value.engine) == (2000, "memory")
        assert nothing_left(it)


@pytest.mark.parametrize(
    ("failure", "refusal", "reason"),
    [
        (LOADING, PoolUnready, "the model is loading"),
        (GONE, PoolUnavailable, "can't connect to the engine"),
        (
            EngineMisconfigured("GET /slots answered 501"),
            PoolUnavailable,
            "misconfigured: GET /slots answered 501",
        ),
    ],
)
@virtual_time
async def test_an_unready_pool_says_why(
    failure: EngineFailure, refusal: type[LlorchError], reason: str
) -> None:
    """E1, E2, E5: and takes tasks again when it is mended; each change is told once."""
    engine = MemoryEngine()
    engine.failure = failure
    async with rig(engine=engine) as it:
        await advance(100)
        with pytest.raises(refusal, match=reason):
            await it.submit()
        assert it.pool.health().ready is False
        engine.failure = None
        await advance(10)
        assert (await it.submit()).state is State.RUNNING
        assert [ready for ready, _ in it.readiness] == [False, True]


@virtual_time
async def test_a_stuck_replica_takes_no_new_tasks() -> None:
    """E19: with the reason, until the slot is back."""
    async with rig(slots=2, drain_s=5) as it:
        it.engine.clings = True
        task, _ = await it.running()
        it.cancel(task)
        await advance(6)
        with pytest.raises(PoolUnavailable, match="a slot did not come back within 5 s"):
            await it.submit()
        assert "did not come back" in (it.pool.health().last_error or "")
        it.engine.let_go()
        await advance(1)
        assert (await it.submit()).state is State.RUNNING


@virtual_time
async def test_the_world_may_change_while_the_engine_is_asked() -> None:
    """Readiness is looked at again before the task is admitted."""
    async with rig(ctx=30) as it:
        gate = it.engine.hold("tokenize")
        submit = asyncio.create_task(
            it.orchestrator.submit(TaskRequest(prompt="one two three four five six", max_tokens=9))
        )
        await settled()
        it.replica.misconfigured("answered 404")
        gate.set()
        await settled()
        assert isinstance(submit.exception(), PoolUnavailable)
        assert nothing_left(it)


@pytest.mark.parametrize("failure", [GONE, LOADING])
@pytest.mark.parametrize("noticed", ["by a task", "by a tokenizer", "while draining"])
@virtual_time
async def test_whoever_notices_a_restart_has_the_seeds_tried_again(
    noticed: str, failure: EngineFailure
) -> None:
    """E21: a refused connection or a loading answer, although the next probe is good again [MVP-042]."""
    async with rig(ctx=30) as it:
        it.replica.determinism = "verified"
        if noticed == "by a tokenizer":

            async def fails(_: str) -> int:
                raise failure

            it.engine.tokenize = fails  # type: ignore[method-assign]
            with pytest.raises(LlorchError):
                await it.submit("a b c d e f g h i")
        else:
            task, call = await it.running("a")
            if noticed == "by a task":
                call.fail(failure)
            else:
                it.engine.clings = True
                it.cancel(task)
                await advance(1)
                assert it.replica.determinism == "verified"
                it.engine.failure = failure
                await advance(0.2)
                it.engine.failure = None
        await advance(3)
        assert (it.replica.determinism, it.replica.ready) == ("unknown", True)


@virtual_time
async def test_no_strict_task_where_seeds_can_not_be_relied_on() -> None:
    """New ones are refused, waiting ones fail with the cure, best-effort ones run [MVP-042]."""
    async with rig(slots=2) as it:
        await it.submit("first")
        strict, behind = await it.submit("strict", seed=1), await it.submit("behind")
        it.replica.determinism = "failed"
        it.pool.dispatch()
        await settled()
        assert (code(strict), behind.state) == ("DETERMINISM_UNAVAILABLE", State.RUNNING)
        error = events(strict)[-1].data
        assert (error["retriable"], "--no-kv-unified" in error["message"]) == (False, True)
        with pytest.raises(DeterminismUnavailable) as refusal:
            await it.submit(seed=1)
        assert "--no-kv-unified" in (refusal.value.hint or "")
        assert it.pool.health().determinism == "failed"
        assert (await it.submit("best effort")).state is State.QUEUED


# -- bugs ------------------------------------------------------------------------------------------


@virtual_time
async def test_a_bug_ends_one_task_and_no_other(caplog: pytest.LogCaptureFixture) -> None:
    """INTERNAL, its message says nothing of the inside, the log has all of it; the slot drains."""
    async with rig(slots=2) as it:
        task, call = await it.running("first")
        other, other_call = await it.running("other")
        call.fail(ZeroDivisionError("secret inside"))
        await settled()
        error = events(task)[-1].data
        assert (code(task), error["retriable"]) == ("INTERNAL", False)
        assert "inside" not in error["message"]
        [line] = [line for line in caplog.records if line.exc_info]
        assert line.__dict__["job_id"] == task.id
        assert it.replica.draining == 1
        other_call.finish("x")
        await advance(1)
        assert (other.state, it.replica.free_slots) == (State.COMPLETED, 2)
        assert (await it.submit()).state is State.RUNNING


# -- stopping --------------------------------------------------------------------------------------


@virtual_time
async def test_stopping_fails_what_waits_and_lets_run_what_runs() -> None:
    """P1: POOL_UNAVAILABLE at once for queued tasks and new ones; running ones go on to their end."""
    async with rig() as it:
        running, call = await it.running()
        waiting = [await it.submit() for _ in range(3)]
        it.orchestrator.stop()
        assert [code(task) for task in waiting] == ["POOL_UNAVAILABLE"] * 3
        assert (events(waiting[0])[-1].data["retriable"], len(it.queue)) == (True, 0)
        with pytest.raises(PoolUnavailable, match="stopping"):
            await it.submit()
        finished = asyncio.create_task(it.orchestrator.finished())
        await settled()
        assert not finished.done()
        call.finish("x")
        await finished
        assert names(running) == "started token end"
        assert len(it.engine.calls) == 1


@virtual_time
async def test_a_request_that_is_looked_at_during_the_stop_is_refused() -> None:
    """P1: it gives its place back."""
    async with rig(ctx=30) as it:
        gate = it.engine.hold("tokenize")
        submit = asyncio.create_task(
            it.orchestrator.submit(TaskRequest(prompt="one two three four five six", max_tokens=9))
        )
        await settled()
        it.orchestrator.stop()
        gate.set()
        await settled()
        assert isinstance(submit.exception(), PoolUnavailable)
        assert nothing_left(it)


@pytest.mark.parametrize("phase", ["dispatching", "headers", "retrying", "draining", "streaming"])
@virtual_time
async def test_closing_ends_what_runs_without_waiting_for_the_engine(phase: str) -> None:
    """P1: WORKER_RESET in whatever phase, connections closed, no time passes."""
    async with rig() as it:
        it.engine.clings = True
        task = await it.orchestrator.submit(TaskRequest(prompt="hello"))
        if phase != "dispatching":
            await settled()
            if phase == "retrying":
                it.engine.failure = GONE
                it.engine.calls[0].fail(GONE)
            elif phase == "draining":
                it.engine.calls[0].fail(HUNG_UP)
            elif phase == "streaming":
                it.engine.calls[0].say("x")
            await settled()
        before = current().time()
        it.orchestrator.stop()
        await it.orchestrator.close()
        assert current().time() == before
        assert (code(task), it.engine.closed, it.engine.open) == ("WORKER_RESET", True, [])


# -- cancel ----------------------------------------------------------------------------------------


async def queued(it: Rig) -> Task:
    """Behind another one."""
    await it.submit("first")
    return await it.submit("cancelled")


async def dispatching(it: Rig) -> Task:
    """Running, and its runner has not taken its first step."""
    return await it.orchestrator.submit(TaskRequest(prompt="cancelled"))


async def waiting_for_headers(it: Rig) -> Task:
    """The request is out."""
    return await it.submit("cancelled")


async def retrying(it: Rig) -> Task:
    """The engine was gone, the task waits for it."""
    task, call = await it.running("cancelled")
    it.engine.failure = GONE
    call.fail(GONE)
    await settled()
    return task


async def draining_to_retry(it: Rig) -> Task:
    """The engine hung up, and may still be at work on the request."""
    it.engine.clings = True
    task, call = await it.running("cancelled")
    call.fail(HUNG_UP)
    await advance(1)
    assert it.replica.draining == 1
    return task


async def prefill(it: Rig) -> Task:
    """The engine has begun."""
    task, call = await it.running("cancelled")
    call.begin()
    await settled()
    return task


async def streaming(it: Rig) -> Task:
    """Two tokens are out."""
    task, call = await it.running("cancelled")
    call.say("a", "b")
    await settled()
    return task


async def finishing(it: Rig) -> Task:
    """The final chunk has arrived and nobody has looked at it."""
    task, call = await it.running("cancelled")
    call.say("a", "b")
    await settled()
    call.finish("c")
    return task


@pytest.mark.parametrize(
    ("bring", "tokens"),
    [
        (queued, 0),
        (dispatching, 0),
        (waiting_for_headers, 0),
        (retrying, 0),
        (draining_to_retry, 0),
        (prefill, 0),
        (streaming, 2),
        (finishing, 2),
    ],
)
@virtual_time
async def test_a_cancel_in_any_state_ends_the_task_in_that_step(
    bring: Callable[..., object], tokens: int
) -> None:
    """C12: its `end` is all that is left, nothing comes after it, and the slot comes back [MVP-032]."""
    async with rig() as it:
        task = await bring(it)  # type: ignore[misc]
        was_queued = task.state is State.QUEUED
        assert it.cancel(task) is task
        assert (task.state, task.tokens_out, task.log.sealed) == (State.CANCELLED, tokens, True)
        frames = events(task)
        assert [(event.name, event.id) for event in frames] == [("started", 0), ("end", tokens + 1)]
        assert frames[1].data["finish_reason"] == "cancelled"
        await settled()
        assert all(call.closed for call in it.engine.calls if call.prompt == "cancelled")
        it.engine.failure = None
        it.engine.let_go()
        await advance(15)
        assert events(task) == frames
        assert ("cancelled" in it.engine.prompts) is (bring not in (queued, dispatching))
        assert it.replica.busy == was_queued
        assert it.replica.draining == 0
        after = await it.submit("after")
        assert after.state is (State.QUEUED if was_queued else State.RUNNING)


@virtual_time
async def test_a_slot_that_nothing_was_sent_on_is_free_at_once() -> None:
    """C12: cancelled while it waits to be tried again, with a request that never went out."""
    async with rig() as it:
        task, call = await it.running()
        gate = it.engine.hold("health")
        call.fail(EngineRefused("can't connect in time", sent=False))
        await settled()
        it.cancel(task)
        await settled()
        assert not it.replica.leases
        gate.set()


@virtual_time
async def test_a_cancel_of_an_ended_task_changes_nothing() -> None:
    """C12: its final state stays, whichever it is."""
    async with rig() as it:
        completed, call = await it.running()
        call.finish("a")
        await settled()
        failed, call = await it.running()
        call.fail(BROKEN)
        await settled()
        before = events(completed), events(failed)
        assert states(it.cancel(completed), it.cancel(failed)) == [State.COMPLETED, State.FAILED]
        assert (events(completed), events(failed)) == before


@virtual_time
async def test_a_slot_is_free_only_when_the_engine_has_let_go() -> None:
    """E19: the task ends at once for everybody, the slot later, and then the next one goes."""
    async with rig() as it:
        it.engine.clings = True
        task, call = await it.running()
        waiting = await it.submit("waiting")
        it.cancel(task)
        await settled()
        assert (call.closed, it.pool.health().slots.draining) == (True, 1)
        await advance(20)
        assert waiting.state is State.QUEUED
        it.engine.let_go()
        await advance(0.5)
        assert waiting.state is State.RUNNING


@virtual_time
async def test_a_thousand_cancels_are_one() -> None:
    """C13: one transition, one end, one connection closed."""
    async with rig() as it:
        task, call = await it.running()
        call.say("a")
        await settled()
        answers = {(it.cancel(task).state, task.tokens_out) for _ in range(1000)}
        await settled()
        assert answers == {(State.CANCELLED, 1)}
        assert [state for moved, state in it.moves if moved is task] == [
            State.QUEUED, State.RUNNING, State.CANCELLED
        ]  # fmt: skip
        assert names(task) == "started end"


@virtual_time
async def test_many_queued_tasks_can_leave_at_once() -> None:
    """C13: none of them reaches the engine, in whatever order they go."""
    async with rig(capacity=1000) as it:
        first, call = await it.running("first")
        tasks = [await it.submit(str(number)) for number in range(1000)]
        for task in [*tasks[::2], *tasks[::-1]]:
            it.cancel(task)
        assert len(it.queue) == 0
        call.finish()
        await settled()
        assert (it.engine.prompts, first.state) == (["first"], State.COMPLETED)


@virtual_time
async def test_cancel_and_shutdown_together_are_one_end() -> None:
    """C13: whoever comes first wins, and the other finds it ended."""
    async with rig() as it:
        cancelled, call = await it.running()
        call.say("a")
        waiting = await it.submit()
        await settled()
        it.cancel(cancelled)
        it.orchestrator.stop()
        it.cancel(waiting)
        await it.orchestrator.close()
        assert (names(cancelled), names(waiting)) == ("started end", "started error")


@virtual_time
async def test_a_cancel_and_a_deadline_at_once_are_a_cancel() -> None:
    """The deadline fires in the same turn; the task is already ended, and no failure is told."""
    async with rig(first_token_s=20) as it:
        task, call = await it.running()
        current().call_later(20, it.cancel, task)
        await advance(20)
        assert task.state is State.FAILED or names(task) == "started end"
        assert len([state for moved, state in it.moves if moved is task and state.final]) == 1
        assert call.closed
        await advance(1)
        assert it.replica.free_slots == 1


# -- health ----------------------------------------------------------------------------------------


@virtual_time
async def test_health_is_what_there_is_now() -> None:
    """Slots, queue, engine, model and limits [MVP-041]."""
    engine = MemoryEngine(slots=3, ctx=2048)
    engine.change(model_path="/m.gguf")
    engine.digests["/m.gguf"] = "sha256:abc"
    async with rig(engine=engine, capacity=5, accelerator="RTX") as it:
        engine.clings = True
        tasks = [await it.submit("12345678") for _ in range(5)]
        it.cancel(tasks[0])
        await settled()
        health = it.pool.health()
        assert (health.pool_id, health.live, health.ready, health.engine) == ("default", True, True, "memory")
        assert (health.engine_version, health.model, health.model_digest) == ("b1", "tiny", "sha256:abc")
        assert (health.ctx, health.accelerator, health.sampler_profile_version) == (2048, "RTX", "1")
        assert (health.slots.total, health.slots.busy, health.slots.draining) == (3, 2, 1)
        assert (health.queue.depth, health.queue.capacity, health.queue.bytes) == (2, 5, 16)
        assert [(r.replica_id, r.ready, r.slots, r.last_error) for r in health.replicas] == [
            ("default-0", True, 3, None)
        ]
        assert (health.determinism, health.last_error) == ("unknown", None)


@virtual_time
async def test_log_lines_of_a_pool_name_engine_and_model() -> None:
    """What every line about its tasks carries [MVP-052, MVP-070]."""
    async with rig() as it:
        assert it.pool.log_fields() == {
            "engine": "memory",
            "engine_version": "b1",
            "model_digest": None,
            "sampler_profile_version": "1",
        }

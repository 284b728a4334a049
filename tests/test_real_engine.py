"""Pool and orchestrator with the real llama.cpp at work behind the adapter (slow, on the CPU)."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import msgspec
import pytest

from llorch.adapters.llamacpp import LlamaCpp
from llorch.admission import QueueLimits
from llorch.errors import ContextOverflow
from llorch.orchestrator import Orchestrator
from llorch.pool import Pool
from llorch.replica import Replica
from llorch.selftest import examine
from llorch.task import Message, Sampling, State, Task, TaskRequest
from tests.conftest import REAL_CTX, REAL_SLOTS
from tests.rig import POOL, STREAM, events, names, text

pytestmark = pytest.mark.real_engine

SETTINGS = msgspec.structs.replace(
    POOL,
    queue=QueueLimits(capacity=100, max_bytes=1 << 20),
    max_tokens=REAL_CTX,
    first_token_s=60.0,
    idle_s=60.0,
)
PATIENCE_S = 60.0
FOR_LONG = Sampling(grammar='root ::= "a" root')  # never done by itself


class House:
    """An orchestrator with one pool over the real engine."""

    def __init__(self, engine: LlamaCpp) -> None:
        self.engine = engine
        self.replica = Replica("default-0", engine, slots=REAL_SLOTS, drain_s=PATIENCE_S)
        self.pool = Pool("default", engine.name, SETTINGS, [self.replica], on_readiness=lambda *_: None)
        self.orchestrator = Orchestrator([self.pool], STREAM, tickets=False)

    async def submit(self, prompt: str | None, **asked: Any) -> Task:
        """Hand in a task, strict if it has a seed."""
        sampling = asked.pop("sampling", Sampling())
        determinism = "best_effort" if sampling.seed is None else "strict"
        request = TaskRequest(prompt=prompt, sampling=sampling, determinism=determinism, **asked)
        return await self.orchestrator.submit(request)

    async def drained(self) -> None:
        """Return once no lease is left, and the engine has no busy slot."""
        await until(lambda: not self.replica.leases)
        assert await self.engine.busy_slots() == 0


@pytest.fixture
async def house(real_engine: str) -> AsyncIterator[House]:
    """A ready house over the real engine, which it leaves idle."""
    house = House(LlamaCpp(real_engine))
    await house.orchestrator.first_probe(PATIENCE_S)
    work = asyncio.create_task(house.orchestrator.run())
    yield house
    await house.drained()
    house.orchestrator.stop()
    await house.orchestrator.close()
    work.cancel()
    await asyncio.wait({work})
    assert work.cancelled()


async def until(condition: Callable[[], bool]) -> None:
    """Return once `condition` holds."""
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110  # the engine announces nothing
            await asyncio.sleep(0.02)


async def ended(task: Task) -> None:
    """Return once the task has ended."""
    async for _ in task.log.follow():
        pass


def token_frames(task: Task) -> bytes:
    """The bytes that a reader of the task's tokens gets."""
    frames, _ = task.log.read(1)
    return b"".join(frame for frame in frames if b"event: token" in frame)


async def test_a_task_runs_from_started_to_end(house: House) -> None:
    """A prompt goes in, tokens come out, and the counts are the engine's [MVP-030, MVP-040]."""
    task = await house.submit("Once upon a time", max_tokens=12)
    await ended(task)
    started, *tokens, end = events(task)
    assert started.name == "started"
    assert [token.data["i"] for token in tokens] == list(range(len(tokens)))
    assert all(token.data["t"] for token in tokens)
    assert end.name == "end"
    assert end.data["tokens_out"] == 12 >= len(tokens)
    assert end.data["tokens_in"] == await house.engine.tokenize("Once upon a time")
    assert end.data["finish_reason"] == "length"
    assert task.state is State.COMPLETED
    assert house.pool.estimate.mean_s is not None


async def test_messages_go_through_the_models_own_template(house: House) -> None:
    """A conversation gives the very text that the prompt rendered from it gives."""
    messages = (Message("system", "Answer in one word."), Message("user", "What is the capital of France?"))
    prompt = await house.engine.render(messages)
    spoken = await house.submit(None, messages=messages, max_tokens=16, sampling=Sampling(seed=1))
    written = await house.submit(prompt, max_tokens=16, sampling=Sampling(seed=1))
    await asyncio.gather(ended(spoken), ended(written))
    assert text(spoken)
    assert token_frames(spoken) == token_frames(written)
    assert spoken.tokens_in == await house.engine.tokenize(prompt)


async def test_a_prompt_over_the_context_is_refused_before_it_is_queued(house: House) -> None:
    """Our own check, with the engine's tokenizer, tells the numbers [E4]."""
    with pytest.raises(ContextOverflow, match=rf"{REAL_CTX} tokens of context"):
        await house.submit("word " * REAL_CTX, max_tokens=10)
    assert not house.orchestrator.recent(None, 10)
    fits = await house.submit("word " * (REAL_CTX - 100), max_tokens=50)
    assert house.orchestrator.cancel(fits.id).state is State.CANCELLED


async def test_an_overflow_that_only_the_engine_sees_is_told_as_one(house: House) -> None:
    """An engine with less context than it said refuses the task with its own words [E4, E21]."""
    assert house.replica.props is not None
    house.replica.props = msgspec.structs.replace(house.replica.props, ctx=100 * REAL_CTX)
    task = await house.submit("word " * 2 * REAL_CTX, max_tokens=10)
    await ended(task)
    assert names(task) == "started error"
    error = events(task)[-1].data
    assert (error["code"], error["retriable"]) == ("CONTEXT_OVERFLOW", False)
    assert f"the available context size ({REAL_CTX} tokens)" in error["message"]


async def test_a_cancel_in_decode_ends_the_task_at_once_and_frees_the_slot(house: House) -> None:
    """The task has ended when `cancel` returns; its slot comes back long before its text is done [C12]."""
    task = await house.submit("a", max_tokens=REAL_CTX - 100, sampling=FOR_LONG)
    await until(lambda: task.tokens_out >= 3)
    told = house.orchestrator.cancel(task.id)
    assert told.state is State.CANCELLED
    end = events(task)[-1]
    assert end.data["finish_reason"] == "cancelled"
    assert end.data["tokens_out"] == told.tokens_out
    assert len(house.replica.leases) == 1
    await house.drained()
    assert events(task)[-1] == end


async def test_a_cancel_in_prefill_ends_the_task_at_once_and_the_slot_drains(house: House) -> None:
    """The engine can't stop a prefill: the task is over, the slot is counted until it can [C12, MVP-032]."""
    task = await house.submit("word " * 600, max_tokens=10, sampling=FOR_LONG)
    await until(lambda: any(lease.answered for lease in house.replica.leases))
    assert house.orchestrator.cancel(task.id).state is State.CANCELLED
    assert names(task) == "started end"
    assert len(house.replica.leases) == 1
    await until(lambda: house.replica.draining == 1)
    await house.drained()
    after = await house.submit("Once", max_tokens=2)
    await ended(after)
    assert after.state is State.COMPLETED


async def test_unseeded_tasks_share_the_slots(house: House) -> None:
    """As many as there are slots are decoded at the same time, one more waits."""
    tasks = [
        await house.submit(f"Number {i}:", max_tokens=30, sampling=FOR_LONG) for i in range(REAL_SLOTS + 1)
    ]
    assert [task.state for task in tasks] == [State.RUNNING] * REAL_SLOTS + [State.QUEUED]
    await until(lambda: all(task.tokens_out for task in tasks[:REAL_SLOTS]))
    assert [task.state for task in tasks[:REAL_SLOTS]] == [State.RUNNING] * REAL_SLOTS
    await asyncio.gather(*map(ended, tasks))
    assert all(task.state is State.COMPLETED for task in tasks)


SEEDS = [0, 1, 2, 42, 31337, 2**31 - 1, 2**31, 2**32 - 2]
STORY = "In the harbour of a small town on the coast, where the fog comes in every evening, "


async def test_the_same_seed_gives_the_same_frames_whatever_runs_around_it(house: House) -> None:
    """Eight seeds, three times each, byte for byte, among unseeded tasks of any length [MVP-042, MVP-081].

    Their prompts begin alike, so that a prompt cache would be used if it were allowed.
    """
    frames: dict[int, set[bytes]] = {seed: set() for seed in SEEDS}
    for turn in range(3):
        seeded = {}
        for number, seed in enumerate(SEEDS if turn != 1 else reversed(SEEDS)):
            sampling = Sampling(seed=seed, temperature=1.0)
            seeded[seed] = await house.submit(STORY * 2 + "there", max_tokens=20, sampling=sampling)
            await house.submit(STORY * (1 + (number + turn) % 3) + f"{number} men", max_tokens=4 + number)
            await house.submit(f"Meanwhile, {turn}", max_tokens=4 + turn)
        await asyncio.gather(*map(ended, house.orchestrator.recent(None, 100)))
        for seed, task in seeded.items():
            assert task.state is State.COMPLETED
            frames[seed].add(token_frames(task))
    assert {seed: len(different) for seed, different in frames.items()} == dict.fromkeys(SEEDS, 1)
    assert len(set.union(*frames.values())) == len(SEEDS)


async def test_the_engine_passes_the_self_test(house: House) -> None:
    """The flags that the demo and the tests launch it with keep the promise about seeds."""
    verdict = await examine(house.engine, REAL_SLOTS)
    assert (verdict.determinism, verdict.fault) == ("verified", None)

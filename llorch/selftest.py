"""What a replica has to show when it becomes ready: it decodes, it lets go of a cancelled slot, and the same
seed gives the same tokens whatever ran in between [ORCH-3049].

The one rule: it runs alone on its replica, and uses it as llorch does: strict work alone on slot 0 without
the prompt cache, other work on all slots at once with it.
"""

import asyncio
import contextlib
from typing import Literal

import msgspec

from llorch.engine import Engine, EngineBroken, Generation
from llorch.task import Sampling

Determinism = Literal["verified", "failed", "unknown"]

CURE = (
    "start llama-server with -np N --no-kv-unified --no-context-shift --cache-ram 0 and no draft model: "
    "slots that share one cache change each other's output"
)
LET_GO_S = 10.0
_LOOK_S = 0.05
_PROMPT = "The lighthouse keeper wrote in his diary:"
_SAMPLING = Sampling(seed=20_240_229, temperature=5.0, top_k=1000, top_p=1.0, min_p=0.0)  # tips at a hair
_OTHER_PROMPT = "Numbers, colours, animals and the names of rivers, in no order: "
_TOKENS = 32
_MOST_AT_ONCE = 16


class Verdict(msgspec.Struct, frozen=True):
    """Whether seeds can be relied on, and what else was wrong, None if nothing."""

    determinism: Determinism
    fault: str | None = None


async def decodes(engine: Engine) -> None:
    """Return if the engine makes a token; raises EngineFailure if it doesn't."""
    if not await _tokens(engine, Generation(prompt=_PROMPT, max_tokens=1, sampling=_SAMPLING)):
        raise EngineBroken("the engine made no token")


async def examine(engine: Engine, slots: int) -> Verdict:
    """Put the engine to the test on `slots` slots; raises EngineFailure if it breaks meanwhile."""
    strict = Generation(prompt=_PROMPT, max_tokens=_TOKENS, sampling=_SAMPLING, slot=0, cache_prompt=False)
    first = await _tokens(engine, strict)
    if not first:
        return Verdict("unknown", "self-test: the engine made no token")
    await _work_on_all(engine, slots)
    await _cancel_one(engine)
    if not await _lets_go(engine):
        return Verdict("unknown", f"self-test: a cancelled slot did not come back within {LET_GO_S:g} s")
    second = await _tokens(engine, strict)
    if first != second:
        return Verdict("failed", f"self-test: the same seed gave two different texts; {CURE}")
    return Verdict("verified")


async def _work_on_all(engine: Engine, slots: int) -> None:
    try:
        async with asyncio.TaskGroup() as group:
            for slot in range(min(slots, _MOST_AT_ONCE)):
                group.create_task(_tokens(engine, _other_work(slot)))
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from None


def _other_work(number: int) -> Generation:
    """Prompts of different lengths: equal ones disturb each other less."""
    return Generation(prompt=_OTHER_PROMPT * (number + 1), max_tokens=_TOKENS, sampling=Sampling())


async def _tokens(engine: Engine, generation: Generation) -> list[str]:
    texts: list[str] = []
    async with contextlib.aclosing(engine.generate(generation)) as chunks:
        async for chunk in chunks:
            texts += chunk.texts
            if chunk.final is not None:
                return texts
    raise EngineBroken("the engine's stream ended without its final frame")


async def _cancel_one(engine: Engine) -> None:
    """Leave a generation after its first token."""
    long_work = msgspec.structs.replace(_other_work(0), max_tokens=32 * _TOKENS)
    async with contextlib.aclosing(engine.generate(long_work)) as chunks:
        async for chunk in chunks:
            if chunk.texts:
                return


async def _lets_go(engine: Engine) -> bool:
    try:
        async with asyncio.timeout(LET_GO_S):
            while await engine.busy_slots():  # noqa: ASYNC110  # no event tells
                await asyncio.sleep(_LOOK_S)
    except TimeoutError:
        return False
    return True

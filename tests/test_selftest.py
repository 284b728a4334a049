"""What a replica has to show when it becomes ready, and what is concluded from it."""

from collections.abc import AsyncGenerator

import pytest

from llorch.engine import Chunk, EngineBroken, EngineFailure, EngineStalled, Final, Generation
from llorch.selftest import CURE, LET_GO_S, examine
from tests.memory_engine import MemoryEngine
from tests.virtualtime import current, settled, virtual_time


class Willing(MemoryEngine):
    """An engine that answers by itself; `strict_texts` are what it says to strict generations, in turn."""

    def __init__(self, *strict_texts: str, slots: int = 1) -> None:
        super().__init__(slots=slots)
        self.strict_texts = list(strict_texts)
        self.asked_for: list[Generation] = []
        self.at_work = self.most_at_work = 0
        self.ends = True

    async def generate(self, generation: Generation) -> AsyncGenerator[Chunk, None]:
        """Its text, a character at a time, beside whatever else it was asked in that moment."""
        self.asked_for.append(generation)
        self.at_work += 1
        try:
            await settled()
            self.most_at_work = max(self.most_at_work, self.at_work)
            if self.failure is not None:
                raise self.failure
            for text in "noise" if generation.cache_prompt else self.strict_texts.pop(0):
                yield Chunk([text])
            if self.ends:
                yield Chunk([], Final("length", 5, 3))
        finally:
            self.at_work -= 1


@virtual_time
async def test_the_same_seed_with_the_same_text_is_verified() -> None:
    """Whatever ran in between [MVP-042]."""
    verdict = await examine(Willing("same", "same"), slots=1)
    assert (verdict.determinism, verdict.fault) == ("verified", None)


@pytest.mark.parametrize("second", ["sane", "sam", "same!", ""])
@virtual_time
async def test_any_other_text_is_a_failure_with_its_cure(second: str) -> None:
    """A character more, less or another; the fault names the launch flags."""
    verdict = await examine(Willing("same", second), slots=1)
    assert verdict.determinism == "failed"
    assert CURE in (verdict.fault or "")


@virtual_time
async def test_the_engine_is_used_as_llorch_uses_it() -> None:
    """Strict work alone on slot 0 without the prompt cache, other work on all slots at once with it."""
    engine = Willing("same", "same", slots=3)
    await examine(engine, slots=3)
    strict = [generation for generation in engine.asked_for if not generation.cache_prompt]
    assert engine.asked_for[0] == engine.asked_for[-1] == strict[0] == strict[1]
    assert (len(strict), strict[0].slot) == (2, 0)
    assert strict[0].sampling.seed is not None
    others = engine.asked_for[1:-1]
    assert engine.most_at_work == 3
    assert {other.slot for other in others} == {None}
    assert len({other.prompt for other in others[:3]}) == 3, "equal prompts disturb each other less"


@virtual_time
async def test_many_slots_are_not_all_put_to_work() -> None:
    """Enough is enough: it must not take longer than it is worth."""
    engine = Willing("same", "same", slots=64)
    await examine(engine, slots=64)
    assert engine.most_at_work == 16


@virtual_time
async def test_one_generation_is_left_after_its_first_token() -> None:
    """Its connection is closed, and the slot has to come back before the test goes on."""
    engine = Willing("same", "same")
    engine.busy = 1
    current().call_later(5, setattr, engine, "busy", 0)
    began = current().time()
    assert (await examine(engine, slots=1)).determinism == "verified"
    assert current().time() == pytest.approx(began + 5, abs=0.1)
    assert engine.at_work == 0


@virtual_time
async def test_a_slot_that_does_not_come_back_proves_nothing() -> None:
    """Unknown, with the reason."""
    engine = Willing("same", "same")
    engine.busy = 1
    verdict = await examine(engine, slots=1)
    assert verdict.determinism == "unknown"
    assert verdict.fault == f"self-test: a cancelled slot did not come back within {LET_GO_S:g} s"


@virtual_time
async def test_an_engine_that_says_nothing_proves_nothing() -> None:
    """Two empty texts are equal, and no proof."""
    verdict = await examine(Willing("", ""), slots=1)
    assert (verdict.determinism, verdict.fault) == ("unknown", "self-test: the engine made no token")


@pytest.mark.parametrize("healthy_calls", [0, 1, 3, 4])
@virtual_time
async def test_what_breaks_meanwhile_comes_out_as_one_failure(healthy_calls: int) -> None:
    """No group of exceptions, and no generation left behind, whichever of them it was."""
    engine = Willing("same", "same", slots=2)
    answers = engine.generate

    async def breaks_later(generation: Generation) -> AsyncGenerator[Chunk, None]:
        if len(engine.asked_for) == healthy_calls:
            engine.failure = EngineStalled("silence")
        async for chunk in answers(generation):
            yield chunk

    engine.generate = breaks_later  # type: ignore[method-assign]
    with pytest.raises(EngineFailure, match="silence"):
        await examine(engine, slots=2)


@virtual_time
async def test_a_stream_without_its_end_is_no_proof() -> None:
    """Two texts cut off at the same place would look the same."""
    engine = Willing("same", "same")
    engine.ends = False
    with pytest.raises(EngineBroken):
        await examine(engine, slots=1)

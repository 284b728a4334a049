"""What every engine adapter must do, whatever engine is behind it.

A test module of an adapter inherits `EngineConformance` and makes its fixture `engine`: an
`llorch.engine.Engine` over a live engine with at least two slots, all idle.
"""

import asyncio
import contextlib

import pytest

from llorch.engine import (
    Engine,
    EngineContextOverflow,
    EngineInvalidRequest,
    Final,
    Generation,
)
from llorch.task import Message, Sampling

PROMPT = "The three primary colours are red, blue and"
SEEDED = Sampling(seed=42, temperature=1.0)
POLL_S = 0.05
PATIENCE_S = 30.0


def strict(prompt: str = PROMPT, max_tokens: int = 24, sampling: Sampling = SEEDED) -> Generation:
    """A generation as a strict task sends it."""
    return Generation(prompt=prompt, max_tokens=max_tokens, sampling=sampling, slot=0, cache_prompt=False)


async def generate(engine: Engine, generation: Generation) -> tuple[list[str], Final]:
    """All texts and the engine's account of a generation that comes to its end."""
    texts: list[str] = []
    async with contextlib.aclosing(engine.generate(generation)) as chunks:
        async for chunk in chunks:
            texts += chunk.texts
            if chunk.final is not None:
                return texts, chunk.final
    raise AssertionError("the stream ended without a final chunk and without a failure")


async def let_go(engine: Engine) -> None:
    """Return once the engine shows no busy slot, twice in a row; an engine announces it in no other way."""
    idle_looks = 0
    async with asyncio.timeout(PATIENCE_S):
        while idle_looks < 2:
            idle_looks = 0 if await engine.busy_slots() else idle_looks + 1
            await asyncio.sleep(POLL_S)


class EngineConformance:
    """The suite. Every test leaves the engine idle."""

    async def test_it_is_healthy_and_says_what_it_is(self, engine: Engine) -> None:
        """A ready engine is healthy and tells its slots, context, version and model [MVP-041, MVP-052]."""
        await engine.health()
        props = await engine.props()
        assert props.slots >= 2
        assert props.ctx >= 512
        assert props.model
        assert props.engine_version
        assert await engine.busy_slots() == 0

    async def test_tokens_are_never_more_than_bytes(self, engine: Engine) -> None:
        """A longer text has more tokens, and none has more tokens than UTF-8 bytes, specials aside."""
        short, long = await engine.tokenize("one two"), await engine.tokenize("one two three four five")
        assert 0 < short < long
        for text in ["a", PROMPT, "größer 😀 漢字\u2028", "\x00", "<|im_start|>"]:
            assert await engine.tokenize(text) <= len(text.encode()) + 8

    async def test_messages_become_a_prompt_with_all_they_say(self, engine: Engine) -> None:
        """The chat template keeps every content, in order, and leaves the answer to the model."""
        said = (Message("system", "Be brief."), Message("user", "Größe 😀?"), Message("assistant", "Nine."))
        prompt = await engine.render((*said, Message("user", "Why \u2028 nine?")))
        places = [
            prompt.index(content) for content in ("Be brief.", "Größe 😀?", "Nine.", "Why \u2028 nine?")
        ]
        assert places == sorted(places)
        assert await engine.tokenize(prompt) > 0

    async def test_a_generation_comes_to_its_end_with_counts(self, engine: Engine) -> None:
        """Texts are never empty, the limit is kept, and the final chunk counts what went in and came out."""
        texts, final = await generate(engine, strict(max_tokens=5))
        assert all(texts)
        assert len(texts) <= final.tokens_out
        assert final == Final("length", tokens_out=5, tokens_in=await engine.tokenize(PROMPT))

    async def test_the_first_chunk_says_that_a_slot_has_begun(self, engine: Engine) -> None:
        """`begun` comes first, then how far the prompt is, never less than before, all before any text."""
        chunks = [chunk async for chunk in engine.generate(strict(max_tokens=3))]
        begun = [chunk for chunk in chunks if chunk.begun]
        assert chunks[: len(begun)] == begun
        assert (begun[0].texts, begun[0].prefill) == ([], None)
        assert not any(chunk.texts for chunk in begun)
        prefills = [chunk.prefill for chunk in begun[1:] if chunk.prefill is not None]
        assert len(prefills) == len(begun) - 1
        tokens_in = await engine.tokenize(PROMPT)
        assert all(0 <= prefill.done <= prefill.total == tokens_in for prefill in prefills)
        assert [prefill.done for prefill in prefills] == sorted(prefill.done for prefill in prefills)

    async def test_a_single_token_is_a_generation(self, engine: Engine) -> None:
        """max_tokens 1 gives one token."""
        texts, final = await generate(engine, strict(max_tokens=1))
        assert (len(texts), final.tokens_out, final.finish_reason) == (1, 1, "length")

    async def test_a_stop_string_ends_the_text_before_it(self, engine: Engine) -> None:
        """The text up to the stop string is given, the stop string is not, and the reason is `stop`."""
        texts, _ = await generate(engine, strict())
        whole = "".join(texts)
        stop = "".join(texts[3:5]).strip()
        stopped = Sampling(seed=SEEDED.seed, temperature=SEEDED.temperature, stop=(stop, "never said"))
        texts, final = await generate(engine, strict(sampling=stopped))
        assert "".join(texts) == whole[: whole.index(stop)]
        assert final.finish_reason == "stop"

    async def test_a_prompt_over_the_context_is_an_overflow(self, engine: Engine) -> None:
        """A prompt longer than a slot's context is refused as such, before anything is generated [E4]."""
        words = "word " * (await engine.props()).ctx
        with pytest.raises(EngineContextOverflow) as failure:
            await generate(engine, strict(prompt=words + words, max_tokens=1))
        assert not failure.value.sent
        assert await engine.busy_slots() == 0

    async def test_a_bad_grammar_is_the_requests_fault(self, engine: Engine) -> None:
        """A grammar that can't be parsed is refused with the engine's words [E5]."""
        with pytest.raises(EngineInvalidRequest, match="grammar") as failure:
            await generate(engine, strict(sampling=Sampling(grammar="root ::= (")))
        assert type(failure.value) is EngineInvalidRequest

    async def test_a_seed_gives_the_same_texts_again(self, engine: Engine) -> None:
        """The same prompt, parameters and seed, alone on slot 0, give the same texts; another seed others."""
        first = await generate(engine, strict())
        await generate(engine, strict(prompt="Something else, to stir the cache, is"))
        assert await generate(engine, strict()) == first
        other = Sampling(seed=43, temperature=1.0)
        assert (await generate(engine, strict(sampling=other)))[0] != first[0]

    async def test_closing_in_decode_frees_the_slot(self, engine: Engine) -> None:
        """A closed iterator stops the engine's work: its slot comes back long before the text is done."""
        props = await engine.props()
        chunks = engine.generate(
            strict(max_tokens=props.ctx - 100, sampling=Sampling(grammar='root ::= "a" root'))
        )
        while not (await anext(chunks)).texts:
            pass
        assert await engine.busy_slots() == 1
        await chunks.aclose()
        await let_go(engine)

    async def test_closing_while_others_run_stops_only_the_one(self, engine: Engine) -> None:
        """A closed generation takes nothing from the one beside it."""
        beside = asyncio.create_task(
            generate(engine, Generation(prompt=PROMPT, max_tokens=40, sampling=Sampling(temperature=0.5)))
        )
        chunks = engine.generate(Generation(prompt=PROMPT, max_tokens=400, sampling=Sampling()))
        assert (await anext(chunks)).begun
        await chunks.aclose()
        _, final = await beside
        assert final.tokens_out > 0
        await let_go(engine)

    async def test_text_that_is_not_ascii_comes_through_whole(self, engine: Engine) -> None:
        """Prompts of any script are taken, and what comes back is text, never a broken character [E17]."""
        texts, final = await generate(engine, strict(prompt="Größe 😀 漢字\u2028é:", max_tokens=16))
        assert final.tokens_in == await engine.tokenize("Größe 😀 漢字\u2028é:")
        for text in texts:
            text.encode()

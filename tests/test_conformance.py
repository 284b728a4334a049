"""The conformance suite, for the llama.cpp adapter: over the fake, and over the real llama.cpp."""

import json
from collections.abc import AsyncIterator

import pytest

from llorch.adapters.llamacpp import LlamaCpp
from llorch.task import Sampling
from tests.conformance import EngineConformance, generate, strict
from tests.fakes import FakeLlamaServer


class TestLlamaCppOverTheFake(EngineConformance):
    """The fake behaves like the real one, or these differ."""

    @pytest.fixture
    async def engine(self, fake_engine: FakeLlamaServer) -> AsyncIterator[LlamaCpp]:
        """The adapter over the fake engine."""
        fake_engine.pace_s = 0.001  # or it would be done before anybody can close
        adapter = LlamaCpp(fake_engine.url)
        yield adapter
        await adapter.close()


@pytest.mark.real_engine
class TestLlamaCppOverTheRealOne(EngineConformance):
    """The real llama.cpp behaves as the fake says."""

    @pytest.fixture
    async def engine(self, real_engine: str) -> AsyncIterator[LlamaCpp]:
        """The adapter over a real llama.cpp."""
        adapter = LlamaCpp(real_engine)
        yield adapter
        await adapter.close()

    async def test_a_json_schema_is_honoured(self, engine: LlamaCpp) -> None:
        """The answer is JSON of the asked shape."""
        schema = {
            "type": "object",
            "properties": {"age": {"type": "integer", "minimum": 0, "maximum": 150}},
            "required": ["age"],
            "additionalProperties": False,
        }
        sampling = Sampling(seed=1, json_schema=json.dumps(schema).encode())
        texts, final = await generate(engine, strict(max_tokens=60, sampling=sampling))
        answer = json.loads("".join(texts))
        assert final.finish_reason == "stop"
        assert answer.keys() == {"age"}
        assert 0 <= answer["age"] <= 150

    async def test_characters_of_several_tokens_come_whole(self, engine: LlamaCpp) -> None:
        """Events are fewer than tokens where a character takes several, and none is split [E17]."""
        sampling = Sampling(seed=1, grammar='root ::= "😀é漢字"+')
        texts, final = await generate(engine, strict(max_tokens=40, sampling=sampling))
        assert set("".join(texts)) <= set("😀é漢字")
        assert final.tokens_out == 40 > len(texts)

    async def test_the_digest_is_that_of_the_model_served(self, engine: LlamaCpp) -> None:
        """The model file behind the engine is the one we know [MVP-052]."""
        props = await engine.props()
        assert props.model_path is not None
        digest = await engine.model_digest(props.model_path)
        assert digest == "sha256:b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

"""scripts/haiku: a real model passes, and what only looks like one does not."""

import ast
from pathlib import Path

import pytest

from tests.child import llorch
from tests.fakes import Connection, FakeLlamaServer
from tests.running import SCRIPTS, run_script

ROOT = SCRIPTS.parent
NEEDED = ["haiku", "identity"]
EVIDENCE = ["engine", "reading", "tokenizer", "grammar", "sampling"]
BEHAVIOUR = EVIDENCE[1:]


@pytest.fixture
def stand_in(fake_engine: FakeLlamaServer, tmp_path: Path) -> FakeLlamaServer:
    """A fake engine that has a model's file and says nothing that gives it away."""
    model = tmp_path / "SmolLM2-135M.gguf"
    model.write_bytes(b"GGUF")
    fake_engine.model_path, fake_engine.build = str(model), "b4242-0123abc"
    return fake_engine


@pytest.mark.real_engine
async def test_a_real_model_writes_a_haiku(real_engine: str) -> None:
    """Every point is good, and engine, model and counts are shown [MVP-042, MVP-052]."""
    async with llorch({"adapter.endpoint": real_engine, "adapter.slots": "auto"}) as child:
        said = await run_script("haiku", child.url, REQUIRE_REAL_LLAMA="1")
    assert (said.code, said.err) == (0, ""), said.lines
    assert said.verdicts == dict.fromkeys(NEEDED + EVIDENCE, "good")
    assert child.faults == []


async def test_a_stand_in_is_found_out_by_what_it_does(stand_in: FakeLlamaServer) -> None:
    """It names itself well and counts its tokens; but it does not read, and knows no grammar."""
    async with llorch({"adapter.endpoint": stand_in.url, "adapter.slots": 2}) as child:
        said = await run_script("haiku", child.url, REQUIRE_REAL_LLAMA="1")
    assert (said.code, said.err) == (1, "")
    assert said.verdicts == dict.fromkeys([*NEEDED, "engine"], "good") | dict.fromkeys(BEHAVIOUR, "BAD")


async def test_a_stand_in_is_refused_unless_it_is_allowed(stand_in: FakeLlamaServer) -> None:
    """Real is the default; with REQUIRE_REAL_LLAMA=0 the doubts are shown and pass."""
    async with llorch({"adapter.endpoint": stand_in.url, "adapter.slots": 2}) as child:
        strict = await run_script("haiku", child.url)
        lenient = await run_script("haiku", child.url, REQUIRE_REAL_LLAMA="0")
    assert (strict.code, lenient.code) == (1, 0)
    assert [lenient.verdicts[point] for point in NEEDED + BEHAVIOUR] == ["good"] * 2 + ["doubt"] * 4


async def test_an_engine_without_a_file_of_a_model_never_passes(fake_engine: FakeLlamaServer) -> None:
    """No digest, no good end; and its own words give it away."""
    async with llorch({"adapter.endpoint": fake_engine.url, "adapter.slots": 2}) as child:
        said = await run_script("haiku", child.url, REQUIRE_REAL_LLAMA="0")
    assert said.code == 1
    assert (said.verdicts["identity"], said.verdicts["engine"]) == ("BAD", "doubt")


@pytest.mark.parametrize("counted", [1, 999])
async def test_a_wrong_count_of_tokens_never_passes(counted: int, stand_in: FakeLlamaServer) -> None:
    """The engine's count is held against the events that came: not fewer, and for ASCII not more."""

    async def miscounts(connection: Connection) -> None:
        for _ in range(5):
            await connection.token()
        await connection.final(tokens_predicted=counted)

    stand_in.always(miscounts)
    settings = {"adapter.endpoint": stand_in.url, "adapter.self_test": False}
    async with llorch(settings) as child:
        said = await run_script("haiku", child.url, REQUIRE_REAL_LLAMA="0")
    assert said.code == 1
    assert said.verdicts["haiku"] == "BAD"
    assert any(f"the engine counts {counted} tokens" in line for line in said.lines)


@pytest.mark.parametrize("argv", [["--help"], ["127.0.0.1:1"], ["http://127.0.0.1:1", "x"]])
async def test_a_wrong_command_line_is_told_how_it_is_used(argv: list[str]) -> None:
    """Exit 64, and no traceback."""
    said = await run_script("haiku", *argv)
    assert (said.code, said.lines) == (64, [])
    assert said.err.startswith("A haiku from a real model")


def test_no_fake_is_within_reach_of_the_program_or_its_scripts() -> None:
    """Nothing that is shipped or run against a real engine imports the tests, where the fakes are."""
    shipped = [*(ROOT / "llorch").rglob("*.py"), *SCRIPTS.glob("*.py"), SCRIPTS / "haiku"]
    for path in shipped:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [getattr(node, "module", None) or "", *(name.name for name in node.names)]
                assert not [name for name in names if name.split(".")[0] in ("tests", "fakes")], path

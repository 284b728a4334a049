"""scripts/determinism: nothing to report on the real engine, and on a fickle one exactly what differs."""

import json
import re
from collections import deque
from itertools import count
from pathlib import Path

import aiohttp
import pytest

from llorch.selftest import CURE
from tests.child import llorch
from tests.fakes import Connection, FakeLlamaServer, Script
from tests.running import Said, run_script

CONDITIONS = ["after unrelated work", "after related work", "beside work", "after cancels"]
FAKE = {"adapter.slots": 2, "adapter.self_test": False}


def table(said: Said) -> dict[str, str]:
    """How many runs differed, by condition."""
    rows = (re.fullmatch(r"  (\S.*?) +\d+ +(-|\d+)", line) for line in said.lines)
    return {row[1]: row[2] for row in rows if row}


def fickle() -> Script:
    """An engine whose third word is another in each answer."""
    answers = count()

    async def script(connection: Connection) -> None:
        answer = next(answers)
        for index in range(connection.request.body["n_predict"]):
            await connection.token(" word" if index < 2 else f" {answer}")
        await connection.final("limit")

    return script


def cached() -> Script:
    """An engine whose last word is another if its cache has the beginning of the prompt from other work."""
    cache: deque[str] = deque(maxlen=2)

    async def script(connection: Connection) -> None:
        body = connection.request.body
        warm = any(body["prompt"].startswith(beginning) for beginning in cache)
        if "seed" not in body:
            cache.append(body["prompt"])
        last = body["n_predict"] - 1
        for _ in range(last):
            await connection.token()
        await connection.token(" warm" if warm else connection.word(last))
        await connection.final("limit")

    return script


@pytest.mark.real_engine
@pytest.mark.timeout(300)
async def test_seeds_hold_on_the_real_engine_whatever_happens_around_them(tmp_path: Path) -> None:
    """Eight seeds, four slots, every condition, a restart too: byte for byte [MVP-042, MVP-081]."""
    diff = tmp_path / "diff.json"
    said = await run_script("determinism", "--seeds", "8", "--restart", "--diff", diff)
    assert (said.code, said.err) == (0, ""), said.lines
    assert table(said) == {"cold": "-", **dict.fromkeys([*CONDITIONS, "after a restart"], "0")}
    assert not diff.exists()


async def test_a_steady_engine_has_nothing_to_report(fake_engine: FakeLlamaServer, tmp_path: Path) -> None:
    """All identical, exit 0, no file; and no slot is ever asked for twice."""
    diff = tmp_path / "diff.json"
    async with llorch(FAKE | {"adapter.endpoint": fake_engine.url}) as child:
        said = await run_script("determinism", child.url, "--seeds", "3", "--diff", diff)
    assert (said.code, said.err) == (0, "")
    assert table(said) == {"cold": "-", **dict.fromkeys(CONDITIONS, "0")}
    assert said.lines[-1] == "identical: 3 seeds, 15 runs"
    assert not diff.exists()
    assert fake_engine.waited == 0


async def test_a_difference_is_written_down(fake_engine: FakeLlamaServer, tmp_path: Path) -> None:
    """Seed, condition, the first frame that differs and both of its bytes; exit 1."""
    fake_engine.always(fickle())
    diff = tmp_path / "new" / "diff.json"
    async with llorch(FAKE | {"adapter.endpoint": fake_engine.url}) as child:
        said = await run_script("determinism", child.url, "--seeds", "2", "--diff", diff)
    assert (said.code, said.err) == (1, "")
    assert table(said) == {"cold": "-", **dict.fromkeys(CONDITIONS, "2")}
    assert said.lines[-1] == f"DIFFERENT: 8 runs were not as the cold one; see {diff}"
    artefact = json.loads(diff.read_text("utf-8"))
    assert artefact["engine_version"] == "b4242-fake"
    found = artefact["differences"]
    assert [(each["seed"], each["condition"]) for each in found] == [
        (s, c) for c in CONDITIONS for s in (0, 1)
    ]
    assert {each["frame"] for each in found} == {2}
    assert found[0]["cold"] == '{"t":" 0","i":2}'
    assert all(json.loads(each["found"])["i"] == 2 and each["found"] != each["cold"] for each in found)


async def test_the_condition_says_what_the_cause_is(fake_engine: FakeLlamaServer, tmp_path: Path) -> None:
    """An engine that only a warm cache changes differs after related work, and nowhere else."""
    fake_engine.always(cached())
    diff = tmp_path / "diff.json"
    async with llorch(FAKE | {"adapter.endpoint": fake_engine.url}) as child:
        said = await run_script("determinism", child.url, "--seeds", "3", "--diff", diff)
    assert said.code == 1
    assert table(said) == {"cold": "-", **dict.fromkeys(CONDITIONS, "0"), "after related work": "3"}
    assert {each["frame"] for each in json.loads(diff.read_text("utf-8"))["differences"]} == {15}


async def test_the_self_test_refuses_seeds_on_a_fickle_engine(fake_engine: FakeLlamaServer) -> None:
    """Strict tasks get 409 with the launch flags that mend it; best-effort ones run [MVP-042]."""
    fake_engine.always(fickle())
    settings = {"adapter.endpoint": fake_engine.url, "adapter.slots": 2}
    async with llorch(settings) as child, aiohttp.ClientSession(child.url) as session:
        await examined(session)
        said = await run_script("determinism", child.url, "--seeds", "1")
        assert await finishes(session, prompt="hello", max_tokens=4)
        assert await finishes(session, prompt="hello", max_tokens=4, seed=1, determinism="best_effort")
    assert said.code == 69
    assert said.err.startswith("determinism: a task was answered 409 DETERMINISM_UNAVAILABLE: ")
    assert said.err.endswith(f"cure: {CURE}\n")


async def examined(session: aiohttp.ClientSession) -> None:
    """Return once the self-test is done."""
    while True:
        async with session.get("/v1/pools/default/health") as response:
            if (await response.json())["determinism"] != "unknown":
                return


async def finishes(session: aiohttp.ClientSession, **task: object) -> bool:
    """Whether the task is admitted, and its stream ends as it should."""
    async with session.post("/v1/tasks", json=task) as response:
        assert response.status == 202, await response.text()
        created = await response.json()
    async with session.get(created["stream_url"]) as stream:
        return "event: end\n" in await stream.text()


async def test_where_nobody_listens_it_says_so() -> None:
    """Exit 69, one line."""
    said = await run_script("determinism", "http://127.0.0.1:1")
    assert said.code == 69
    assert said.err == "determinism: [Errno 111] Connection refused\n"


@pytest.mark.parametrize(
    "argv", [["--seeds", "0"], ["--seeds", "65"], ["--tokens", "1"], ["ftp://h"], ["http://h", "--restart"]]
)
async def test_a_wrong_command_line_is_told_why(argv: list[str]) -> None:
    """Exit 2, as argparse has it, and no traceback."""
    said = await run_script("determinism", *argv)
    assert (said.code, said.lines) == (2, [])
    assert said.err.splitlines()[-1].startswith("determinism: error: ")

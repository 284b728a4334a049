"""scripts/bench: it measures, prints its tables and leaves nothing behind. No figure is judged here."""

import asyncio
import json
import os
import sys
from pathlib import Path

import pytest

from tests.running import SCRIPTS, run_script


def children_of(marker: str) -> list[str]:
    """The command lines of all processes that have this in their environment."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if marker.encode() in (process / "environ").read_bytes():
                found.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            pass  # it has just ended, or is another's
    return found


async def test_a_scenario_gives_its_table_and_leaves_no_process(tmp_path: Path) -> None:
    """Each peer has its row, each round its number in the file; whatever was started is gone."""
    marker, file = f"bench-test-{os.urandom(8).hex()}", tmp_path / "found.json"
    said = await run_script(
        "bench.py", "--quick", "--only", "failures,gap", "--json", file, BENCH_TEST=marker
    )
    assert (said.code, said.err) == (0, ""), said.lines
    rows = [line.split(" | ")[0].removeprefix("| ") for line in said.lines if line.startswith("| ")]
    for peer in ("aiohttp relay", "llorch", "llorch, uvloop"):
        assert rows.count(peer) == 2
    found = json.loads(file.read_text())["found"]
    assert found["failures"]["failed"]["llorch"] == [0]
    assert found["gap"].keys() == {"p50", "p99"}
    assert children_of(marker) == []


async def test_a_terminated_bench_leaves_no_process() -> None:
    """Its engine and its peers end with it, whatever it was at."""
    marker = f"bench-test-{os.urandom(8).hex()}"
    process = await asyncio.create_subprocess_exec(
        *[sys.executable, SCRIPTS / "bench.py", "--only", "failures"],
        env=os.environ | {"BENCH_TEST": marker},
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    assert await process.stdout.readline()  # it says what machine it is on, and begins
    process.terminate()
    assert await process.wait() == 143
    assert children_of(marker) == []


@pytest.mark.parametrize("argv", [["--only", "paced,warp"], ["--rounds", "0.5"], ["now"]])
async def test_a_wrong_command_line_is_told_how_it_is_used(argv: list[str]) -> None:
    """Nothing is started, no traceback."""
    said = await run_script("bench.py", *argv)
    assert (said.code, said.lines) == (2, [])
    assert said.err.startswith("usage: scripts/bench")

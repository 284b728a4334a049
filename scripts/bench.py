"""What llorch costs, beside a plain aiohttp relay (and nginx and haproxy where they are installed).

    scripts/bench                         # everything, three rounds, some twelve minutes
    scripts/bench --quick                 # a look, under a minute; its figures are rough
    scripts/bench --only paced,gap        # some of it

All of it runs on 127.0.0.1 against an engine that costs little, and stops by itself. Within a round every
peer does the same work, one after another, in reversed order every other round. Figures are medians of the
rounds; in brackets stands how many times the anchors' they are, and only that means anything elsewhere.
"""

import argparse
import importlib.util
import json
import os
import platform
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench_peers import DIRECT, HAPROXY_PEER, LLORCH_UVLOOP, NGINX_PEER, RELAY, Peer, Stage, find
from bench_scenarios import FULL, QUICK, SCENARIOS, Scenario, Size
from stack import leave_on_sigterm

Found = dict[str, dict[str, list[float]]]  # by column, by peer: one number a round


def here(peer: Peer) -> bool:
    """Whether this machine has it."""
    if peer == LLORCH_UVLOOP:
        return importlib.util.find_spec("uvloop") is not None
    return peer not in (NGINX_PEER, HAPROXY_PEER) or find(peer.name) is not None


def machine() -> str:
    """What it was measured on, in words."""
    cpus = len(os.sched_getaffinity(0))
    return f"{platform.system()} {platform.machine()}, {cpus} CPUs, Python {platform.python_version()}"


class Progress:
    """One line on stderr that says what is being done, if that is a terminal."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._shown = sys.stderr.isatty()

    def show(self, text: str) -> None:
        """Put it in the line's place; an empty text wipes the line."""
        if self._shown:
            elapsed = f"{time.monotonic() - self._began:4.0f} s  {text}" if text else ""
            print(f"\r\x1b[K{elapsed}", end="", file=sys.stderr, flush=True)

    def warn(self, text: str) -> None:
        """A line that stays."""
        self.show("")
        print(f"bench: {text}", file=sys.stderr, flush=True)


def measure(stage: Stage, name: str, size: Size, rounds: int, progress: Progress) -> tuple[Found, int]:
    """All rounds of one scenario, and how often a peer failed in it."""
    scenario, found, failed = SCENARIOS[name], Found(), 0
    peers = [peer for peer in scenario.peers if here(peer)]
    for number in range(rounds):
        for peer in peers if number % 2 == 0 else reversed(peers):
            progress.show(f"{name}: round {number + 1} of {rounds}, {peer.name}")
            try:
                numbers = scenario.run(stage, peer, size)
            except (OSError, RuntimeError, ValueError, LookupError) as error:
                progress.warn(f"{name}, {peer.name}: {type(error).__name__}: {error}")
                failed += 1
                stage.clear()
                continue
            for column, value in numbers.items():
                found.setdefault(column, {}).setdefault(peer.name, []).append(value)
    stage.clear()
    progress.show("")
    return found, failed


def medians(scenario: Scenario, found: Found) -> dict[str, dict[str, float]]:
    """By column and peer; without the engine's own share where the scenario says so."""
    result = {}
    for column, by_peer in found.items():
        row = {name: statistics.median(values) for name, values in by_peer.items()}
        direct = row.pop(DIRECT.name, None)
        if scenario.less_direct and direct is not None:
            row = {name: value - direct for name, value in row.items()}
        result[column] = row
    return result


def table(name: str, found: Found) -> str:
    """One scenario in Markdown."""
    scenario = SCENARIOS[name]
    figures = medians(scenario, found)
    names = [peer.name for peer in scenario.peers if any(peer.name in row for row in figures.values())]
    anchors = [peer.name for peer in (RELAY, NGINX_PEER, HAPROXY_PEER) if peer.name in names]
    times = f" In brackets: times {', times '.join(anchors)}." if anchors else ""
    head = ["", *figures]
    rows = [
        [peer, *(cell(row, peer, column, anchors, scenario) for column, row in figures.items())]
        for peer in names
    ]
    lines = [f"| {' | '.join(cells)} |" for cells in (head, ["---", *["---:"] * len(figures)], *rows)]
    return "\n".join(
        [
            f"## {scenario.title} (`{name}`)",
            "",
            f"{scenario.note}.{times}",
            "",
            *lines,
        ]
    )


def cell(row: dict[str, float], peer: str, column: str, anchors: list[str], scenario: Scenario) -> str:
    """One figure with its ratios to the anchors."""
    if (value := row.get(peer)) is None:
        return "–"
    shown = f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.1f}"
    if column in scenario.plain or peer in anchors:
        return shown
    ratios = [f"{value / row[anchor]:.2f}" if row.get(anchor) else "–" for anchor in anchors]
    return f"{shown} ({', '.join(ratios)})" if any(ratio != "–" for ratio in ratios) else shown


def options() -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(
        prog="scripts/bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default=",".join(SCENARIOS), help=f"of {', '.join(SCENARIOS)}")
    parser.add_argument("--rounds", type=int, help="3, or 1 with --quick")
    parser.add_argument("--quick", action="store_true", help="a tenth of the work, once")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every number of every round there")
    chosen = parser.parse_args()
    chosen.only = chosen.only.split(",")
    if unknown := [name for name in chosen.only if name not in SCENARIOS]:
        parser.error(f"no such scenario: {', '.join(unknown)}; there are {', '.join(SCENARIOS)}")
    chosen.rounds = chosen.rounds or (1 if chosen.quick else 3)
    if chosen.rounds < 1:
        parser.error("--rounds is 1 at least")
    return chosen


def allow_open_files() -> None:
    """A thousand streams are some thousands of files; the children inherit it."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def main() -> int:
    """Measure and print; 0 if every peer did its work."""
    chosen = options()
    leave_on_sigterm()
    allow_open_files()
    size, progress, failures = QUICK if chosen.quick else FULL, Progress(), 0
    numbers: dict[str, Any] = {}
    rounds = f"{chosen.rounds} round{'s' if chosen.rounds > 1 else ''}"
    print(f"{machine()}; {rounds}{', quick: rough figures' if chosen.quick else ''}", flush=True)
    with tempfile.TemporaryDirectory(prefix="llorch-bench-") as folder:
        stage = Stage(Path(folder))
        try:
            for name in chosen.only:
                numbers[name], failed = measure(stage, name, size, chosen.rounds, progress)
                failures += failed
                print(f"\n{table(name, numbers[name])}", flush=True)
        finally:
            stage.close()
    if chosen.json is not None:
        chosen.json.write_text(json.dumps({"machine": machine(), "rounds": chosen.rounds, "found": numbers}))
    return 1 if failures else 0


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except KeyboardInterrupt:
        raise SystemExit(130) from None

"""Mixed work on a llorch of its own for a long time, while its engine is killed at random and restarted."""

import argparse
import asyncio
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.child import Child, llorch
from tests.soak.client import Client
from tests.soak.engine import Engine
from tests.soak.work import LONG_TOKENS, Work

SETTLE_S = 30.0
DOWN_S = (0.0, 0.5)
SAMPLES = 10
WATCH_EVERY_S = 0.5
WARM = 3  # tenths, after which memory is flat
RSS_GROWTH, RSS_SLACK_KIB = 1.15, 8 * 1024
FILES_SLACK = 3
SETTINGS: dict[str, Any] = {
    "adapter.slots": "auto",
    "queue.capacity": 12,
    "queue.default_retry_after_ms": 250,
    "stream.retain_s": 4,
    "shutdown.grace_s": 5,
}


@dataclass(frozen=True)
class Kind:
    """What differs with the engine; slots and capacity together are fewer than the workers: so 429 comes."""

    slots: int
    workers: int
    max_tokens: int


FAKE = Kind(slots=18, workers=32, max_tokens=4)
REAL = Kind(slots=4, workers=18, max_tokens=12)


@dataclass
class Soak:
    """One soak, and what it found."""

    tasks: int
    kills: int = 0
    seed: int = 1
    real: bool = False
    before: str = ""
    ends_within_s: float = 120.0  # any task, from its first POST
    show: bool = False
    faults: list[str] = field(default_factory=list)
    samples: list[tuple[int, int]] = field(default_factory=list)  # KiB resident, open files
    killed: int = 0

    async def run(self) -> list[str]:
        """Everything that is wrong."""
        kind = REAL if self.real else FAKE
        engine = Engine(real=self.real, slots=kind.slots)
        await engine.start()
        try:
            settings = SETTINGS | {
                "adapter.endpoint": engine.url,
                "limits.max_tokens": LONG_TOKENS,
                "limits.max_tokens_default": LONG_TOKENS,
            }
            async with llorch(settings, before=self.before) as child:
                await self._on(child, engine, kind)
        finally:
            await engine.kill()
        return self.faults

    async def _on(self, child: Child, engine: Engine, kind: Kind) -> None:
        began = time.monotonic()
        client = Client(child.address)
        await self._until_idle(client)
        files = child.open_files
        work = Work(
            child.address,
            self.seed,
            max_tokens=kind.max_tokens,
            errors_expected=self.kills > 0,
            ends_within_s=self.ends_within_s,
        )
        async with asyncio.TaskGroup() as group:
            watching = group.create_task(self._watch(work, child, began), name="watch")
            killing = group.create_task(self._kill(work, engine), name="killer")
            indices = list(range(self.tasks))[::-1]
            workers = [group.create_task(work.worker(indices), name="worker") for _ in range(kind.workers)]
            await asyncio.wait(workers)
            if work.done < self.tasks:  # given up: too many faults
                killing.cancel()
            await asyncio.wait({killing})
            watching.cancel()
        took_s = time.monotonic() - began
        self.faults += work.faults
        self.samples.append((child.rss_kib, child.open_files))
        await self._until_idle(client)
        client.close()
        await self._judge(child, files)
        if self.show:
            self._report(work, took_s)

    async def _kill(self, work: Work, engine: Engine) -> None:
        chance = random.Random(self.seed)
        for moment in sorted(chance.randrange(self.tasks) for _ in range(self.kills)):
            while work.done < moment:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            await engine.kill()
            await asyncio.sleep(chance.uniform(*DOWN_S))
            await engine.start()
            self.killed += 1

    async def _watch(self, work: Work, child: Child, began: float) -> None:
        while True:
            if work.done >= len(self.samples) * self.tasks / SAMPLES and child.process.returncode is None:
                self.samples.append((child.rss_kib, child.open_files))
            if self.show:
                rate = work.done / (time.monotonic() - began)
                done = f"{work.done} of {self.tasks} tasks, {rate:.0f}/s, {self.killed} kills"
                print(f"\r{done}, {work.lost} lost, {len(work.faults)} faults ", end="", flush=True)
            await asyncio.sleep(WATCH_EVERY_S)

    async def _until_idle(self, client: Client) -> None:
        """Wait for a ready pool with free slots and an empty queue."""
        until = time.monotonic() + SETTLE_S
        while time.monotonic() < until:
            pool = (await client.ask("GET", "/v1/pools/default/health")).body
            slots, queue = pool["slots"], pool["queue"]
            left = slots["busy"], slots["draining"], queue["depth"], queue["bytes"]
            if pool["ready"] and not any(left):
                return
            await asyncio.sleep(0.1)
        self.faults.append(f"not ready and idle within {SETTLE_S:g} s: {pool}")

    async def _judge(self, child: Child, files: int) -> None:
        until = time.monotonic() + SETTLE_S
        while child.open_files > files + FILES_SLACK and time.monotonic() < until:  # noqa: ASYNC110
            await asyncio.sleep(0.1)
        if child.open_files > files + FILES_SLACK:
            self.faults.append(f"open files: {files} before, {child.open_files} after")
        warm_kib, last_kib = self.samples[min(WARM, len(self.samples) - 1)][0], self.samples[-1][0]
        if last_kib > warm_kib * RSS_GROWTH + RSS_SLACK_KIB:
            self.faults.append(f"memory grew from {warm_kib} to {last_kib} KiB")
        if code := await child.stop():
            self.faults.append(f"llorch ends with {code}")
        self.faults += [f"llorch says: {line}" for line in child.faults]

    def _report(self, work: Work, took_s: float) -> None:
        print(f"\n{work.done} tasks in {took_s:.0f} s, {work.done / took_s:.0f}/s, {self.killed} kills")
        print(f"  admitted {work.admitted}, ended {work.ended.total()}, lost {work.lost}")
        for title, counts in (("ended", work.ended), ("refused", work.refused), ("way", work.ways)):
            for name, count in counts.most_common():
                print(f"  {title:8} {name:32} {count:8}")
        for tenth, (kib, files) in enumerate(self.samples):
            print(f"  after {tenth}/{SAMPLES}: {kib / 1024:.1f} MiB resident, {files} open files")


def main(argv: Sequence[str] | None = None) -> int:
    """0 if nothing is wrong."""
    parser = argparse.ArgumentParser(prog="scripts/soak", description=__doc__)
    parser.add_argument("--tasks", type=int, default=10_000, help="how many (default 10000)")
    parser.add_argument("--kills", type=int, default=0, help="how often the engine is killed (default 0)")
    parser.add_argument("--seed", type=int, default=1, help="what the work is made from (default 1)")
    parser.add_argument("--real", action="store_true", help="a real llama.cpp instead of the fake one")
    options = parser.parse_args(argv)
    soak = Soak(options.tasks, options.kills, options.seed, real=options.real, show=True)
    faults = asyncio.run(soak.run())
    for fault in faults[:20]:
        print(f"  {fault}")
    print(f"{len(faults)} faults" if faults else "good")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())

"""Mixed work on a llorch of its own for a long time, while its engines are killed and restarted at random and
its configuration is changed under it."""

import argparse
import asyncio
import contextlib
import random
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tomli_w

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
    "queue.capacity": 12,
    "queue.batch_capacity": 4,
    "queue.batch_promote_s": 1,
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


def configure(file: Path, engines: Sequence[Engine]) -> None:
    """Have the file name these engines."""
    replicas = [{"id": f"e{engine.port}", "endpoint": engine.url, "slots": "auto"} for engine in engines]
    file.write_text(tomli_w.dumps({"pools": {"default": {"replicas": replicas}}}))


@dataclass
class Soak:
    """One soak, and what it found."""

    tasks: int
    kills: int = 0
    seed: int = 1
    real: bool = False
    engines: int = 1
    reloads: int = 0
    before: str = ""
    ends_within_s: float = 120.0  # any task, from its first POST
    show: bool = False
    faults: list[str] = field(default_factory=list)
    samples: list[tuple[int, int]] = field(default_factory=list)  # KiB resident, open files
    killed: int = 0
    reloaded: int = 0

    async def run(self) -> list[str]:
        """Everything that is wrong."""
        kind = REAL if self.real else FAKE
        slots = max(kind.slots // self.engines, 1)
        engines = [Engine(real=self.real, slots=slots) for _ in range(self.engines)]
        settings = SETTINGS | {
            "limits.max_tokens": LONG_TOKENS,
            "limits.max_tokens_default": LONG_TOKENS,
        }
        async with contextlib.AsyncExitStack() as stack:
            file = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "llorch.toml"
            for engine in engines:
                stack.push_async_callback(engine.kill)
                await engine.start()
            configure(file, engines)
            child = await stack.enter_async_context(llorch(settings, before=self.before, file=file))
            await self._on(child, engines, file, kind)
        return self.faults

    async def _on(self, child: Child, engines: list[Engine], file: Path, kind: Kind) -> None:
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
            killing = group.create_task(self._kill(work, engines), name="killer")
            reloading = group.create_task(self._reload(work, child, engines, file), name="reloader")
            indices = list(range(self.tasks))[::-1]
            workers = [group.create_task(work.worker(indices), name="worker") for _ in range(kind.workers)]
            await asyncio.wait(workers)
            if work.done < self.tasks:  # given up: too many faults
                killing.cancel()
                reloading.cancel()
            await asyncio.wait({killing, reloading})
            watching.cancel()
        took_s = time.monotonic() - began
        self.faults += work.faults
        self.samples.append((child.rss_kib, child.open_files))
        await self._until_idle(client)
        client.close()
        await self._judge(child, files)
        if self.show:
            self._report(work, took_s)

    async def _kill(self, work: Work, engines: list[Engine]) -> None:
        chance = random.Random(self.seed)
        for moment in sorted(chance.randrange(self.tasks) for _ in range(self.kills)):
            while work.done < moment:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            engine = chance.choice(engines)
            await engine.kill()
            await asyncio.sleep(chance.uniform(*DOWN_S))
            await engine.start()
            self.killed += 1

    async def _reload(self, work: Work, child: Child, engines: list[Engine], file: Path) -> None:
        """One engine fewer, and all of them again, in turn; what can't be done changes nothing."""
        chance = random.Random(-self.seed)
        for moment in sorted(chance.randrange(self.tasks) for _ in range(self.reloads)):
            while work.done < moment and child.process.returncode is None:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            fewer = len(engines) > 1 and self.reloaded % 2 == 0
            configure(file, chance.sample(engines, len(engines) - 1) if fewer else engines)
            child.process.send_signal(signal.SIGHUP)
            self.reloaded += 1
        if self.reloads and child.process.returncode is None:
            configure(file, engines)
            child.process.send_signal(signal.SIGHUP)

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
        events = f"{self.killed} kills, {self.reloaded} reloads"
        print(f"\n{work.done} tasks in {took_s:.0f} s, {work.done / took_s:.0f}/s, {events}")
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
    parser.add_argument("--kills", type=int, default=0, help="how often an engine is killed (default 0)")
    parser.add_argument("--engines", type=int, default=1, help="how many engines (default 1)")
    parser.add_argument("--reloads", type=int, default=0, help="how often it is reloaded (default 0)")
    parser.add_argument("--seed", type=int, default=1, help="what the work is made from (default 1)")
    parser.add_argument("--real", action="store_true", help="a real llama.cpp instead of the fake one")
    options = parser.parse_args(argv)
    soak = Soak(
        options.tasks,
        options.kills,
        options.seed,
        real=options.real,
        engines=options.engines,
        reloads=options.reloads,
        show=True,
    )
    faults = asyncio.run(soak.run())
    for fault in faults[:20]:
        print(f"  {fault}")
    print(f"{len(faults)} faults" if faults else "good")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())

"""Hostile input on a live llorch: every connection must end, every answer must be the contract's."""

import argparse
import asyncio
import contextlib
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tests.child import Child, llorch
from tests.fakes import FakeLlamaServer
from tests.fuzz import inputs
from tests.fuzz.attack import Address, Attack, Failure
from tests.pools import written

FAILURES = Path("build/fuzz")
URL_BOUND_S = 60.0  # for a server whose time limits we do not know
PACE_S = 0.02  # between tokens: slow enough for a queue that is full most of the time
SETTINGS: dict[str, Any] = {
    "queue.capacity": 4,
    "queue.batch_capacity": 3,
    "queue.batch_promote_s": 0.2,
    "queue.max_bytes": 8192,
    "limits.max_tokens": 16,
    "limits.max_tokens_default": 8,
    "http.max_body_bytes": inputs.MAX_BODY_BYTES,
    "http.body_timeout_s": 0.5,
    "http.idle_timeout_s": 0.5,
    "stream.max_readers": 16,
    "stream.retain_s": 2,
}
FILES_SLACK = 8


def main(argv: Sequence[str] | None = None) -> int:
    """0 if nothing is wrong."""
    parser = argparse.ArgumentParser(prog="scripts/fuzz", description=__doc__)
    parser.add_argument("--n", type=int, default=20_000, help="how many inputs (default 20000)")
    parser.add_argument("--seed", type=int, default=1, help="what they are made from (default 1)")
    parser.add_argument("--only", type=int, metavar="INDEX", help="play this one alone, and show it")
    parser.add_argument("--url", help="attack this llorch (default: one of its own, with a fake engine)")
    parser.add_argument("--token", default="", help="ask for this token, and give it in good requests")
    options = parser.parse_args(argv)
    indices = range(options.n) if options.only is None else range(options.only, options.only + 1)
    failures = asyncio.run(fuzz(indices, options.seed, url=options.url, token=options.token, show=True))
    for failure in failures[:20]:
        print(f"  input {failure.input}: {failure.what}\n    {_kept(options.seed, failure)}")
    print(f"{len(failures)} failures" if failures else "good")
    return 1 if failures else 0


async def fuzz(
    indices: range,
    seed: int,
    *,
    url: str | None = None,
    token: str = "",
    before: str = "",
    bound_s: float = 6.0,
    show: bool = False,
) -> list[Failure]:
    """Play the inputs; everything that is wrong. `before` is Python that the child runs first."""
    began = time.monotonic()
    async with _attacked(url, token, before) as (address, child):
        attack = Attack(address, seed, token=token.encode(), bound_s=URL_BOUND_S if url else bound_s)
        files = child.open_files if child else 0
        showing = asyncio.create_task(_show(attack, len(indices), began), name="show") if show else None
        await attack.play(indices)
        if showing is not None:
            showing.cancel()
        await attack.settle()
        if child is not None:
            places = SETTINGS["queue.capacity"] + SETTINGS["queue.batch_capacity"]
            await attack.fill(SETTINGS["queue.max_bytes"] // places - 100)
            attack.failures += [Failure(-1, what) async for what in _autopsy(child, files)]
    if show:
        _report(attack, time.monotonic() - began)
        if len(indices) == 1:
            _exhibit(attack, indices[0])
    return attack.failures


async def _autopsy(child: Child, files: int) -> AsyncIterator[str]:
    """What is wrong with a llorch after the attack; it had so many open `files` before. Stops it."""
    if child.process.returncode is None:
        print(f"\nllorch has {child.rss_kib // 1024} MiB, {child.open_files} files, said {child.lines} lines")
        if child.open_files > files + FILES_SLACK:
            yield f"open files: {files} before, {child.open_files} after"
    if code := await child.stop():
        yield f"llorch ends with {code}"
    for line in child.faults:
        yield f"llorch says: {line}"


@contextlib.asynccontextmanager
async def _attacked(url: str | None, token: str, before: str) -> AsyncIterator[tuple[Address, Child | None]]:
    """Where the llorch listens that is attacked, and its process if it is ours."""
    if url is not None:
        parts = urlsplit(url)
        yield (parts.hostname or "127.0.0.1", parts.port or 80), None
        return
    secrets = [inputs.CANARY.encode(), *([token.encode()] if token else [])]
    settings = SETTINGS | ({"auth.token": token} if token else {})
    async with contextlib.AsyncExitStack() as open_:
        engines = [await open_.enter_async_context(FakeLlamaServer(pace_s=PACE_S)) for _ in range(3)]
        folder = Path(open_.enter_context(tempfile.TemporaryDirectory()))
        pools = {"default": {"gpu0": engines[0], "gpu1": engines[1]}, "small": {"gpu2": engines[2]}}
        file = written(folder, pools)
        child = await open_.enter_async_context(llorch(settings, before=before, secrets=secrets, file=file))
        yield child.address, child


# -- what is shown ---------------------------------------------------------------------------------


async def _show(attack: Attack, total: int, began: float) -> None:
    while True:
        await asyncio.sleep(1)
        rate = attack.played / (time.monotonic() - began)
        slowest_ms = max(attack.health_ms, default=0)
        done = f"{attack.played} of {total}, {rate:.0f}/s, {len(attack.failures)} failures"
        print(f"\r{done}, /health at most {slowest_ms:.0f} ms ", end="", flush=True)


def _report(attack: Attack, took_s: float) -> None:
    print(f"{attack.played} inputs in {took_s:.0f} s, {attack.played / took_s:.0f}/s; seed {attack.seed}")
    for title, counts in (("inputs", attack.kinds), ("first answer", attack.outcomes)):
        for name, count in counts.most_common():
            print(f"  {title:12}  {name:32} {count:9}")
    health = sorted(attack.health_ms)
    if health:
        middle, late, worst = health[len(health) // 2], health[len(health) * 99 // 100], health[-1]
        print(
            f"  /health asked {len(health)} times: median {middle:.1f}, p99 {late:.1f}, most {worst:.1f} ms"
        )


def _exhibit(attack: Attack, index: int) -> None:
    given = inputs.make(attack.seed, index, attack.token)
    print(
        f"\n{given.kind}, then {given.ending}; {given.requests} requests, cut at {given.cuts}\n{given.data!r}"
    )


def _kept(seed: int, failure: Failure) -> str:
    """How to see it again; the file that has what was sent and received."""
    FAILURES.mkdir(parents=True, exist_ok=True)
    file = FAILURES / f"{seed}-{failure.input}.txt"
    replay = f"scripts/fuzz --seed {seed} --only {failure.input}"
    text = f"{failure.what}\n{replay}\n\nsent {failure.sent!r}\n\nreceived {failure.received!r}\n"
    file.write_text(text)
    return f"{file}: {replay}" if failure.input >= 0 else str(file)


if __name__ == "__main__":
    sys.exit(main())

"""Many seeds on all cores, with progress; or one seed, with everything that happens to its tasks."""

import argparse
import logging
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed

from llorch.task import State, Task
from tests.sim import world
from tests.sim.world import run_seed

CHUNK = 1000


def main() -> int:
    """0 if no seed breaks an invariant."""
    parser = argparse.ArgumentParser(prog="scripts/simulate", description=__doc__)
    parser.add_argument("--seeds", type=int, default=20_000, help="how many (default 20000)")
    parser.add_argument("--first", type=int, default=0, help="the first (default 0)")
    parser.add_argument("--seed", type=int, help="replay this one alone")
    options = parser.parse_args()
    logging.disable(logging.CRITICAL)
    if options.seed is not None:
        return replay(options.seed)
    return search(range(options.first, options.first + options.seeds))


def search(seeds: range) -> int:
    """Play all `seeds`; failing ones are printed as they come."""
    began, failed, done = time.monotonic(), 0, 0
    with ProcessPoolExecutor(os.cpu_count()) as workers:
        chunks = [workers.submit(play, seeds[start : start + CHUNK]) for start in range(0, len(seeds), CHUNK)]
        for chunk in as_completed(chunks):
            for seed, what in chunk.result():
                print(f"\rseed {seed}: {what}")
                failed += 1
            done += CHUNK
            rate = done / (time.monotonic() - began)
            print(f"\r{min(done, len(seeds))} of {len(seeds)} seeds, {rate:.0f}/s, {failed} failed", end=" ")
            sys.stdout.flush()
    print()
    return 1 if failed else 0


def play(seeds: range) -> list[tuple[int, str]]:
    """The failing ones among `seeds`, and what they broke."""
    logging.disable(logging.CRITICAL)
    failed = []
    for seed in seeds:
        try:
            run_seed(seed)
        except AssertionError as error:
            failed.append((seed, str(error)))
    return failed


def replay(seed: int) -> int:
    """Play one seed and print each transition of each task."""
    quiet = world.World._moved

    def moved(self: world.World, pool: object, task: Task, previous: State | None) -> None:
        error = f" {task.error.code}: {task.cause}" if task.error else ""
        print(f"{self.loop.now:8.3f} s  task {world.name_of(task)}: {task.state.value}{error}")
        quiet(self, pool, task, previous)  # type: ignore[arg-type]

    world.World._moved = moved  # type: ignore[assignment, method-assign]
    try:
        print(f"good, {run_seed(seed)} steps")
    except AssertionError as error:
        print(f"BROKEN: {error}")
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""The core under seeded interleavings of everything that can happen; and that they find planted bugs."""

import logging
from collections.abc import Iterator

import pytest

from tests.sim.mutants import MUTANTS
from tests.sim.world import run_seed

CHUNKS = 20
SEEDS_PER_MUTANT = 2000


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Thousands of failing engines would fill the log."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_no_interleaving_breaks_an_invariant(chunk: int, request: pytest.FixtureRequest) -> None:
    """Whatever order things happen in, the invariants hold; a failing seed is told and replays alone."""
    for seed in range(chunk, request.config.getoption("--sim-seeds"), CHUNKS):
        try:
            run_seed(seed)
        except AssertionError as error:
            pytest.fail(f"seed {seed}: {error}; replay it: scripts/simulate --seed {seed}", pytrace=False)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # what a bug leaves behind is not awaited
@pytest.mark.parametrize("bug", MUTANTS)
def test_a_planted_bug_is_found(bug: str) -> None:
    """Each planted bug breaks an invariant within 2,000 seeds: so the search above means something."""
    with MUTANTS[bug](), pytest.raises(AssertionError):
        run_seeds(SEEDS_PER_MUTANT)


def run_seeds(count: int) -> None:
    """Play so many seeds."""
    for seed in range(count):
        run_seed(seed)


def test_a_seed_replays() -> None:
    """The same seed takes the same number of steps, so a failing one can be looked at."""
    assert [run_seed(seed) for seed in range(20)] == [run_seed(seed) for seed in range(20)]

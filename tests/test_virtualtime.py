"""The loop with virtual time that the tests of deadlines rely on."""

import asyncio

import pytest

from tests.virtualtime import Deadlock, VirtualTimeLoop, advance, settled, virtual_time


@virtual_time
async def test_time_passes_only_when_nothing_is_ready() -> None:
    """A day's timeout takes no time at all, and fires at its own time."""
    loop = asyncio.get_running_loop()
    start = loop.time()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(3600):
            await loop.create_future()
    assert loop.time() == start + 3600


@virtual_time
async def test_advance_fires_timers_in_order_and_no_others() -> None:
    """Advancing runs what is due by then, oldest first, and what follows from it."""
    fired: list[int] = []
    loop = asyncio.get_running_loop()
    timers = [loop.call_later(delay, fired.append, delay) for delay in (3, 1, 2, 4)]
    await advance(3)
    assert fired == [1, 2, 3]
    timers[3].cancel()


@virtual_time
async def test_settled_lets_a_chain_of_callbacks_finish() -> None:
    """Everything that follows without a wait has happened, and the clock has not moved."""
    steps = 0

    async def chain() -> None:
        nonlocal steps
        for _ in range(1000):
            steps += 1
            await asyncio.sleep(0)

    before = asyncio.get_running_loop().time()
    chained = asyncio.create_task(chain())
    await settled()
    assert (steps, chained.done(), asyncio.get_running_loop().time()) == (1000, True, before)


def test_waiting_for_ever_is_a_failure() -> None:
    """A test that can't go on ends with an error that says so."""

    async def forever() -> None:
        await asyncio.get_running_loop().create_future()

    with pytest.raises(Deadlock), asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        runner.run(forever())


def test_a_task_left_behind_is_a_failure() -> None:
    """A test must end what it has begun."""

    @virtual_time
    async def leaves_one() -> None:
        asyncio.get_running_loop().stray = asyncio.create_task(advance(10), name="stray")  # type: ignore[attr-defined]

    with pytest.raises(AssertionError, match="stray"):
        leaves_one()

"""One pool over two engines, on real sockets: shared load, one that dies and comes back, both lanes."""

import asyncio
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from llorch.pool import Pool
from llorch.task import State, Task
from tests.fakes import Connection, FakeLlamaServer
from tests.live import Live, eventually, names, text
from tests.test_reload import engines, toml, write


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Where the configuration is."""
    return tmp_path / "llorch.toml"


async def steps(connection: Connection) -> None:
    """Three words, a turn of the loop before each, so that others come in between."""
    for _ in range(3):
        await asyncio.sleep(0)
        await connection.token()
    await connection.final()


def prompts(*engines: FakeLlamaServer) -> list[str]:
    """What the engines were given, each in the order in which it was."""
    return [connection.request.body["prompt"] for engine in engines for connection in engine.completions]


async def test_a_mixed_load_is_shared(file: Path) -> None:
    """Every task ends well, on both engines; the order of starts is that of admission in each lane."""
    async with engines(slots=2) as (first, second):
        write(file, toml(first, second, more="[queue]\ncapacity = 100"))
        for engine in (first, second):
            engine.always(steps)
        async with Live(first, file=file) as live:
            starts: list[Task] = []

            def moved(pool: Pool, task: Task, previous: State | None) -> None:
                if task.state is State.RUNNING:
                    starts.append(task)

            live.orchestrator.listeners.append(moved)
            kinds: list[dict[str, Any]] = [{}, {"seed": 7}, {"priority": "batch"}]
            tasks = [await live.submit(max_tokens=3, **kinds[number % 3]) for number in range(30)]
            events = [await live.events(task) for task in tasks]
            assert {names(seen) for seen in events} == {"started token token token end"}
            ran_on = Counter([(await live.snapshot(task))["replica_id"] for task in tasks])
            assert set(ran_on) == {"e0", "e1"}
            admitted = [task["task_id"] for task in tasks]
            for lane in ("interactive", "batch"):
                order = [admitted.index(task.id) for task in starts if task.request.priority == lane]
                assert order == sorted(order)
            assert len({text(seen) for seen in events[1::3]}) == 1, "one seed, several texts"
            assert first.waited == second.waited == 0


async def test_an_engine_that_dies_and_comes_back(file: Path) -> None:
    """What ran on it ends with WORKER_RESET, what had not begun is done by the other, in order; then it is
    back at work."""
    async with engines(slots=1, hold=True) as (first, second):
        write(file, toml(first, second, slots=1))
        async with Live(first, file=file) as live:
            lost = await live.submit(prompt="lost")
            await (await first.started()).token("a")
            kept = await live.submit(prompt="kept")
            await second.started()
            waiting = [await live.submit(prompt=f"waiting {number}") for number in range(4)]
            await first.kill()
            events = await live.events(lost)
            assert names(events) == "started token error"
            assert events[-1].data["code"] == "WORKER_RESET"
            await eventually(lambda: not live.replica.ready, "the dead engine still counts")
            health = await live.health()
            assert (health["ready"], [replica["ready"] for replica in health["replicas"]]) == (
                True,
                [False, True],
            )
            await second.held[0].final()
            assert names(await live.events(kept)) == "started end"
            for number in (0, 1):
                await (await second.started(number + 2)).final()
                assert names(await live.events(waiting[number])) == "started end"
            await second.started(4)
            await first.start()
            live.replica.suspect("look again")
            await (await first.started(2)).final()
            await second.held[3].final()
            assert [names(await live.events(task)) for task in waiting] == ["started end"] * 4
            assert prompts(second)[1:] == ["waiting 0", "waiting 1", "waiting 2"]
            assert prompts(first) == ["lost", "waiting 3"]


async def test_batch_is_turned_away_while_interactive_work_is_admitted(file: Path) -> None:
    """Each lane has its own bound, and says which; batch work goes when no interactive task waits."""
    async with engines(1, slots=1, hold=True) as (engine,):
        write(file, toml(engine, more="[queue]\ncapacity = 2\nbatch_capacity = 1", slots=1))
        async with Live(engine, file=file) as live:
            running = await live.submit_held(prompt="running")
            batch = await live.submit(prompt="batch", priority="batch")
            refusal = await live.post({"prompt": "more", "priority": "batch"})
            assert (refusal.status, refusal.body["code"]) == (429, "ADMISSION_REJECT")
            assert "1 of 1 batch tasks wait (queue.batch_capacity)" in refusal.body["message"]
            others = [await live.submit(prompt=f"interactive {number}") for number in range(2)]
            assert [task["queue_position"] for task in (batch, *others)] == [0, 0, 1]
            assert (await live.snapshot(batch))["queue_position"] == 2
            refusal = await live.post({"prompt": "more"})
            assert "2 of 2 tasks wait (queue.capacity)" in refusal.body["message"]
            for number, task in enumerate((running, *others, batch)):
                await (await engine.started(number + 1)).final()
                assert names(await live.events(task)) == "started end"
            assert prompts(engine) == ["running", "interactive 0", "interactive 1", "batch"]


async def test_an_engine_that_differs_is_kept_out(file: Path) -> None:
    """It gets no task, health says why, and it is let in once it is the same."""
    async with engines(slots=1) as (first, second):
        second.build = "b9999-other"
        write(file, toml(first, second, slots=1))
        async with Live(first, file=file) as live:
            replica = (await live.health())["replicas"][1]
            assert (replica["ready"], replica["last_error"]) == (
                False,
                "it runs engine b9999-other, the pool b4242-fake",
            )
            first.hold = True
            await live.submit_held()
            waiting = await live.submit()
            assert (await live.snapshot(waiting))["queue_position"] == 0
            second.build = first.build
            await live.pool.replicas[1].probe()
            assert names(await live.events(waiting)).endswith("end")


async def test_strict_work_runs_alone_on_its_replica_only(file: Path) -> None:
    """The other engine goes on with other work meanwhile."""
    async with engines(slots=2, hold=True) as (first, second):
        write(file, toml(first, second))
        async with Live(first, file=file) as live:
            await live.submit(prompt="strict", seed=7)
            await first.started()
            beside = [await live.submit(prompt=f"beside {number}") for number in range(2)]
            await second.started(2)
            assert {(await live.snapshot(task))["replica_id"] for task in beside} == {"e1"}
            assert len(first.completions) == 1
            for connection in (*first.held, *second.held):
                await connection.final()


async def test_two_pools_have_a_queue_each(file: Path) -> None:
    """A task names its pool or takes the default one; a full pool does not touch the other."""
    async with engines(slots=1, hold=True) as (first, second):
        second.model_path = "/models/other.gguf"
        write(
            file,
            "[queue]\ncapacity = 1\n"
            f'[pools.small]\nself_test = false\n[[pools.small.replicas]]\nendpoint = "{first.url}"\n'
            "[pools.big]\nself_test = false\ndefault = true\n"
            f'[[pools.big.replicas]]\nendpoint = "{second.url}"\n',
        )
        async with Live(first, file=file) as live:
            assert [pool["pool_id"] for pool in (await live.get("/v1/capabilities")).body["pools"]] == [
                "big",
                "small",
            ]
            for _ in range(2):
                assert (await live.post()).status == 202
            await second.started()
            assert (await live.post()).status == 429
            small = await live.submit(pool_id="small")
            await (await first.started()).final()
            assert names(await live.events(small)) == "started end"
            assert (await live.snapshot(small))["pool_id"] == "small"
            unknown = await live.post({"prompt": "x", "pool_id": "medium"})
            assert (unknown.status, unknown.body["code"]) == (404, "UNKNOWN_POOL")
            assert "the pools are: big, small" in str(unknown.body)

"""The snapshot for the status page and the command line: what is counted, and what of it is shown."""

from unittest.mock import ANY

import msgspec
import pytest

from llorch import __version__
from llorch.engine import EngineBroken
from llorch.errors import QueueFull
from llorch.status import MAX_TASKS, Percentiles, StatusBoard, Totals
from llorch.telemetry import GpuReading, GpuUsage
from tests.fakes import FakeLlamaServer
from tests.live import TOKEN, Live, eventually, refused
from tests.rig import Rig, rig
from tests.virtualtime import advance, settled, virtual_time


def board(built: Rig, *, home: bool = False, reading: GpuReading | None = None) -> StatusBoard:
    """A board that listens to the rig's orchestrator."""
    return StatusBoard(built.orchestrator, lambda: reading or GpuReading(), home=home)


# -- totals ----------------------------------------------------------------------------------------


@virtual_time
async def test_totals_are_of_all_tasks_since_start() -> None:
    """By what became of them, and with the tokens of those that still run."""
    async with rig(slots=1, capacity=2) as built:
        status = board(built)
        _, call = await built.running("completed")
        call.finish("a", "b", tokens_out=3)
        await settled()
        _, call = await built.running("failed")
        call.say("a")
        call.fail(EngineBroken("gone"))
        await advance(1)
        cancelled, call = await built.running("cancelled")
        call.say("a")
        await settled()
        waiting = [await built.submit("waiting") for _ in range(2)]
        with pytest.raises(QueueFull):
            await built.submit("refused")
        built.cancel(waiting[0])
        totals = Totals(admitted=5, refused=1, completed=1, failed=1, cancelled=1, tokens_out=5)
        assert status.status().totals == totals
        call.say("b", "c")
        await settled()
        assert status.status().totals.tokens_out == 7
        built.cancel(cancelled)
        await settled()
        assert status.status().totals.tokens_out == 7
        assert status.status().totals.cancelled == 2


# -- tokens per second -----------------------------------------------------------------------------


@virtual_time
async def test_tokens_per_second_are_those_of_the_last_seconds() -> None:
    """Of all tasks together; the rate follows, and is 0 again some time after the last token."""
    async with rig(slots=2) as built:
        status = board(built)
        assert status.status().tokens_per_s == 0
        (_, first), (_, second) = await built.running("a"), await built.running("b")
        for _ in range(4):
            first.say("x", "y", "z")
            second.say("x")
            await advance(1)
        assert status.status().tokens_per_s == 4
        for _ in range(8):
            first.say("x")
            await advance(1)
        assert status.status().tokens_per_s == 1
        first.finish()
        second.finish()
        await advance(3)
        assert 0 < status.status().tokens_per_s < 1
        await advance(3)
        assert status.status().tokens_per_s == 0


@virtual_time
async def test_a_burst_is_not_taken_for_a_rate() -> None:
    """What came within the first second counts as of one second."""
    async with rig(slots=1) as built:
        status = board(built)
        await advance(100)
        _, call = await built.running("a")
        call.say("x", "y")
        await advance(0.1)
        assert status.status().tokens_per_s == 2


@virtual_time
async def test_nothing_ticks_while_nothing_runs() -> None:
    """A second after the last task has ended there is no timer left: an idle llorch does nothing."""
    async with rig(slots=1) as built:
        status = board(built)
        _, call = await built.running("a")
        assert status._tick is not None
        call.finish("x")
        await advance(1.5)
        assert status._tick is None


# -- first token -----------------------------------------------------------------------------------


@virtual_time
@pytest.mark.parametrize(("home", "p95"), [(False, 1900), (True, None)])
async def test_the_time_to_the_first_token(home: bool, p95: int | None) -> None:
    """Median and 95th percentile of recent tasks; the home profile has no p95."""
    async with rig(slots=1) as built:
        status = board(built, home=home)
        assert status.status().first_token_ms == Percentiles(None, None)
        for tenths in range(20):
            _, call = await built.running("a")
            await advance(tenths / 10 + 0.1)
            call.say("x")
            await settled()
            if tenths < 19:
                call.finish("y")
                await settled()
        assert status.status().first_token_ms == Percentiles(1000, p95)


# -- which tasks -----------------------------------------------------------------------------------


@virtual_time
async def test_what_runs_and_what_is_next_is_always_shown() -> None:
    """However many newer tasks there are; newest first, with the places in the queue."""
    async with rig(slots=1, capacity=200, max_bytes=100_000) as built:
        status = board(built)
        running, _ = await built.running("runs")
        waiting = [await built.submit("waits") for _ in range(100)]
        shown = status.status().tasks
        newest = [task.id for task in reversed(waiting[-(MAX_TASKS - 21) :])]
        heads = [task.id for task in reversed(waiting[:20])]
        assert [task.task_id for task in shown] == [*newest, *heads, running.id]
        assert [task.queue_position for task in shown[-21:]] == [*reversed(range(20)), None]
        assert shown[0].queue_position == 99


# -- over HTTP -------------------------------------------------------------------------------------


async def test_the_status_of_a_live_server(fake_engine: FakeLlamaServer) -> None:
    """The whole shape, which the page and the command line rely on."""
    fake_engine.hold = True
    async with Live(fake_engine, {"adapter": {"slots": 1}}) as live:
        running, waiting = await live.submit_held(), await live.submit(metadata={"k": "v"})
        async with live.stream(running) as stream:
            await stream.next()
            answer = await live.get("/v1/status")
        tasks = (await live.get("/v1/tasks")).body["tasks"]
        assert [task["task_id"] for task in tasks] == [waiting["task_id"], running["task_id"]]
        assert answer.status == 200
        assert answer.body == {
            "version": __version__,
            "uptime_s": ANY,
            "pools": [await live.health()],
            "tasks": tasks,
            "totals": {
                "admitted": 2,
                "refused": 0,
                "completed": 0,
                "failed": 0,
                "cancelled": 0,
                "tokens_out": 0,
            },
            "tokens_per_s": 0.0,
            "first_token_ms": {"p50": None, "p95": None},
            "readers": 1,
            "gpus": [],
            "gpu_fault": None,
        }
        assert 0 <= answer.body["uptime_s"] < 60


@virtual_time
async def test_gpus_are_shown_as_they_were_read() -> None:
    """Without what nobody needs to see; and the fault in words."""
    usage = GpuUsage(0, "RTX", "GPU-0", 97, 6, 24, None)
    async with rig() as built:
        status = board(built, reading=GpuReading("570", (usage,), "GPU 1: lost")).status()
    gpu = {"index": 0, "name": "RTX", "utilization": 97, "temperature_c": None}
    assert msgspec.to_builtins(status.gpus) == [{**gpu, "vram_used_bytes": 6, "vram_total_bytes": 24}]
    assert status.gpu_fault == "GPU 1: lost"


async def test_the_status_wants_the_token(fake_engine: FakeLlamaServer) -> None:
    """It has names and counts in it: 401 without, in both profiles."""
    for profile in ("mvp", "home"):
        async with Live(fake_engine, {"auth": {"token": TOKEN}}, profile=profile) as live:
            answer = await live.get("/v1/status", headers={})
            more = {"hint": ANY} if profile == "mvp" else {}
            refused(live, answer, 401, "MISSING_TOKEN", **more)
            assert (await live.get("/v1/status")).status == 200


async def test_telemetry_runs_as_long_as_the_server(
    fake_engine: FakeLlamaServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sampled from its start to its stop; what it reads is in the status."""
    calls: list[str] = []

    class Sampler:
        def __init__(self, *, required: bool) -> None:
            calls.append(f"required={required}")
            self.reading = GpuReading("570", (), "no such luck")

        def free_vram(self, devices: tuple[int, ...]) -> None:
            """Nothing is known."""

        def start(self) -> None:
            calls.append("start")

        def stop(self) -> None:
            calls.append("stop")

    monkeypatch.setattr("llorch.server.GpuSampler", Sampler)
    async with Live(fake_engine) as live:
        assert calls == ["required=False", "start"]
        assert (await live.get("/v1/status")).body["gpu_fault"] == "no such luck"
    await eventually(lambda: calls[-1] == "stop", "the sampler is not stopped")

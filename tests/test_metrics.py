"""Metrics: what moves which number, what is read at the scrape, and the contract that all of it keeps."""

import re
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from unittest.mock import patch

import prometheus_client
import pytest

from llorch import __version__
from llorch.engine import EngineBroken
from llorch.errors import ContextOverflow, QueueFull
from llorch.measures import FAMILIES, Family
from llorch.metrics import Metrics
from llorch.orchestrator import Orchestrator
from llorch.pool import Pool
from llorch.replica import Replica
from llorch.series import MAX_VALUE_CHARS, OTHER, Counter, Histogram, gauge, label
from llorch.task import TaskRequest
from llorch.telemetry import GpuReading, GpuUsage
from tests.contract import CONTRACT, MISSING, OBSERVABILITY, lint, of_profile, promtool, samples
from tests.fakes import Connection, FakeLlamaServer
from tests.live import TOKEN, Live, eventually, refused
from tests.memory_engine import MemoryEngine
from tests.rig import POOL as SETTINGS
from tests.rig import STREAM, Rig, rig
from tests.virtualtime import advance, settled, virtual_time

HOME = {  # the home document's list, word by word
    "queue_depth": "engine,engine_version,pool_id,priority",
    "tasks_enqueued_total": "engine,engine_version,pool_id,replica_id,priority",
    "tasks_rejected_total": "engine,reason",
    "tokens_in_total": "engine,engine_version,pool_id,replica_id",
    "tokens_out_total": "engine,engine_version,pool_id,replica_id",
    "gpu_utilization": "engine,engine_version,pool_id,replica_id,device",
    "vram_used_bytes": "engine,engine_version,pool_id,replica_id,device",
    "model_state": "model_id,state",
}
MVP = {
    "tasks_started_total": "engine,engine_version,pool_id,replica_id,priority",
    "tasks_canceled_total": "engine,engine_version,pool_id,replica_id,reason",
    "kv_cache_usage_ratio": "engine,engine_version,pool_id,replica_id",
    "admission_backpressure_events_total": "engine,policy",
    "placement_decisions_total": "outcome,pinned,fallback",
    "placement_candidates_considered": "",
    "latency_first_token_ms": "engine,engine_version,pool_id,priority",
    "latency_decode_ms": "engine,engine_version,pool_id,priority",
}
POOL = 'engine="memory",engine_version="b1",pool_id="default"'
INTERACTIVE = f'{POOL},priority="interactive"'
REPLICA = f'{POOL},replica_id="default-0"'
OWN = 'pool_id="default",replica_id="default-0"'


class Scraper:
    """Metrics of a rig; asks for one number at a time."""

    def __init__(
        self, built: Rig | Orchestrator, *, home: bool = False, reading: GpuReading | None = None
    ) -> None:
        orchestrator = built.orchestrator if isinstance(built, Rig) else built
        self.metrics = Metrics(orchestrator, lambda: reading or GpuReading(), home=home)

    def text(self) -> str:
        """What Prometheus gets."""
        return self.metrics.exposition().decode()

    def __call__(self, name: str, labels: str = "") -> float | None:
        """One sample, None if there is none."""
        ordered = ",".join(sorted(re.findall(r'\w+="[^"]*"', labels)))
        return samples(self.text()).get(f"{name}{{{ordered}}}" if ordered else name)


# -- tasks -----------------------------------------------------------------------------------------


@virtual_time
async def test_each_task_is_counted_as_it_moves() -> None:
    """Admitted, started, and what became of it."""
    async with rig(slots=1) as built:
        said = Scraper(built)
        _, call = await built.running("a")
        waiting = await built.submit("b")
        assert said("tasks_enqueued_total", f'{INTERACTIVE},replica_id="unknown"') == 2
        assert said("tasks_started_total", f'{INTERACTIVE},replica_id="default-0"') == 1
        assert said("queue_depth", INTERACTIVE) == 1
        call.finish("x", tokens_out=5)
        await settled()
        assert said("queue_depth", INTERACTIVE) == 0
        assert said("tokens_in_total", REPLICA) == 3
        assert said("tokens_out_total", REPLICA) == 5
        built.engine.calls[-1].fail(EngineBroken("gone"))
        await built.until_ended(waiting)
        assert said("llorch_tasks_failed_total", 'pool_id="default",code="WORKER_RESET"') == 1
        assert said("tokens_in_total", REPLICA) == 3


@virtual_time
async def test_a_cancel_is_counted_with_its_reason() -> None:
    """Where the task was, and whether a client asked or the last reader left."""
    async with rig(slots=1, cancel_on_disconnect=True, disconnect_grace_s=2.0) as built:
        said = Scraper(built)
        running, _ = await built.running("a")
        built.cancel(await built.submit("b"))
        with built.orchestrator.reading(running):
            assert said("llorch_readers") == 1
        assert said("llorch_readers") == 0
        await advance(3)
        assert said("tasks_canceled_total", f'{POOL},replica_id="unknown",reason="client"') == 1
        assert said("tasks_canceled_total", f'{REPLICA},reason="disconnect"') == 1
        assert said("tasks_canceled_total", f'{REPLICA},reason="client"') == 0


@virtual_time
async def test_tokens_of_what_runs_are_counted_at_the_scrape() -> None:
    """Each once, whenever somebody looks; a last count below what was said takes nothing back."""
    async with rig(slots=1) as built:
        said = Scraper(built)
        _, call = await built.running("a")
        call.say("x", "y")
        await settled()
        assert said("tokens_out_total", REPLICA) == 2
        assert said("tokens_out_total", REPLICA) == 2
        call.say("z")
        call.finish(tokens_out=1)
        await settled()
        assert said("tokens_out_total", REPLICA) == 2


@virtual_time
async def test_nothing_is_done_per_token() -> None:
    """Neither a listener nor a number moves between the start of a task and its end or a scrape."""
    async with rig(slots=1) as built:
        scraper = Scraper(built)
        with (
            patch.object(Counter, "add", autospec=True, side_effect=Counter.add) as added,
            patch.object(Histogram, "observe", autospec=True, side_effect=Histogram.observe) as observed,
        ):
            _, call = await built.running("a")
            moves, adds, values = len(built.moves), added.call_count, observed.call_count
            for _ in range(1000):
                call.say("x")
            await settled()
            assert (len(built.moves), added.call_count, observed.call_count) == (moves, adds, values)
            call.finish()
            await settled()
            assert len(built.moves) == moves + 1
            assert added.call_count + observed.call_count <= adds + values + 4
        assert scraper("tokens_out_total", REPLICA) == 1000


# -- times -----------------------------------------------------------------------------------------


@virtual_time
async def test_the_first_token_is_timed_while_the_task_still_runs() -> None:
    """Once, from its start on the engine; the decode once it has completed, and only then."""
    async with rig(slots=1) as built:
        said = Scraper(built)
        _, call = await built.running("a")
        await advance(0.12)
        call.say("x")
        await advance(0.3)
        for _ in range(2):
            assert said("latency_first_token_ms_sum", INTERACTIVE) == 120
            assert said("latency_first_token_ms_count", INTERACTIVE) == 1
        call.finish("y")
        await settled()
        assert said("latency_first_token_ms_bucket", f'{INTERACTIVE},le="100.0"') == 0
        assert said("latency_first_token_ms_bucket", f'{INTERACTIVE},le="150.0"') == 1
        assert said("latency_first_token_ms_count", INTERACTIVE) == 1
        assert said("latency_decode_ms_sum", INTERACTIVE) == 300
        cancelled, call = await built.running("b")
        call.say("x")
        await settled()
        built.cancel(cancelled)
        assert said("latency_first_token_ms_count", INTERACTIVE) == 2
        assert said("latency_decode_ms_count", INTERACTIVE) == 1


@virtual_time
async def test_a_cancel_is_timed_until_its_slot_is_free() -> None:
    """As long as the engine clings to it; a task that never ran has no slot to give back."""
    async with rig(slots=1) as built:
        said = Scraper(built)
        built.engine.clings = True
        running, call = await built.running("a")
        call.say("x")
        await settled()
        built.cancel(await built.submit("b"))
        built.cancel(running)
        await advance(3)
        assert said("llorch_slots", f'{OWN},state="draining"') == 1
        assert said("llorch_cancel_seconds_count", OWN) == 0
        built.engine.let_go()
        await advance(1)
        assert said("llorch_slots", f'{OWN},state="draining"') == 0
        assert said("llorch_cancel_seconds_count", OWN) == 1
        assert 3 < (said("llorch_cancel_seconds_sum", OWN) or 0) < 4
        _, call = await built.running("c")
        call.finish("x")
        await settled()
        assert said("llorch_cancel_seconds_count", OWN) == 1


@virtual_time
async def test_a_prediction_is_held_against_what_came() -> None:
    """Of tasks that waited; one that started at once was nothing to predict."""
    async with rig(slots=1) as built:
        said = Scraper(built)
        own = 'pool_id="default",priority="interactive"'
        _, call = await built.running("a")
        await advance(10)
        call.finish("x")
        await settled()
        _, call = await built.running("b")
        waiting = await built.submit("c")
        assert waiting.predicted_start_ms == 10_000
        assert said("llorch_predicted_start_error_ms_count", own) == 0
        await advance(4)
        call.finish("x")
        await settled()
        assert said("llorch_predicted_start_error_ms_count", own) == 1
        assert said("llorch_predicted_start_error_ms_sum", own) == 6000


# -- refusals --------------------------------------------------------------------------------------


@virtual_time
async def test_a_refusal_is_counted_by_its_code() -> None:
    """A full queue also as backpressure."""
    async with rig(slots=1, capacity=1) as built:
        said = Scraper(built)
        assert said("tasks_rejected_total", 'engine="memory",reason="ADMISSION_REJECT"') == 0
        await built.running("a")
        waiting = await built.submit("b")
        with pytest.raises(QueueFull):
            await built.submit("c")
        built.cancel(waiting)
        with pytest.raises(ContextOverflow):
            await built.submit("d " * 4500)
        assert said("tasks_rejected_total", 'engine="memory",reason="ADMISSION_REJECT"') == 1
        assert said("tasks_rejected_total", 'engine="memory",reason="CONTEXT_OVERFLOW"') == 1
        assert said("admission_backpressure_events_total", 'engine="memory",policy="reject"') == 1


# -- placement and lanes ---------------------------------------------------------------------------


@asynccontextmanager
async def two_replicas() -> AsyncIterator[Pool]:
    """A pool `big` of `a`, on GPU 0, and `b`, on GPU 1, with a slot each; GPU 1 has more memory free."""
    engines = [MemoryEngine(), MemoryEngine()]
    replicas = [
        Replica(name, engine, slots=None, drain_s=60, devices=(device,))
        for device, (name, engine) in enumerate(zip("ab", engines, strict=True))
    ]
    pool = Pool(
        "big",
        "memory",
        SETTINGS,
        replicas,
        on_readiness=lambda *_: None,
        free_vram=lambda devices: 1000 * (devices[0] + 1),
    )
    yield pool
    await pool.close()


@virtual_time
async def test_a_placement_is_counted() -> None:
    """By what was decided and how; and how many replicas there were to choose from."""
    async with two_replicas() as pool:
        orchestrator = Orchestrator([pool], STREAM, tickets=False)
        said = Scraper(orchestrator)
        assert said("placement_candidates_considered_count") == 0
        await orchestrator.first_probe(1)
        tasks = [await orchestrator.submit(TaskRequest(prompt="x", priority="batch")) for _ in range(3)]
        decided = 'outcome="placed",pinned="false",fallback="false"'
        assert said("placement_decisions_total", decided) == 2
        assert said("placement_candidates_considered_bucket", 'le="1.0"') == 1
        assert said("placement_candidates_considered_sum") == 3
        big = 'engine="memory",engine_version="b1",pool_id="big"'
        assert [task.replica_id for task in tasks] == ["b", "a", None]
        for replica in "ab":
            assert said("tasks_started_total", f'{big},priority="batch",replica_id="{replica}"') == 1
        assert said("queue_depth", f'{big},priority="batch"') == 1
        assert said("queue_depth", f'{big},priority="interactive"') == 0
        assert said("llorch_queue_capacity", 'pool_id="big",priority="batch"') == 256
        orchestrator.stop()
        await orchestrator.close()


@virtual_time
async def test_after_a_switch_the_gauges_are_those_of_the_new_replicas() -> None:
    """What the old ones have counted stays, and what they still run is counted."""
    async with two_replicas() as pool:
        orchestrator = Orchestrator([pool], STREAM, tickets=False)
        said = Scraper(orchestrator)
        await orchestrator.first_probe(1)
        task = await orchestrator.submit(TaskRequest(prompt="x"))
        said.text()
        new = Replica("c", MemoryEngine(), slots=None, drain_s=60)
        await new.probe()
        pool.switch([new], SETTINGS)
        await settled()
        ready = re.findall(r'llorch_replica_ready{pool_id="big",replica_id="(\w)"} (\S+)', said.text())
        assert ready == [("c", "1.0")]
        task.token("x")
        labels = 'engine="memory",engine_version="b1",pool_id="big",replica_id="{}"'
        assert said("tokens_out_total", labels.format("b")) == 1
        assert said("tokens_out_total", labels.format("c")) == 0
        assert said("llorch_slots", 'pool_id="big",replica_id="b",state="busy"') is None
        assert lint(said.text(), "mvp") == []
        orchestrator.stop()
        await orchestrator.close()


@virtual_time
async def test_a_gpu_is_shown_for_the_replicas_that_compute_on_it() -> None:
    """And for no other."""
    gpus = tuple(GpuUsage(index, "RTX", f"GPU-{index}", 10 + index, 6, 24, 60) for index in range(3))
    async with two_replicas() as pool:
        orchestrator = Orchestrator([pool], STREAM, tickets=False)
        await orchestrator.first_probe(1)
        text = Scraper(orchestrator, reading=GpuReading("570", gpus)).text()
        shown = re.findall(r'gpu_utilization{device="(\d)",.*replica_id="(\w)"} (\S+)', text)
        assert shown == [("0", "a", "10.0"), ("1", "b", "11.0")]
        orchestrator.stop()


# -- what is read ----------------------------------------------------------------------------------


@virtual_time
async def test_slots_and_readiness_are_read_at_the_scrape() -> None:
    """An unready replica has no free slot."""
    async with rig(slots=2) as built:
        said = Scraper(built)
        await built.running("a")
        assert said("llorch_slots", f'{OWN},state="busy"') == 1
        assert said("llorch_slots", f'{OWN},state="free"') == 1
        assert said("llorch_replica_ready", OWN) == 1
        assert said("llorch_queue_capacity", 'pool_id="default",priority="interactive"') == 8
        built.replica.misconfigured("no --slots")
        assert said("llorch_slots", f'{OWN},state="busy"') == 1
        assert said("llorch_slots", f'{OWN},state="free"') == 0
        assert said("llorch_replica_ready", OWN) == 0
        assert said("llorch_build_info", f'version="{__version__}"') == 1


@virtual_time
async def test_gpus_are_read_at_the_scrape() -> None:
    """By index; what one can't tell is left out."""
    gpus = (GpuUsage(0, "RTX", "GPU-0", 97, 6, 24, 60), GpuUsage(1, "RTX", "GPU-1", None, 7, 24, None))
    async with rig() as built:
        said = Scraper(built, reading=GpuReading("570", gpus))
        assert said("gpu_utilization", f'{REPLICA},device="0"') == 97
        assert said("gpu_utilization", f'{REPLICA},device="1"') is None
        assert said("vram_used_bytes", f'{REPLICA},device="1"') == 7
        assert said("llorch_vram_total_bytes", 'device="1"') == 24


@virtual_time
async def test_a_model_that_was_replaced_is_retired() -> None:
    """And the new one is active; before the first is known its name is `unknown`."""
    engine = MemoryEngine()
    probed = engine.hold("health")
    async with rig(engine=engine) as built:
        said = Scraper(built)
        assert said("model_state", 'model_id="unknown",state="Active"') == 1
        assert said("queue_depth", 'engine="memory",engine_version="unknown",pool_id="default",'
                    'priority="interactive"') == 0  # fmt: skip
        probed.set()
        await settled()
        assert said("model_state", 'model_id="tiny",state="Active"') == 1
        assert said("model_state", 'model_id="unknown",state="Active"') is None
        engine.change(model="small")
        await built.replica.probe()
        for model, active in (("tiny", 0), ("small", 1)):
            assert said("model_state", f'model_id="{model}",state="Active"') == active
            assert said("model_state", f'model_id="{model}",state="Retired"') == 1 - active


# -- bounds ----------------------------------------------------------------------------------------


def text_of(family: Any) -> str:
    """What Prometheus would get of one family."""

    class Once:
        def collect(self) -> list[Any]:
            return [family]

    registry = prometheus_client.CollectorRegistry()
    registry.register(Once())
    return prometheus_client.generate_latest(registry).decode()


def test_beyond_its_budget_a_metric_counts_under_other() -> None:
    """So no stream of new names makes it grow, and no count is lost."""
    counter = Counter(Family(name="c_total", kind="counter", help="It counts.", labels=("a", "b"), budget=3))
    histogram = Histogram(
        Family(name="h", kind="histogram", help="It times.", labels=("a",), buckets=(1,), budget=2)
    )
    for number in range(10):
        counter.add((str(number), "x"))
        histogram.observe((str(number),), number)
    counter.add(("0", "x"))
    told = samples(text_of(counter.metric()))
    assert told == {
        'c_total{a="0",b="x"}': 2,
        'c_total{a="1",b="x"}': 1,
        f'c_total{{a="{OTHER}",b="{OTHER}"}}': 8,
    }
    told = samples(text_of(histogram.metric()))
    assert told['h_count{a="0"}'] == 1
    assert told[f'h_count{{a="{OTHER}"}}'] == 9
    assert len(told) == 2 * 4
    many = gauge(
        Family(name="g", kind="gauge", help="It is.", labels=("a",), budget=2), [((s,), 1) for s in "abc"]
    )
    assert len(samples(text_of(many))) == 2


def test_a_value_on_a_bucket_is_in_it() -> None:
    """`le` means at most."""
    histogram = Histogram(Family(name="h", kind="histogram", help="It times.", buckets=(1, 2.5)))
    for value in (0, 1, 2.5, 2.6):
        histogram.observe((), value)
    told = samples(text_of(histogram.metric()))
    assert [told[f'h_bucket{{le="{le}"}}'] for le in ("1.0", "2.5", "+Inf")] == [2, 3, 4]
    assert (told["h_count"], told["h_sum"]) == (4, 6.1)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (None, "unknown"),
        ("", "unknown"),
        ("b1", "b1"),
        ('a"} 1\nevil 2', 'a"} 1\ufffdevil 2'),
        ("\ud800\x1b[2J\u202e", "\ufffd\ufffd[2J\ufffd"),
        ("x" * 1000, "x" * MAX_VALUE_CHARS),
    ],
)
def test_a_label_is_short_and_can_be_printed(given: str | None, told: str) -> None:
    """Whatever an engine calls itself; and it comes out of the text as it went in."""
    assert label(given) == told
    family = gauge(Family(name="g", kind="gauge", help="It is.", labels=("a",)), [((given,), 1)])
    [found] = prometheus_client.parser.text_string_to_metric_families(text_of(family))
    assert found.samples[0].labels == {"a": told}


@virtual_time
async def test_an_engine_that_changes_its_version_for_ever_stays_in_the_budget() -> None:
    """Each new build would bring new series."""
    async with rig(slots=1) as built:
        said = Scraper(built)
        for number in range(150):
            built.engine.change(engine_version=f"b{number}", model=f"m{number}")
            await built.replica.probe()
            _, call = await built.running("a")
            call.finish("x")
            await settled()
            if number % 4 == 0:  # often enough for more models than are kept
                said.text()
        text = said.text()
        assert lint(text, "mvp") == []
        assert f'tokens_out_total{{engine="{OTHER}"' in text


@virtual_time
async def test_two_in_one_process_know_nothing_of_each_other() -> None:
    """Nor of prometheus-client's own registry, which other code may use."""
    async with rig() as one, rig() as two:
        first, second = Scraper(one), Scraper(two)
        await one.submit("a")
        assert first("tasks_enqueued_total", f'{INTERACTIVE},replica_id="unknown"') == 1
        assert second("tasks_enqueued_total", f'{INTERACTIVE},replica_id="unknown"') == 0
        assert b"queue_depth" not in prometheus_client.generate_latest(prometheus_client.REGISTRY)
        assert "python_info" not in first.text()


# -- the contract ----------------------------------------------------------------------------------


def test_the_contract_is_what_the_code_declares() -> None:
    """Name, type, help, labels in order, buckets, profiles and budget."""
    declared = {
        family.name: {
            "name": family.name,
            "type": family.kind,
            "help": family.help,
            "labels": list(family.labels),
            "profiles": ["home", "mvp"] if family.home else ["mvp"],
            "budget": family.budget,
            **({"buckets": list(family.buckets)} if family.buckets else {}),
        }
        for family in FAMILIES
    }
    extra = {"unit", "optional"}
    assert {
        name: {key: value for key, value in metric.items() if key not in extra}
        for name, metric in CONTRACT.items()
    } == declared
    assert all(metric["unit"] for metric in CONTRACT.values())


def test_the_profiles_have_what_the_documents_say() -> None:
    """`home` that list and no histogram; beyond the named ones `mvp` has only our own."""
    home = of_profile("home")
    assert {name: ",".join(metric["labels"]) for name, metric in home.items()} == HOME
    assert "histogram" not in {metric["type"] for metric in home.values()}
    named = {
        name: ",".join(metric["labels"])
        for name, metric in CONTRACT.items()
        if name not in HOME and not name.startswith("llorch_")
    }
    assert named == MVP
    assert CONTRACT["latency_first_token_ms"]["buckets"] == [
        *(50, 100, 150, 200, 300, 500, 750, 1000, 1500, 2000, 3000)
    ]
    assert CONTRACT["latency_decode_ms"]["buckets"] == [
        *(250, 500, 1000, 1500, 2000, 3000, 4000, 6000, 8000, 12000)
    ]


def test_each_metric_is_explained_with_its_labels() -> None:
    """In docs/metrics.md, under its profile, in the contract's order."""
    page = (OBSERVABILITY.parent / "metrics.md").read_text("utf-8")
    _, both, own = re.split(r"(?m)^## .*\n", page)[:3]
    rows = [
        re.findall(r"(?m)^\| `(\w+)` \| (\w+) \| (?:`([^`]*)`)? ?\| (\S.*) \|$", part) for part in (both, own)
    ]
    told = [[[name, kind, labels] for name, kind, labels, _ in part] for part in rows]
    known = [(name, it["type"], ", ".join(it["labels"]), it["profiles"]) for name, it in CONTRACT.items()]
    assert told[0] == [row for *row, profiles in known if "home" in profiles]
    assert told[1] == [row for *row, profiles in known if "home" not in profiles]
    assert all(len(text) > 3 for part in rows for *_, text in part if text != "1")


# -- over HTTP -------------------------------------------------------------------------------------

HOSTILE = 'evil"} 1\nevil_total{x="\\'
MARK = "evil"


async def failing(connection: Connection) -> None:
    """An engine's answer that breaks off."""
    await connection.headers()
    await connection.token()
    connection.rst()


async def mixed_work(live: Live, engine: FakeLlamaServer) -> None:
    """Tasks that complete, fail, are cancelled waiting and running, and are refused for several reasons."""
    await live.events(await live.submit())
    engine.script(failing)
    await live.events(await live.submit(priority="batch"))
    engine.hold = True
    headers = {**live.headers, "X-Correlation-Id": MARK, "X-Forwarded-For": MARK, "User-Agent": MARK}
    refusals = [await live.post({"prompt": HOSTILE, "max_tokens": 4096}, headers=headers)]
    running = await live.submit_held(session_id=HOSTILE, metadata={MARK: HOSTILE})
    waiting = [await live.submit(prompt=HOSTILE) for _ in range(2)]
    refusals += [
        await live.post({"prompt": HOSTILE, "session_id": HOSTILE}, headers=headers),
        await live.post({"prompt": "a", "pool_id": HOSTILE}, headers=headers),
        await live.post({"prompt": "a", MARK: 1}),
    ]
    assert [answer.body["code"] for answer in refusals] == [
        *("CONTEXT_OVERFLOW", "ADMISSION_REJECT", "UNKNOWN_POOL", "INVALID_PARAMS")
    ]
    await live.cancel(waiting[0])
    await live.cancel(running)
    await eventually(lambda: not live.replica.draining, "the slot does not come back")
    engine.hold = False


async def scraped(
    engine: FakeLlamaServer, profile: str, reading: GpuReading, monkeypatch: pytest.MonkeyPatch
) -> str:
    """What a live llorch says after mixed work."""
    monkeypatch.setattr("llorch.telemetry.GpuSampler.reading", reading)
    monkeypatch.setattr("llorch.telemetry.GpuSampler.start", lambda _: None)
    settings: dict[str, dict[str, Any]] = {"queue": {"capacity": 2}, "adapter": {"slots": 1}}
    async with Live(engine, settings, profile=profile) as live:
        await mixed_work(live, engine)
        return await live.scrape()


GPU = GpuReading("570", (GpuUsage(0, "RTX", "GPU-0", 97, 6, 24, 60),))


@pytest.mark.parametrize("profile", ["mvp", "home"])
async def test_a_live_scrape_keeps_the_contract(
    profile: str, fake_engine: FakeLlamaServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After mixed work: every series declared, every one declared there, labels, budget and buckets."""
    text = await scraped(fake_engine, profile, GPU, monkeypatch)
    assert lint(text, profile) == []
    told = samples(text)
    for reason, count in {"ADMISSION_REJECT": 1, "CONTEXT_OVERFLOW": 1, "POOL_UNREADY": 0}.items():
        assert told[f'tasks_rejected_total{{engine="llamacpp",reason="{reason}"}}'] == count
    for optional in ("gpu_utilization", "vram_used_bytes", "llorch_vram_total_bytes"):
        assert (f"\n{optional}{{" in text) is (optional in of_profile(profile))
    if profile == "mvp":
        assert told['llorch_tasks_failed_total{code="WORKER_RESET",pool_id="default"}'] == 1
        assert told['llorch_cancel_seconds_count{pool_id="default",replica_id="default-0"}'] == 1


@pytest.mark.parametrize("profile", ["mvp", "home"])
async def test_nothing_that_a_client_sent_is_in_it(
    profile: str, fake_engine: FakeLlamaServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No prompt, session, metadata, name of a pool or field, and no correlation id."""
    text = await scraped(fake_engine, profile, GPU, monkeypatch)
    assert MARK not in text


def test_the_lint_finds_what_is_wrong() -> None:
    """A foreign series, a foreign label, too many of them, a missing one, another bucket, another type."""
    good = "".join(
        f"# HELP {name} {metric['help']}\n# TYPE {name} {metric['type']}\n"
        + (f'{name}{{{",".join(f"""{it}="x" """.strip() for it in metric["labels"])}}} 1\n')
        for name, metric in of_profile("home").items()
    )
    assert lint(good, "home") == []
    assert lint(good + "# HELP x X.\n# TYPE x gauge\nx 1\n", "home")
    assert lint(good.replace('reason="x"', 'reason="x",prompt="y"'), "home")
    assert lint(good.replace('model_state{model_id="x",state="x"} 1\n', ""), "home")
    assert lint(good.replace("queue_depth gauge", "queue_depth counter"), "home")
    many = "".join(f'tasks_rejected_total{{engine="{number}",reason="x"}} 1\n' for number in range(40))
    assert lint(good.replace('tasks_rejected_total{engine="x",reason="x"} 1\n', many), "home")
    assert lint(good, "mvp")


async def test_metrics_want_the_token(fake_engine: FakeLlamaServer) -> None:
    """In both profiles; and HEAD has the same headers."""
    for profile in ("mvp", "home"):
        async with Live(fake_engine, {"auth": {"token": TOKEN}}, profile=profile) as live:
            answer = await live.get("/metrics", headers={})
            assert answer.status == 401
            refused(live, answer, 401, "MISSING_TOKEN", hint=answer.body.get("hint"))
            async with live.session.head("/metrics", headers=live.headers) as head:
                assert head.status == 200
                assert head.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"


GRUMBLES = {  # of names that the documents give: promtool would have them in seconds
    f"{name} metric names should not contain abbreviated units"
    for name in ("latency_first_token_ms", "latency_decode_ms", "llorch_predicted_start_error_ms")
}
LINT_GRUMBLES = 3  # its exit code when it could parse all, and likes some of it less


@pytest.mark.skipif(shutil.which("promtool") is None, reason=MISSING)
@pytest.mark.parametrize(
    ("profile", "code", "grumbles"), [("mvp", LINT_GRUMBLES, GRUMBLES), ("home", 0, set())]
)
async def test_promtool_accepts_the_text(
    profile: str,
    code: int,
    grumbles: set[str],
    fake_engine: FakeLlamaServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It finds no fault but the names that the documents give."""
    text = await scraped(fake_engine, profile, GPU, monkeypatch)
    done = await promtool("check", "metrics", given=text)
    assert {*(done.stdout + done.stderr).splitlines()} == grumbles
    assert done.returncode == code

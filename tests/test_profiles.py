"""The two profiles side by side: the same requests to both, and every difference in their answers is listed.

The one rule: DIFFERENCES is the oracle. A line is `request | place | in mvp | at home`; `-` is nothing there,
and the request `every` is each that the profiles have both. Whoever adds a route adds a request to `play`.
"""

import asyncio
import contextlib
import json
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from llorch import api, config
from llorch.errors import LlorchError
from llorch.orchestrator import Orchestrator
from llorch.schema import ConfigError
from tests.fakes import FakeLlamaServer
from tests.live import TOKEN, EventReader, Live, eventually
from tests.test_docs import subclasses

PROFILES = ("mvp", "home")
DIFFERENCES = """
every | header X-Correlation-Id | string | -

submit | body correlation_id | string | -
submit batch | body correlation_id | string | -
submit another | body correlation_id | string | -
submit to break | body correlation_id | string | -
status | body first_token_ms.p95 | number | null

full lane | body policy_label | "reject" | -
full batch lane | body policy_label | "reject" | -
too many streams | body hint | "raise stream.max_readers" | -

bad field | body retriable | false | -
too long | body retriable | false | -
too long | body hint | string | -
no token | body hint | string | -
bad token | body hint | string | -
bad host | body hint | string | -
bad origin | body hint | string | -
no such task | body hint | string | -
no such pool | body hint | string | -
slow body | body retriable | true | -
no determinism | body retriable | false | -
no determinism | body hint | string | -
large body | body retriable | false | -
no JSON | body retriable | false | -
a bug | body retriable | false | -
bad reload | body retriable | true | -
bad reload | body steps | a list | -

drain | status | 200 | 404
drain | body code | - | "NOT_FOUND"
drained | status | 503 | 202
drained | body code | "POOL_UNAVAILABLE" | -
drained health | body drain | an object | -
drained health | body ready | false | true
drain no longer | status | 200 | 404
drain no longer | body code | - | "NOT_FOUND"
description | body components.schemas.DrainBody | an object | -
description | body components.schemas.Drained | an object | -
description | body paths./v1/pools/{pool_id}/drain | an object | -

metrics | body admission_backpressure_events_total | "counter" | -
metrics | body kv_cache_usage_ratio | "gauge" | -
metrics | body latency_decode_ms | "histogram" | -
metrics | body latency_first_token_ms | "histogram" | -
metrics | body llorch_build_info | "gauge" | -
metrics | body llorch_cancel_seconds | "histogram" | -
metrics | body llorch_predicted_start_error_ms | "histogram" | -
metrics | body llorch_queue_capacity | "gauge" | -
metrics | body llorch_readers | "gauge" | -
metrics | body llorch_replica_ready | "gauge" | -
metrics | body llorch_slots | "gauge" | -
metrics | body llorch_tasks_failed_total | "counter" | -
metrics | body llorch_vram_total_bytes | "gauge" | -
metrics | body placement_candidates_considered | "histogram" | -
metrics | body placement_decisions_total | "counter" | -
metrics | body tasks_canceled_total | "counter" | -
metrics | body tasks_started_total | "counter" | -
"""
SETTINGS: dict[str, Any] = {
    "auth": {"token": TOKEN},
    "queue": {"capacity": 1, "batch_capacity": 1},
    "http": {"max_body_bytes": 2000, "body_timeout_s": 0.05},
    "stream": {"max_readers": 1},
}
MEASURED = {  # differs from run to run: only its type counts
    *("predicted_start_ms", "retry_after_ms", "queue_ms", "first_token_ms", "decode_time_ms", "uptime_s"),
    *("tokens_per_s", "p50", "p95", "Retry-After", "X-Backoff-Ms", "gpus", "gpu_fault", "correlation_id"),
    *("X-Correlation-Id", "hint", "deadline_ms", "ms"),
}
SAID = {"raise stream.max_readers"}  # a hint that is short enough to stand in the table
LEFT_OUT = {"Date", "Content-Length"}
JSON = {"Content-Type": "application/json"}


class Recorder:
    """Asks a live llorch and keeps what came, with whatever is another each time made the same."""

    def __init__(self, live: Live) -> None:
        self.live = live
        self.seen: dict[str, dict[str, Any]] = {}
        self.asked: set[tuple[str, str]] = set()

    async def ask(self, name: str, method: str, path: str, *, token: bool = True, **options: Any) -> Any:
        """One request under this name, with the token; the decoded body of its answer, or its events."""
        options["headers"] = (self.live.headers if token else {}) | options.get("headers", {})
        async with self.live.session.request(method, path, **options) as response:
            kind = response.content_type
            if kind == "text/event-stream":
                body: Any = [event._asdict() for event in await EventReader(response).rest()]
            else:
                text = await response.text()
                body = json.loads(text) if kind == "application/json" and text else text
            if path == "/metrics":  # its numbers are other tests' business
                body = dict(re.findall(r"(?m)^# TYPE (\w+) (\w+)$", body))
        headers = {name.title(): value for name, value in response.headers.items()}
        told = {
            f"header {name}": steady(name, value) for name, value in headers.items() if name not in LEFT_OUT
        }
        assert name not in self.seen
        self.seen[name] = {"status": response.status, "body": steady("", body), **told}
        self.asked.add((method, re.sub(r"[0-9a-f]{32}", "{task_id}", path).partition("?")[0]))
        return body

    async def task(self, name: str, **task: Any) -> Any:
        """Hand in a task."""
        return await self.ask(name, "POST", "/v1/tasks", json={"prompt": "hello", **task})


def steady(name: str, value: Any) -> Any:
    """`value` with what is measured, random, or an address replaced by what it is."""
    if isinstance(value, dict):
        return {key: steady(key, item) for key, item in value.items()}
    if isinstance(value, list):
        return [steady("", item) for item in value]
    if name in MEASURED and value not in SAID and value is not None and not isinstance(value, bool):
        return "<number>" if isinstance(value, int | float) or value.isdigit() else "<string>"
    if isinstance(value, str):
        value = re.sub(r"[0-9a-f]{32}", "<id>", value)
        value = re.sub(r"127\.0\.0\.1:\d+", "<address>", value)
        return re.sub(r"\d{4}-\d\d-\d\dT[\d:.]+Z", "<time>", value)
    return value


async def play(live: Live, engine: FakeLlamaServer, monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """Every route, every refusal, whole streams, and what health says on the way."""
    it = Recorder(live)
    engine.hold = True
    for name, path in [
        *(("page", "/"), ("alive", "/health"), ("list", "/v1/tasks"), ("capabilities", "/v1/capabilities")),
        ("health", "/v1/pools/default/health"),
        *(("description", "/openapi.json"), ("metrics", "/metrics")),
    ]:
        await it.ask(name, "GET", path)
    await it.ask("head", "HEAD", "/health")
    running = await it.task("submit", seed=7, metadata={"k": "v"}, session_id="s")
    connection = await engine.started(1)
    await it.task("submit batch", priority="batch")
    waiting = await it.task("submit another")
    await it.task("full lane")
    await it.task("full batch lane", priority="batch")
    await it.ask("busy health", "GET", "/v1/pools/default/health")
    await it.ask("running", "GET", f"/v1/tasks/{running['task_id']}")
    await it.ask("waiting", "GET", f"/v1/tasks/{waiting['task_id']}")
    await it.ask("some", "GET", "/v1/tasks?state=queued&limit=1")
    async with live.stream(running, params={"metrics": "1"}):
        await it.ask("too many streams", "GET", running["stream_url"])
    await eventually(lambda: not live.orchestrator.reader_count, "the reader is left")
    await connection.token("a")
    await connection.finish()
    await it.ask("stream", "GET", running["stream_url"])
    await it.ask("resumed", "GET", running["stream_url"], headers={"Last-Event-ID": "1"})
    await it.ask("over", "GET", running["stream_url"], headers={"Last-Event-ID": "2"})
    await it.ask("status", "GET", "/v1/status")
    await it.ask("cancel", "POST", waiting["cancel_url"])
    await it.ask("cancelled", "GET", waiting["stream_url"])
    await refusals(it, running["task_id"], monkeypatch)
    await control(it)
    await failures(it, engine)
    return it


async def refusals(it: Recorder, task_id: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is wrong with a request, in the order in which it is looked at."""
    live = it.live
    await it.ask("bad host", "GET", "/health", headers={"Host": "evil.example"})
    await it.ask("bad origin", "GET", "/health", headers={"Origin": "http://evil.example"})
    await it.ask("no token", "GET", "/health", token=False)
    await it.ask("bad token", "GET", "/health", headers={"Authorization": "Bearer wrong"})
    await it.ask("no route", "GET", "/v2")
    await it.ask("no such task", "GET", f"/v1/tasks/{'0' * 32}")
    await it.ask("no such pool", "GET", "/v1/pools/none/health")
    await it.ask("bad method", "DELETE", f"/v1/tasks/{task_id}")
    await it.ask("no JSON", "POST", "/v1/tasks", data=b"x", headers={"Content-Type": "text/plain"})
    await it.ask("large body", "POST", "/v1/tasks", data=b"x" * 3000, headers=JSON)

    async def dripping() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.Event().wait()

    await it.ask("slow body", "POST", "/v1/tasks", data=dripping(), headers=JSON)
    await it.task("bad field", temperatur=1)
    live.replica.determinism = "failed"
    await it.task("no determinism", seed=1)
    live.replica.determinism = "unknown"
    await cleared(live)
    await it.task("too long", prompt="word " * 300, max_tokens=4096)
    with monkeypatch.context() as patch:
        patch.setattr(Orchestrator, "health", lambda *_: 1 // 0)
        await it.ask("a bug", "GET", "/v1/pools/default/health")


async def control(it: Recorder) -> None:
    """A reload that changes nothing, one that is refused, and a drain, which home has not."""
    pool = "/v1/pools/default"
    await it.ask("reload", "POST", f"{pool}/reload")
    await it.ask(
        "bad reload", "POST", f"{pool}/reload", json={"replicas": [{"endpoint": "http://127.0.0.1:9"}]}
    )
    await it.ask("drain", "POST", f"{pool}/drain", json={"deadline_ms": 60_000})
    await it.ask("drained health", "GET", f"{pool}/health")
    await it.task("drained")
    await it.ask("drain no longer", "POST", f"{pool}/drain", json={"cancel": True})
    await cleared(it.live)


async def cleared(live: Live) -> None:
    """Return once every task has ended and its slot is free."""
    for task in live.orchestrator.recent(None, 10):
        task.cancel()
    await eventually(lambda: not live.replica.leases, "a lease is left")


async def failures(it: Recorder, engine: FakeLlamaServer) -> None:
    """Tasks that fail, and a pool that can't take any."""
    live, count = it.live, len(engine.completions)
    broken = await it.task("submit to break")
    connection = await engine.started(count + 1)
    await connection.token("a")
    await connection.error_frame()
    await it.ask("broken stream", "GET", broken["stream_url"])
    await it.ask("failed", "GET", f"/v1/tasks/{broken['task_id']}")
    await eventually(lambda: live.replica.open, "the engine is not back")
    engine.health = "loading"
    await live.replica.probe()
    await it.task("loading")
    await it.ask("loading health", "GET", "/v1/pools/default/health")
    engine.health = "error"
    await live.replica.probe()
    await it.task("gone")
    await it.ask("gone health", "GET", "/v1/pools/default/health")


# -- the comparison --------------------------------------------------------------------------------


def differences(place: str, mvp: Any, home: Any) -> list[tuple[str, str, str]]:
    """Where the two differ: the place, and what each says there."""
    if isinstance(mvp, dict) and isinstance(home, dict):
        found = []
        for name in dict.fromkeys([*mvp, *home]):
            inner = f"{place}.{name}" if place.startswith("body ") else f"{place} {name}".strip()
            found += differences(inner, mvp.get(name, ...), home.get(name, ...))
        return found
    if isinstance(mvp, list) and isinstance(home, list) and len(mvp) == len(home):
        pairs = zip(mvp, home, strict=True)
        return [it for n, pair in enumerate(pairs) for it in differences(f"{place}[{n}]", *pair)]
    return [] if mvp == home else [(place, _shown(mvp), _shown(home))]


def told(mvp: dict[str, Any], home: dict[str, Any]) -> list[dict[str, Any]]:
    """Both answers; of two that are no longer alike at all, status, code and correlation id."""
    if mvp["status"] == home["status"]:
        return [mvp, home]
    kept = ("status", "header X-Correlation-Id")
    return [
        {name: answer[name] for name in kept if name in answer}
        | {"body": {name: code for name, code in answer["body"].items() if name == "code"}}
        for answer in (mvp, home)
    ]


def _shown(value: Any) -> str:
    if value is ...:
        return "-"
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    return value.strip("<>") if str(value).startswith("<") else json.dumps(value)


def expected() -> list[tuple[str, ...]]:
    """The table, a tuple for each line."""
    return [tuple(line.split(" | ")) for line in DIFFERENCES.splitlines() if line]


@contextlib.asynccontextmanager
async def played(profile: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Recorder]:
    """A profile that has gone through all of it."""
    async with FakeLlamaServer(slots=1) as engine, Live(engine, SETTINGS, profile=profile) as live:
        yield await play(live, engine, monkeypatch)


async def test_the_profiles_differ_where_the_contract_says_and_nowhere_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Field by field, over every route and every refusal, success, streams, 429 and health."""
    async with played("mvp", monkeypatch) as mvp:
        pass
    async with played("home", monkeypatch) as home:
        pass
    assert mvp.seen.keys() == home.seen.keys()
    every = {line[1:] for line in expected() if line[0] == "every"}
    found = []
    for name in mvp.seen:
        its = differences("", *told(mvp.seen[name], home.seen[name]))
        assert every <= set(its), f"{name}: {its}"
        found += [(name, *difference) for difference in its if difference not in every]
    listed = {line for line in expected() if line[0] != "every"}
    assert (set(found) - listed, listed - set(found)) == (set(), set()), "not listed, and listed in vain"
    routes = {(method, path.replace("{pool_id}", "default")) for method, path, _ in api.ROUTES}
    assert routes <= mvp.asked
    codes = {answer["body"].get("code") for answer in mvp.seen.values() if isinstance(answer["body"], dict)}
    assert codes - {None} == {kind.code for kind in subclasses(LlorchError)}


async def test_only_the_lanes_go_another_way_at_home(fake_engine: FakeLlamaServer) -> None:
    """No batch task is ever promoted there; every other setting of a pool is the same."""
    settings = []
    for profile in PROFILES:
        async with Live(fake_engine, {"auth": {"token": TOKEN}}, profile=profile) as live:
            settings.append(msgspec.to_builtins(live.pool.settings))
    assert differences("", *settings) == [("queue batch_promote_s", "300.0", "null")]


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ("", "HOME_WITHOUT_TOKEN"),
        (f'[auth]\ntoken = "{TOKEN}"\noptional = true', "auth.optional"),
        (f'[auth]\ntoken = "{TOKEN}"', None),
    ],
)
def test_home_always_wants_its_token(keys: str, says: str | None, tmp_path: Path) -> None:
    """What mvp starts with on loopback, home refuses; with a token both start."""
    file = tmp_path / "config.toml"
    file.write_text(keys)
    assert config.load(file, {}, {"profile": "mvp"}).profile == "mvp"
    with contextlib.nullcontext() if says is None else pytest.raises(ConfigError, match=says):
        config.load(file, {}, {"profile": "home"})

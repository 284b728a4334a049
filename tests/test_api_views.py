"""What can be read over HTTP: a task, the list, health; what has no route; which check comes first."""

import logging
from typing import Any
from unittest.mock import ANY

import pytest

from llorch.capabilities import API_VERSION
from tests.fakes import FakeLlamaServer, answers, error
from tests.live import TOKEN, Live, eventually, refused

PROFILES = pytest.mark.parametrize("profile", ["mvp", "home"])


# -- one task --------------------------------------------------------------------------------------


async def test_a_task_while_it_waits_and_runs(fake_engine: FakeLlamaServer) -> None:
    """The snapshot of each state, field by field [MVP-030]."""
    fake_engine.hold = True
    async with Live(fake_engine) as live:
        running = await live.submit_held(seed=7)
        waiting = await live.submit(session_id="s1", metadata={"k": "v"})
        common = {"priority": "interactive", "pool_id": "default", "tokens_out": 0, "created_at": ANY}
        assert await live.snapshot(waiting) == {
            **common,
            "task_id": waiting["task_id"],
            "state": "queued",
            "determinism": "best_effort",
            "session_id": "s1",
            "metadata": {"k": "v"},
            "queue_position": 0,
            "timings": {"queue_ms": None, "first_token_ms": None, "decode_time_ms": None},
            "stream_url": waiting["stream_url"],
        }
        shot = await live.snapshot(running)
        assert shot["timings"].pop("queue_ms") in range(1000)
        assert shot == {
            **common,
            "task_id": running["task_id"],
            "state": "running",
            "determinism": "strict",
            "replica_id": "default-0",
            "queue_position": None,
            "timings": {"first_token_ms": None, "decode_time_ms": None},
            "stream_url": running["stream_url"],
        }


async def test_a_task_that_has_ended(fake_engine: FakeLlamaServer) -> None:
    """Completed, cancelled or failed: the end, the counts, the error; no longer a place in the queue."""
    fake_engine.script(answers(400, error(400, "bad grammar", "invalid_request_error")))
    async with Live(fake_engine) as live:
        failed = await live.submit()
        await live.events(failed)
        completed = await live.submit(prompt="one two three", max_tokens=2)
        await live.events(completed)
        fake_engine.hold = True
        running, waiting = await live.submit_held(), await live.submit()
        await live.cancel(waiting)
        await live.cancel(running)
        shot = await live.snapshot(completed)
        assert (shot["state"], shot["finish_reason"]) == ("completed", "length")
        assert (shot["tokens_in"], shot["tokens_out"], shot["queue_position"]) == (3, 2, None)
        assert all(isinstance(value, int) for value in shot["timings"].values())
        for task in (running, waiting):
            shot = await live.snapshot(task)
            assert (shot["state"], shot["finish_reason"]) == ("cancelled", "cancelled")
            assert (shot["tokens_out"], shot["queue_position"]) == (0, None)
        shot = await live.snapshot(failed)
        assert (shot["state"], shot["queue_position"]) == ("failed", None)
        assert shot["error"] == {"code": "INVALID_PARAMS", "retriable": False, "message": ANY}
        assert "bad grammar" in shot["error"]["message"]
        assert "finish_reason" not in shot


# -- the list --------------------------------------------------------------------------------------


async def test_the_list_is_newest_first_and_can_be_narrowed(fake_engine: FakeLlamaServer) -> None:
    """By state and by number; positions in one pass; no stream_url."""
    fake_engine.hold = True
    async with Live(fake_engine) as live:
        tasks = [await live.submit_held(), *[await live.submit() for _ in range(3)]]
        await live.cancel(tasks[1])
        ids = [task["task_id"] for task in reversed(tasks)]

        async def listed(query: str) -> list[dict[str, Any]]:
            answer = await live.get(f"/v1/tasks{query}")
            assert (answer.status, list(answer.body)) == (200, ["tasks"])
            return answer.body["tasks"]

        everything = await listed("")
        assert [task["task_id"] for task in everything] == ids
        assert [task["queue_position"] for task in everything] == [1, 0, None, None]
        assert not any("stream_url" in task for task in everything)
        assert [task["task_id"] for task in await listed("?limit=2")] == ids[:2]
        assert [task["task_id"] for task in await listed("?state=queued")] == ids[:2]
        assert [task["task_id"] for task in await listed("?state=queued&limit=1")] == ids[:1]
        assert [task["state"] for task in await listed("?state=running&limit=1000")] == ["running"]
        assert [task["state"] for task in await listed("?state=cancelled")] == ["cancelled"]
        assert await listed("?state=failed") == await listed("?state=completed") == []


async def test_the_list_has_a_hundred_unless_asked(fake_engine: FakeLlamaServer) -> None:
    """`limit` is 100 if not given."""
    fake_engine.hold = True
    async with Live(fake_engine, {"queue": {"capacity": 200}}) as live:
        for _ in range(101):
            await live.submit()
        assert len((await live.get("/v1/tasks")).body["tasks"]) == 100
        assert len((await live.get("/v1/tasks?limit=1000")).body["tasks"]) == 101


BAD_QUERIES = [
    *("limit=0", "limit=1001", "limit=-1", "limit=x", "limit=", "limit=1e2", "limit=%D9%A1", "limit=99999"),
    *("state=", "state=QUEUED", "state=done", "state=%ff", "page=2", "state=queued&x", "%00=1", "%ff=1"),
]


@PROFILES
@pytest.mark.parametrize("query", BAD_QUERIES)
async def test_a_bad_query_is_refused(fake_engine: FakeLlamaServer, query: str, profile: str) -> None:
    """400 that names the parameter."""
    async with Live(fake_engine, profile=profile) as live:
        answer = await live.get(f"/v1/tasks?{query}")
        refused(live, answer, 400, "INVALID_PARAMS", retriable=False)
        assert answer.body["message"].startswith("?")


# -- health ----------------------------------------------------------------------------------------


async def test_health_of_the_process(fake_engine: FakeLlamaServer) -> None:
    """It answers, and says nothing else."""
    async with Live(fake_engine) as live:
        answer = await live.get("/health")
        assert (answer.status, answer.body) == (200, {"status": "ok"})


async def test_health_of_the_pool(fake_engine: FakeLlamaServer) -> None:
    """Everything there is to know of pool, engine, slots and queue [MVP-041, MVP-052]."""
    fake_engine.hold = True
    async with Live(fake_engine, {"adapter": {"slots": "auto"}, "queue": {"capacity": 5}}) as live:
        for _ in range(2):
            await live.submit_held()
        await live.submit(prompt="four")
        assert await live.health() == {
            "pool_id": "default",
            "live": True,
            "ready": True,
            "engine": "llamacpp",
            "engine_version": "b4242-fake",
            "model": "fake-1b.gguf",
            "ctx": 4096,
            "slots": {"total": 2, "busy": 2, "draining": 0},
            "queue": {
                "depth": 1,
                "capacity": 5,
                "bytes": 4,
                "interactive": {"depth": 1, "capacity": 5},
                "batch": {"depth": 0, "capacity": 256},
            },
            "replicas": [
                {
                    "replica_id": "default-0",
                    "ready": True,
                    "slots": 2,
                    "busy": 2,
                    "draining": 0,
                    "determinism": "unknown",
                }
            ],
            "determinism": "unknown",
            "sampler_profile_version": "1",
            "accelerator": "test",
        }


# -- capabilities ----------------------------------------------------------------------------------


async def test_capabilities(fake_engine: FakeLlamaServer) -> None:
    """The API's version; per pool what it can do, the limits in force, what the self-test found."""
    settings = {"adapter": {"slots": "auto"}, "limits": {"ctx": 2048, "max_tokens": 1000}}
    async with Live(fake_engine, settings) as live:
        live.replica.determinism = "verified"
        answer = await live.get("/v1/capabilities")
        assert (answer.status, answer.body["api_version"]) == (200, API_VERSION)
        assert answer.body["pools"] == [
            {
                "pool_id": "default",
                "engine": "llamacpp",
                "engine_version": "b4242-fake",
                "model": "fake-1b.gguf",
                "ctx": 2048,
                "max_tokens": 1000,
                "slots": 2,
                "features": {"chat_template": True, "grammar": True, "determinism": "verified"},
                "accelerator": "test",
            }
        ]


async def test_capabilities_of_an_engine_never_seen(fake_engine: FakeLlamaServer) -> None:
    """What is not known yet is null or left out; the limits are ours and known."""
    await fake_engine.stop()
    async with Live(fake_engine) as live:
        [pool] = (await live.get("/v1/capabilities")).body["pools"]
        assert (pool["ctx"], pool["slots"], pool["max_tokens"]) == (None, 1, 4096)
        assert pool["features"] == {"chat_template": None, "grammar": None, "determinism": "unknown"}
        assert not pool.keys() & {"engine_version", "model", "model_digest"}


@pytest.mark.parametrize("path", ["/health", "/v1/tasks", "/v1/pools/default/health", "/v1/capabilities"])
async def test_head_is_get_without_the_body(fake_engine: FakeLlamaServer, path: str) -> None:
    """The same status and length, for probes that ask so."""
    async with Live(fake_engine) as live:
        got, head = await live.get(path), await live.ask("HEAD", path)
        assert (head.status, head.body) == (200, None)
        assert head.headers["Content-Length"] == got.headers["Content-Length"]


# -- what is not there -----------------------------------------------------------------------------

UNKNOWN = [
    ("GET", "/v1/tasks/nope", "TASK_NOT_FOUND"),
    ("GET", "/v1/tasks/nope/stream", "TASK_NOT_FOUND"),
    ("POST", "/v1/tasks/nope/cancel", "TASK_NOT_FOUND"),
    ("GET", "/v1/tasks/%00", "TASK_NOT_FOUND"),
    ("GET", "/v1/pools/nope/health", "UNKNOWN_POOL"),
    ("GET", "/v1/tasks/", "NOT_FOUND"),
    ("GET", "/v1", "NOT_FOUND"),
    ("GET", "/V1/TASKS", "NOT_FOUND"),
    ("POST", "/v1/pools/nope/reload", "UNKNOWN_POOL"),
    ("PROPFIND", "/nope", "NOT_FOUND"),
]


@PROFILES
@pytest.mark.parametrize(("method", "path", "code"), UNKNOWN)
async def test_what_is_not_there(
    fake_engine: FakeLlamaServer, method: str, path: str, code: str, profile: str
) -> None:
    """404 says whether it is the route, the pool or the task."""
    async with Live(fake_engine, profile=profile) as live:
        more = {} if code == "NOT_FOUND" else {"hint": ANY}
        refused(live, await live.ask(method, path), 404, code, **more)


@PROFILES
async def test_an_unknown_pool_takes_no_task(fake_engine: FakeLlamaServer, profile: str) -> None:
    """404 UNKNOWN_POOL for a `pool_id` that is not ours."""
    async with Live(fake_engine, profile=profile) as live:
        answer = await live.post({"prompt": "hello", "pool_id": "nope"})
        refused(live, answer, 404, "UNKNOWN_POOL", hint="the pools are: default")


@PROFILES
@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("PUT", "/v1/tasks", "GET, HEAD, POST"),
        ("DELETE", "/v1/tasks/x", "GET, HEAD"),
        ("POST", "/v1/tasks/x/stream", "GET"),
        ("GET", "/v1/tasks/x/cancel", "POST"),
        ("POST", "/health", "GET, HEAD"),
        ("PATCH", "/v1/pools/x/health", "GET, HEAD"),
        ("OPTIONS", "/v1/tasks", "GET, HEAD, POST"),
        ("TRACE", "/health", "GET, HEAD"),
        ("PROPFIND", "/health", "GET, HEAD"),
    ],
)
async def test_a_method_that_a_route_has_not(
    fake_engine: FakeLlamaServer, method: str, path: str, allow: str, profile: str
) -> None:
    """405 with the methods it has in Allow."""
    async with Live(fake_engine, profile=profile) as live:
        answer = await live.ask(method, path)
        refused(live, answer, 405, "METHOD_NOT_ALLOWED")
        assert answer.headers["Allow"] == allow


async def test_head_of_a_stream_is_not_possible(fake_engine: FakeLlamaServer) -> None:
    """A stream has no HEAD: 405."""
    async with Live(fake_engine) as live:
        task = await live.submit(max_tokens=1)
        answer = await live.ask("HEAD", task["stream_url"])
        assert (answer.status, answer.headers["Allow"]) == (405, "GET")


@PROFILES
async def test_a_bug_says_nothing_of_the_inside(
    fake_engine: FakeLlamaServer,
    profile: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """500 INTERNAL; the log has the traceback under the correlation id; the service goes on."""
    async with Live(fake_engine, profile=profile) as live:
        headers = {**live.headers, "X-Correlation-Id": "c-9"}
        with monkeypatch.context() as patch, caplog.at_level(logging.ERROR, "llorch"):
            patch.setattr(live.orchestrator, "recent", lambda *_: 1 // 0)
            answer = await live.get("/v1/tasks", headers=headers)
        refused(live, answer, 500, "INTERNAL", retriable=False)
        assert "zero" not in str(answer.body).lower()
        [record] = [record for record in caplog.records if record.levelno == logging.ERROR]
        assert record.exc_info is not None
        assert record.exc_info[0] is ZeroDivisionError
        assert vars(record)["correlation_id"] == "c-9"
        assert (await live.get("/health")).status == 200


# -- the order of checks ---------------------------------------------------------------------------


async def test_a_request_that_breaks_many_rules_hears_of_the_first(fake_engine: FakeLlamaServer) -> None:
    """Site, token, route, media type, size, JSON, pool, determinism, readiness, queue, context."""
    fake_engine.hold, fake_engine.ctx = True, 50
    settings = {"auth": {"token": TOKEN}, "queue": {"capacity": 1}, "http": {"max_body_bytes": 5000}}
    async with Live(fake_engine, settings) as live:
        await live.submit_held(max_tokens=1)
        await live.submit(max_tokens=1)
        live.replica.determinism = "failed"
        fake_engine.api_key = "another-key"
        live.replica.suspect("for this test")
        await eventually(lambda: not live.replica.ready, "it is still ready")

        headers = {"Host": "evil.example", "Content-Type": "text/plain"}
        body = {"prompt": "word " * 2000, "seed": -1, "pool_id": "nope", "max_tokens": 1}
        path = "/nope"

        async def ask() -> tuple[int, str]:
            answer = await live.ask("POST", path, headers=headers, json=body)
            return answer.status, answer.body["code"]

        assert await ask() == (403, "FORBIDDEN_HOST")
        headers |= {"Host": "localhost", "Origin": "null"}
        assert await ask() == (403, "FORBIDDEN_ORIGIN")
        del headers["Origin"]
        assert await ask() == (401, "MISSING_TOKEN")
        headers |= live.headers
        assert await ask() == (404, "NOT_FOUND")
        path = "/health"
        assert await ask() == (405, "METHOD_NOT_ALLOWED")
        path = "/v1/tasks"
        assert await ask() == (415, "UNSUPPORTED_MEDIA_TYPE")
        headers["Content-Type"] = "application/json"
        assert await ask() == (413, "BODY_TOO_LARGE")
        body["prompt"] = "word " * 60
        assert await ask() == (400, "INVALID_PARAMS")
        body["seed"] = 1
        assert await ask() == (404, "UNKNOWN_POOL")
        del body["pool_id"]
        assert await ask() == (409, "DETERMINISM_UNAVAILABLE")
        live.replica.determinism = "unknown"
        assert await ask() == (503, "POOL_UNAVAILABLE")
        fake_engine.api_key = ""
        live.replica.suspect("mended")
        await eventually(lambda: live.replica.dispatchable, "it is not ready again")
        assert await ask() == (429, "ADMISSION_REJECT")
        waiting = (await live.get("/v1/tasks?state=queued")).body["tasks"][0]["task_id"]
        await live.cancel({"cancel_url": f"/v1/tasks/{waiting}/cancel"})
        assert await ask() == (400, "CONTEXT_OVERFLOW")
        body["prompt"] = "word"
        assert (await live.post(body)).status == 202

"""Handing in tasks over HTTP: what is admitted, in which order, and how everything else is refused."""

import asyncio
import json
import re
import uuid
from unittest.mock import ANY

import pytest

from tests.fakes import Connection, FakeLlamaServer, answers
from tests.live import Live, eventually, names, refused

PROFILES = pytest.mark.parametrize("profile", ["mvp", "home"])
LONG = {"prompt": "word " * 1000, "max_tokens": 4000}  # only the engine can say whether it fits
UNREADY = {"engine": "llamacpp", "retriable": True, "retry_after_ms": 2000}


async def stalled(connection: Connection) -> None:
    """A script that never answers."""
    await connection.stall()


# -- admission -------------------------------------------------------------------------------------


async def test_the_answer_to_an_admitted_task(fake_engine: FakeLlamaServer) -> None:
    """202 with id, position, the two paths, the correlation id, and Location [MVP-030]."""
    async with Live(fake_engine) as live:
        answer = await live.post({"prompt": "hello", "max_tokens": 1}, headers={"X-Correlation-Id": "c-1"})
        task_id = answer.body["task_id"]
        assert answer.status == 202
        assert re.fullmatch("[0-9a-f]{32}", task_id)
        assert answer.headers["Location"] == f"/v1/tasks/{task_id}"
        assert answer.body == {
            "task_id": task_id,
            "queue_position": 0,
            "stream_url": f"/v1/tasks/{task_id}/stream",
            "cancel_url": f"/v1/tasks/{task_id}/cancel",
            "correlation_id": "c-1",
        }
        assert (await live.get(answer.headers["Location"])).body["task_id"] == task_id


async def test_the_home_profile_has_no_correlation_id_anywhere(fake_engine: FakeLlamaServer) -> None:
    """Neither in a header, asked for or not, nor in the 202, nor on a stream."""
    async with Live(fake_engine, profile="home") as live:
        asked = {**live.headers, "X-Correlation-Id": "c-1"}
        admitted = await live.post({"prompt": "hello", "max_tokens": 1}, headers=asked)
        assert admitted.status == 202
        assert admitted.body.keys() == {"task_id", "queue_position", "stream_url", "cancel_url"}
        async with live.stream(admitted.body, headers=asked) as stream:
            await stream.rest()
            answers = [admitted.headers, stream.response.headers]
        for path in ("/health", "/v1/tasks", "/nope", admitted.body["stream_url"]):
            answer = await live.get(path, headers={**asked, "Last-Event-ID": "99"})
            answers.append(answer.headers)
        answers.append((await live.get("/health", headers={"X-Correlation-Id": "c-1"})).headers)
        assert not any("X-Correlation-Id" in headers for headers in answers)


@pytest.mark.parametrize("given", ["c-1", "A.z_0:-9", "x" * 128])
async def test_a_sane_correlation_id_is_echoed(fake_engine: FakeLlamaServer, given: str) -> None:
    """On every answer: 202, 200, 204, 4xx, and on a stream."""
    async with Live(fake_engine) as live:
        headers = {"X-Correlation-Id": given}
        task = await live.post({"prompt": "hello", "max_tokens": 1}, headers=headers)
        assert task.body["correlation_id"] == given
        async with live.stream(task.body, headers=headers) as stream:
            assert stream.response.headers["X-Correlation-Id"] == given
            await stream.rest()
        for path, status in ((task.body["stream_url"], 204), ("/health", 200), ("/nope", 404)):
            answer = await live.get(path, headers={**headers, "Last-Event-ID": "99"})
            assert (answer.status, answer.headers["X-Correlation-Id"]) == (status, given)
        answer = await live.get("/health", headers={**headers, "Host": "evil.example"})
        assert (answer.status, answer.headers["X-Correlation-Id"]) == (403, given)


@pytest.mark.parametrize("given", ["", "x" * 129, "a b", "a/b", "é", '"'])
async def test_any_other_correlation_id_is_replaced(fake_engine: FakeLlamaServer, given: str) -> None:
    """By a UUID of our own, a new one each time."""
    async with Live(fake_engine) as live:
        headers = {"X-Correlation-Id": given}
        ids = {(await live.get("/health", headers=headers)).headers["X-Correlation-Id"] for _ in range(2)}
        assert len({uuid.UUID(found) for found in ids}) == 2


async def test_every_parameter_reaches_the_engine(fake_engine: FakeLlamaServer) -> None:
    """One by one, as given; metadata, session and pool do not [MVP-030]."""
    given = {
        "max_tokens": 7,
        "seed": 5,
        "temperature": 0.5,
        "top_k": 3,
        "top_p": 0.25,
        "min_p": 0.125,
        "typical_p": 0.75,
        "repeat_penalty": 1.5,
        "repeat_last_n": 9,
        "presence_penalty": -1.0,
        "frequency_penalty": 2.0,
        "stop": ["x", "yy"],
        "json_schema": {"type": "object"},
    }
    ours = {"session_id": "s", "metadata": {"k": "v"}, "pool_id": "default", "priority": "interactive"}
    async with Live(fake_engine) as live:
        await live.events(await live.submit(**given, **ours))
        sent = fake_engine.completions[0].request.body
        assert sent.pop("n_predict") == given.pop("max_tokens")
        assert {name: sent[name] for name in given} == given
        assert (sent["cache_prompt"], sent["id_slot"]) == (False, 0)
        assert not sent.keys() & {*ours, "determinism"}


async def test_a_conversation_is_rendered_by_the_engine(fake_engine: FakeLlamaServer) -> None:
    """`messages` become a prompt by the engine's own template."""
    async with Live(fake_engine) as live:
        await live.events(await live.submit(messages=[{"role": "user", "content": "hi"}], max_tokens=1))
        prompt = fake_engine.completions[0].request.body["prompt"]
        assert prompt == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


async def test_tasks_wait_and_start_in_the_order_of_admission(fake_engine: FakeLlamaServer) -> None:
    """Positions count the tasks that wait ahead, and the engine sees the same order."""
    fake_engine.hold = True
    async with Live(fake_engine) as live:
        tasks = [await live.submit_held(prompt="p0")] + [
            await live.submit(prompt=f"p{number}") for number in (1, 2, 3)
        ]
        assert [task["queue_position"] for task in tasks] == [0, 0, 1, 2]
        assert [(await live.snapshot(task))["queue_position"] for task in tasks] == [None, 0, 1, 2]
        assert (await live.cancel(tasks[1]))["state"] == "cancelled"
        assert [(await live.snapshot(task))["queue_position"] for task in tasks] == [None, None, 0, 1]
        for number in (1, 2, 3):
            await (await fake_engine.started(number)).finish()
        prompts = [connection.request.body["prompt"] for connection in fake_engine.completions]
        assert prompts == ["p0", "p2", "p3"]
        for task in tasks[2:]:
            assert names(await live.events(task)) == "started end"


async def test_the_start_is_predicted_once_something_was_measured(fake_engine: FakeLlamaServer) -> None:
    """`predicted_start_ms` is absent at first, then one number in answer, event and snapshot."""
    async with Live(fake_engine) as live:
        await live.events(await live.submit(max_tokens=1))
        fake_engine.hold = True
        await live.submit_held()
        waiting = await live.submit()
        predicted = waiting["predicted_start_ms"]
        assert isinstance(predicted, int)
        assert (await live.snapshot(waiting))["predicted_start_ms"] == predicted
        async with live.stream(waiting) as stream:
            started = await stream.next()
        assert started is not None
        assert started.data == {"queue_position": 0, "predicted_start_ms": predicted}


# -- a full queue ----------------------------------------------------------------------------------


@PROFILES
async def test_a_full_queue_says_when_to_come_back(fake_engine: FakeLlamaServer, profile: str) -> None:
    """429 with Retry-After, X-Backoff-Ms and the same figure in the body [MVP-031, C11]."""
    fake_engine.hold = True
    settings = {"queue": {"capacity": 1, "default_retry_after_ms": 1234}}
    async with Live(fake_engine, settings, profile=profile) as live:
        await live.submit_held()
        await live.submit()
        answer = await live.post()
        refused(
            live,
            answer,
            429,
            "ADMISSION_REJECT",
            engine="llamacpp",
            retriable=True,
            retry_after_ms=1234,
            **({"policy_label": "reject"} if profile == "mvp" else {}),
        )
        assert (answer.headers["X-Backoff-Ms"], answer.headers["Retry-After"]) == ("1234", "2")


@pytest.mark.parametrize(("slots", "capacity"), [(1, 1), (1, 4), (2, 3)])
async def test_slots_and_capacity_are_admitted_and_no_more(
    fake_engine: FakeLlamaServer, slots: int, capacity: int
) -> None:
    """Of many at once exactly S + N get in; of the others nothing is left [MVP-031, C11]."""
    fake_engine.hold = True
    settings = {"adapter": {"slots": slots}, "queue": {"capacity": capacity}}
    async with Live(fake_engine, settings) as live:
        answers = await asyncio.gather(*(live.post() for _ in range(20)))
        admitted = [answer.body["task_id"] for answer in answers if answer.status == 202]
        assert len(admitted) == slots + capacity
        assert {answer.status for answer in answers} == {202, 429}
        listed = (await live.get("/v1/tasks")).body["tasks"]
        assert {task["task_id"] for task in listed} == set(admitted)
        queue = (await live.health())["queue"]
        assert queue == {
            "depth": capacity,
            "capacity": capacity,
            "bytes": capacity * len("hello"),
            "interactive": {"depth": capacity, "capacity": capacity},
            "batch": {"depth": 0, "capacity": 256},
        }
        await live.cancel({"cancel_url": f"/v1/tasks/{admitted[-1]}/cancel"})
        assert (await live.post()).status == 202
        assert (await live.post()).status == 429


async def test_the_queue_is_bounded_in_bytes_too(fake_engine: FakeLlamaServer) -> None:
    """Waiting prompts share `queue.max_bytes`; one that could never fit is too large [C11]."""
    fake_engine.hold = True
    async with Live(fake_engine, {"queue": {"max_bytes": 20}}) as live:
        await live.submit_held()
        await live.submit(prompt="x" * 15)
        assert (await live.post({"prompt": "x" * 6})).body["code"] == "ADMISSION_REJECT"
        assert (await live.post({"prompt": "x" * 5})).status == 202
        answer = await live.post({"prompt": "x" * 21})
        refused(live, answer, 413, "BODY_TOO_LARGE", engine="llamacpp", retriable=False)


# -- the context check -----------------------------------------------------------------------------


async def test_a_prompt_that_does_not_fit_is_refused(fake_engine: FakeLlamaServer) -> None:
    """CONTEXT_OVERFLOW says prompt tokens, max_tokens and the limit [MVP-030]."""
    fake_engine.ctx = 50
    async with Live(fake_engine) as live:
        answer = await live.post({"prompt": "word " * 41, "max_tokens": 10})
        refused(live, answer, 400, "CONTEXT_OVERFLOW", engine="llamacpp", retriable=False, hint=ANY)
        assert "41" in answer.body["message"]
        assert "10" in answer.body["message"]
        assert "50" in answer.body["message"]
        assert (await live.post({"prompt": "word " * 41, "max_tokens": 9})).status == 202
        assert (await live.post({"prompt": "word " * 50})).body["code"] == "CONTEXT_OVERFLOW"


async def test_max_tokens_not_given_is_what_the_context_leaves(fake_engine: FakeLlamaServer) -> None:
    """At most the default, at most the rest."""
    fake_engine.ctx = 50
    async with Live(fake_engine) as live:
        await live.events(await live.submit(prompt="word " * 41))
        assert fake_engine.completions[0].request.body["n_predict"] == 9


async def test_places_are_held_while_the_context_is_checked(fake_engine: FakeLlamaServer) -> None:
    """Tasks whose check still waits for the engine count as admitted, and give back what they held [C11]."""
    go_on = asyncio.Event()

    async def slow(connection: Connection) -> None:
        await go_on.wait()
        await connection.answer(200, {"tokens": [1] * 1000})

    fake_engine.script(slow, slow, path="/tokenize")
    async with Live(fake_engine, {"queue": {"capacity": 1}}) as live:
        checks = [asyncio.create_task(live.post(LONG)) for _ in range(2)]
        await fake_engine.until(lambda: [r.path for r in fake_engine.requests].count("/tokenize") == 2)
        assert (await live.post()).body["code"] == "ADMISSION_REJECT"
        go_on.set()
        assert {answer.body["code"] for answer in await asyncio.gather(*checks)} == {"CONTEXT_OVERFLOW"}
        assert (await live.get("/v1/tasks")).body == {"tasks": []}
        fake_engine.hold = True
        assert [(await live.post()).status for _ in range(3)] == [202, 202, 429]


@PROFILES
async def test_a_check_that_the_engine_fails(fake_engine: FakeLlamaServer, profile: str) -> None:
    """503 POOL_UNAVAILABLE, and nothing is left."""
    fake_engine.script(answers(500, b"kaputt"), path="/tokenize")
    async with Live(fake_engine, profile=profile) as live:
        refused(live, await live.post(LONG), 503, "POOL_UNAVAILABLE", **UNREADY)
        assert (await live.get("/v1/tasks")).body == {"tasks": []}


async def test_a_client_that_leaves_during_the_check_leaves_nothing(fake_engine: FakeLlamaServer) -> None:
    """Its reservation is given back; no task is made [C1, C11]."""
    fake_engine.script(stalled, path="/tokenize")
    async with Live(fake_engine) as live:
        body = json.dumps(LONG).encode()
        async with live.connection() as (_, writer):
            writer.write(
                b"POST /v1/tasks HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
            )
            await fake_engine.until(lambda: fake_engine.requests[-1].path == "/tokenize")
            assert live.pool.queue.reserved == 1
        await eventually(lambda: live.pool.queue.reserved == 0, "the reservation is left")
        assert live.pool.queue.reserved_bytes == 0
        assert (await live.get("/v1/tasks")).body == {"tasks": []}


# -- the pool can't --------------------------------------------------------------------------------


@PROFILES
async def test_a_loading_engine_is_unready(fake_engine: FakeLlamaServer, profile: str) -> None:
    """503 POOL_UNREADY with Retry-After while the model loads [E2]."""
    fake_engine.health = "loading"
    async with Live(fake_engine, profile=profile) as live:
        refused(live, await live.post(), 503, "POOL_UNREADY", **UNREADY)
        health = await live.health()
        assert (health["live"], health["ready"]) == (True, False)


@PROFILES
async def test_an_engine_that_is_gone_is_unavailable(fake_engine: FakeLlamaServer, profile: str) -> None:
    """503 POOL_UNAVAILABLE with Retry-After; health says why [E1]."""
    await fake_engine.kill()
    async with Live(fake_engine, profile=profile) as live:
        refused(live, await live.post(), 503, "POOL_UNAVAILABLE", **UNREADY)
        health = await live.health()
        assert (health["live"], health["ready"]) == (False, False)
        assert fake_engine.url in health["last_error"]


async def test_a_misconfigured_engine_is_unavailable(fake_engine: FakeLlamaServer) -> None:
    """A wrong API key is not the client's fault: 503, and health says misconfigured [E5]."""
    fake_engine.api_key = "another-key"
    async with Live(fake_engine) as live:
        refused(live, await live.post(), 503, "POOL_UNAVAILABLE", **UNREADY)
        assert (await live.health())["last_error"].startswith("misconfigured: ")


async def test_a_stopping_llorch_admits_nothing(fake_engine: FakeLlamaServer) -> None:
    """503 POOL_UNAVAILABLE, and the rest still answers [P1]."""
    async with Live(fake_engine) as live:
        live.orchestrator.stop()
        refused(live, await live.post(), 503, "POOL_UNAVAILABLE", **UNREADY)
        assert (await live.get("/health")).status == 200
        assert (await live.health())["ready"] is False


@PROFILES
async def test_strict_tasks_need_a_deterministic_engine(fake_engine: FakeLlamaServer, profile: str) -> None:
    """409 with the cure after a failed probe; tasks without a seed run [MVP-042]."""
    numbers = iter(range(1000))

    async def never_the_same(connection: Connection) -> None:
        await connection.token(f" {next(numbers)}")
        await connection.final()

    fake_engine.always(never_the_same)
    async with Live(fake_engine, {"adapter": {"self_test": True}}, profile=profile) as live:
        await eventually(lambda: live.replica.determinism == "failed", "the probe found nothing")
        answer = await live.post({"prompt": "hello", "seed": 1})
        refused(live, answer, 409, "DETERMINISM_UNAVAILABLE", engine="llamacpp", retriable=False, hint=ANY)
        if profile == "mvp":
            assert "--no-kv-unified" in answer.body["hint"]
        assert names(await live.events(await live.submit())) == "started token end"
        assert (await live.health())["determinism"] == "failed"

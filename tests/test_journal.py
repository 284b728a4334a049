"""The journal: one line for each thing that happens, with the standard fields, and no secret in any."""

import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest

from llorch.execution import Execution
from llorch.logs import JsonLines
from tests.fakes import Connection, FakeLlamaServer, answers, error, says, streams
from tests.live import TOKEN, Live, eventually

CANARY = "canary-4711"
POOL_FIELDS = {
    "engine": "llamacpp",
    "engine_version": "b4242-fake",
    "sampler_profile_version": "1",
    "pool_id": "default",
}


class Journal(logging.Handler):
    """Every record, as the line it becomes without the redactor: nothing may lean on that."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(JsonLines(str))  # type: ignore[arg-type]
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep it."""
        self.records.append(record)

    @property
    def text(self) -> str:
        """All lines."""
        return "\n".join(self.format(record) for record in self.records)

    def lines(self, *events: str) -> list[dict[str, Any]]:
        """The lines of these events, of all if none is given, decoded."""
        decoded = [json.loads(self.format(record)) for record in self.records]
        return [line for line in decoded if not events or line["event"] in events]

    def events(self) -> list[str]:
        """What happened to tasks, in order."""
        about_tasks = [line for line in self.lines() if "job_id" in line or line["event"] == "rejected"]
        return [line["event"] for line in about_tasks]


@pytest.fixture
def journal() -> Iterator[Journal]:
    """What is logged, down to debug."""
    root, handler = logging.getLogger(), Journal()
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    logging.getLogger("asyncio").setLevel(logging.WARNING)
    yield handler
    root.setLevel(level)
    logging.getLogger("asyncio").setLevel(logging.NOTSET)
    root.removeHandler(handler)


async def test_the_life_of_a_task(fake_engine: FakeLlamaServer, journal: Journal) -> None:
    """One line each at admission, start and end, with what is known by then [MVP-070]."""
    async with Live(fake_engine) as live:
        headers = {"X-Correlation-Id": "c-1"}
        task = {"prompt": "one two", "max_tokens": 3, "session_id": "s-1", "metadata": {"k": CANARY}}
        created = (await live.post(task, headers=headers)).body
        await live.events(created)
    admitted, started, completed = journal.lines("admitted", "started", "completed")
    assert journal.events() == ["admitted", "started", "completed"]
    common = {
        **POOL_FIELDS,
        "level": "info",
        "correlation_id": "c-1",
        "job_id": created["task_id"],
        "session_id": "s-1",
        "queue_position": 0,
        "identity": "localhost",
    }
    for line in (admitted, started, completed):
        assert common.items() <= line.items()
        assert line["ts"].endswith("Z")
        assert " " in line["msg"]
    assert admitted["tokens_out"] == 0
    assert {"replica_id": "default-0", "queue_ms": started["queue_ms"]}.items() <= started.items()
    assert {"tokens_in": 2, "tokens_out": 3}.items() <= completed.items()
    for field in ("queue_ms", "first_token_ms", "decode_time_ms"):
        assert isinstance(completed[field], int)
    assert CANARY not in journal.text


async def test_ends_of_every_kind(fake_engine: FakeLlamaServer, journal: Journal) -> None:
    """A cancel, waiting or running, and a failure have one line, which says why [MVP-070]."""
    async with Live(fake_engine) as live:
        fake_engine.script(answers(500, b"kaputt"))
        await live.events(await live.submit())
        await eventually(lambda: live.replica.dispatchable, "the pool did not recover")
        fake_engine.hold = True
        running, waiting = await live.submit_held(), await live.submit()
        for task in (waiting, running, running):
            await live.cancel(task)
    assert sorted(journal.events()) == sorted(
        ["admitted", "started"] * 2 + ["admitted", "failed"] + ["cancelled"] * 2
    )
    [failed] = journal.lines("failed")
    assert failed["level"] == "warning"
    assert "WORKER_RESET: POST /completion answered 500" in failed["msg"]
    assert [line["msg"] for line in journal.lines("cancelled")] == [
        "task cancelled while it waited",
        "task cancelled after 0 tokens",
    ]


async def test_a_reject(fake_engine: FakeLlamaServer, journal: Journal) -> None:
    """A refused task has one line with code and backoff, and no other [MVP-070, C11]."""
    fake_engine.hold = True
    async with Live(fake_engine, {"queue": {"capacity": 1}}) as live:
        await live.submit_held()
        await live.submit()
        answer = await live.post(headers={"X-Correlation-Id": "c-2"})
        [line] = journal.lines("rejected")
        assert (
            line.items()
            >= {
                **POOL_FIELDS,
                "level": "info",
                "code": "ADMISSION_REJECT",
                "correlation_id": "c-2",
                "identity": "localhost",
                "retry_after_ms": answer.body["retry_after_ms"],
            }.items()
        )
        assert journal.events() == ["admitted", "started", "admitted", "rejected"]


async def test_changes_of_readiness(fake_engine: FakeLlamaServer, journal: Journal) -> None:
    """One line for each, with the reason, and none while nothing changes [MVP-070, MVP-041]."""
    async with Live(fake_engine) as live:
        for _ in range(3):
            await live.replica.probe()
        await fake_engine.kill()
        for _ in range(3):
            await live.replica.probe()
        await fake_engine.start()
        await live.replica.probe()
    lines = journal.lines("ready", "unready")
    assert [line["event"] for line in lines] == ["ready", "unready", "ready"]
    assert [line["level"] for line in lines] == ["info", "warning", "info"]
    assert all(line.items() >= {"pool_id": "default", "replica_id": "default-0"}.items() for line in lines)
    assert "1 slots, 4096 tokens of context" in lines[0]["msg"]
    assert "nothing listens" in lines[1]["msg"]


async def test_who_was_turned_away(fake_engine: FakeLlamaServer, journal: Journal) -> None:
    """A 401 or 403 has a line with code, peer and correlation id; a hostile Host stays in it [T17]."""
    async with Live(fake_engine, {"auth": {"token": TOKEN}}) as live:
        await live.get("/health", headers={"X-Correlation-Id": "c-3"})
        await live.raw(b'GET /health HTTP/1.1\r\nHost: x"\t,"level":"y\r\nConnection: close\r\n\r\n')
    missing, host = journal.lines("refused")
    assert missing.items() >= {"correlation_id": "c-3", "peer": "127.0.0.1"}.items()
    assert "MISSING_TOKEN" in missing["msg"]
    assert "FORBIDDEN_HOST" in host["msg"]
    assert host["level"] == "info"
    assert len(journal.text.splitlines()) == len(journal.records)


def quoting(*parts: str) -> bytes:
    """What an engine says that repeats what it was sent."""
    return json.dumps(error(400, " ".join([CANARY, *parts]), "invalid_request_error")).encode()


async def quotes_and_breaks(connection: Connection) -> None:
    """Repeats the prompt as a token, then in an error in mid-stream."""
    await connection.token(connection.request.body["prompt"])
    await connection.error_frame(connection.request.body["prompt"])


SCRIPTS = {
    "400": answers(400, quoting()),
    "400 with a type": answers(400, error(400, CANARY, "exceed_context_size_error")),
    "401": answers(401, quoting()),
    "404": answers(404, quoting()),
    "500": answers(500, quoting()),
    "501": answers(501, CANARY.encode()),
    "503": answers(503, quoting()),
    "an error frame": quotes_and_breaks,
    "an odd event": streams(f'data: {{"content":"{CANARY}'.encode() + b'"\n\n'),
    "an odd field": streams(f'data: {{"content":"a","stop":"{CANARY}"}}\n\n'.encode()),
    "an odd stop": streams(f'data: {{"content":"a","stop":true,"tokens_predicted":"{CANARY}"}}\n\n'.encode()),
    "no HTTP": says(CANARY.encode() + b"\r\n\r\n"),
    "an odd header": says(b"HTTP/1.1 200 OK\r\n" + CANARY.encode() + b"\r\n\r\n"),
    "an odd chunk": says(
        b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
        + CANARY.encode()
        + b"\r\n"
    ),
    "an odd type": answers(200, b"", more=f"Content-Type: {CANARY}/x\r\n"),
}


@pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)
async def test_engines_that_quote_the_prompt(
    fake_engine: FakeLlamaServer, script: Any, journal: Journal
) -> None:
    """Whatever words of a client's an engine repeats in its failure, they are in no log line [T18]."""
    fake_engine.script(script)
    async with Live(fake_engine, {"timeouts": {"idle_s": 0.05, "first_token_s": 1.0}}) as live:
        await live.events(await live.submit(prompt=CANARY))
        await eventually(lambda: live.replica.dispatchable, "the pool did not recover")
    assert "started" in journal.events()
    assert CANARY not in journal.text


@pytest.mark.parametrize("path", ["/tokenize", "/apply-template"])
async def test_context_checks_that_quote_the_prompt(
    fake_engine: FakeLlamaServer, path: str, journal: Journal
) -> None:
    """The same while a task is being admitted [T18]."""
    task: dict[str, Any] = {"prompt": f"{CANARY} " * 500, "max_tokens": 4000}
    if path == "/apply-template":
        task = {"messages": [{"role": "user", "content": CANARY}]}
    async with Live(fake_engine) as live:
        for script in (answers(400, quoting()), answers(404, quoting()), answers(500, quoting())):
            fake_engine.script(script, path=path)
            assert (await live.post(task)).status in (400, 503)
            await eventually(lambda: live.replica.dispatchable, "the pool did not recover")
    assert CANARY not in journal.text


async def test_secrets_of_a_whole_life(
    fake_engine: FakeLlamaServer, journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompt, output, token, ticket, query and engine key are in no line, not even of a bug [T18]."""
    fake_engine.api_key = f"engine-key-{CANARY}"
    token = f"token-of-{CANARY}"
    settings = {"auth": {"token": token}, "adapter": {"api_key": fake_engine.api_key}}

    async def speaks(connection: Connection) -> None:
        await connection.token(CANARY)
        await connection.final()

    fake_engine.always(speaks)
    async with Live(fake_engine, settings) as live:
        live.headers = {"Authorization": f"Bearer {token}"}
        secrets = {"metadata": {CANARY: CANARY}, "stop": [CANARY], "json_schema": {CANARY: 1}}
        task = await live.submit(prompt=CANARY, **secrets)
        ticket = task["stream_url"].partition("ticket=")[2]
        await live.events(task)
        fake_engine.hold = True
        await live.cancel(await live.submit(prompt=CANARY))
        for path in (
            f"/v1/tasks?{CANARY}=1",
            f"/v1/tasks?state={CANARY}",
            f"/health?{CANARY}",
            f"/nope?{CANARY}",
        ):
            await live.get(path)
        for header in ("Authorization", "X-API-Key", "Cookie"):
            await live.get("/health", headers={header: f"Bearer {CANARY}"})
        await live.get(f"/v1/tasks/{task['task_id']}/stream?ticket={CANARY}", headers={})
        await live.get(f"{task['stream_url']}0", headers={})
        await live.get(task["stream_url"], headers={"Origin": "null"})
        await live.post(data=f'{{"prompt":"{CANARY}", "{CANARY}":1}}', headers=live.headers)
        for field in (CANARY, "prompt", "temperature"):
            await live.post({"prompt": [CANARY], field: CANARY})
        await live.post({"prompt": "a", "pool_id": CANARY})
        await live.raw(f"GET /?{CANARY} HTTP/1.1\r\n{CANARY}\r\n\r\n".encode())
        with monkeypatch.context() as patch:
            patch.setattr(live.orchestrator, "submit", lambda request, **_: int(request.prompt))
            assert (await live.post({"prompt": CANARY})).status == 500
        with monkeypatch.context() as patch:
            fake_engine.hold = False
            patch.setattr(Execution, "_complete", lambda *_: int(CANARY))
            await live.events(await live.submit(prompt=CANARY))
    assert {"bug", "refused", "completed", "cancelled"} <= {line["event"] for line in journal.lines()}
    assert CANARY not in journal.text
    assert ticket not in journal.text

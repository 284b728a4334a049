"""What a client sees of an engine that fails: every stream is closed by `end` or `error`."""

from typing import Any

import pytest

from llorch.task import Task
from tests.fakes import Connection, FakeLlamaServer, Script, answers, error, says, streams
from tests.live import Live, eventually, names, text

TOKEN = b'data: {"content":" hi","stop":false}\n\n'
FINAL = b'data: {"content":"","stop":true,"stop_type":"eos","tokens_predicted":1,"tokens_evaluated":1}\n\n'
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
CHUNK = b"%x\r\n%b\r\n" % (len(TOKEN), TOKEN)


async def token_and_silence(connection: Connection) -> None:
    """One token, then nothing."""
    await connection.token(" hi")
    await connection.stall()


async def token_and_error(connection: Connection) -> None:
    """One token, then an error in mid-stream."""
    await connection.token(" hi")
    await connection.error_frame("kaputt")


FAILURES: list[tuple[str, Script, str, str, dict[str, Any]]] = [
    ("E4", answers(400, error(400, "9 > 8", "exceed_context_size_error")), "", "CONTEXT_OVERFLOW", {}),
    ("E5", answers(400, error(400, "no such grammar", "invalid_request_error")), "", "INVALID_PARAMS", {}),
    ("E5", answers(422, b"odd"), "", "INVALID_PARAMS", {}),
    ("E5", answers(401, error(401, "Invalid API Key", "authentication_error")), "", "POOL_UNAVAILABLE", {}),
    ("E5", answers(501, error(501, "not here", "not_supported_error")), "", "POOL_UNAVAILABLE", {}),
    ("E6", answers(500, b"<html>" + b"x" * 64_000), "", "WORKER_RESET", {}),
    ("E6", answers(200, b""), "", "WORKER_RESET", {}),
    ("E7", answers(302, more="Location: http://127.0.0.1:1/\r\n"), "", "WORKER_RESET", {}),
    ("E8", token_and_error, " hi", "WORKER_RESET", {}),
    ("E9", says(HEAD + CHUNK), " hi", "WORKER_RESET", {}),
    ("E9", says(HEAD + CHUNK, CHUNK[:25], then="fin"), " hi", "WORKER_RESET", {}),
    ("E9", says(HEAD + CHUNK[:-20], then="fin"), "", "WORKER_RESET", {}),
    ("E10", streams(TOKEN), " hi", "WORKER_RESET", {}),
    ("E12", token_and_silence, " hi", "DECODE_TIMEOUT", {"timeouts": {"idle_s": 0.3}}),
    ("E3", says(then="stall"), "", "DECODE_TIMEOUT", {"timeouts": {"first_token_s": 0.3}}),
    ("E15", says(b"SSH-2.0-OpenSSH_9.6\r\n"), "", "WORKER_RESET", {}),
    ("E16", streams(b'data: {"content":"\xff","stop":false}\n\n'), "", "WORKER_RESET", {}),
]


@pytest.mark.parametrize(
    ("script", "tokens", "code", "settings"), [pytest.param(*row[1:], id=row[0]) for row in FAILURES]
)
async def test_what_a_failing_engine_looks_like(
    fake_engine: FakeLlamaServer, script: Script, tokens: str, code: str, settings: dict[str, Any]
) -> None:
    """Tokens so far, then one `error` with its code; the snapshot says the same; the next task runs.

    E3 to E16 as a client sees them: the status of the stream stays 200.
    """
    fake_engine.script(script)
    async with Live(fake_engine, settings) as live:
        task = await live.submit()
        events = await live.events(task)
        assert names(events) == ("started token error" if tokens else "started error")
        assert text(events) == tokens
        said = events[-1].data
        retriable = code not in ("INVALID_PARAMS", "CONTEXT_OVERFLOW")
        assert (said["code"], said["retriable"]) == (code, retriable)
        assert said["message"]
        assert said.get("retry_after_ms") == (2000 if retriable else None)
        assert await live.events(task, 0) == events[1:]
        assert (await live.get(task["stream_url"], headers={"Last-Event-ID": "9"})).status == 204
        shot = await live.snapshot(task)
        assert (shot["state"], shot["error"]) == ("failed", said)
        await eventually(lambda: live.replica.dispatchable, "the pool did not recover")
        assert names(await live.events(await live.submit(max_tokens=1))) == "started token end"


async def test_the_engines_own_words_reach_the_client(fake_engine: FakeLlamaServer) -> None:
    """A refused parameter is told in the engine's words, so that it can be mended [E5]."""
    async with Live(fake_engine) as live:
        events = await live.events(await live.submit(grammar="root ::= ("))
        assert "failed to parse grammar" in events[-1].data["message"]


async def test_an_engine_killed_in_mid_stream_and_back(fake_engine: FakeLlamaServer) -> None:
    """The stream ends with WORKER_RESET at once; those that wait keep their order and run later [E18, E1]."""
    fake_engine.hold = True
    async with Live(fake_engine) as live:
        task = await live.submit_held(prompt="p0")
        waiting = [await live.submit(prompt=f"p{number}") for number in (1, 2)]
        async with live.stream(task) as stream:
            await fake_engine.held[0].token("a")
            await stream.next()
            await stream.next()
            await fake_engine.kill()
            [event] = await stream.rest()
            assert (event.name, event.data["code"]) == ("error", "WORKER_RESET")
        await eventually(lambda: not live.replica.ready, "the pool looks ready")
        assert (await live.post()).body["code"] == "POOL_UNAVAILABLE"
        assert {(await live.snapshot(task))["state"] for task in waiting} == {"queued"}
        fake_engine.hold = False
        await fake_engine.start()
        for task in waiting:
            assert names(await live.events(task))[-3:] == "end"
        prompts = [connection.request.body["prompt"] for connection in fake_engine.completions]
        assert prompts == ["p0", "p1", "p2"]


async def test_an_engine_that_is_gone_at_dispatch_is_tried_again(fake_engine: FakeLlamaServer) -> None:
    """Before any byte of the answer nothing is lost: the client notices nothing [E1, E2]."""
    fake_engine.script(says(then="rst"), answers(503, error(503, "Loading model", "unavailable_error")))
    async with Live(fake_engine) as live:
        assert names(await live.events(await live.submit(max_tokens=1))) == "started token end"
        assert len(fake_engine.completions) == 3


async def test_a_task_that_waits_too_long(fake_engine: FakeLlamaServer) -> None:
    """QUEUE_TIMEOUT after `queue.max_wait_s`, retriable, and those behind it are not held up."""
    fake_engine.hold = True
    async with Live(fake_engine, {"queue": {"max_wait_s": 0.05}}) as live:
        await live.submit_held()
        events = await live.events(await live.submit())
        assert names(events) == "started error"
        assert (events[-1].data["code"], events[-1].data["retriable"]) == ("QUEUE_TIMEOUT", True)
        assert events[-1].data["retry_after_ms"] >= 250


async def test_a_bug_while_running_a_task(
    fake_engine: FakeLlamaServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`error INTERNAL`, not retriable, says nothing of the inside; the next task runs."""

    def buggy(*_: Any) -> bool:
        raise ZeroDivisionError("secret inside")

    async with Live(fake_engine) as live:
        with monkeypatch.context() as patch:
            patch.setattr(Task, "tokens", buggy)
            events = await live.events(await live.submit())
        assert names(events) == "started error"
        assert (events[-1].data["code"], events[-1].data["retriable"]) == ("INTERNAL", False)
        assert "secret" not in events[-1].data["message"]
        assert names(await live.events(await live.submit(max_tokens=1))) == "started token end"

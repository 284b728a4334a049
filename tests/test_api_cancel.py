"""Cancel over HTTP, in every state: after the answer no token reaches anybody [MVP-032]."""

import asyncio
from typing import Any

import pytest

from tests.fakes import PATIENCE_S, Connection, FakeLlamaServer
from tests.live import Event, Live, eventually, names, refused

PROFILES = pytest.mark.parametrize("profile", ["mvp", "home"])


@pytest.fixture
def held(fake_engine: FakeLlamaServer) -> FakeLlamaServer:
    """A fake engine that gives out only what the test lets out."""
    fake_engine.hold = True
    return fake_engine


def cancelled(task: dict[str, Any], tokens_out: int) -> dict[str, Any]:
    """The answer to a cancel that ended the task."""
    return {"task_id": task["task_id"], "state": "cancelled", "tokens_out": tokens_out}


@PROFILES
async def test_cancel_of_a_running_task(held: FakeLlamaServer, profile: str) -> None:
    """Open, new and resumed readers get no token after the answer, and the right `end` [MVP-032, C12]."""
    async with Live(held, profile=profile) as live:
        task = await live.submit_held()
        async with live.stream(task) as early, live.stream(task) as other:
            await held.held[0].token("a")
            await held.held[0].token("b")
            for stream in (early, other):
                assert names([event for _ in range(3) if (event := await stream.next())]) == (
                    "started token token"
                )
            assert await live.cancel(task) == cancelled(task, 2)
            end = Event(3, "end", {"tokens_out": 2, "finish_reason": "cancelled", "decode_time_ms": 0})
            for stream in (early, other):
                [event] = await stream.rest()
                event.data["decode_time_ms"] = 0
                assert event == end
            assert [(event.id, event.name) for event in await live.events(task)] == [
                (0, "started"),
                (3, "end"),
            ]
            for last in (0, 1, 2):
                assert [(event.id, event.name) for event in await live.events(task, last)] == [(3, "end")]
            for last in (3, 4):
                answer = await live.get(
                    task["stream_url"], headers={**live.headers, "Last-Event-ID": str(last)}
                )
                assert answer.status == 204
        await held.closed(1)
        assert (await live.snapshot(task))["tokens_out"] == 2


async def test_cancel_before_anybody_reads(held: FakeLlamaServer) -> None:
    """Tokens made so far are taken back from readers that come later [C13]."""
    async with Live(held) as live:
        task = await live.submit_held()
        await held.held[0].token("a")
        await eventually(lambda: live.orchestrator.get(task["task_id"]).tokens_out == 1, "no token")
        assert await live.cancel(task) == cancelled(task, 1)
        assert names(await live.events(task)) == "started end"


async def test_cancel_of_a_waiting_task(held: FakeLlamaServer) -> None:
    """It never reaches the engine; its reader gets `end`; those behind it move up [MVP-032, C12]."""
    async with Live(held) as live:
        await live.submit_held(prompt="first")
        waiting, behind = await live.submit(prompt="second"), await live.submit(prompt="third")
        async with live.stream(waiting) as stream:
            await stream.next()
            assert await live.cancel(waiting) == cancelled(waiting, 0)
            assert names(await stream.rest()) == "end"
        assert (await live.snapshot(behind))["queue_position"] == 0
        await held.held[0].finish()
        assert (await held.started(2)).request.body["prompt"] == "third"


async def test_cancel_while_the_engine_has_said_nothing(fake_engine: FakeLlamaServer) -> None:
    """Before its headers, and in its prefill: the connection is closed, the slot comes back [C12]."""

    async def silent(connection: Connection) -> None:
        await connection.stall()

    async def prefill(connection: Connection) -> None:
        await connection.headers()
        await connection.stall()

    fake_engine.script(silent, prefill)
    async with Live(fake_engine) as live:
        for count in (1, 2):
            task = await live.submit()
            await fake_engine.started(count)
            assert await live.cancel(task) == cancelled(task, 0)
            await fake_engine.closed(count)
            assert names(await live.events(task)) == "started end"
        assert names(await live.events(await live.submit(max_tokens=1))) == "started token end"


@pytest.mark.parametrize("tokens", [1, 50, 5000])
async def test_cancel_with_a_burst_on_its_way(held: FakeLlamaServer, tokens: int) -> None:
    """Many tokens in one segment, cancelled at once: none at or past the answered count ever shows [C12]."""
    async with Live(held) as live:
        task = await live.submit_held()
        async with live.stream(task) as stream:
            await stream.next()
            burst = b"".join(b'data: {"content":"x","stop":false}\n\n' for _ in range(tokens))
            sending = asyncio.create_task(held.held[0].chunk(burst))
            answer = await live.cancel(task)
            rest = await stream.rest()
            await asyncio.wait({sending})
            sending.exception()
        shown = [event.data["i"] for event in rest if event.name == "token"]
        assert shown == list(range(len(shown)))
        assert len(shown) <= answer["tokens_out"]
        assert rest[-1].data["tokens_out"] == answer["tokens_out"]
        assert (await live.snapshot(task))["tokens_out"] == answer["tokens_out"]


async def test_cancel_with_a_reader_far_behind(fake_engine: FakeLlamaServer) -> None:
    """Behind what its transport held, a slow reader gets `end`, not what was in between [C3, C12]."""

    async def flood(connection: Connection) -> None:
        for _ in range(800):
            await connection.token("x" * 10_000)
        await connection.stall()

    fake_engine.script(flood)
    async with Live(fake_engine) as live, live.connection(receive_buffer=4096) as (reader, writer):
        writer.transport.pause_reading()
        task = await live.submit(max_tokens=4000)
        stored = live.orchestrator.get(task["task_id"])
        writer.write(f"GET {task['stream_url']} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        await eventually(lambda: stored.tokens_out == 800, "the flood did not come")
        held_bytes = live.other_side(writer).get_write_buffer_size()
        assert await live.cancel(task) == cancelled(task, 800)
        writer.transport.resume_reading()
        async with asyncio.timeout(PATIENCE_S):
            received = await reader.read()
        assert held_bytes < 20_000
        assert received.count(b"event: token\n") < 800
        assert received.count(b"event: end\n") == 1
        assert b'"finish_reason":"cancelled"' in received[-200:]


async def test_cancel_twice_and_after_the_end(fake_engine: FakeLlamaServer) -> None:
    """It changes nothing, and says the final state each time [MVP-032, C12]."""
    async with Live(fake_engine) as live:
        done = await live.submit(max_tokens=2)
        await live.events(done)
        for _ in range(2):
            final = {"task_id": done["task_id"], "state": "completed", "tokens_out": 2}
            assert await live.cancel(done) == final
        assert names(await live.events(done)) == "started token token end"
        fake_engine.hold = True
        task = await live.submit_held()
        assert [await live.cancel(task) for _ in range(3)] == [cancelled(task, 0)] * 3


async def test_many_cancels_at_once(held: FakeLlamaServer) -> None:
    """One `end`, one answer for all, one connection closed [C13]."""
    async with Live(held) as live:
        task = await live.submit_held()
        async with live.stream(task) as stream:
            answers = await asyncio.gather(*(live.cancel(task) for _ in range(100)))
            assert names(await stream.rest()) == "started end"
        assert all(answer == cancelled(task, 0) for answer in answers)
        await held.closed(1)
        assert len(held.completions) == 1


async def test_cancel_and_a_reader_that_leaves(held: FakeLlamaServer) -> None:
    """Both at once: the task is cancelled, once [C13]."""
    settings = {"stream": {"on_disconnect": "cancel", "disconnect_grace_s": 0.01}}
    async with Live(held, settings) as live:
        task = await live.submit_held()
        async with live.stream(task) as stream:
            await stream.next()
            cancel = asyncio.create_task(live.cancel(task))
        assert await cancel == cancelled(task, 0)
        await held.closed(1)


async def test_a_cancelled_slot_is_free_when_the_engine_let_go(held: FakeLlamaServer) -> None:
    """The next task waits while the engine still works on what was cancelled [E19, MVP-032]."""
    held.lingering = True
    async with Live(held) as live:
        task, waiting = await live.submit_held(), await live.submit()
        await live.cancel(task)
        await held.closed(1)
        assert (await live.health())["slots"] == {"total": 1, "busy": 0, "draining": 1}
        assert (await live.snapshot(waiting))["state"] == "queued"
        held.let_go()
        await held.started(2)
        assert held.waited == 0


@PROFILES
@pytest.mark.parametrize(
    ("headers", "body"),
    [
        ({"Content-Type": "application/json"}, b"{}"),
        ({"Content-Type": "application/json"}, b""),
        ({"Content-Type": "text/plain"}, b"x"),
        ({"Content-Type": "text/plain"}, b""),
        ({"Content-Type": "application/x-www-form-urlencoded"}, b"a=b"),
        ({"Content-Encoding": "gzip"}, b""),
        ({}, b"x"),
    ],
    ids=str,
)
async def test_a_cancel_takes_no_body(
    held: FakeLlamaServer, headers: dict[str, str], body: bytes, profile: str
) -> None:
    """415 for one, and for anything a form of another site could send; the task runs on [T2]."""
    async with Live(held, profile=profile) as live:
        task = await live.submit_held()
        answer = await live.ask("POST", task["cancel_url"], data=body, headers={**live.headers, **headers})
        refused(live, answer, 415, "UNSUPPORTED_MEDIA_TYPE", retriable=False)
        assert (await live.snapshot(task))["state"] == "running"


async def test_an_empty_body_is_none(held: FakeLlamaServer) -> None:
    """By Content-Length 0, chunked, or by saying nothing, without a type."""
    framings = [b"", b"Content-Length: 0\r\n\r\n", b"Transfer-Encoding: chunked\r\n\r\n0\r\n"]
    async with Live(held) as live:
        task = await live.submit_held()
        for framing in framings:
            head = f"POST {task['cancel_url']} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
            assert b" 200 " in await live.raw(head.encode() + framing + b"\r\n")

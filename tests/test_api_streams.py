"""Event streams over HTTP: order, resuming, many readers, readers that do not read, engines that break."""

import asyncio
import contextlib
from typing import Any

import pytest

from llorch import streams
from tests.fakes import PATIENCE_S, Connection, FakeLlamaServer
from tests.live import Event, Live, eventually, names, refused, text

PROFILES = pytest.mark.parametrize("profile", ["mvp", "home"])


@pytest.fixture
def held(fake_engine: FakeLlamaServer) -> FakeLlamaServer:
    """A fake engine that gives out only what the test lets out."""
    fake_engine.hold = True
    return fake_engine


def flooding(megabytes: int) -> Any:
    """A script of many tokens as fast as they go: `megabytes` of text in all."""

    async def flood(connection: Connection) -> None:
        for _ in range(megabytes * 100):
            await connection.token("x" * 10_000)
        await connection.final()

    return flood


# -- the order of events ---------------------------------------------------------------------------


@PROFILES
async def test_a_stream_from_its_start_to_its_end(held: FakeLlamaServer, profile: str) -> None:
    """One `started`, the tokens, one `end`, ids from 0 on, then the connection closes [MVP-033]."""
    async with Live(held, profile=profile) as live:
        task = await live.submit_held(prompt="one two")
        async with live.stream(task) as stream:
            response = stream.response
            assert response.headers["Content-Type"] == "text/event-stream"
            assert response.headers["Cache-Control"] == "no-store"
            assert response.headers["X-Accel-Buffering"] == "no"
            assert response.headers["X-Content-Type-Options"] == "nosniff"
            assert "Content-Encoding" not in response.headers
            assert ("X-Correlation-Id" in response.headers) is (profile == "mvp")
            assert await stream.next() == Event(0, "started", {"queue_position": 0})
            for index, word in enumerate(["a", "é\n", "\u2028data: x"]):
                await held.held[0].token(word)
                assert await stream.next() == Event(index + 1, "token", {"t": word, "i": index})
            await held.held[0].finish("eos")
            last = await stream.next()
            assert last is not None
            assert (last.id, last.name) == (4, "end")
            assert isinstance(last.data.pop("decode_time_ms"), int)
            assert last.data == {"tokens_out": 3, "finish_reason": "stop", "tokens_in": 2}
            assert await stream.next() is None
            assert response.connection is None


async def test_tokens_arrive_as_they_are_made(held: FakeLlamaServer) -> None:
    """Each is in the reader's hands before the next one is made: nothing waits for the whole [MVP-033]."""
    async with Live(held) as live:
        task = await live.submit_held()
        async with live.stream(task) as stream:
            await stream.next()
            for index in range(5):
                await held.held[0].token(f"{index}")
                token = await stream.next()
                assert token is not None
                assert token.data["t"] == f"{index}"


async def test_a_waiting_task_has_its_started_at_once(held: FakeLlamaServer) -> None:
    """`started` says the place in the queue, and comes while the task still waits [MVP-033]."""
    async with Live(held) as live:
        await live.submit_held()
        await live.submit()
        waiting = await live.submit()
        async with live.stream(waiting) as stream:
            assert await stream.next() == Event(0, "started", {"queue_position": 1})
            await live.cancel(waiting)
            assert names(await stream.rest()) == "end"


async def test_bytes_of_a_stream(held: FakeLlamaServer) -> None:
    """Frames are `id`, `event`, one line of `data`, a blank line; every reader gets the same bytes."""
    async with Live(held) as live:
        task = await live.submit_held()
        await held.held[0].token("a\r\n\nevent: evil")
        await held.held[0].finish()
        await live.events(task)
        request = f"GET {task['stream_url']} HTTP/1.0\r\nHost: localhost\r\n\r\n".encode()
        bodies = [(await live.raw(request)).partition(b"\r\n\r\n")[2] for _ in range(2)]
        assert bodies[0] == bodies[1]
        started, token, end, rest = bodies[0].split(b"\n\n")
        assert started == b'id: 0\nevent: started\ndata: {"queue_position":0}'
        assert token == b'id: 1\nevent: token\ndata: {"t":"a\\r\\n\\nevent: evil","i":0}'
        assert end.startswith(b'id: 2\nevent: end\ndata: {"tokens_out":1,')
        assert rest == b""


async def test_the_connection_closes_after_the_last_event(fake_engine: FakeLlamaServer) -> None:
    """The server closes it, so that a client that reads to the end needs no framing [MVP-033]."""
    async with Live(fake_engine, {"http": {"idle_timeout_s": 600}}) as live:
        task = await live.submit(max_tokens=1)
        answer = await live.raw(f"GET {task['stream_url']} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        assert b"\r\nConnection: close\r\n" in answer
        assert answer.endswith(b"\r\n0\r\n\r\n")


async def test_silence_is_filled_with_comments(held: FakeLlamaServer) -> None:
    """At least every `stream.heartbeat_s`, from the first byte on, waiting or running [C3]."""
    async with Live(held, {"stream": {"heartbeat_s": 0.02}}) as live:
        running, waiting = await live.submit_held(), await live.submit()
        for task in (running, waiting):
            async with live.stream(task) as stream:
                await stream.comment()
                await stream.comment()


# -- resuming --------------------------------------------------------------------------------------


async def test_resuming_a_finished_task_at_every_id(fake_engine: FakeLlamaServer) -> None:
    """After id n comes n + 1 onward; at the terminal event and past it there is a 204 [C4]."""
    async with Live(fake_engine) as live:
        task = await live.submit(max_tokens=4)
        everything = await live.events(task)
        assert [event.id for event in everything] == [0, 1, 2, 3, 4, 5]
        for last in range(5):
            assert await live.events(task, last) == everything[last + 1 :]
        for last in (5, 6, 999_999_999):
            answer = await live.get(task["stream_url"], headers={"Last-Event-ID": str(last)})
            assert (answer.status, answer.body) == (204, None)
            assert answer.headers["Cache-Control"] == "no-store"


@pytest.mark.parametrize("given", ["", "-1", "+1", "1.0", "x", "0x1", "9999999999", " ", "1 1", "é", "١"])
async def test_an_id_that_is_none_replays_everything(fake_engine: FakeLlamaServer, given: str) -> None:
    """Whatever is not one to nine digits counts as no id, in header and query [C4]."""
    async with Live(fake_engine) as live:
        task = await live.submit(max_tokens=2)
        everything = await live.events(task)
        assert await live.events(task, given) == everything
        answer = await live.session.get(task["stream_url"], params={"last_event_id": given})
        assert (await answer.read()).count(b"id: ") == len(everything)


async def test_resuming_a_live_task(held: FakeLlamaServer) -> None:
    """At its newest id it goes on from there; beyond what there is it replays from the start [C4]."""
    async with Live(held) as live:
        task = await live.submit_held()
        async with live.stream(task) as first:
            await held.held[0].token("a")
            await held.held[0].token("b")
            seen = [await first.next() for _ in range(3)]
            async with live.stream(task, 2) as newest, live.stream(task, 3) as beyond:
                assert [await beyond.next() for _ in range(3)] == seen
                await held.held[0].token("c")
                await held.held[0].finish()
                rest = await first.rest()
                assert names(rest) == "token end"
                assert await newest.rest() == rest
                assert await beyond.rest() == rest


async def test_the_header_wins_over_the_query(fake_engine: FakeLlamaServer) -> None:
    """`?last_event_id=` counts where there is no Last-Event-ID; the header is what EventSource sends [C4]."""
    async with Live(fake_engine) as live:
        task = await live.submit(max_tokens=4)
        everything = await live.events(task)
        query = {"params": {"last_event_id": "1"}}
        assert await live.events(task, **query) == everything[2:]
        assert await live.events(task, 3, **query) == everything[4:]
        assert await live.events(task, "x", **query) == everything


async def test_reading_on_after_a_lost_connection(held: FakeLlamaServer) -> None:
    """A reader that comes back with its last id gets nothing twice and misses nothing [C4, C1]."""
    async with Live(held) as live:
        task = await live.submit_held()
        got: list[Event] = []
        for index in range(6):
            async with live.stream(task, got[-1].id if got else None) as stream:
                for _ in range(2 if not got else 1):
                    if got:
                        await held.held[0].token(f"{index}")
                    event = await stream.next()
                    assert event is not None
                    got.append(event)
                    if len(got) == 1:
                        await held.held[0].token("0")
        assert [event.id for event in got] == list(range(len(got)))
        assert [event.data["i"] for event in got[1:]] == list(range(len(got) - 1))


# -- readers ---------------------------------------------------------------------------------------


async def test_many_readers_each_have_their_place(held: FakeLlamaServer) -> None:
    """Early, late and after the end, all read the same; the engine works once."""
    async with Live(held) as live:
        task = await live.submit_held()
        early = [asyncio.create_task(live.events(task)) for _ in range(20)]
        await eventually(lambda: live.orchestrator._reader_count == 20, "they do not read")
        await held.held[0].token("a")
        late = [asyncio.create_task(live.events(task)) for _ in range(20)]
        await held.held[0].token("b")
        await held.held[0].finish()
        streams = await asyncio.gather(*early, *late, live.events(task))
        assert names(streams[0]) == "started token token end"
        assert all(stream == streams[0] for stream in streams)
        assert len(held.completions) == 1


@PROFILES
async def test_no_more_readers_than_allowed(held: FakeLlamaServer, profile: str) -> None:
    """One too many gets 503 TOO_MANY_STREAMS with Retry-After; the others read on; a place frees [C6]."""
    async with Live(held, {"stream": {"max_readers": 2}}, profile=profile) as live:
        task = await live.submit_held()
        async with live.stream(task) as first:
            async with live.stream(task) as second:
                answer = await live.get(task["stream_url"], headers=live.headers)
                more = {"hint": "raise stream.max_readers"}
                refused(live, answer, 503, "TOO_MANY_STREAMS", retriable=True, retry_after_ms=1000, **more)
                assert (await live.get("/health")).status == 200
                await held.held[0].token("a")
                for stream in (first, second):
                    await stream.next()
                    token = await stream.next()
                    assert token is not None
                    assert token.data["t"] == "a"
            await eventually(lambda: live.orchestrator._reader_count == 1, "the place is not free")
            async with live.stream(task, 1) as third:
                await held.held[0].finish()
                assert names(await third.rest()) == names(await first.rest()) == "end"


async def test_a_reader_that_never_reads_delays_nobody(fake_engine: FakeLlamaServer) -> None:
    """It costs its socket and at most one write of 16 KiB; the log is the only buffer [C3]."""
    fake_engine.script(flooding(8))
    async with Live(fake_engine) as live, live.connection(receive_buffer=4096) as (_, writer):
        writer.transport.pause_reading()
        task = await live.submit(max_tokens=4000)
        writer.write(f"GET {task['stream_url']} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        await eventually(lambda: live.orchestrator._reader_count == 1, "it does not read")
        transport = live.other_side(writer)
        events = await live.events(task)
        assert (len(text(events)), names(events[-1:])) == (8_000_000, "end")
        assert live.orchestrator._reader_count == 1
        assert transport.get_write_buffer_size() <= 16 * 1024 + 100
        assert (await live.snapshot(task))["state"] == "completed"


async def test_a_stalled_write_is_aborted(
    fake_engine: FakeLlamaServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader that takes nothing for a while is cut off, and no longer counts [C3]."""
    monkeypatch.setattr(streams, "STALLED_WRITE_S", 0.05)
    fake_engine.script(flooding(8))
    async with Live(fake_engine) as live, live.connection(receive_buffer=4096) as (_, writer):
        writer.transport.pause_reading()
        task = await live.submit(max_tokens=4000)
        writer.write(f"GET {task['stream_url']} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        await eventually(lambda: live.orchestrator._reader_count == 1, "it does not read")
        await eventually(lambda: live.orchestrator._reader_count == 0, "it is not cut off")
        assert live.other_side(writer).is_closing()
        monkeypatch.undo()
        assert len(text(await live.events(task))) == 8_000_000


async def test_a_reader_that_leaves_does_not_cancel(held: FakeLlamaServer) -> None:
    """The task goes on, waiting or running, and can be read again; its handler has ended [C1]."""
    async with Live(held, {"stream": {"disconnect_grace_s": 0.01}}) as live:
        running, waiting = await live.submit_held(), await live.submit()
        for task in (running, waiting):
            async with live.stream(task) as stream:
                await stream.next()
        await eventually(lambda: live.orchestrator._reader_count == 0, "a handler outlives its client")
        for number in (1, 2):
            await (await held.started(number)).finish()
        for task in (running, waiting):
            assert names(await live.events(task)) == "started end"


async def test_a_task_that_lost_its_last_reader_can_be_cancelled(held: FakeLlamaServer) -> None:
    """With `on_disconnect = "cancel"`, after the grace: not with another reader, not if never read.

    And not if one came back in time [C1].
    """
    settings = {"stream": {"on_disconnect": "cancel", "disconnect_grace_s": 0.3}}
    async with Live(held, settings) as live:
        running = await live.submit_held()
        left, unread, back = [await live.submit() for _ in range(3)]
        async with live.stream(running) as reader, contextlib.AsyncExitStack() as later:
            await reader.next()
            for task in (back, running, left):
                async with live.stream(task) as stream:
                    await stream.next()
                await eventually(lambda: live.orchestrator._reader_count <= 2, "it has not left")
                if task is back:
                    await later.enter_async_context(live.stream(task))
            waiting = live.orchestrator.get(left["task_id"])
            await eventually(lambda: waiting.state.value == "cancelled", "nobody cancels it")
            assert (await live.snapshot(running))["state"] == "running"
            assert (await live.snapshot(back))["state"] == "queued"
        async with asyncio.timeout(PATIENCE_S):
            await held.closed(1)
        assert (await live.snapshot(running))["state"] == "cancelled"
        assert (await live.snapshot(unread))["state"] in ("queued", "running")

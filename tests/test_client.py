"""The HTTP client: each answer has its type, and a broken stream goes on where it broke."""

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from typing import Any

import msgspec
import pytest
from aiohttp import web

from llorch import answers
from llorch.answers import (
    BadAnswer,
    BadUrl,
    Broken,
    Busy,
    Metrics,
    NotAllowed,
    NotFound,
    Refused,
    ServerBug,
    Snapshot,
    Status,
    TooOld,
    Unavailable,
    Unreachable,
)
from llorch.client import LONGEST_PAUSE_S, PATIENCE_S, STATUS, Client
from llorch.events import End, Error, Started, Token
from tests.fakes import FakeLlamaServer
from tests.live import TOKEN, Live
from tests.proxy import Proxy

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
TOKENS = 12


class Clock:
    """Time that passes only in pauses."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.pauses: list[float] = []

    def __call__(self) -> float:
        return self.now

    async def pause(self, seconds: float) -> None:
        """Let so much time pass."""
        self.pauses.append(seconds)
        self.now += seconds


def client(url: str, token: str = "", clock: Clock | None = None, **options: Any) -> Client:
    """A client that waits for nothing."""
    clock = clock or Clock()
    return Client(url, token, pause=clock.pause, clock=clock, **options)


async def followed(it: Client, task_id: str, **options: Any) -> list[answers.Event]:
    """Every event, to the end."""
    async with contextlib.aclosing(it.follow(task_id, **options)) as events:
        return [event async for event in events]


def without_breaks(events: Iterable[answers.Event]) -> list[answers.Event]:
    """What the server said."""
    return [event for event in events if not isinstance(event, Broken)]


@contextlib.asynccontextmanager
async def serving(routes: dict[str, Handler]) -> AsyncIterator[str]:
    """The URL of a server with these GET routes, and 404 in llorch's envelope for the rest."""
    app = web.Application()
    for path, handler in routes.items():
        app.router.add_route("*", path, handler)

    async def no_route(request: web.Request) -> web.Response:
        return web.json_response({"code": "NOT_FOUND", "message": "no route", "engine": None}, status=404)

    app.router.add_route("*", "/{tail:.*}", no_route)
    runner = web.AppRunner(app, shutdown_timeout=0.05, handler_cancellation=True)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


def says(status: int, body: object, **headers: str) -> Handler:
    """A handler with this answer; `body` is text or becomes JSON."""

    async def handler(request: web.Request) -> web.Response:
        text = body if isinstance(body, str) else msgspec.json.encode(body).decode()
        return web.Response(status=status, text=text, headers=headers)

    return handler


def streams(*connections: bytes) -> Handler:
    """A handler that streams these bytes, one item a connection, the last one again and again."""
    left = list(connections)

    async def handler(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await response.write(left.pop(0) if len(left) > 1 else left[0])
        return response

    return handler


def frame(event_id: int | None, name: str, data: object) -> bytes:
    """One SSE frame."""
    head = b"" if event_id is None else b"id: %d\n" % event_id
    return head + b"event: %b\ndata: %b\n\n" % (name.encode(), msgspec.json.encode(data))


def token(i: int, text: str = "x") -> bytes:
    """The frame of token `i`."""
    return frame(i + 1, "token", {"t": text, "i": i})


STARTED = frame(0, "started", {"queue_position": 0})


def end(event_id: int, **more: object) -> bytes:
    """The frame that ends a stream."""
    return frame(event_id, "end", {"tokens_out": event_id - 1, "finish_reason": "stop", **more})


# -- questions -------------------------------------------------------------------------------------


async def test_a_task_is_submitted_followed_and_looked_at(fake_engine: FakeLlamaServer) -> None:
    """From admission to its snapshot."""
    async with Live(fake_engine) as live, client(live.url) as it:
        created = await it.submit({"prompt": "hello", "max_tokens": 3, "seed": 1})
        events = await followed(it, created.task_id)
        snapshot = await it.snapshot(created.task_id)
        assert [type(event) for event in events] == [Started, Token, Token, Token, End]
        assert snapshot.state == "completed"
        assert snapshot.tokens_out == 3
        assert [task.task_id for task in await it.tasks(state="completed", limit=5)] == [created.task_id]
        assert (await it.pool("default")).ready


async def test_a_cancel_is_answered_with_what_became_of_the_task(fake_engine: FakeLlamaServer) -> None:
    """And its stream ends as cancelled."""
    fake_engine.hold = True
    async with Live(fake_engine) as live, client(live.url) as it:
        created = await it.submit({"prompt": "hello"})
        cancelled = await it.cancel(created.task_id)
        assert (cancelled.state, cancelled.tokens_out) == ("cancelled", 0)
        (last,) = (await followed(it, created.task_id))[-1:]
        assert isinstance(last, End)
        assert last.finish_reason == "cancelled"


async def test_the_token_is_sent(fake_engine: FakeLlamaServer) -> None:
    """With it the door is open, without it or with another one it is not."""
    async with Live(fake_engine, {"auth": {"token": TOKEN}}) as live:
        async with client(live.url, TOKEN) as it:
            assert (await it.pool("default")).pool_id == "default"
        for given in ("", "another-token-0123456789"):
            async with client(live.url, given) as it:
                with pytest.raises(NotAllowed) as refused:
                    await it.pool("default")
                assert refused.value.answer.code == ("BAD_TOKEN" if given else "MISSING_TOKEN")


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, Refused),
        (401, NotAllowed),
        (403, NotAllowed),
        (404, NotFound),
        (408, Refused),
        (409, Refused),
        (413, Refused),
        (415, Refused),
        (429, Busy),
        (500, ServerBug),
        (501, ServerBug),
        (503, Unavailable),
    ],
)
async def test_each_refusal_has_its_type(status: int, kind: type[Refused]) -> None:
    """With what the envelope says, whatever else it says."""
    envelope = {"code": "WHY", "message": "because", "engine": None, "retry_after_ms": 1500, "new": [1]}
    async with serving({"/v1/tasks": says(status, envelope)}) as url, client(url) as it:
        with pytest.raises(Refused) as refused:
            await it.submit({"prompt": "x"})
        assert type(refused.value) is kind
        assert (str(refused.value), refused.value.answer.code) == ("because", "WHY")
        if isinstance(refused.value, answers.Later):
            assert refused.value.retry_after_s == 1.5


async def test_the_wait_is_read_from_the_header_too() -> None:
    """A proxy's 429 may have no figure in the body."""
    answer = says(429, {"code": "SLOW", "message": "slow down"}, **{"Retry-After": "7"})
    async with serving({"/v1/tasks": answer}) as url, client(url) as it:
        with pytest.raises(Busy) as refused:
            await it.submit({"prompt": "x"})
        assert refused.value.retry_after_s == 7


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (200, "<html>"),
        (200, ""),
        (200, '{"task_id": 1}'),
        (200, '"\\ud800"'),
        (404, '{"error":{"code":404,"message":"File Not Found","type":"not_found_error"}}'),
        (302, ""),
        (418, "teapot"),
    ],
)
async def test_what_is_not_llorch_is_told(status: int, body: str) -> None:
    """A web page, llama-server, a redirect: never a traceback, never followed."""
    answer = says(status, body, Location="http://127.0.0.1:9/")
    async with serving({"/v1/tasks": answer}) as url, client(url) as it:
        with pytest.raises(BadAnswer, match="llorch"):
            await it.submit({"prompt": "x"})


async def test_an_older_server_is_told_apart() -> None:
    """A route that it lacks is no task that it lost."""
    async with serving({}) as url, client(url) as it:
        with pytest.raises(TooOld, match="too old: it has no /v1/status"):
            await it.status()


async def test_the_status_of_a_newer_server_is_read() -> None:
    """Fields that are not known are passed over, those that are not there have defaults."""
    said = {
        "version": "9",
        "uptime_s": 1.5,
        "totals": {"tokens_out": 7},
        "moon": "full",
        "gpus": [{"name": "H"}],
    }
    async with serving({STATUS: says(200, said)}) as url, client(url) as it:
        status = await it.status()
        assert status == Status(
            version="9", uptime_s=1.5, totals=answers.Totals(tokens_out=7), gpus=[answers.Gpu(name="H")]
        )


async def test_nobody_at_home_is_told_with_the_cure(unused_tcp_port: int) -> None:
    """And that nothing can have arrived."""
    async with client(f"http://127.0.0.1:{unused_tcp_port}") as it:
        with pytest.raises(Unreachable, match=r"nothing listens at .* is `llorch serve` running") as fault:
            await it.submit({"prompt": "x"})
        assert not fault.value.sent


async def test_no_such_host_is_told() -> None:
    """By its name; RFC 6761 keeps .invalid free."""
    async with client("http://llorch.invalid:80") as it:
        with pytest.raises(Unreachable, match=r"no such host as in http://llorch.invalid"):
            await it.submit({"prompt": "x"})


async def test_a_connection_that_breaks_after_the_request_may_have_arrived(
    fake_engine: FakeLlamaServer,
) -> None:
    """So that nobody submits twice."""
    async with (
        Live(fake_engine) as live,
        Proxy(live.port, [0], b"/v1/tasks") as proxy,
        client(proxy.url) as it,
    ):
        with pytest.raises(Unreachable) as fault:
            await it.submit({"prompt": "x"})
        assert fault.value.sent


@pytest.mark.parametrize("status", [502, 503, 504])
async def test_a_proxy_whose_llorch_is_away_is_told(status: int) -> None:
    """Its own words are HTML."""
    async with serving({"/v1/tasks": says(status, "<html>Bad Gateway")}) as url, client(url) as it:
        with pytest.raises(Unreachable, match=f"answered {status}"):
            await it.tasks()


@pytest.mark.parametrize(
    "url",
    [
        "",
        "localhost",
        "localhost:8080",
        "ftp://a",
        "http://",
        "http://a:0",
        "http://a?b=1",
        "http://a:x",
        "//a",
    ],
)
def test_what_is_no_url_is_refused(url: str) -> None:
    """Before anything is sent."""
    with pytest.raises(BadUrl, match="expected http://host:port"):
        Client(url)


def test_a_password_in_a_url_is_not_repeated() -> None:
    """Nor used."""
    with pytest.raises(BadUrl) as fault:
        Client("http://me:secret@host:1")
    assert "secret" not in str(fault.value)


def test_a_token_that_no_header_can_carry_is_refused() -> None:
    """And not repeated."""
    with pytest.raises(BadUrl, match="visible ASCII") as fault:
        Client("http://a", "se\ncret")
    assert "cret" not in str(fault.value)


async def test_a_path_before_llorch_is_kept() -> None:
    """A reverse proxy may have one."""
    async with serving({"/llm/v1/tasks": says(200, {"tasks": []})}) as url, client(f"{url}/llm/") as it:
        assert await it.tasks() == []


async def test_an_id_can_not_leave_its_place() -> None:
    """It is quoted, whatever it is."""
    seen = []

    async def handler(request: web.Request) -> web.Response:
        seen.append(request.raw_path)
        return web.json_response({"task_id": "x", "state": "queued"})

    async with serving({"/v1/tasks/{id}": handler}) as url, client(url) as it:
        assert await it.snapshot("../pools/a?b#c%2f") == Snapshot("x", "queued")
    assert seen == ["/v1/tasks/..%2Fpools%2Fa%3Fb%23c%252f"]


# -- streams that break ----------------------------------------------------------------------------


async def test_a_stream_cut_anywhere_goes_on_with_nothing_lost_or_repeated(
    fake_engine: FakeLlamaServer,
) -> None:
    """Cut after every so many bytes of the answer, at every place of a frame."""
    async with Live(fake_engine) as live, client(live.url) as it:
        created = await it.submit({"prompt": "hello", "max_tokens": TOKENS, "seed": 1})
        whole = await followed(it, created.task_id)
        assert len(whole) == TOKENS + 2
        broken = 0
        for cut in range(0, 1000, 13):
            async with Proxy(live.port, [cut]) as proxy, client(proxy.url) as cut_off:
                events = await followed(cut_off, created.task_id)
            assert without_breaks(events) == whole, cut
            broken += len(events) - len(whole)
        assert broken > 50


async def test_a_stream_that_is_cut_again_and_again_gets_to_its_end(fake_engine: FakeLlamaServer) -> None:
    """Each connection brings it a little further, from the last event that came whole."""
    async with Live(fake_engine) as live:
        async with Proxy(live.port, [600] * 8) as proxy, client(proxy.url) as it:
            created = await it.submit({"prompt": "hello", "max_tokens": TOKENS, "seed": 1})
            events = await followed(it, created.task_id)
        assert proxy.count > 2
        asked = [head.partition(b"Last-Event-ID: ")[2].split(b"\r\n")[0] for head in proxy.requests[1:]]
        assert asked[0] == b""
        assert all(asked[1:])
        assert [event.i for event in events if isinstance(event, Token)] == list(range(TOKENS))


async def test_a_running_task_is_followed_across_a_cut(fake_engine: FakeLlamaServer) -> None:
    """What it says meanwhile comes with the next connection."""
    fake_engine.hold = True
    async with Live(fake_engine) as live, Proxy(live.port, []) as proxy, client(proxy.url) as it:
        created = await it.submit({"prompt": "hello"})
        engine = await fake_engine.started()
        async with contextlib.aclosing(it.follow(created.task_id)) as events:
            assert isinstance(await anext(events), Started)
            await engine.token("a")
            assert await anext(events) == Token("a", 0)
            proxy.break_all()
            await engine.token("b")
            assert isinstance(await anext(events), Broken)
            assert await anext(events) == Token("b", 1)
            await engine.finish()
            assert isinstance(await anext(events), End)


async def test_a_server_that_restarts_has_lost_the_task(fake_engine: FakeLlamaServer) -> None:
    """That is said, and not taken for an end."""
    fake_engine.hold = True
    async with Proxy(0, []) as proxy, client(proxy.url) as it, contextlib.AsyncExitStack() as stack:
        async with Live(fake_engine) as live:
            proxy.point_to(live.port)
            created = await it.submit({"prompt": "hello"})
            events = await stack.enter_async_context(contextlib.aclosing(it.follow(created.task_id)))
            assert isinstance(await anext(events), Started)
            proxy.down = True
            proxy.break_all()
            assert isinstance(await anext(events), Broken)
        async with Live(fake_engine) as restarted:
            proxy.point_to(restarted.port)
            assert isinstance(await anext(events), Broken)
            proxy.down = False
            with pytest.raises(NotFound, match=r"is gone: llorch was restarted"):
                await anext(events)


async def test_a_server_away_for_a_while_is_waited_for(fake_engine: FakeLlamaServer) -> None:
    """Ever more seldom, and at most so long."""
    clock = Clock()
    async with (
        Live(fake_engine) as live,
        Proxy(live.port, []) as proxy,
        client(proxy.url, clock=clock) as it,
    ):
        created = await it.submit({"prompt": "hello", "max_tokens": 1})
        proxy.down = True
        async with contextlib.aclosing(it.follow(created.task_id)) as events:
            for _ in range(8):
                assert isinstance(await anext(events), Broken)
            proxy.down = False
            assert [type(event) async for event in events] == [Started, Token, End]
        assert clock.pauses[0] == 0
        assert all(later >= earlier * 0.7 for earlier, later in itertools.pairwise(clock.pauses))
        assert max(clock.pauses) <= LONGEST_PAUSE_S
        proxy.down = True
        with pytest.raises(Unreachable, match=f"given up after {PATIENCE_S:g} s"):
            await followed(it, created.task_id)


async def test_too_many_streams_is_waited_out(fake_engine: FakeLlamaServer) -> None:
    """A 503 while following is no end: so long as the server says."""
    refusal = {"code": "TOO_MANY_STREAMS", "message": "full", "engine": None, "retry_after_ms": 9000}
    clock, busy = Clock(), [True, True]

    async def handler(request: web.Request) -> web.StreamResponse:
        if busy and busy.pop():
            return web.json_response(refusal, status=503)
        return await streams(STARTED + end(1))(request)

    async with serving({"/v1/tasks/x/stream": handler}) as url, client(url, clock=clock) as it:
        assert [type(event) for event in await followed(it, "x")] == [Broken, Broken, Started, End]
    assert clock.pauses == [9, 9]


async def test_a_silent_connection_is_given_up_for_a_new_one() -> None:
    """A laptop that slept has sockets that never say so."""

    async def handler(request: web.Request) -> web.StreamResponse:
        if "Last-Event-ID" in request.headers:
            return await streams(token(0) + end(2))(request)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await response.write(STARTED)
        await asyncio.Event().wait()
        return response

    async with serving({"/v1/tasks/x/stream": handler}) as url, client(url, silence_s=0.05) as it:
        events = await followed(it, "x")
    assert [type(event) for event in events] == [Started, Broken, Token, End]


# -- what a stream may say -------------------------------------------------------------------------


async def test_what_was_seen_is_not_handed_out_again() -> None:
    """Whatever a server repeats."""
    first, second = STARTED + token(0) + token(1), STARTED + token(0) + token(1) + token(2) + end(4)
    async with serving({"/v1/tasks/x/stream": streams(first, second)}) as url, client(url) as it:
        events = without_breaks(await followed(it, "x"))
    assert [type(event) for event in events] == [Started, Token, Token, Token, End]
    assert [event.i for event in events if isinstance(event, Token)] == [0, 1, 2]


async def test_a_gap_is_told() -> None:
    """A text with a hole is no answer."""
    said = STARTED + token(0) + token(2)
    async with serving({"/v1/tasks/x/stream": streams(said)}) as url, client(url) as it:
        with pytest.raises(BadAnswer, match="token 1 is missing"):
            await followed(it, "x")


async def test_events_that_are_not_known_are_passed_over() -> None:
    """And comments; a newer server may say more."""
    said = STARTED + b": ping\n\n" + frame(None, "weather", {"rain": True}) + token(0) + end(2)
    async with serving({"/v1/tasks/x/stream": streams(said)}) as url, client(url) as it:
        assert [type(event) for event in await followed(it, "x")] == [Started, Token, End]


@pytest.mark.parametrize(
    "said",
    [b"event: token\ndata: {\n\n", frame(1, "token", {"t": 1, "i": 0}), b"event: token\ndata: \xff\n\n"],
)
async def test_an_event_that_can_not_be_read_is_told(said: bytes) -> None:
    """Trying again would bring the same."""
    async with serving({"/v1/tasks/x/stream": streams(STARTED + said)}) as url, client(url) as it:
        with pytest.raises(BadAnswer, match="not llorch's"):
            await followed(it, "x")


async def test_a_stream_that_is_none_is_told() -> None:
    """Whatever page stands there."""
    async with serving({"/v1/tasks/x/stream": says(200, "<html>")}) as url, client(url) as it:
        with pytest.raises(BadAnswer, match="text/plain"):
            await followed(it, "x")


async def test_metrics_come_to_those_who_ask() -> None:
    """They move no place in the stream: a new connection asks after the last event that has an id."""
    asked = []

    async def handler(request: web.Request) -> web.StreamResponse:
        asked.append((request.query_string, request.headers.get("Last-Event-ID")))
        metrics = frame(None, "metrics", {"queue_position": 3, "predicted_start_ms": 1200, "queue_depth": 9})
        last = len(asked) > 1
        return await streams(token(0) + end(2) if last else STARTED + metrics)(request)

    async with serving({"/v1/tasks/x/stream": handler}) as url, client(url) as it:
        events = without_breaks(await followed(it, "x", metrics=True))
        await followed(it, "x")
    assert events[1] == Metrics(queue_position=3, predicted_start_ms=1200, queue_depth=9)
    assert asked == [("metrics=1", None), ("metrics=1", "0"), ("", None)]


async def test_after_the_last_event_the_end_is_told_all_the_same(fake_engine: FakeLlamaServer) -> None:
    """204 says that there is no more; how it ended is in the snapshot."""
    async with Live(fake_engine) as live, client(live.url) as it:
        done = await it.submit({"prompt": "hello", "max_tokens": 2})
        whole = await followed(it, done.task_id)
        fake_engine.hold = True
        held = await it.submit({"prompt": "hello"})
        await it.cancel(held.task_id)
        fake_engine.script(_broken_off)
        failed = await it.submit({"prompt": "hello"})
        assert isinstance((await followed(it, failed.task_id))[-1], Error)
        assert await followed(it, done.task_id, after=3) == whole[-1:]
        (cancelled,) = await followed(it, held.task_id, after=99)
        assert isinstance(cancelled, End)
        assert cancelled.finish_reason == "cancelled"
        (error,) = await followed(it, failed.task_id, after=99)
        assert isinstance(error, Error)
        assert error.code == "WORKER_RESET"


async def _broken_off(connection: Any) -> None:
    await connection.token("a")
    connection.rst()


async def test_a_stream_can_begin_after_any_event(fake_engine: FakeLlamaServer) -> None:
    """As EventSource does after a reload."""
    async with Live(fake_engine) as live, client(live.url) as it:
        created = await it.submit({"prompt": "hello", "max_tokens": 4})
        whole = await followed(it, created.task_id)
        for after in range(5):
            assert await followed(it, created.task_id, after=after) == whole[after + 1 :]


async def test_closing_a_stream_closes_its_connection(fake_engine: FakeLlamaServer) -> None:
    """And the server forgets the reader; the task goes on."""
    fake_engine.hold = True
    async with Live(fake_engine) as live, client(live.url) as it:
        created = await it.submit({"prompt": "hello"})
        async with contextlib.aclosing(it.follow(created.task_id)) as events:
            assert isinstance(await anext(events), Started)
        await live.orchestrator.readers_gone()
        assert (await it.snapshot(created.task_id)).state == "running"

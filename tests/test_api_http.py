"""HTTP as attackers and broken clients speak it: a plain 4xx or a closed connection, and nothing echoed."""

import asyncio
import contextlib
import json
import re

import pytest

from llorch import server
from tests.fakes import PATIENCE_S, FakeLlamaServer
from tests.live import Live, eventually

NOT_HTTP = b'{"code":"INVALID_PARAMS","message":"this is not a valid HTTP request","engine":null}'
GET = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"
POST = b"POST /v1/tasks HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
CLOSE = b"Connection: close\r\n\r\n"

NO_HTTP = {
    "no Host": b"GET /health HTTP/1.1\r\n" + CLOSE,
    "two Hosts [T9]": GET + b"Host: localhost\r\n" + CLOSE,
    "bare LF [T9]": b"GET /evilness HTTP/1.1\nHost: localhost\n\n",
    "obs-fold [T9]": GET + b"X: evilness\r\n more\r\n" + CLOSE,
    "CL and TE [T9]": POST + b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n" + CLOSE + b"0\r\n\r\n",
    "TE and CL [T9]": POST + b"Transfer-Encoding: chunked\r\nContent-Length: 4\r\n" + CLOSE + b"0\r\n\r\n",
    "two CLs [T9]": POST + b"Content-Length: 2\r\nContent-Length: 2\r\n" + CLOSE + b"{}",
    "CL of two values [T9]": POST + b"Content-Length: 2, 2\r\n" + CLOSE + b"{}",
    "CL with a sign [T9]": POST + b"Content-Length: +2\r\n" + CLOSE + b"{}",
    "CL below zero [T9]": POST + b"Content-Length: -1\r\n" + CLOSE,
    "an endless CL [T9]": POST + b"Content-Length: " + b"9" * 30 + b"\r\n" + CLOSE,
    "TE that is not chunked [T9]": POST + b"Transfer-Encoding: evilness\r\n" + CLOSE,
    "a space before the colon [T9]": GET + b"Content-Length : 5\r\n" + CLOSE,
    "a space in a name": GET + b"Evil Ness: x\r\n" + CLOSE,
    "a NUL in a value": GET + b"X: evil\x00ness\r\n" + CLOSE,
    "a 9 kB URI": b"GET /" + b"evilness" * 1200 + b" HTTP/1.1\r\nHost: localhost\r\n" + CLOSE,
    "a 9 kB header": GET + b"X: " + b"evilness" * 1200 + b"\r\n" + CLOSE,
    "raw bytes in the path": b"GET /\xff\xfe HTTP/1.1\r\nHost: localhost\r\n" + CLOSE,
    "a target without its slash": b"GET evilness HTTP/1.1\r\nHost: localhost\r\n" + CLOSE,
    "an absolute target with half a host": b"GET http://[::1/health HTTP/1.1\r\nHost: localhost\r\n" + CLOSE,
    "an absolute target with no port": b"GET http://localhost:x/ HTTP/1.1\r\nHost: localhost\r\n" + CLOSE,
    "an unknown method": b"EVILNESS /health HTTP/1.1\r\nHost: localhost\r\n" + CLOSE,
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "HTTP/9": b"GET /health HTTP/9.9\r\nHost: localhost\r\n" + CLOSE,
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03evilness\r\n\r\n",
    "SSH": b"SSH-2.0-evilness\r\n\r\n",
}


@pytest.mark.parametrize("sent", NO_HTTP.values(), ids=NO_HTTP)
async def test_what_is_not_http(
    fake_engine: FakeLlamaServer, sent: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    """400 with a constant body, the connection closed, nothing echoed or logged of it [C10, T9, T17]."""
    async with Live(fake_engine) as live:
        answer = await live.raw(sent)
        head, _, body = answer.partition(b"\r\n\r\n")
        assert head.split(b" ")[1] == b"400"
        assert body == NOT_HTTP
        assert b"aiohttp" not in head
        said = answer.decode() + "".join(record.getMessage() for record in caplog.records)
        assert not re.search("evil.?ness", said)
        assert not any(record.exc_info for record in caplog.records)
        assert (await live.get("/v1/tasks")).body == {"tasks": []}


ODD = {
    "a double slash": (b"GET //health HTTP/1.1", 404),
    "a host in the path": (b"GET //evil.example/health HTTP/1.1", 404),
    "dots": (b"GET /v1/../health HTTP/1.1", 404),
    "encoded dots": (b"GET /v1/%2e%2e/health HTTP/1.1", 404),
    "an encoded slash": (b"GET /v1%2Ftasks HTTP/1.1", 404),
    "an encoded NUL": (b"GET /%00 HTTP/1.1", 404),
    "encoded bytes": (b"GET /%ff HTTP/1.1", 404),
    "half an escape": (b"GET /% HTTP/1.1", 404),
    "a fragment": (b"GET /health#x HTTP/1.1", 200),
    "TRACE": (b"TRACE /health HTTP/1.1", 405),
    "OPTIONS of all": (b"OPTIONS * HTTP/1.1", 404),
    "CONNECT to us": (b"CONNECT localhost:80 HTTP/1.1", 404),
    "CONNECT elsewhere": (b"CONNECT evil.example:443 HTTP/1.1", 403),
    "an absolute target": (b"GET http://localhost/health HTTP/1.1", 200),
    "an absolute target on another port": (b"GET http://localhost:99/health HTTP/1.1", 200),
    "an absolute target by address": (b"GET http://[::1]:8080/health HTTP/1.1", 200),
    "an absolute target elsewhere [T1]": (b"GET http://evil.example/health HTTP/1.1", 403),
    "an upgrade": (b"GET /health HTTP/1.1\r\nUpgrade: websocket", 200),
    "HTTP/1.0": (b"GET /health HTTP/1.0", 200),
}


@pytest.mark.parametrize(("line", "status"), ODD.values(), ids=ODD)
async def test_odd_but_legal_requests(fake_engine: FakeLlamaServer, line: bytes, status: int) -> None:
    """Nothing is normalised into a route, and each gets an answer of ours in JSON [C10]."""
    async with Live(fake_engine) as live:
        answer = await live.raw(line + b"\r\nHost: localhost\r\n" + CLOSE)
        head, _, body = answer.partition(b"\r\n\r\n")
        assert int(head.split()[1]) == status
        assert json.loads(body).keys() >= ({"status"} if status == 200 else {"code", "message", "engine"})


async def test_http_1_0_without_a_host(fake_engine: FakeLlamaServer) -> None:
    """Legal HTTP, yet nobody knows whom it means: 403 [T1, C10]."""
    async with Live(fake_engine) as live:
        assert b" 403 " in await live.raw(b"GET /health HTTP/1.0\r\n\r\n")


async def test_a_stream_over_http_1_0(fake_engine: FakeLlamaServer) -> None:
    """An old proxy gets the events, unchunked, to the end of the connection."""
    async with Live(fake_engine) as live:
        task = await live.submit(max_tokens=1)
        answer = await live.raw(f"GET {task['stream_url']} HTTP/1.0\r\nHost: localhost\r\n\r\n".encode())
        head, _, body = answer.partition(b"\r\n\r\n")
        assert b"chunked" not in head
        assert re.findall(rb"event: (\w+)\n", body) == [b"started", b"token", b"end"]


async def test_a_thousand_pipelined_requests(fake_engine: FakeLlamaServer) -> None:
    """All are answered, in order; nobody else waits for them [C10]."""
    async with Live(fake_engine) as live:
        requests = [
            b"GET /%d HTTP/1.1\r\nHost: localhost\r\nX-Correlation-Id: c%d\r\n" % (number, number)
            for number in range(1000)
        ]
        burst = b"\r\n".join(requests)
        async with live.connection() as (reader, writer), asyncio.timeout(PATIENCE_S):
            writer.write(burst + CLOSE)
            assert (await live.get("/health")).status == 200
            found = re.findall(rb"X-Correlation-Id: c(\d+)\r\n", await reader.read())
        assert [int(number) for number in found] == list(range(1000))


# -- slow clients ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sent",
    [b"", b"G", GET, GET + b"X: y", GET + b"X: y\r\n", b"\r\n\r\n", GET + b"\r\n"],
    ids=["nothing", "a letter", "a line", "half a header", "a header", "empty lines", "one whole request"],
)
async def test_half_open_headers_are_closed(fake_engine: FakeLlamaServer, sent: bytes) -> None:
    """After `http.idle_timeout_s`, also those of a second request, and an idle connection [C16]."""
    async with Live(fake_engine, {"http": {"idle_timeout_s": 0.2}}) as live:
        answer = await live.raw(sent)
        assert answer.startswith(b"HTTP/1.1 200 ") is sent.endswith(b"localhost\r\n\r\n")
        assert b" 200 " in await live.raw(GET + b"\r\n" + sent)


async def test_dripping_headers_are_closed(fake_engine: FakeLlamaServer) -> None:
    """Bytes that come one by one do not put off the end [C16]."""
    settings = {"http": {"idle_timeout_s": 0.2}}
    async with Live(fake_engine, settings) as live, live.connection() as (reader, writer):
        writer.write(GET + b"X: ")
        end = asyncio.create_task(reader.read())
        while not end.done():
            writer.write(b"x")
            await asyncio.wait({end}, timeout=0.005)
        with contextlib.suppress(ConnectionResetError):  # its last bytes may come too late
            assert await end == b""


async def test_many_slow_clients_at_once(
    fake_engine: FakeLlamaServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two hundred half-open headers and dripping bodies hold up nobody, and all are closed [C16]."""
    monkeypatch.setattr(server, "LINGERING_S", 0.05)
    settings = {"http": {"idle_timeout_s": 0.5, "body_timeout_s": 0.3}}
    dripping = POST + b"Content-Length: 100\r\n\r\n{"
    async with Live(fake_engine, settings) as live:
        slow = [asyncio.create_task(live.raw(sent)) for sent in [GET, dripping] * 100]
        await eventually(lambda: len(live.transports) >= 200, "they did not connect")
        assert (await live.get("/health")).status == 200
        assert (await live.submit(max_tokens=1))["queue_position"] == 0
        answers = await asyncio.gather(*slow)
        assert answers[::2] == [b""] * 100
        assert {b"BODY_TIMEOUT" in answer for answer in answers[1::2] if answer} == {True}
        await eventually(lambda: all(t.is_closing() for t in live.transports[:200]), "some are left")


async def test_a_client_that_never_reads_an_answer_is_cut_off(
    fake_engine: FakeLlamaServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it is not a stream: nothing of it stays after a while [C3]."""
    monkeypatch.setattr(server, "STALLED_WRITE_S", 0.4)
    settings = {"http": {"idle_timeout_s": 600}}
    async with Live(fake_engine, settings) as live, live.connection(receive_buffer=4096) as (_, writer):
        writer.transport.pause_reading()
        await live.submit(metadata={f"{number}": "x" * 512 for number in range(16)})
        writer.write(b"GET /v1/tasks HTTP/1.1\r\nHost: localhost\r\n\r\n" * 2000)
        await eventually(lambda: len(live.transports) >= 2, "it did not connect")
        await eventually(live.other_side(writer).is_closing, "it is not cut off")

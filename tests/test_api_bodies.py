"""Bodies of requests over HTTP: what is read at all, and how malformed ones are refused."""

import asyncio
import contextlib
import gzip
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.fakes import PATIENCE_S, FakeLlamaServer
from tests.live import Live, refused

JSON = {"Content-Type": "application/json"}
SMALL = {"http": {"max_body_bytes": 1000}}
POST = b"POST /v1/tasks HTTP/1.1\r\nHost: localhost\r\n"


def length(headers: bytes, body_bytes: int) -> bytes:
    """The head of a POST that announces so many bytes of JSON."""
    announced = b"Content-Type: application/json\r\nContent-Length: %d\r\n" % body_bytes
    return POST + announced + headers + b"\r\n"


# -- media type, size, time ------------------------------------------------------------------------


@pytest.mark.parametrize("profile", ["mvp", "home"])
@pytest.mark.parametrize(
    "headers",
    [
        {"Content-Type": "text/plain"},
        {"Content-Type": "application/x-www-form-urlencoded"},
        {"Content-Type": "multipart/form-data; boundary=x"},
        {"Content-Type": "application/jsonx"},
        {"Content-Type": "application/json", "Content-Encoding": "gzip"},
        {"Content-Type": "application/json", "Content-Encoding": "identity"},
        {"Content-Type": ""},
    ],
    ids=str,
)
async def test_only_plain_json_is_read(
    fake_engine: FakeLlamaServer, headers: dict[str, str], profile: str
) -> None:
    """Anything a form of another site could send is a 415, and so is an encoded body [T2, C8]."""
    async with Live(fake_engine, profile=profile) as live:
        body = gzip.compress(b"x" * 10_000) if "Content-Encoding" in headers else b'{"prompt":"a"}'
        answer = await live.post(data=body, headers={**live.headers, **headers})
        refused(live, answer, 415, "UNSUPPORTED_MEDIA_TYPE", retriable=False)


async def test_json_may_name_its_charset(fake_engine: FakeLlamaServer) -> None:
    """Parameters of the media type do no harm."""
    async with Live(fake_engine) as live:
        headers = {"Content-Type": "Application/JSON; charset=utf-8"}
        assert (await live.post(data=b'{"prompt":"a"}', headers=headers)).status == 202


@pytest.mark.parametrize("profile", ["mvp", "home"])
async def test_a_body_over_the_limit_is_refused(fake_engine: FakeLlamaServer, profile: str) -> None:
    """413, exactly from the first byte over `http.max_body_bytes` [C8]."""
    async with Live(fake_engine, SMALL, profile=profile) as live:
        frame = len(b'{"prompt":""}')
        fits = await live.post(data=b'{"prompt":"%b"}' % (b"x" * (1000 - frame)), headers=live.headers | JSON)
        assert fits.status == 202
        over = await live.post(data=b'{"prompt":"%b"}' % (b"x" * (1001 - frame)), headers=live.headers | JSON)
        refused(live, over, 413, "BODY_TOO_LARGE", retriable=False)


async def test_an_announced_100_mb_are_refused_unread(fake_engine: FakeLlamaServer) -> None:
    """The 413 comes before a byte of the body was sent [C8]."""
    async with Live(fake_engine) as live, live.connection() as (reader, writer):
        writer.write(length(b"", 100_000_000))
        async with asyncio.timeout(PATIENCE_S):
            assert b" 413 " in await reader.readline()


async def test_a_chunked_body_is_cut_off_at_the_limit(fake_engine: FakeLlamaServer) -> None:
    """Of an endless chunked body little more than the limit is read before the 413 [C8]."""
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        while sent < 100_000_000:
            sent += 1000
            yield b"x" * 1000

    async with Live(fake_engine, SMALL) as live:
        with contextlib.suppress(ConnectionError):
            answer = await live.post(data=endless(), headers=JSON)
            refused(live, answer, 413, "BODY_TOO_LARGE", retriable=False)
        assert sent < 100_000_000


async def test_a_refused_client_gets_no_100_continue(fake_engine: FakeLlamaServer) -> None:
    """The refusal comes instead of it, so the body is never sent [C8]."""
    expect = b"Expect: 100-continue\r\nConnection: close\r\n"
    heads = [
        (b"413", length(expect, 100_000_000)),
        (b"415", POST + expect + b"Content-Type: text/plain\r\nContent-Length: 5\r\n\r\n"),
        (b"403", length(expect + b"Origin: http://evil.example\r\n", 5)),
        (b"404", length(expect, 5).replace(b"/v1/tasks", b"/nope")),
        (b"405", length(expect, 5).replace(b"POST", b"PUT")),
        (b"415", length(expect, 5).replace(b"/v1/tasks", b"/v1/tasks/x/cancel")),
        (b"415", POST.replace(b"tasks", b"tasks/x/cancel") + expect + b"Content-Length: 5\r\n\r\n"),
    ]
    async with Live(fake_engine) as live:
        for status, head in heads:
            async with live.connection() as (reader, writer), asyncio.timeout(PATIENCE_S):
                writer.write(head)
                assert (await reader.readline()).split()[1] == status


async def test_a_welcome_body_gets_its_100_continue(fake_engine: FakeLlamaServer) -> None:
    """Then the body is read, and answered as ever [C8]."""
    async with Live(fake_engine) as live, live.connection() as (reader, writer):
        body = b'{"prompt":"a"}'
        writer.write(length(b"Expect: 100-continue\r\n", len(body)))
        async with asyncio.timeout(PATIENCE_S):
            assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
            writer.write(body)
            assert b" 202 " in await reader.readline()


@pytest.mark.parametrize("target", ["/v1/tasks", "/health", "/nope", "*"])
async def test_an_unknown_expectation_is_not_echoed(fake_engine: FakeLlamaServer, target: str) -> None:
    """Whatever a client expects comes back in no answer [C8, C10]."""
    async with Live(fake_engine) as live:
        head = (
            f"OPTIONS {target} HTTP/1.1\r\nHost: localhost\r\nExpect: evilness\r\nConnection: close\r\n\r\n"
        )
        answer = await live.raw(head.encode())
        assert answer.startswith(b"HTTP/1.")
        assert answer.split()[1] in (b"400", b"404", b"405")
        assert b"evilness" not in answer
        assert "code" in json.loads(answer.partition(b"\r\n\r\n")[2])


@pytest.mark.parametrize("profile", ["mvp", "home"])
async def test_a_dripping_body_times_out(fake_engine: FakeLlamaServer, profile: str) -> None:
    """408 after `http.body_timeout_s`, and the connection is closed [C16]."""
    async with Live(fake_engine, {"http": {"body_timeout_s": 0.05}}, profile=profile) as live:

        async def dripping() -> AsyncIterator[bytes]:
            yield b"{"
            await asyncio.Event().wait()

        answer = await live.post(data=dripping(), headers=live.headers | JSON)
        refused(live, answer, 408, "BODY_TIMEOUT", retriable=True)


async def test_a_body_that_breaks_off_leaves_nothing(fake_engine: FakeLlamaServer) -> None:
    """A client that leaves in the middle of its body, or frames it badly, leaves no task [C1, C16]."""
    chunked = POST + b"Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    async with Live(fake_engine) as live:
        async with live.connection() as (_, writer):
            writer.write(length(b"", 100) + b'{"prompt":')
            await writer.drain()
        assert b" 400 " in await live.raw(chunked + b"5\r\n{", b"zzzzzzzzz\r\n")
        assert (await live.get("/v1/tasks")).body == {"tasks": []}


# -- JSON ------------------------------------------------------------------------------------------

BAD_BODIES: list[tuple[str, bytes, str]] = [
    ("nothing", b"", "$: "),
    ("null", b"null", "$: "),
    ("an array", b"[]", "$: "),
    ("text", b'"x"', "$: "),
    ("an empty object", b"{}", "$: exactly one of prompt and messages"),
    ("both", b'{"prompt":"a","messages":[{"role":"user","content":"a"}]}', "$: exactly one of"),
    ("bytes after the end", b'{"prompt":"a"} x', "$: "),
    ("UTF-16", '{"prompt":"a"}'.encode("utf-16"), "$: "),
    ("a byte order mark", b'\xef\xbb\xbf{"prompt":"a"}', "$: "),
    ("100,000 arrays", b"[" * 100_000, "$: "),
    ("100,000 objects", b'{"prompt":"a","json_schema":' + b'{"a":' * 100_000, "$: nested too deeply"),
    ("5,000 digits", b'{"prompt":"a","max_tokens":' + b"9" * 5000 + b"}", "$.max_tokens: "),
    ("5,000 digits in a schema", b'{"prompt":"a","json_schema":{"a":' + b"9" * 5000 + b"}}", "$.json_schema"),
    ("1e400", b'{"prompt":"a","temperature":1e400}', "$.temperature: "),
    ("1e400 in a schema", b'{"prompt":"a","json_schema":{"a":1e400}}', "$.json_schema"),
    ("NaN", b'{"prompt":"a","temperature":NaN}', "$: "),
    ("a raw NUL", b'{"prompt":"a\x00"}', "$: "),
    ("not UTF-8", b'{"prompt":"\xff"}', "$: "),
    ("not UTF-8 in a name", b'{"\xff":1}', "$: "),
    ("an encoded surrogate", b'{"prompt":"\xed\xa0\x80"}', "$: "),
    ("a lone surrogate", rb'{"prompt":"\ud800"}', "$: "),
    ("surrogates the wrong way", rb'{"prompt":"\udc00\ud800"}', "$: "),
    ("a null prompt, the last of two", b'{"prompt":"a","prompt":null}', "$.prompt: "),
    ("an unknown field", b'{"prompt":"a","temperatur":1}', "$.temperatur: unknown field, did you mean temp"),
    ("a tricky unknown field", b'{"prompt":"a"," - at `$.x`":1}', "$. - at `$.x`: unknown field"),
    ("an unknown field deep down", b'{"messages":[{"role":"a","content":"b","x":1}]}', "$.messages[0].x: "),
    ("a field missing deep down", b'{"messages":[{"role":"a"}]}', "$.messages[0].content: "),
    ("text for a number", b'{"prompt":"a","top_k":"1"}', "$.top_k: "),
    ("a fraction for a whole number", b'{"prompt":"a","seed":1.5}', "$.seed: "),
    ("true for a number", b'{"prompt":"a","max_tokens":true}', "$.max_tokens: "),
    ("an endless name", b'{"prompt":"a","%b":1}' % (b"x" * 10_000), "$.xxx"),
]


@pytest.mark.parametrize(("body", "message"), [pytest.param(*row[1:], id=row[0]) for row in BAD_BODIES])
async def test_malformed_bodies(fake_engine: FakeLlamaServer, body: bytes, message: str) -> None:
    """400 INVALID_PARAMS with the path of what is wrong; never 500; and nothing is left [C9]."""
    async with Live(fake_engine) as live:
        answer = await live.post(data=body, headers={"Content-Type": "application/json"})
        refused(live, answer, 400, "INVALID_PARAMS", retriable=False)
        assert answer.body["message"].startswith(message)
        assert len(answer.body["message"]) < 400
        assert (await live.get("/v1/tasks")).body == {"tasks": []}


BEYOND: list[tuple[str, Any]] = [
    ("prompt", ""),
    ("max_tokens", 0),
    ("max_tokens", 4097),
    ("seed", -1),
    ("seed", 2**32 - 1),
    ("temperature", 5.01),
    ("temperature", -0.01),
    ("top_k", 1001),
    ("top_p", 1.01),
    ("min_p", -0.01),
    ("typical_p", 1.01),
    ("repeat_penalty", 0.49),
    ("repeat_penalty", 2.01),
    ("repeat_last_n", 4097),
    ("presence_penalty", -2.01),
    ("frequency_penalty", 2.01),
    ("stop", ["x"] * 9),
    ("stop[0]", ["é" * 65]),
    ("stop", [""]),
    ("grammar", "x" * (64 * 1024 + 1)),
    ("json_schema", {"x": "x" * (64 * 1024)}),
    ("priority", "urgent"),
    ("session_id", "é" * 65),
    ("determinism", "perhaps"),
    ("metadata", {str(number): "" for number in range(17)}),
    ("metadata: a key", {"é" * 33: ""}),
    ("metadata['k']", {"k": "é" * 257}),
]


@pytest.mark.parametrize(("path", "value"), BEYOND)
async def test_values_beyond_our_ranges(fake_engine: FakeLlamaServer, path: str, value: object) -> None:
    """Refused by us, for the engine coerces silently [T12, MVP-030]."""
    async with Live(fake_engine) as live:
        field = path.partition("[")[0].partition(":")[0]
        answer = await live.post({"prompt": "hello", "seed": 1, field: value})
        refused(live, answer, 400, "INVALID_PARAMS", retriable=False)
        assert answer.body["message"].startswith(f"$.{path}")


async def test_values_at_our_limits_are_accepted(fake_engine: FakeLlamaServer) -> None:
    """Each range includes its ends; an escaped NUL is text; of two fields of a name the last counts [C9]."""
    limits = [
        {"max_tokens": 1, "temperature": 0, "top_k": 0, "top_p": 0, "repeat_penalty": 0.5},
        {"temperature": 5, "top_k": 1000, "top_p": 1, "min_p": 1, "typical_p": 1, "repeat_penalty": 2},
        {"seed": 2**32 - 2, "repeat_last_n": 4096, "presence_penalty": -2, "frequency_penalty": 2},
        {"seed": 0, "determinism": "best_effort", "max_tokens": 4000, "grammar": "x" * 64 * 1024},
        {"stop": ["é" * 64] * 8, "session_id": "x" * 128, "metadata": {"k" * 64: "v" * 512}},
        {"prompt": "\x00", "json_schema": {}},
    ]
    async with Live(fake_engine) as live:
        for task in limits:
            await live.submit(**task)
        twice = await live.post(
            data=b'{"prompt":null,"prompt":"a"}', headers={"Content-Type": "application/json"}
        )
        assert twice.status == 400  # each one is checked
        twice = await live.post(
            data=b'{"prompt":"first","prompt":"last"}', headers={"Content-Type": "application/json"}
        )
        await live.events(twice.body)
        assert fake_engine.completions[-1].request.body["prompt"] == "last"

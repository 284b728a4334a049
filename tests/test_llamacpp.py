"""The llama.cpp adapter: what it sends, and that nothing but an EngineFailure comes out of it [MVP-050]."""

import asyncio
import contextlib
import hashlib
import json
import os
import socket
import traceback
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import aiohttp
import pytest
from aioresponses import aioresponses

from llorch.adapters.llamacpp import MAX_ANSWER_BYTES, MAX_ERROR_BYTES, LlamaCpp
from llorch.engine import (
    Chunk,
    EngineBroken,
    EngineContextOverflow,
    EngineFailure,
    EngineGone,
    EngineInvalidRequest,
    EngineLoading,
    EngineMisconfigured,
    EngineRefused,
    EngineStalled,
    Final,
    Generation,
    Prefill,
    Props,
)
from llorch.task import Message, Sampling
from tests.fakes import (
    PATIENCE_S,
    ClientGone,
    Connection,
    FakeLlamaServer,
    Script,
    answers,
    error,
    says,
    streams,
)

HEAD = (
    b"HTTP/1.1 200 OK\r\nServer: llama.cpp\r\nContent-Type: text/event-stream\r\n"
    b"Transfer-Encoding: chunked\r\nKeep-Alive: timeout=5, max=100\r\n\r\n"
)
FINAL = b'data: {"stop":true,"stop_type":"eos","tokens_predicted":2,"tokens_evaluated":7}\n\n'
HELLO = Generation(prompt="hello world", max_tokens=3, sampling=Sampling())
CANARY = "canary-key-0123456789"


@pytest.fixture
async def llama(fake_engine: FakeLlamaServer) -> AsyncIterator[LlamaCpp]:
    """The adapter, pointed at the fake engine."""
    adapter = LlamaCpp(fake_engine.url)
    yield adapter
    await adapter.close()


async def generated(
    llama: LlamaCpp, generation: Generation = HELLO
) -> tuple[list[str], Final | EngineFailure]:
    """The texts that came, and how it ended: with the engine's account or with a failure."""
    texts: list[str] = []
    try:
        async with contextlib.aclosing(llama.generate(generation)) as chunks:
            async for chunk in chunks:
                texts += chunk.texts
                if chunk.final is not None:
                    return texts, chunk.final
    except EngineFailure as failure:
        return texts, failure
    raise AssertionError("the stream ended without a final chunk and without a failure")


async def failed(llama: LlamaCpp, generation: Generation = HELLO) -> EngineFailure:
    """The failure that a generation ends with."""
    _, end = await generated(llama, generation)
    assert isinstance(end, EngineFailure)
    return end


async def broken(llama: LlamaCpp) -> list[str]:
    """The texts that came before an EngineBroken, exactly that."""
    texts, end = await generated(llama)
    assert type(end) is EngineBroken
    return texts


def token(text: str, count: int = 1) -> bytes:
    """An event with one token, as the engine writes it."""
    return (
        b'data: {"index":0,"content":%b,"tokens":[284],"stop":false,"id_slot":-1,"tokens_predicted":%d}\n\n'
        % (
            json.dumps(text, ensure_ascii=False).encode(),
            count,
        )
    )


def http_chunk(data: bytes) -> bytes:
    """`data` as one chunk of a chunked body."""
    return b"%x\r\n%b\r\n" % (len(data), data)


# -- statuses and exceptions, without a socket -------------------------------------------------------


class Answer(aiohttp.ClientResponse):
    """What aioresponses builds, with the one argument that it does not know yet."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("stream_writer", Mock(output_size=0))
        super().__init__(*args, **kwargs)


@pytest.fixture
async def mocked() -> AsyncIterator[tuple[LlamaCpp, aioresponses]]:
    """The adapter with no network under it, and what decides its answers."""
    adapter = LlamaCpp("http://engine:8081")
    with aioresponses() as answers:
        yield adapter, answers
    await adapter.close()


TOO_LONG = error(400, "request (9 tokens) exceeds the available context size", "exceed_context_size_error")
STATUSES = [
    (400, error(400, "no", "invalid_request_error"), EngineInvalidRequest, False),
    (413, {}, EngineInvalidRequest, False),
    (422, {}, EngineInvalidRequest, False),
    (400, TOO_LONG, EngineContextOverflow, False),
    (401, error(401, "Invalid API Key", "authentication_error"), EngineMisconfigured, False),
    (403, {"error": {"message": "no", "type": "permission_error"}}, EngineMisconfigured, False),
    (404, error(404, "File Not Found", "not_found_error"), EngineMisconfigured, False),
    (501, error(501, "not supported", "not_supported_error"), EngineMisconfigured, False),
    (503, error(503, "Loading model", "unavailable_error"), EngineLoading, False),
    (500, error(500, "kaputt", "server_error"), EngineBroken, True),
    *((status, {}, EngineBroken, True) for status in (204, 206, 302, 304, 307, 405, 418, 429, 502, 504, 507)),
]


@pytest.mark.parametrize(("status", "body", "kind", "sent"), STATUSES)
async def test_each_status_becomes_the_failure_that_the_contract_names(
    mocked: tuple[LlamaCpp, aioresponses],
    status: int,
    body: dict[str, Any],
    kind: type[EngineFailure],
    sent: bool,
) -> None:
    """Each status maps to one class, for tasks and polls; only broken ones may hold a slot [E2, E4, E5]."""
    llama, answer = mocked
    answer.post("http://engine:8081/completion", status=status, payload=body, response_class=Answer)
    answer.get("http://engine:8081/health", status=status, payload=body, response_class=Answer)
    failure = await failed(llama)
    assert type(failure) is kind
    assert failure.sent is sent
    with pytest.raises(kind) as control:
        await llama.health()
    assert type(control.value) is kind


CONNECTION_KEY = Mock(ssl=True, host="engine", port=8081)
REQUEST = Mock(real_url="http://engine:8081/completion")
EXCEPTIONS = [
    (aiohttp.ClientConnectorError(CONNECTION_KEY, ConnectionRefusedError(111, "refused")), EngineGone, False),
    (aiohttp.ClientConnectorError(CONNECTION_KEY, OSError(113, "no route")), EngineRefused, False),
    (aiohttp.ClientConnectorDNSError(CONNECTION_KEY, OSError(-2, "unknown name")), EngineRefused, False),
    (aiohttp.ConnectionTimeoutError("connect"), EngineRefused, False),
    (aiohttp.ClientOSError(104, "reset"), EngineRefused, True),
    (aiohttp.ServerDisconnectedError(), EngineRefused, True),
    (aiohttp.ClientConnectionError("connector is closed"), EngineRefused, True),
    (ConnectionResetError(104, "reset"), EngineRefused, True),
    (aiohttp.SocketTimeoutError("read"), EngineStalled, True),
    (aiohttp.ServerTimeoutError("read"), EngineStalled, True),
    (TimeoutError(), EngineStalled, True),
    (aiohttp.ClientResponseError(REQUEST, (), status=400, message="bad status line"), EngineBroken, True),
    (ValueError("Chunk too big"), EngineBroken, True),
]


@pytest.mark.parametrize(("exception", "kind", "sent"), EXCEPTIONS, ids=lambda case: type(case).__name__)
async def test_each_exception_of_aiohttp_becomes_an_engine_failure(
    mocked: tuple[LlamaCpp, aioresponses], exception: Exception, kind: type[EngineFailure], sent: bool
) -> None:
    """What aiohttp raises before an answer maps to a class; its 400 is not the engine's [E1, E3, E15]."""
    llama, answer = mocked
    answer.post("http://engine:8081/completion", exception=exception)
    answer.get("http://engine:8081/slots", exception=exception)
    failure = await failed(llama)
    assert type(failure) is kind
    assert failure.sent is sent
    with pytest.raises(kind) as control:
        await llama.busy_slots()
    assert type(control.value) is kind


async def test_an_overflow_keeps_the_engines_numbers(llama: LlamaCpp, fake_engine: FakeLlamaServer) -> None:
    """A prompt over the context is told with the engine's own words, by the error's type [E4]."""
    fake_engine.ctx = 4
    failure = await failed(llama, Generation(prompt="a b c d e", max_tokens=1, sampling=Sampling()))
    assert isinstance(failure, EngineContextOverflow)
    assert "request (5 tokens) exceeds the available context size (4 tokens)" in str(failure)
    assert not failure.retriable


# -- what is sent ------------------------------------------------------------------------------------

FINAL_FIELDS = [
    "stop",
    "stop_type",
    "stopping_word",
    "truncated",
    "tokens_predicted",
    "tokens_evaluated",
    "tokens_cached",
    "timings",
]


async def test_the_defaults_are_sent_in_full_and_nothing_else(
    llama: LlamaCpp, fake_engine: FakeLlamaServer
) -> None:
    """Every sampling value goes out, so that no flag of the engine decides; what was not asked does not."""
    await generated(llama)
    assert fake_engine.requests[0].body == {
        "prompt": "hello world",
        "n_predict": 3,
        "stream": True,
        "cache_prompt": True,
        "return_progress": True,
        "response_fields": FINAL_FIELDS,
        "temperature": 0.8,
        "top_k": 40,
        "top_p": 0.95,
        "min_p": 0.05,
        "typical_p": 1.0,
        "repeat_penalty": 1.0,
        "repeat_last_n": 64,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
    }


async def test_everything_asked_for_is_sent_as_it_was_given(
    llama: LlamaCpp, fake_engine: FakeLlamaServer
) -> None:
    """Seed, stops, grammar, schema, slot and cache go out key by key, text unchanged [MVP-042, MVP-050]."""
    sampling = Sampling(
        seed=4294967294,
        temperature=0.0,
        top_k=0,
        top_p=1.0,
        min_p=0.5,
        typical_p=0.25,
        repeat_penalty=2.0,
        repeat_last_n=4096,
        presence_penalty=-2.0,
        frequency_penalty=2.0,
        stop=("\n\n", "größe\u2028"),
        grammar='root ::= "a"',
        json_schema=b'{"type": "object", "n": 1e2}',
    )
    prompt = 'a "quoted"\u2028 \x00 😀\r\nline'
    await generated(
        llama, Generation(prompt=prompt, max_tokens=7, sampling=sampling, slot=0, cache_prompt=False)
    )
    request = fake_engine.requests[0]
    assert request.body == {
        "prompt": prompt,
        "n_predict": 7,
        "stream": True,
        "cache_prompt": False,
        "id_slot": 0,
        "return_progress": True,
        "response_fields": FINAL_FIELDS,
        "seed": 4294967294,
        "temperature": 0.0,
        "top_k": 0,
        "top_p": 1.0,
        "min_p": 0.5,
        "typical_p": 0.25,
        "repeat_penalty": 2.0,
        "repeat_last_n": 4096,
        "presence_penalty": -2.0,
        "frequency_penalty": 2.0,
        "stop": ["\n\n", "größe\u2028"],
        "grammar": 'root ::= "a"',
        "json_schema": {"type": "object", "n": 100.0},
    }
    assert b'"json_schema":{"type": "object", "n": 1e2}' in request.raw


async def test_seed_zero_is_a_seed(llama: LlamaCpp, fake_engine: FakeLlamaServer) -> None:
    """Seed 0 is sent as 0."""
    await generated(llama, Generation(prompt="x", max_tokens=1, sampling=Sampling(seed=0)))
    assert fake_engine.requests[0].body["seed"] == 0


async def test_only_the_adapters_own_headers_are_sent(llama: LlamaCpp, fake_engine: FakeLlamaServer) -> None:
    """No header but HTTP's own and ours goes out, and no encoding is offered that we can't read [E15]."""
    await generated(llama)
    await llama.health()
    for request in fake_engine.requests:
        assert request.headers.keys() <= {
            "host",
            "content-type",
            "user-agent",
            "accept",
            "accept-encoding",
            "content-length",
            "connection",
        }
        assert request.headers["accept-encoding"] == "identity"


async def test_each_generation_and_each_poll_has_a_connection_of_its_own(
    llama: LlamaCpp, fake_engine: FakeLlamaServer
) -> None:
    """No connection is reused, so none is lost to an engine that closes it, and none holds a thread of it."""
    for _ in range(3):
        await generated(llama)
        await llama.health()
    await fake_engine.until(lambda: fake_engine.connections == 7)  # the last one is in reserve
    await fake_engine.until(lambda: fake_engine.open_connections == 1)


async def test_neither_proxies_of_the_environment_nor_cookies_are_used(
    fake_engine: FakeLlamaServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine is spoken to directly and remembers nothing on our side."""
    async with FakeLlamaServer() as proxy:
        for name in ("no_proxy", "NO_PROXY"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("http_proxy", proxy.url)
        monkeypatch.setenv("HTTP_PROXY", proxy.url)
        llama = LlamaCpp(f"http://localhost:{fake_engine.port}")  # of an IP address no jar takes cookies
        fake_engine.script(answers(200, {}, more="Set-Cookie: a=b\r\n"), path="/health")
        await llama.health()
        await llama.health()
        await llama.close()
        assert proxy.connections == 0
    assert "cookie" not in fake_engine.requests[1].headers


async def test_the_api_key_goes_to_the_engine_and_into_no_failure() -> None:
    """The key is in every request, and in no message, repr or traceback of what may fail [T18]."""
    async with FakeLlamaServer(api_key=CANARY) as engine:
        llama = LlamaCpp(engine.url, api_key=CANARY)
        texts, end = await generated(llama)
        assert (len(texts), type(end)) == (3, Final)
        await llama.props()
        assert {request.headers["authorization"] for request in engine.requests} == {f"Bearer {CANARY}"}
        engine.script(answers(500), answers(400, b"x"), says(b"NOT HTTP\r\n\r\n"), says(HEAD), says())
        failures = [await failed(llama) for _ in range(5)]
        await engine.stop()
        failures.append(await failed(llama))
        assert len({type(failure) for failure in failures}) == 4
        for failure in failures:
            told = [str(failure), repr(failure), failure.summary, *traceback.format_exception(failure)]
            assert CANARY not in "".join(told)
        assert CANARY not in repr(llama)
        await llama.close()


async def test_a_wrong_api_key_is_a_misconfiguration() -> None:
    """401 says that somebody has to mend the configuration [E5]."""
    async with FakeLlamaServer(api_key="right") as engine:
        llama = LlamaCpp(engine.url, api_key="wrong")
        assert type(await failed(llama)) is EngineMisconfigured
        with pytest.raises(EngineMisconfigured, match=r"401 \(.*its api_key_file\): Invalid API Key"):
            await llama.props()
        await llama.close()


# -- a stream, good or broken --------------------------------------------------------------------------


async def test_a_generation_gives_every_text_and_the_engines_own_account(
    llama: LlamaCpp, fake_engine: FakeLlamaServer
) -> None:
    """Texts in order, then the counts of the final chunk."""
    texts, final = await generated(llama)
    assert texts == [fake_engine.completions[0].word(i) for i in range(3)]
    assert final == Final("length", tokens_out=3, tokens_in=2)


@pytest.mark.parametrize(
    ("stop_type", "finish_reason"), [("eos", "stop"), ("word", "stop"), ("none", "stop"), ("limit", "length")]
)
async def test_the_engines_reason_becomes_ours(
    llama: LlamaCpp, fake_engine: FakeLlamaServer, stop_type: str, finish_reason: str
) -> None:
    """Only a reached limit is `length`."""
    fake_engine.script(lambda connection: connection.finish(stop_type))
    _, final = await generated(llama)
    assert isinstance(final, Final)
    assert final.finish_reason == finish_reason


async def test_a_token_is_handed_on_before_the_next_one_comes(
    llama: LlamaCpp, fake_engine: FakeLlamaServer
) -> None:
    """Streaming is streaming: each token is out before the engine has made another."""
    fake_engine.hold = True
    chunks = llama.generate(HELLO)
    assert (await anext(chunks)).begun
    connection = await fake_engine.started(1)
    for text in ["one", "two", "three"]:
        await connection.token(text)
        assert await anext(chunks) == Chunk([text])
    await chunks.aclose()


def prompt_progress(said: str) -> bytes:
    """An event that says how far the engine is with the prompt."""
    return (
        b'data: {"index":0,"content":"","tokens":[0],"stop":false,"prompt_progress":%b}\n\n' % said.encode()
    )


async def test_it_says_how_far_the_prompt_is(llama: LlamaCpp, fake_engine: FakeLlamaServer) -> None:
    """Each as it comes; it counts as begun, for there is no token yet."""
    fake_engine.hold = True
    chunks = llama.generate(HELLO)
    assert (await anext(chunks)).begun
    connection = await fake_engine.started(1)
    for done in (0, 512, 700):
        await connection.progress(done, 700)
        assert await anext(chunks) == Chunk([], begun=True, prefill=Prefill(700, done))
    await connection.token("a")
    assert await anext(chunks) == Chunk(["a"])
    await chunks.aclose()


async def test_progress_beside_tokens_is_not_told(llama: LlamaCpp, fake_engine: FakeLlamaServer) -> None:
    """Once there is a token, even one without text, nobody asks any more how far the prompt is."""
    progress = prompt_progress('{"total":7,"cache":0,"processed":7,"time_ms":1}')
    fake_engine.script(streams(progress + token("a"), progress + token(""), token("b"), FINAL))
    chunks = [chunk async for chunk in llama.generate(HELLO)]
    assert chunks[0].begun
    assert not any(chunk.begun for chunk in chunks[1:])
    assert [text for chunk in chunks for text in chunk.texts] == ["a", "b"]


@pytest.mark.parametrize(
    "said",
    ["{}", "null", "[]", "7", '"x"', '{"total":-1,"processed":0}', '{"total":1e99,"processed":1}'],
)
async def test_progress_that_cannot_be_read_harms_nobody(
    llama: LlamaCpp, fake_engine: FakeLlamaServer, said: str
) -> None:
    """It is a courtesy of the engine's: the task goes on without."""
    fake_engine.script(streams(prompt_progress(said), token("a"), FINAL))
    chunks = [chunk async for chunk in llama.generate(HELLO)]
    assert [chunk.prefill for chunk in chunks] == [None] * len(chunks)
    assert [text for chunk in chunks for text in chunk.texts] == ["a"]
    assert chunks[-1].final == Final("stop", 2, 7)


async def test_more_done_than_there_is_counts_as_all(llama: LlamaCpp, fake_engine: FakeLlamaServer) -> None:
    """The prompt's length is the bound."""
    fake_engine.hold = True
    chunks = llama.generate(HELLO)
    await anext(chunks)
    await (await fake_engine.started(1)).progress(9, 7)
    assert (await anext(chunks)).prefill == Prefill(7, 7)
    await chunks.aclose()


async def test_an_engine_that_knows_no_progress_is_fine(
    llama: LlamaCpp, fake_engine: FakeLlamaServer
) -> None:
    """It ignores what it does not know, and says nothing of it."""
    fake_engine.script(streams(token("a"), FINAL))
    assert await generated(llama) == (["a"], Final("stop", 2, 7))


async def test_it_says_when_a_slot_has_begun_and_not_before(
    llama: LlamaCpp, fake_engine: FakeLlamaServer
) -> None:
    """`begun` comes once, with the headers; a request that waits for a slot, or is refused, has none."""
    fake_engine.slots, fake_engine.hold = 1, True
    first, second = llama.generate(HELLO), llama.generate(HELLO)
    assert (await anext(first)).begun
    waiting = asyncio.ensure_future(anext(second))
    await fake_engine.until(lambda: fake_engine.waited == 1)
    assert not waiting.done()
    await fake_engine.held[0].finish()
    assert [chunk.begun for chunk in [chunk async for chunk in first]] == [False]
    assert (await waiting).begun
    await second.aclose()
    fake_engine.script(answers(400), answers(500), says())
    for _ in range(3):
        refused = llama.generate(HELLO)
        with pytest.raises(EngineFailure):
            await anext(refused)


async def test_pings_are_not_progress(llama: LlamaCpp, fake_engine: FakeLlamaServer) -> None:
    """Comments give no chunk, so that nobody takes them for a token [E12]."""

    async def script(connection: Connection) -> None:
        for _ in range(5):
            await connection.ping()
        await connection.token("at last")
        await connection.finish()

    fake_engine.script(script)
    begun, *chunks = [chunk async for chunk in llama.generate(HELLO)]
    assert begun.begun
    assert [text for chunk in chunks for text in chunk.texts] == ["at last"]
    assert len(chunks) <= 2


async def test_a_withheld_character_is_progress_and_is_counted_by_the_engine_alone(
    llama: LlamaCpp, fake_engine: FakeLlamaServer
) -> None:
    """Tokens of an unfinished character show no text; the final chunk counts them all the same [E17]."""

    async def script(connection: Connection) -> None:
        await connection.token("", tokens=2)
        await connection.token("é")
        await connection.token("")
        await connection.finish("limit")

    fake_engine.script(script)
    texts, final = await generated(llama)
    assert texts == ["é"]
    assert final == Final("length", tokens_out=4, tokens_in=2)


@pytest.mark.parametrize("size", [1, 7, 10_000_000])
async def test_segments_of_any_size_give_the_same_texts(
    llama: LlamaCpp, fake_engine: FakeLlamaServer, size: int
) -> None:
    """One byte at a time, a few, or all in one write: comments, CR LF and BOM included [E13]."""
    events = [token(f"é{i}") for i in range(50)]
    body = b"\xef\xbb\xbf:\n\n" + b": ping\r\n".join(events).replace(b"\n\n", b"\r\n\r\n") + FINAL
    fake_engine.script(streams(*(body[i : i + size] for i in range(0, len(body), size))))
    texts, final = await generated(llama)
    assert texts == [f"é{i}" for i in range(50)]
    assert final == Final("stop", tokens_out=2, tokens_in=7)


async def test_ten_thousand_events_in_one_write_all_come(
    llama: LlamaCpp, fake_engine: FakeLlamaServer
) -> None:
    """However many events one read holds, each text comes, in order [E13]."""
    fake_engine.script(streams(b"".join(token(str(i)) for i in range(10_000)) + FINAL))
    texts, _ = await generated(llama)
    assert texts == [str(i) for i in range(10_000)]


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("one_write", [False, True])
async def test_an_error_frame_breaks_the_task_and_keeps_its_tokens(
    llama: LlamaCpp, fake_engine: FakeLlamaServer, old: bool, one_write: bool
) -> None:
    """Both forms of an error in mid-stream; texts before it are kept, also those of the same read [E8]."""

    async def script(connection: Connection) -> None:
        said = b'{"code":500,"message":"CUDA error","type":"server_error"}'
        frame = b"error: " + said + b"\n\n" if old else b'data: {"error":' + said + b"}\n\n"
        if one_write:
            await connection.chunk(token("one") + token("two") + frame)
        else:
            await connection.token("one")
            await connection.token("two")
            await connection.error_frame("CUDA error", old=old)

    fake_engine.script(script)
    texts, failure = await generated(llama)
    assert texts == ["one", "two"]
    assert type(failure) is EngineBroken
    assert "CUDA error" in str(failure)
    assert "CUDA error" not in failure.summary


async def test_a_clean_end_without_the_final_chunk_is_a_failure(
    llama: LlamaCpp, fake_engine: FakeLlamaServer
) -> None:
    """A stream is good only if its final chunk came [E10]."""
    fake_engine.script(streams(token("one")), streams(b""))
    assert await broken(llama) == ["one"]
    assert await broken(llama) == []


@pytest.mark.parametrize("one_write", [False, True])
async def test_the_first_final_chunk_wins_and_closes_the_connection(
    llama: LlamaCpp, fake_engine: FakeLlamaServer, one_write: bool
) -> None:
    """Neither tokens nor a second end after the final chunk are taken, and the engine is let go [E11]."""
    after = [token("late"), FINAL.replace(b'"eos"', b'"limit"')]

    async def script(connection: Connection) -> None:
        for chunk in [token("one") + FINAL + b"".join(after)] if one_write else [token("one"), FINAL, *after]:
            with contextlib.suppress(ClientGone):
                await connection.chunk(chunk)
        await connection.stall()

    fake_engine.script(script)
    assert await generated(llama) == (["one"], Final("stop", tokens_out=2, tokens_in=7))
    await fake_engine.completions[0].gone.wait()


# A transcript to be cut at every byte: in the headers, between events, in a chunk, in JSON, in a character.
EVENTS = [token(" Hello"), token(","), token(" wör"), token("😀", 3), b":\n\n", token("\u2028end", 4), FINAL]
TRANSCRIPT = HEAD + b"".join(map(http_chunk, EVENTS)) + b"0\r\n\r\n"
TEXTS = [" Hello", ",", " wör", "😀", "\u2028end"]
TEXT_ENDS = [TRANSCRIPT.index(event) + len(event) for event in EVENTS if b"content" in event]
FINAL_END = TRANSCRIPT.index(FINAL) + len(FINAL)


@pytest.mark.parametrize("end", ["fin", "rst"])
@pytest.mark.parametrize("at_once", [False, True])
async def test_a_break_at_any_byte_is_a_failure_or_the_whole_answer(
    llama: LlamaCpp, fake_engine: FakeLlamaServer, end: str, at_once: bool
) -> None:
    """FIN or RST after any byte: whole events are shown, parts never, and the failure is of its class [E9].

    Where the break comes `at_once`, in the same breath as the bytes, the last events may be lost with it.
    """
    read: dict[int, asyncio.Event] = {}

    async def script(connection: Connection) -> None:
        offset = int(connection.request.body["prompt"])
        await connection.send(TRANSCRIPT[:offset])
        if not at_once:
            await read[offset].wait()
        getattr(connection, end)()

    async def check(offset: int) -> None:
        expected = TEXTS[: sum(text_end <= offset for text_end in TEXT_ENDS)]
        read[offset] = asyncio.Event()
        texts: list[str] = []
        told: Final | EngineFailure | None = None
        try:
            async with asyncio.timeout(PATIENCE_S):
                if not expected:
                    read[offset].set()
                async for chunk in llama.generate(
                    Generation(prompt=str(offset), max_tokens=9, sampling=Sampling())
                ):
                    texts, told = texts + chunk.texts, chunk.final
                    if texts == expected:
                        read[offset].set()
        except EngineFailure as failure:
            told = failure
        assert texts == (expected[: len(texts)] if at_once else expected)
        if told == Final("stop", tokens_out=2, tokens_in=7):
            assert offset >= FINAL_END
            assert texts == TEXTS
        else:
            assert type(told) is (EngineRefused if offset < len(HEAD) else EngineBroken)
            assert told.sent
            assert offset < (len(TRANSCRIPT) if at_once else FINAL_END)

    fake_engine.slots = 100
    fake_engine.always(script)
    for start in range(0, len(TRANSCRIPT) + 1, fake_engine.slots):
        await asyncio.gather(*map(check, range(start, min(start + fake_engine.slots, len(TRANSCRIPT) + 1))))
    assert len(fake_engine.completions) == len(TRANSCRIPT) + 1


async def test_an_event_that_came_whole_before_the_break_is_shown(
    llama: LlamaCpp, fake_engine: FakeLlamaServer
) -> None:
    """A token that was read before the connection broke stays [E9, E18]."""
    fake_engine.hold = True
    chunks = llama.generate(HELLO)
    assert (await anext(chunks)).begun
    await fake_engine.held[0].token("kept")
    assert await anext(chunks) == Chunk(["kept"])
    await fake_engine.kill()
    with pytest.raises(EngineBroken):
        await anext(chunks)
    assert type(await failed(llama)) is EngineGone


async def test_a_line_without_end_is_cut_off(llama: LlamaCpp, fake_engine: FakeLlamaServer) -> None:
    """1 GiB on one line: the connection is closed soon after 1 MiB, what came before it is kept [E14]."""
    sent = 0

    async def script(connection: Connection) -> None:
        nonlocal sent
        await connection.token("kept")
        await connection.chunk(b"data: ")
        for _ in range(16 * 1024):
            await connection.chunk(b"x" * 65536)
            sent += 65536

    fake_engine.script(script)
    texts, failure = await generated(llama)
    assert texts == ["kept"]
    assert type(failure) is EngineBroken
    await fake_engine.closed(1)
    assert sent < 64 * 1024 * 1024  # 1 MiB and what the sockets hold


GARBAGE: dict[str, Script] = {
    "bad status line": says(b"HTTP/1.1 99999 What\r\n\r\n"),
    "no HTTP at all": says(b"SSH-2.0-OpenSSH_9.6\r\n\r\n"),
    "binary": says(bytes(range(256))),
    "20 kB header": says(b"HTTP/1.1 200 OK\r\nX-Long: " + b"x" * 20_000 + b"\r\n\r\n"),
    "bad header": says(b"HTTP/1.1 200 OK\r\nno colon here\r\n\r\n"),
    "bad chunk size": says(HEAD, b"xyz\r\n" + token("x")),
    "huge chunk size": says(HEAD, b"f" * 40 + b"\r\n" + token("x")),
    "bad chunk end": says(HEAD, b"1\r\nab\r\n"),
    "two lengths": says(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab"),
    "gzip": says(
        HEAD.replace(b"\r\n\r\n", b"\r\nContent-Encoding: gzip\r\n\r\n"), http_chunk(token("x") + FINAL)
    ),
    "HTML": answers(200, b"<html>It works!</html>", more=""),
    "a stream of another type": says(HEAD.replace(b"event-stream", b"plain"), http_chunk(token("x") + FINAL)),
    "HTML with a stream's type": streams(b"<html>It works!</html>\n\n" * 10),
    "redirect without Location": answers(302),
}


@pytest.mark.parametrize("garbage", GARBAGE)
async def test_garbage_is_a_broken_engine_never_a_bad_request(
    llama: LlamaCpp, fake_engine: FakeLlamaServer, garbage: str
) -> None:
    """What is not an answer of llama.cpp is WORKER_RESET; nothing of it is shown [E6, E15]."""
    fake_engine.script(GARBAGE[garbage])
    assert await broken(llama) == []


LEGAL = [
    "\u2028\u2029\x85",
    "\x00\x1f\x7f",
    "\ufeff",
    "\ufffd",
    "😀👩‍👩‍👧",
    '"\\',
    "data: x\n\n",
    "x" * 1_000_000,
]


@pytest.mark.parametrize("ascii_only", [False, True])
async def test_legal_text_passes_unchanged(
    llama: LlamaCpp, fake_engine: FakeLlamaServer, ascii_only: bool
) -> None:
    """All that JSON can carry, raw or escaped, arrives as it was, up to 1 MB in one event [E16]."""
    events = (json.dumps({"content": text}, ensure_ascii=ascii_only).encode() for text in LEGAL)
    fake_engine.script(streams(*(b"data: " + event + b"\n\n" for event in events), FINAL))
    texts, final = await generated(llama)
    assert texts == LEGAL
    assert isinstance(final, Final)


@pytest.mark.parametrize(
    "event",
    [
        b'{"content":"\xff\xfe"}',
        b'{"content":"\xed\xa0\x80"}',
        rb'{"content":"\ud800"}',
        b'{"content":"a\x00b"}',
        b'{"content":NaN}',
        b'{"content":1}',
        b'{"content":null}',
        b'{"content":["a"]}',
        b'{"tokens":[1]}',
        b'{"content":"a"',
        b'{"content":"a"} {"content":"b"}',
        b'{"content":"","stop":1}',
        b'{"stop":true,"tokens_predicted":-1}',
        b'{"stop":true,"tokens_predicted":1e300}',
        b'{"stop":true,"tokens_evaluated":"7"}',
        b'{"stop":true,"tokens_predicted":1.5}',
        b"",
        b"null",
        b"[]",
        b"[DONE]",
        b"[" * 100_000,
        b'{"content":"a","x":' + b"[" * 100_000,
    ],
)
async def test_text_that_is_not_legal_is_a_broken_engine(
    llama: LlamaCpp, fake_engine: FakeLlamaServer, event: bytes
) -> None:
    """Invalid UTF-8, lone surrogates, NaN, wrong types, no content: WORKER_RESET, and nothing shown [E16]."""
    fake_engine.script(streams(b"data: " + event + b"\n\n", FINAL))
    assert await broken(llama) == []


@pytest.mark.parametrize("timings", [b'{"prompt_ms":-1e300}', b"null", b'"soon"', b"[]"])
async def test_the_engines_own_clock_is_nobodys_business(
    llama: LlamaCpp, fake_engine: FakeLlamaServer, timings: bytes
) -> None:
    """Negative, huge or absent timings change nothing [E23]."""
    fake_engine.script(streams(FINAL.replace(b'"stop":true', b'"stop":true,"timings":' + timings)))
    assert await generated(llama) == ([], Final("stop", tokens_out=2, tokens_in=7))


# -- refusals ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [302, 307, 308])
async def test_a_redirect_is_not_followed(llama: LlamaCpp, fake_engine: FakeLlamaServer, status: int) -> None:
    """No second host ever gets a connection, for generations and for polls [E7]."""
    async with FakeLlamaServer() as elsewhere:
        away = answers(status, more=f"Location: {elsewhere.url}/completion\r\n")
        fake_engine.script(away)
        fake_engine.script(away, path="/health")
        assert type(await failed(llama)) is EngineBroken
        with pytest.raises(EngineBroken):
            await llama.health()
        assert elsewhere.connections == 0


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "no message"),
        (b"<html><h1>Bad\nGateway</h1></html>", "<html><h1>Bad Gateway</h1></html>"),
        (b"\xff" * 65536, "\ufffd"),
        (b'{"error":{"message":"' + b"long " * 10_000 + b'"}}', "long long"),
        (b'{"error":"x"}', '{"error":"x"}'),
    ],
)
async def test_an_error_answer_of_any_shape_is_told_shortly(
    llama: LlamaCpp, fake_engine: FakeLlamaServer, body: bytes, said: str
) -> None:
    """HTML, nothing, 64 kB of text: one short line of it is kept as detail, none in the summary [E6]."""
    fake_engine.script(answers(500, body))
    failure = await failed(llama)
    assert type(failure) is EngineBroken
    assert str(failure).startswith(f"POST /completion answered 500: {said}")
    assert failure.summary == "POST /completion answered 500"
    assert len(str(failure)) < 600
    assert "\n" not in str(failure)


@pytest.mark.parametrize(("status", "kind"), [(500, EngineBroken), (400, EngineInvalidRequest)])
async def test_an_error_answer_without_end_is_read_to_64_kib(
    llama: LlamaCpp, fake_engine: FakeLlamaServer, status: int, kind: type[EngineFailure]
) -> None:
    """An error that never ends is cut at 64 KiB, and the connection closed [E6, E14]."""
    fake_engine.script(_endless(status))
    assert type(await failed(llama)) is kind
    await fake_engine.until(lambda: not fake_engine.open_connections)
    assert fake_engine.completions[0].bytes_sent < MAX_ERROR_BYTES + 32 * 1024 * 1024


def _endless(status: int) -> Script:
    """An answer of 1 GiB of letters."""

    async def script(connection: Connection) -> None:
        await connection.send(b"HTTP/1.1 %d Whatever\r\nTransfer-Encoding: chunked\r\n\r\n" % status)
        for _ in range(16 * 1024):
            await connection.send(http_chunk(b"x" * 65536))

    return script


# -- closing -------------------------------------------------------------------------------------------


async def _headers_wait(connection: Connection) -> None:
    await connection.stall()


async def _prefill(connection: Connection) -> None:
    await connection.headers()
    await connection.stall()


async def _decode(connection: Connection) -> None:
    await connection.token("one")
    await connection.stall()


@pytest.mark.parametrize("phase", [_headers_wait, _prefill, _decode])
async def test_cancelling_the_reader_closes_the_connection(
    llama: LlamaCpp, fake_engine: FakeLlamaServer, phase: Script
) -> None:
    """In the wait for headers, in prefill and in decode, the engine sees the connection close [MVP-032]."""
    fake_engine.script(phase)
    reader = asyncio.create_task(generated(llama))
    connection = await fake_engine.started(1)
    if phase is not _headers_wait:
        await fake_engine.until(lambda: connection.bytes_sent > 0)
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader
    await fake_engine.closed(1)
    await fake_engine.idle()
    await fake_engine.until(lambda: not fake_engine.open_connections)


async def test_hanging_up_closes_the_connection_before_the_iterator(
    llama: LlamaCpp, fake_engine: FakeLlamaServer
) -> None:
    """The engine sees it at once, though nobody has closed the iterator yet; twice is once [MVP-032]."""
    fake_engine.script(_decode)
    chunks = llama.generate(HELLO)
    hang_up = (await anext(chunks)).hang_up
    assert hang_up is not None
    hang_up()
    hang_up()
    await fake_engine.closed(1)
    with pytest.raises(EngineBroken):
        _ = [chunk async for chunk in chunks]
    await fake_engine.idle()


async def test_closing_the_iterator_closes_the_connection(
    llama: LlamaCpp, fake_engine: FakeLlamaServer
) -> None:
    """A consumer that has enough after a token leaves nothing behind."""
    fake_engine.script(_decode)
    chunks = llama.generate(HELLO)
    assert [(await anext(chunks)).begun, await anext(chunks)] == [True, Chunk(["one"])]
    await chunks.aclose()
    await fake_engine.closed(1)
    await fake_engine.idle()


async def test_closing_the_adapter_ends_what_runs_and_refuses_what_comes(
    llama: LlamaCpp, fake_engine: FakeLlamaServer
) -> None:
    """After `close` nothing is connected, and a late call fails like any other, by an EngineFailure."""
    fake_engine.hold = True
    reader = asyncio.create_task(generated(llama))
    await (await fake_engine.started(1)).headers()
    await llama.close()
    _, end = await reader
    assert isinstance(end, EngineRefused | EngineBroken)
    await fake_engine.until(lambda: not fake_engine.open_connections)
    late = await failed(llama)
    assert isinstance(late, EngineRefused)
    assert not late.sent
    with pytest.raises(EngineRefused):
        await llama.tokenize("late")
    assert len(fake_engine.requests) == 1


# -- control -------------------------------------------------------------------------------------------


async def test_health_tells_ready_from_loading_from_broken(
    llama: LlamaCpp, fake_engine: FakeLlamaServer
) -> None:
    """200 is ready, 503 is loading on every route, 500 is broken, a closed port is gone [E1, E2, MVP-041]."""
    await llama.health()
    fake_engine.health = "loading"
    for call in (llama.health, llama.props, llama.busy_slots):
        with pytest.raises(EngineLoading, match="Loading model"):
            await call()
    assert type(await failed(llama)) is EngineLoading
    fake_engine.health = "error"
    with pytest.raises(EngineBroken):
        await llama.health()
    await fake_engine.stop()
    with pytest.raises(EngineGone):
        await llama.health()


async def test_props_are_what_the_engine_says(llama: LlamaCpp, fake_engine: FakeLlamaServer) -> None:
    """Slots, context per slot, build and model are read anew each time [MVP-052, E21]."""
    assert await llama.props() == Props(
        slots=2,
        ctx=4096,
        engine_version="b4242-fake",
        model="fake-1b.gguf",
        model_path="/models/fake-1b.gguf",
        chat_template=True,
        grammar=True,
    )
    fake_engine.slots, fake_engine.ctx, fake_engine.model_path = 1, 512, ""
    fake_engine.chat_template = ""
    assert await llama.props() == Props(slots=1, ctx=512, engine_version="b4242-fake", grammar=True)


async def test_busy_slots_counts_those_at_work(llama: LlamaCpp, fake_engine: FakeLlamaServer) -> None:
    """A slot is busy from request to end, and longer if the engine does not let go [E19]."""
    fake_engine.hold = fake_engine.lingering = True
    assert await llama.busy_slots() == 0
    reader = asyncio.create_task(generated(llama))
    await (await fake_engine.started(1)).token()
    assert await llama.busy_slots() == 1
    reader.cancel()
    await fake_engine.closed(1)
    assert await llama.busy_slots() == 1
    fake_engine.let_go()
    assert await llama.busy_slots() == 0


async def test_tokenize_counts_with_the_special_tokens(llama: LlamaCpp, fake_engine: FakeLlamaServer) -> None:
    """The count is the engine's, of exactly this text, specials included."""
    assert await llama.tokenize("größer\u2028 als zwei") == 3
    assert fake_engine.requests[0].body == {"content": "größer\u2028 als zwei", "add_special": True}


async def test_render_uses_the_engines_own_template(llama: LlamaCpp, fake_engine: FakeLlamaServer) -> None:
    """Messages go out with role and content alone, and come back as a prompt."""
    prompt = await llama.render((Message("system", "be brief"), Message("user", "hi 😀")))
    assert prompt.endswith("<|im_start|>user\nhi 😀<|im_end|>\n<|im_start|>assistant\n")
    assert fake_engine.requests[0].body == {
        "messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi 😀"}]
    }


@pytest.mark.parametrize(
    ("path", "answer"),
    [
        ("/health", b"OK"),
        ("/health", b"[]"),
        ("/props", b"{}"),
        ("/props", b'{"total_slots":0,"default_generation_settings":{"n_ctx":1}}'),
        ("/props", b'{"total_slots":1,"default_generation_settings":{"n_ctx":0}}'),
        ("/props", b'{"total_slots":1,"default_generation_settings":{"n_ctx":1},"model_path":7}'),
        ("/slots", b'{"error":1}'),
        ("/slots", b'[{"id":1}]'),
        ("/slots", b'[{"is_processing":"yes"}]'),
        ("/tokenize", b'{"tokens":7}'),
        ("/tokenize", b'{"tokens":["a"]}'),
        ("/apply-template", b"{}"),
        ("/apply-template", b'{"prompt":"\xff"}'),
        ("/apply-template", rb'{"prompt":"\ud800"}'),
        ("/slots", b"[" * 100_000),
        ("/slots", b""),
    ],
)
async def test_a_control_answer_of_another_shape_is_a_broken_engine(
    llama: LlamaCpp, fake_engine: FakeLlamaServer, path: str, answer: bytes
) -> None:
    """Nothing foreign passes: an answer that is not what was asked for is an EngineBroken."""
    fake_engine.script(answers(200, answer), path=path)
    with pytest.raises(EngineBroken, match="answered with something else"):
        await _control(llama, path)


def _control(llama: LlamaCpp, path: str) -> Any:
    """The call that asks for `path`."""
    return {
        "/health": llama.health,
        "/props": llama.props,
        "/slots": llama.busy_slots,
        "/tokenize": lambda: llama.tokenize("x"),
        "/apply-template": lambda: llama.render((Message("user", "x"),)),
    }[path]()


CONTROL_PATHS = ["/health", "/props", "/slots", "/tokenize", "/apply-template"]


@pytest.mark.parametrize("path", CONTROL_PATHS)
async def test_a_control_answer_without_end_is_cut_off(
    llama: LlamaCpp, fake_engine: FakeLlamaServer, path: str
) -> None:
    """Every control answer is read to a bound and no further [E14]."""
    sent: list[Connection] = []

    async def script(connection: Connection) -> None:
        sent.append(connection)
        await _endless(200)(connection)

    fake_engine.script(script, path=path)
    with pytest.raises(EngineBroken, match=r"answered with over \d+ bytes"):
        await _control(llama, path)
    await fake_engine.until(lambda: not fake_engine.open_connections)
    assert sent[0].bytes_sent < 2 * MAX_ANSWER_BYTES + 32 * 1024 * 1024


@pytest.mark.parametrize("path", CONTROL_PATHS)
async def test_a_control_call_that_breaks_off_is_a_failure(
    llama: LlamaCpp, fake_engine: FakeLlamaServer, path: str
) -> None:
    """No byte is a refusal, part of an answer is a break, for every control call [E9]."""
    half = b'HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{"st'
    for begun, kind in [(b"", EngineRefused), (half, EngineBroken)]:
        for end in ("fin", "rst"):
            fake_engine.always(says(begun, then=end), path)
            with pytest.raises(kind) as failure:
                await _control(llama, path)
            assert type(failure.value) is kind


@pytest.mark.parametrize("path", CONTROL_PATHS)
@pytest.mark.parametrize("begun", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{"])
async def test_a_control_call_has_a_deadline(fake_engine: FakeLlamaServer, path: str, begun: bytes) -> None:
    """An engine that says nothing, or stops in the middle, is stalled after `control_s` [E3]."""
    llama = LlamaCpp(fake_engine.url, control_s=0.05)
    fake_engine.script(says(begun, then="stall"), path=path)
    with pytest.raises(EngineStalled):
        await _control(llama, path)
    await fake_engine.until(lambda: not fake_engine.open_connections)
    await llama.close()


async def test_the_deadline_of_control_calls_does_not_cut_a_generation(fake_engine: FakeLlamaServer) -> None:
    """A generation may be silent for as long as its own watchdogs allow: the adapter adds no deadline."""
    llama = LlamaCpp(fake_engine.url, control_s=0.05)
    fake_engine.hold = True
    reader = asyncio.create_task(generated(llama))
    connection = await fake_engine.started(1)
    fake_engine.health = "hang"
    with pytest.raises(EngineStalled):
        await llama.health()  # and so more than control_s has passed
    await connection.token("late")
    await connection.finish()
    assert await reader == (["late"], Final("length", tokens_out=1, tokens_in=2))
    await llama.close()


async def test_a_host_that_does_not_answer_the_connect_is_a_refusal() -> None:
    """Nothing was sent where no connection came about, so nothing has to drain [E1]."""
    with socket.socket() as deaf, contextlib.ExitStack() as queue:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen(0)
        for _ in range(4):  # more than its backlog holds
            waiting = queue.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(deaf.getsockname())
        llama = LlamaCpp(f"http://127.0.0.1:{deaf.getsockname()[1]}", connect_s=0.05)
        failure = await failed(llama)
        assert type(failure) is EngineRefused
        assert not failure.sent
        await llama.close()


# -- the model's digest ----------------------------------------------------------------------------------


WEIGHTS = b"weights" * 700_000


@pytest.fixture
def model(tmp_path: Path) -> str:
    """The path of a model file of 5 MB."""
    path = tmp_path / "model.gguf"
    path.write_bytes(WEIGHTS)
    return str(path)


async def test_the_digest_is_the_files_sha256(llama: LlamaCpp, model: str) -> None:
    """`sha256:` and the hex of the whole file [MVP-052]."""
    assert await llama.model_digest(model) == f"sha256:{hashlib.sha256(WEIGHTS).hexdigest()}"


async def test_the_digest_is_read_again_only_when_the_file_changes(llama: LlamaCpp, model: str) -> None:
    """Same path, size and time: not read again; another time: read again."""
    os.utime(model, ns=(1, 1))
    first = await llama.model_digest(model)
    with open(model, "r+b") as file:  # noqa: ASYNC230
        file.write(b"WEIGHTS")
    os.utime(model, ns=(1, 1))
    assert await llama.model_digest(model) == first
    os.utime(model, ns=(2, 2))
    assert await llama.model_digest(model) != first


@pytest.mark.parametrize("kind", ["missing", "directory", "fifo", "device", "a name with \0"])
async def test_what_is_no_readable_file_has_no_digest(llama: LlamaCpp, tmp_path: Path, kind: str) -> None:
    """A path that the engine reports is only a name here: None, at once, whatever it is."""
    path = tmp_path / kind
    if kind == "directory":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    assert await llama.model_digest(str(path)) is None


@pytest.mark.parametrize(
    ("endpoint", "local"),
    [
        ("http://127.0.0.1:1", True),
        ("http://127.8.8.8:1", True),
        ("http://[::1]:1", True),
        ("http://localhost:1", True),
        ("http://192.168.1.5:1", False),
        ("http://gpu-box:1", False),
        ("http://localhost.evil:1", False),
    ],
)
async def test_the_file_of_a_remote_engine_has_no_digest(model: str, endpoint: str, local: bool) -> None:
    """A file of that name on this machine need not be the one of an engine on another."""
    llama = LlamaCpp(endpoint)
    assert (await llama.model_digest(model) is not None) is local
    await llama.close()

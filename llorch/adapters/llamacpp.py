"""llama.cpp's HTTP server, behind the `Engine` port [MVP-050].

The one rule: nothing foreign passes this edge. Requests are built key by key from our own checked values;
every answer is bounded and typed; every exception becomes an `EngineFailure`. Closing the connection is
the only cancel llama.cpp knows, so each generation has a connection of its own.
"""

import asyncio
import contextlib
import functools
import hashlib
import ipaddress
import os
import socket
import threading
from collections.abc import AsyncGenerator
from typing import Annotated, Any, TypeVar

import aiohttp
import msgspec
from aiohttp import hdrs
from msgspec import UNSET
from yarl import URL

from llorch.adapters.spare import SpareRequest
from llorch.adapters.sse import EventTooLong, ServerEvent, SseParser
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
from llorch.events import FinishReason
from llorch.task import Message

MAX_EVENT_BYTES = 1024 * 1024
MAX_ERROR_BYTES = 64 * 1024
MAX_ANSWER_BYTES = 8 * 1024 * 1024
_UNIX = "unix:"
_TOKEN_ID_BYTES = 16  # a token's number in the answer of /tokenize, generously
_HASH_BLOCK_BYTES = 4 * 1024 * 1024
_OTHER_PROGRAM = "is it llama-server that listens at its endpoint?"
_API_KEY = "llama-server was started with an API key: give the same to its api_key_file"

_FINAL_FIELDS = [
    "stop",
    "stop_type",
    "stopping_word",
    "truncated",
    "tokens_predicted",
    "tokens_evaluated",
    "tokens_cached",
    "timings",
]

_FOREIGN = (
    aiohttp.ClientError,
    OSError,
    ValueError,
    EventTooLong,
)  # what an exchange with an engine may raise

T = TypeVar("T")

_Count = Annotated[int, msgspec.Meta(ge=0, le=2**53)]


class _Event(msgspec.Struct):
    content: str | msgspec.UnsetType = UNSET
    stop: bool = False
    stop_type: str = "none"
    tokens_predicted: _Count = 0
    tokens_evaluated: _Count = 0
    error: msgspec.Raw | msgspec.UnsetType = UNSET
    prompt_progress: msgspec.Raw | msgspec.UnsetType = UNSET


class _PromptProgress(msgspec.Struct):
    total: _Count
    processed: _Count


class _ErrorBody(msgspec.Struct):
    message: str = ""
    type: str = ""


class _ErrorAnswer(msgspec.Struct):
    error: _ErrorBody


class _Tokens(msgspec.Struct):
    tokens: list[int]


class _Rendered(msgspec.Struct):
    prompt: str


class _GenerationDefaults(msgspec.Struct):
    n_ctx: Annotated[int, msgspec.Meta(ge=1)]


class _PropsAnswer(msgspec.Struct):
    total_slots: Annotated[int, msgspec.Meta(ge=1)]
    default_generation_settings: _GenerationDefaults
    model_path: str | None = None
    model_alias: str | None = None
    build_info: str | None = None
    chat_template: msgspec.Raw = msgspec.Raw(b'""')


class _Slot(msgspec.Struct):
    is_processing: bool


_decode_event = msgspec.json.Decoder(_Event).decode


class LlamaCpp:
    """One llama-server at `endpoint`, http://host:port or unix:/path.

    Timeouts are seconds; `api_key` goes to the engine and nowhere else. `told_at` is the table of the
    configuration that has the endpoint, for messages.
    """

    name = "llamacpp"

    def __init__(
        self,
        endpoint: str,
        *,
        api_key: str = "",
        connect_s: float = 5.0,
        control_s: float = 5.0,
        told_at: str = "adapter",
    ) -> None:
        self.place = f"{endpoint} ({told_at}.endpoint)"
        socket_path = endpoint.removeprefix(_UNIX) if endpoint.startswith(_UNIX) else None
        self.url = URL(endpoint) if socket_path is None else URL("http://localhost")
        self._url_of = functools.cache(self.url.with_path)
        self._control_timeout = aiohttp.ClientTimeout(total=control_s, sock_connect=connect_s)
        self._generation_timeout = aiohttp.ClientTimeout(total=None, sock_connect=connect_s)
        headers: dict[str, str] = {hdrs.AUTHORIZATION: f"Bearer {api_key}"} if api_key else {}
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, force_close=True)
            if socket_path is None
            else aiohttp.UnixConnector(socket_path, limit=0, force_close=True),
            cookie_jar=aiohttp.DummyCookieJar(),
            headers={
                **headers,
                hdrs.ACCEPT_ENCODING: "identity",
                hdrs.CONTENT_TYPE: "application/json",
                hdrs.USER_AGENT: "llorch",
            },
            auto_decompress=False,
            trust_env=False,
        )
        self._spare = SpareRequest(
            lambda body: self._request("POST", "/completion", body, self._generation_timeout)
        )
        self._digests: dict[tuple[str, int, int], str] = {}
        self._closing = threading.Event()

    # -- generation ---------------------------------------------------------------------------

    async def generate(self, generation: Generation) -> AsyncGenerator[Chunk, None]:
        """Stream `/completion`; closing the iterator closes the connection, which is the engine's cancel."""
        answered = False
        try:
            async with await self._spare.request(_completion_body(generation)) as response:
                answered = True
                await _check_status(response)
                self._spare.prepare()
                if response.content_type != "text/event-stream" or "Content-Encoding" in response.headers:
                    raise EngineBroken("/completion answered no event stream", detail=response.content_type)
                # The engine sends its headers when a slot takes the prompt.
                yield Chunk([], begun=True, hang_up=functools.partial(_hang_up, response))
                parser = SseParser(MAX_EVENT_BYTES)
                while block := await response.content.readany():
                    if (text := _one_token(block)) and parser.between_events:
                        yield Chunk([text])
                        continue
                    if not (events := parser.feed(block)):
                        continue
                    chunk, broken = _chunk(events)
                    if chunk.final is not None:
                        response.close()
                        yield chunk
                        return
                    if chunk.texts or broken is None:
                        yield chunk
                    if broken is not None:
                        raise broken
        except _FOREIGN as error:
            raise self._failure(error, answered=answered) from error
        raise EngineBroken("the engine's stream ended without its final frame")

    def keep_spare(self, wanted: bool) -> None:
        """Keep a connected request in reserve for as long as tasks wait."""
        self._spare.keep(wanted)

    # -- control ------------------------------------------------------------------------------

    async def tokenize(self, text: str) -> int:
        """The number of tokens of `text`, special ones included."""
        body = msgspec.json.encode({"content": text, "add_special": True})
        limit = _TOKEN_ID_BYTES * len(body) + MAX_ERROR_BYTES
        return len((await self._ask("POST", "/tokenize", _Tokens, body, limit=limit)).tokens)

    async def render(self, messages: tuple[Message, ...]) -> str:
        """The prompt that the model's own chat template makes of `messages`."""
        body = msgspec.json.encode({"messages": messages})
        limit = 4 * len(body) + MAX_ANSWER_BYTES
        return (await self._ask("POST", "/apply-template", _Rendered, body, limit=limit)).prompt

    async def health(self) -> None:
        """Return if `/health` says the model is loaded; EngineLoading while it is not."""
        await self._ask("GET", "/health", dict[str, Any])

    async def props(self) -> Props:
        """What `/props` says: slots, context per slot, build, model [MVP-052]."""
        answer = await self._ask("GET", "/props", _PropsAnswer)
        path = answer.model_path or None
        return Props(
            slots=answer.total_slots,
            ctx=answer.default_generation_settings.n_ctx,
            engine_version=answer.build_info,
            model=os.path.basename(answer.model_alias or path or "") or None,
            model_path=path,
            chat_template=bytes(answer.chat_template) not in (b'""', b"null"),
            grammar=True,
        )

    async def busy_slots(self) -> int:
        """How many slots `/slots` shows at work."""
        slots = await self._ask("GET", "/slots", list[_Slot])
        return sum(slot.is_processing for slot in slots)

    async def model_digest(self, model_path: str) -> str | None:
        """`sha256:…` of the model file, hashed off the loop; None where it is not readable from here."""
        if not _is_loopback(self.url.host or ""):
            return None  # a file of that name on this machine need not be the engine's
        return await asyncio.to_thread(self._digest, model_path)

    def _digest(self, model_path: str) -> str | None:
        if not os.path.isabs(model_path) or not os.path.isfile(model_path):
            return None  # it may be another's folder; opening a FIFO would wait, a device would not end
        try:
            with open(model_path, "rb") as file:
                stat = os.fstat(file.fileno())
                key = (model_path, stat.st_size, stat.st_mtime_ns)
                if key not in self._digests:
                    digest = hashlib.sha256()
                    while block := file.read(_HASH_BLOCK_BYTES):
                        if self._closing.is_set():
                            return None
                        digest.update(block)
                    self._digests[key] = f"sha256:{digest.hexdigest()}"
                return self._digests[key]
        except OSError:
            return None

    async def close(self) -> None:
        """Close every connection."""
        self._closing.set()
        self._spare.close()
        await self._session.close()

    def _request(
        self, method: str, path: str, body: bytes | aiohttp.Payload | None, timeout: aiohttp.ClientTimeout
    ) -> Any:  # aiohttp's request context manager has no public name
        if self._session.closed:
            raise EngineRefused("the adapter is closed", sent=False)
        return self._session.request(
            method, self._url_of(path), data=body, timeout=timeout, allow_redirects=False
        )

    async def _ask(
        self,
        method: str,
        path: str,
        kind: type[T],
        body: bytes | None = None,
        *,
        limit: int = MAX_ANSWER_BYTES,
    ) -> T:
        answered = False
        try:
            async with self._request(method, path, body, self._control_timeout) as response:
                answered = True
                await _check_status(response)
                answer = await _read(response, limit)
        except _FOREIGN as error:
            raise self._failure(error, answered=answered) from error
        try:
            return msgspec.json.decode(answer, type=kind)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise EngineBroken(f"{path} answered with something else ({_OTHER_PROGRAM}): {error}") from error

    def _failure(self, error: Exception, *, answered: bool) -> EngineFailure:
        """What something foreign means; before the answer's headers it is a refusal."""
        if isinstance(error, aiohttp.ClientConnectorError | aiohttp.ConnectionTimeoutError):
            if isinstance(getattr(error, "os_error", None), ConnectionRefusedError | FileNotFoundError):
                return EngineGone(f"nothing listens on {self.place}: is llama-server running?", sent=False)
            return EngineRefused(f"can't connect to {self.place}", detail=_say(error), sent=False)
        if isinstance(error, TimeoutError):
            return EngineStalled(f"the engine at {self.place} did not answer in time: is it stuck?")
        if isinstance(error, aiohttp.ClientResponseError):
            return EngineBroken("the engine's answer is not HTTP", detail=_say(error))
        if not isinstance(error, aiohttp.ClientError | OSError):
            return EngineBroken("the engine's answer can't be read", detail=_say(error))
        if answered:
            return EngineBroken("the engine broke off in mid-answer")
        return EngineRefused("the engine hung up before it answered")


def _hang_up(response: aiohttp.ClientResponse) -> None:
    """Close the connection of `response` now: a transport's own `close` takes another turn of the loop."""
    connection = response.connection
    if connection is not None and connection.transport is not None:
        with contextlib.suppress(OSError):  # the engine was first
            ours = connection.transport.get_extra_info("socket")
            with socket.socket(ours.family, ours.type, ours.proto, os.dup(ours.fileno())) as same:
                same.shutdown(socket.SHUT_RDWR)  # uvloop lets nobody do that to its own
    response.close()


def _completion_body(generation: Generation) -> bytes:
    sampling = generation.sampling
    body: dict[str, Any] = {
        "prompt": generation.prompt,
        "n_predict": generation.max_tokens,
        "stream": True,
        "cache_prompt": generation.cache_prompt,
        "return_progress": True,
        "response_fields": _FINAL_FIELDS,
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "min_p": sampling.min_p,
        "typical_p": sampling.typical_p,
        "repeat_penalty": sampling.repeat_penalty,
        "repeat_last_n": sampling.repeat_last_n,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
    }
    if generation.slot is not None:
        body["id_slot"] = generation.slot
    if sampling.seed is not None:
        body["seed"] = sampling.seed
    if sampling.stop:
        body["stop"] = sampling.stop
    if sampling.grammar is not None:
        body["grammar"] = sampling.grammar
    if sampling.json_schema is not None:
        body["json_schema"] = msgspec.Raw(sampling.json_schema)
    return msgspec.json.encode(body)


def _one_token(block: bytes) -> str | None:
    """The text, if `block` is one whole event of one token and nothing else, as it nearly always is."""
    if block[:6] != b"data: " or block.find(b"\n") != len(block) - 2 or block[-1] != 10 or b"\r" in block:
        return None
    try:
        said = _decode_event(block[6:-2])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None  # the parser says what is wrong
    if said.stop or said.error is not UNSET or said.content is UNSET:
        return None
    return said.content


def _chunk(events: list[ServerEvent]) -> tuple[Chunk, EngineBroken | None]:
    """All events of one read in one chunk, up to the final one; and what is wrong with the next, if it is."""
    texts: list[str] = []
    prefill, only_prefill = None, True
    for event in events:
        try:
            said = _said(event)
        except EngineBroken as broken:
            return Chunk(texts), broken
        if said.prompt_progress is not UNSET and not said.content and not said.stop:
            prefill = _prefill(said.prompt_progress) or prefill
            continue
        only_prefill = False
        if said.content:
            texts.append(said.content)
        if said.stop:
            reason: FinishReason = "length" if said.stop_type == "limit" else "stop"
            return Chunk(texts, Final(reason, said.tokens_predicted, said.tokens_evaluated)), None
    return Chunk([], begun=True, prefill=prefill) if only_prefill else Chunk(texts), None


def _prefill(said: msgspec.Raw) -> Prefill | None:
    """How far the engine is with the prompt; None for what can't be read: no task should fail of that."""
    try:
        progress = msgspec.json.decode(said, type=_PromptProgress)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    return Prefill(progress.total, min(progress.processed, progress.total))


def _said(event: ServerEvent) -> _Event:
    try:
        said = _decode_event(event.data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise EngineBroken("an event that is not what the engine sends", detail=str(error)) from error
    if event.name == b"error" or said.error is not UNSET:
        raise EngineBroken("the engine reported an error", detail=_error_text(event.data))
    if said.content is UNSET and said.prompt_progress is UNSET and not said.stop:
        raise EngineBroken("an event without content")
    return said


def _error_text(body: bytes) -> str:
    try:
        text = msgspec.json.decode(body, type=_ErrorAnswer).error.message
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        text = body[:200].decode("utf-8", "replace")
    return " ".join(text.split())[:500] or "no message"


async def _check_status(response: aiohttp.ClientResponse) -> None:
    """Return on 200; else raise what the status means (CONTRACT section 7)."""
    status = response.status
    if status == 200:
        return
    body = await _read(response, MAX_ERROR_BYTES, cut=True)
    summary, detail = f"{response.method} {response.url.path} answered {status}", _error_text(body)
    if status in (400, 413, 422):
        try:
            kind = msgspec.json.decode(body, type=_ErrorAnswer).error.type
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            kind = ""
        refused = EngineContextOverflow if kind == "exceed_context_size_error" else EngineInvalidRequest
        raise refused(summary, detail=detail, sent=False)
    if status in (401, 403, 404, 501):
        cure = _cure(status, response.url.path)
        raise EngineMisconfigured(f"{summary} ({cure})" if cure else summary, detail=detail, sent=False)
    if status == 503:
        raise EngineLoading(summary, detail=detail, sent=False)
    raise EngineBroken(summary, detail=detail)


def _cure(status: int, path: str) -> str:
    """How to mend an engine that no task can use; empty where its own words have to do."""
    if status in (401, 403):
        return _API_KEY
    if path == "/slots":
        return "start llama-server with --slots"
    return _OTHER_PROGRAM if status == 404 else ""


async def _read(response: aiohttp.ClientResponse, limit: int, *, cut: bool = False) -> bytes:
    """The body, at most `limit` bytes; a longer one is cut off, or is an EngineBroken."""
    body = bytearray()
    async for block in response.content.iter_any():
        body += block
        if len(body) > limit:
            if cut:
                break
            raise EngineBroken(f"{response.url.path} answered with over {limit} bytes")
    return bytes(body[:limit])


def _say(error: Exception) -> str:
    reason = getattr(getattr(error, "os_error", None), "strerror", None)  # without aiohttp's words around it
    return " ".join(str(reason or error).split())[:300] or type(error).__name__


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"

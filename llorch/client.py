"""llorch over HTTP: submit, follow, cancel, snapshots; for the command line and for whoever likes.

    async with Client("http://127.0.0.1:8080") as client:
        task = await client.submit({"prompt": "hello"})
        async for event in client.follow(task.task_id):
            ...

The one rule: a broken connection loses nothing and repeats nothing. `follow` resumes after the last event
that it handed out; what could have been admitted is never sent twice.
"""

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from typing import Any, TypeVar
from urllib.parse import quote

import aiohttp
import msgspec
from yarl import URL

from llorch import __version__
from llorch.adapters.sse import EventTooLong, ServerEvent, SseParser
from llorch.answers import (
    BadAnswer,
    BadUrl,
    Broken,
    Busy,
    Cancelled,
    ClientError,
    Created,
    Envelope,
    Event,
    Metrics,
    NotAllowed,
    NotFound,
    Pool,
    Refused,
    ServerBug,
    Snapshot,
    Status,
    TaskList,
    TooOld,
    Unavailable,
    Unreachable,
)
from llorch.events import End, Error, Started, Token

CONNECT_S = 5.0
ANSWER_S = 60.0
SILENCE_S = 45.0  # a stream's heartbeats come every 10 s
PATIENCE_S = 60.0
LONGEST_PAUSE_S = 5.0
MAX_ANSWER_BYTES = 64 * 1024 * 1024
MAX_EVENT_BYTES = 1024 * 1024

T = TypeVar("T")

_BY_STATUS: dict[int, type[Refused]] = {
    401: NotAllowed,
    403: NotAllowed,
    404: NotFound,
    429: Busy,
    500: ServerBug,
    503: Unavailable,
}
_GATEWAY = (502, 503, 504)
_EVENTS: dict[bytes, Any] = {
    b"started": Started,
    b"token": Token,
    b"end": End,
    b"error": Error,
    b"metrics": Metrics,
}


# -- paths -----------------------------------------------------------------------------------------

TASKS = "/v1/tasks"
STATUS = "/v1/status"


def task_path(task_id: str) -> str:
    """Of one task."""
    return f"{TASKS}/{quote(task_id, safe='')}"


def list_path(state: str | None, limit: int) -> str:
    """Of recent tasks."""
    return f"{TASKS}?limit={limit}" + (f"&state={quote(state)}" if state else "")


def pool_path(pool_id: str, what: str = "health") -> str:
    """Of a pool's health, reload or drain."""
    return f"/v1/pools/{quote(pool_id, safe='')}/{what}"


# -- the client ------------------------------------------------------------------------------------


class Client:
    """Talks to the llorch at `url`, with `token` if there is one. Raises BadUrl.

    `pause` waits so many seconds between two tries; `clock` is monotonic.
    """

    def __init__(
        self,
        url: str,
        token: str = "",
        *,
        pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
        clock: Callable[[], float] = time.monotonic,
        silence_s: float = SILENCE_S,
    ) -> None:
        self.url = _base(url)
        if not all("!" <= char <= "~" for char in token):
            raise BadUrl("the token has other characters than visible ASCII ones: is it the right file?")
        self._token = token
        self._pause, self._clock = pause, clock
        self._stream_timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S, sock_read=silence_s)
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> "Client":
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, force_close=True),  # a reused one may be half closed
            cookie_jar=aiohttp.DummyCookieJar(),
            headers={
                **({"Authorization": f"Bearer {self._token}"} if self._token else {}),
                "Accept-Encoding": "identity",
                "User-Agent": f"llorch/{__version__}",
            },
            timeout=aiohttp.ClientTimeout(total=ANSWER_S, sock_connect=CONNECT_S),
            auto_decompress=False,
            trust_env=False,
        )
        return self

    async def __aexit__(self, *failure: object) -> None:
        assert self._session is not None
        await self._session.close()

    # -- questions ---------------------------------------------------------------------------------

    async def submit(self, task: Mapping[str, Any]) -> Created:
        """Hand in a task, once. Raises ClientError; after Unreachable with `sent` it may be admitted."""
        return await self.ask("POST", TASKS, Created, msgspec.json.encode(task))

    async def cancel(self, task_id: str) -> Cancelled:
        """End a task; can be asked any number of times. Raises ClientError."""
        return await self.ask("POST", f"{task_path(task_id)}/cancel", Cancelled)

    async def snapshot(self, task_id: str) -> Snapshot:
        """A task as it stands. Raises ClientError."""
        return await self.ask("GET", task_path(task_id), Snapshot)

    async def tasks(self, *, state: str | None = None, limit: int = 100) -> list[Snapshot]:
        """Recent tasks, newest first. Raises ClientError."""
        return (await self.ask("GET", list_path(state, limit), TaskList)).tasks

    async def pool(self, pool_id: str) -> Pool:
        """How a pool is. Raises ClientError."""
        return await self.ask("GET", pool_path(pool_id), Pool)

    async def status(self) -> Status:
        """The whole server. Raises TooOld, or another ClientError."""
        return await self.ask("GET", STATUS, Status)

    async def ask(self, method: str, path: str, kind: type[T], body: bytes | None = None) -> T:
        """One request; its answer as `kind`, msgspec.Raw for its very bytes. Raises ClientError."""
        headers = {} if body is None else {"Content-Type": "application/json"}
        async with self._answer(method, path, headers=headers, data=body) as response:
            answer = await _read(response, MAX_ANSWER_BYTES)
        try:
            return msgspec.json.decode(answer, type=kind)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            raise BadAnswer(f"{self.url} answered {path} with something that is not llorch's") from None

    # -- streams -----------------------------------------------------------------------------------

    async def follow(
        self,
        task_id: str,
        *,
        after: int | None = None,
        metrics: bool = False,
        patience_s: float = PATIENCE_S,
    ) -> AsyncGenerator[Event, None]:
        """Every event of a task after that with id `after`, each once, to its End or Error.

        A broken connection is a `Broken` event, and a new one after it; Unreachable is raised after
        `patience_s` without one. Of Metrics there are any number, if asked for. Raises ClientError.
        """
        place = _Place(after)
        tries, broken_since = 0, self._clock()
        while True:
            wait_s = 0.0
            try:
                async with contextlib.aclosing(self._connection(task_id, place, metrics)) as events:
                    async for event in events:
                        tries = 0
                        yield event
                        if isinstance(event, End | Error):
                            return
                reason = "the stream broke off"
            except Unreachable as error:
                reason = str(error)
            except NotFound as error:
                raise _gone(error, task_id) if tries else error from None
            except Unavailable as error:
                reason, wait_s = str(error), error.retry_after_s
            if tries == 0:
                broken_since = self._clock()
            elif self._clock() - broken_since > patience_s:
                raise Unreachable(f"given up after {patience_s:g} s: {reason}", sent=False)
            wait_s = max(wait_s, _backoff_s(tries))
            tries += 1
            yield Broken(reason, wait_s)
            await self._pause(wait_s)

    async def _connection(
        self, task_id: str, place: "_Place", metrics: bool
    ) -> AsyncGenerator[Started | Token | End | Error | Metrics, None]:
        """The events of one connection, as far as it goes; none that was seen before."""
        path = f"{task_path(task_id)}/stream" + ("?metrics=1" if metrics else "")
        headers = {"Accept": "text/event-stream"}
        if place.last_id is not None:
            headers["Last-Event-ID"] = str(place.last_id)
        async with self._answer("GET", path, headers=headers, timeout=self._stream_timeout) as response:
            if response.status == 204:
                yield _ending(await self.snapshot(task_id))
                return
            if response.content_type != "text/event-stream":
                raise BadAnswer(f"{self.url}: the stream is {response.content_type[:60]!r}")
            parser = SseParser(MAX_EVENT_BYTES)
            async for block in response.content.iter_any():
                for said in parser.feed(block):
                    if (event := place.take(said)) is not None:
                        yield event

    # -- one request -------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def _answer(self, method: str, path: str, **options: Any) -> AsyncIterator[aiohttp.ClientResponse]:
        """The answer to one request, if it is a good one; all that aiohttp raises becomes a ClientError."""
        assert self._session is not None, "use it as a context manager"
        url = URL(f"{self.url}{path}", encoded=True)
        try:
            async with self._session.request(method, url, allow_redirects=False, **options) as response:
                if response.status not in (200, 202, 204):
                    raise await self._refusal(response)
                yield response
        except aiohttp.ClientConnectorError as error:
            raise Unreachable(self._no_connection(error), sent=False) from None
        except aiohttp.ConnectionTimeoutError:
            raise Unreachable(f"no connection to {self.url} within {CONNECT_S:g} s", sent=False) from None
        except TimeoutError:
            raise Unreachable(f"{self.url} went silent", sent=True) from None
        except (aiohttp.ClientResponseError, EventTooLong, ValueError):
            raise BadAnswer(f"what {self.url} answers is not HTTP as llorch speaks it") from None
        except (aiohttp.ClientError, OSError):
            raise Unreachable(f"the connection to {self.url} broke", sent=True) from None

    def _no_connection(self, error: aiohttp.ClientConnectorError) -> str:
        cause = getattr(error, "os_error", error)  # a bad certificate has none
        why = getattr(cause, "strerror", None) or str(cause)
        if isinstance(error, aiohttp.ClientConnectorDNSError):
            return f"no such host as in {self.url}: {why}"
        if isinstance(error, aiohttp.ClientSSLError):
            return f"no TLS with {self.url}: {why}"
        if isinstance(cause, ConnectionRefusedError):
            return (
                f"nothing listens at {self.url}: is `llorch serve` running? "
                "(another place: --url or LLORCH_URL)"
            )
        return f"no connection to {self.url}: {why}"

    async def _refusal(self, response: aiohttp.ClientResponse) -> ClientError:
        status, body = response.status, await _read(response, MAX_EVENT_BYTES)
        try:
            envelope = msgspec.json.decode(body, type=Envelope)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            if status in _GATEWAY:  # a reverse proxy whose llorch is away
                return Unreachable(f"{self.url} answered {status}: is llorch behind it running?", sent=True)
            return BadAnswer(f"what answers at {self.url} is not llorch ({status} for {response.url.path})")
        if envelope.code == "NOT_FOUND":
            return TooOld(f"the llorch at {self.url} is too old: it has no {response.url.path}")
        if envelope.retry_after_ms is None and response.headers.get("Retry-After", "").isdecimal():
            seconds = int(response.headers["Retry-After"][:6])
            envelope = msgspec.structs.replace(envelope, retry_after_ms=1000 * seconds)
        return _BY_STATUS.get(status, ServerBug if status > 500 else Refused)(envelope, status)


class _Place:
    """How far a task's stream was read: nothing is handed out twice, no gap goes unseen."""

    def __init__(self, after: int | None) -> None:
        self.last_id = after
        self._next_token: int | None = 0 if after is None else None
        self._started = after is not None

    def take(self, said: ServerEvent) -> Started | Token | End | Error | Metrics | None:
        """The event, None for one seen before or not known. Raises BadAnswer where a token is missing."""
        kind = _EVENTS.get(said.name)
        if kind is None:
            return None
        try:
            event: Started | Token | End | Error | Metrics = msgspec.json.decode(said.data, type=kind)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            raise BadAnswer(f"an event {said.name.decode()!r} that is not llorch's") from None
        if isinstance(event, Metrics):
            return event
        if isinstance(event, Started):
            seen, self._started = self._started, True
        elif isinstance(event, Token):
            expected = event.i if self._next_token is None else self._next_token
            if event.i > expected:
                raise BadAnswer(f"token {expected} is missing in the stream")
            seen, self._next_token = event.i < expected, max(expected, event.i + 1)
        else:
            seen = False
        if not seen and said.id.isdigit():
            self.last_id = int(said.id[:9])
        return None if seen else event


def _gone(error: NotFound, task_id: str) -> NotFound:
    message = f"task {task_id} is gone: llorch was restarted meanwhile, or dropped it to make room"
    return NotFound(msgspec.structs.replace(error.answer, message=message), error.status)


def _ending(task: Snapshot) -> End | Error:
    """What the stream of a task that has ended said last."""
    if task.state == "failed":
        return task.error or Error("INTERNAL", retriable=False)
    reason = "cancelled" if task.state == "cancelled" else task.finish_reason
    return msgspec.convert(
        {
            "tokens_out": task.tokens_out,
            "finish_reason": reason,
            "decode_time_ms": task.timings.decode_time_ms,
            "tokens_in": task.tokens_in,
        },
        End,
    )


def _backoff_s(tries: int) -> float:
    """Nothing before the first try, then 0.25 s, 0.5 s … 5 s, a little scattered."""
    if tries == 0:
        return 0.0
    return float(min(LONGEST_PAUSE_S, 0.125 * 2**tries) * random.uniform(0.8, 1.0))


def _base(text: str) -> str:
    """`http://host:port` with a path before llorch's if a proxy has one, without the last slash."""
    expected = "expected http://host:port, with --url or LLORCH_URL"
    try:
        url = URL(text)
        good = url.scheme in ("http", "https") and url.host and url.port and not url.user and not url.password
        good = good and not url.query_string and not url.fragment
    except ValueError:
        good = False
    if not good:
        raise BadUrl(f"{'(hidden)' if '@' in text else repr(text)} is not the URL of a server: {expected}")
    return str(url).rstrip("/")


async def _read(response: aiohttp.ClientResponse, limit: int) -> bytes:
    body = bytearray()
    async for block in response.content.iter_any():
        body += block
        if len(body) > limit:
            raise BadAnswer(f"an answer of over {limit} bytes")
    return bytes(body)

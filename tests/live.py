"""A whole llorch in this process, on a real socket, in front of a fake engine; for tests of its HTTP.

    async with Live(engine, {"queue": {"capacity": 2}}) as live:
        task = await live.submit(prompt="hello")
        assert names(await live.events(task)) == "started token end"

The one rule: it is put together, started and stopped as the server does it; and when it has stopped nothing
may be left: no asyncio task, no lease, no reservation, no reader.
"""

import asyncio
import contextlib
import json
import math
import re
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import aiohttp
from multidict import CIMultiDictProxy

from llorch import config, replica, server
from tests import described
from tests.fakes import PATIENCE_S, FakeLlamaServer

TOKEN = "a-token-of-the-tests-0123456789"
_LINE = re.compile(rb"\r\n|\r(?!\Z)|\n")  # a CR at the very end may be half a CRLF


class Event(NamedTuple):
    """One server-sent event, its `data` decoded; one without `id:` has the last one, else -1."""

    id: int
    name: str
    data: dict[str, Any]


def names(events: list[Event]) -> str:
    """The names of events, in one string."""
    return " ".join(event.name for event in events)


def text(events: list[Event]) -> str:
    """The tokens of a stream, joined."""
    return "".join(event.data["t"] for event in events if event.name == "token")


class Answer(NamedTuple):
    """A whole HTTP answer; `body` is decoded JSON, None where there is none."""

    status: int
    headers: CIMultiDictProxy[str]
    body: Any


def refused(live: "Live", answer: Answer, status: int, code: str, **more: Any) -> None:
    """Assert that `answer` is this refusal, in the exact envelope of the profile, with `more` fields.

    The home profile says of itself only what a client needs to come back later.
    """
    home, waits = live.config.profile == "home", status in (429, 503)
    engine = more.pop("engine", None)
    if home:
        more = {name: value for name, value in more.items() if waits and name.startswith("retr")}
    assert answer.body.keys() == {"code", "message", "engine", *more}, answer.body
    assert answer.body == {"code": code, "engine": engine, "message": answer.body["message"], **more}
    assert answer.status == status
    assert answer.headers["Content-Type"] == "application/json"
    assert ("X-Correlation-Id" in answer.headers) is not home
    wait_ms = answer.body.get("retry_after_ms")
    assert answer.headers.get("Retry-After") == (str(math.ceil(wait_ms / 1000)) if waits else None)


class EventReader:
    """A reader of `text/event-stream` by the standard, one event at a time."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self.response = response
        self.comments = 0
        self._blocks = response.content.iter_any()
        self._rest = b""
        self._ready: list[Event] = []
        self._fields: dict[bytes, bytes] = {}
        self._id = b""

    async def next(self) -> Event | None:
        """The next event, None at the end of the stream."""
        async with asyncio.timeout(PATIENCE_S):
            while not self._ready:
                if not await self._read():
                    return None
        return self._ready.pop(0)

    async def rest(self) -> list[Event]:
        """Every event from here to the end."""
        found = []
        while (event := await self.next()) is not None:
            found.append(event)
        return found

    async def comment(self) -> None:
        """Return once another comment line has come."""
        before = self.comments
        async with asyncio.timeout(PATIENCE_S):
            while self.comments == before:
                assert await self._read(), "the stream ended"

    async def _read(self) -> bool:
        block = await anext(self._blocks, b"")
        *lines, self._rest = _LINE.split(self._rest + block)
        for line in lines:
            self._take(line)
        return bool(block)

    def _take(self, line: bytes) -> None:
        name, _, value = line.partition(b":")
        if line == b"":
            self._dispatch()
        elif name == b"":
            self.comments += 1
        elif name == b"id":
            self._id = value.removeprefix(b" ")
        else:
            before = self._fields.get(name)
            value = value.removeprefix(b" ")
            self._fields[name] = value if before is None or name != b"data" else before + b"\n" + value

    def _dispatch(self) -> None:
        fields, self._fields = self._fields, {}
        if b"data" in fields:
            name = fields.get(b"event", b"message").decode()
            self._ready.append(Event(int(self._id or b"-1"), name, json.loads(fields[b"data"])))


class Live:
    """llorch at `url`. `settings` are tables of the configuration; `headers` go with every request.

    With a `file` the engines are what that says.
    """

    def __init__(
        self,
        engine: FakeLlamaServer,
        settings: dict[str, dict[str, Any]] | None = None,
        *,
        profile: str = "mvp",
        port: int = 0,
        file: Path | None = None,
    ) -> None:
        flat: dict[str, Any] = {"bind_addr": "127.0.0.1:0", "profile": profile, "gpu.required": False}
        if file is None:
            flat |= {"adapter.endpoint": engine.url, "adapter.self_test": False}
        flat |= {"auth.token": TOKEN} if profile == "home" else {}
        for table, keys in (settings or {}).items():
            flat |= {f"{table}.{key}": value for key, value in keys.items()}
        self.config = config.load(file, flags=flat)
        self.flags = flat  # what a reload is told besides the file
        self._reread = lambda: config.load(file, flags=self.flags)
        self.engine = engine
        self.headers = {"Authorization": f"Bearer {TOKEN}"} if self.config.auth.token else {}
        self.port = port
        self.transports: list[asyncio.Transport] = []  # the server's side of every connection
        self._open = contextlib.AsyncExitStack()

    async def __aenter__(self) -> "Live":
        self._before = asyncio.all_tasks()
        self._open.enter_context(patch.object(replica, "DRAIN_POLL_S", (0.001, 0.002)))
        self._open.enter_context(patch.object(server.Protocol, "connection_made", self._connected))
        sock = self._open.enter_context(socket.create_server(("127.0.0.1", self.port)))
        self.port = sock.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.secrets: list[str] = []
        reading = server.Reading(self._reread, self.secrets.extend)
        house = await self._open.enter_async_context(server.listening(self.config, sock, "test", reading))
        self.orchestrator, self.reloader = house.orchestrator, house.reloader
        self.pool = self.orchestrator.pools[self.orchestrator.default_pool]
        self.replica = self.pool.replicas[0]
        self.work = asyncio.create_task(self.orchestrator.run(), name="orchestrator")
        self.session = aiohttp.ClientSession(self.url, connector=aiohttp.TCPConnector(limit=0))
        return self

    async def __aexit__(self, *failure: object) -> None:
        await self.session.close()
        for task in self.orchestrator.recent(None, 10_000):
            task.cancel()
        if failure == (None, None, None):
            for pool in self.orchestrator.pools.values():
                for held in pool.replicas:
                    await eventually(lambda held=held: not held.leases, "a lease is left")
            async with asyncio.timeout(PATIENCE_S):
                await self.orchestrator.readers_gone()
        self.orchestrator.stop()
        self.work.cancel()
        await asyncio.wait({self.work})
        await self._open.aclose()
        if failure == (None, None, None):
            assert self.work.cancelled(), f"the orchestrator failed: {self.work.exception()!r}"
            queue = self.pool.queue
            assert (len(queue), queue.reserved, queue.reserved_bytes, queue.waiting_bytes) == (0, 0, 0, 0)
            await eventually(lambda: not self._left_over(), "an asyncio task is left")

    @property
    def _connected(self) -> Callable[[server.Protocol, asyncio.Transport], None]:
        original = server.Protocol.connection_made

        def connection_made(protocol: server.Protocol, transport: asyncio.Transport) -> None:
            self.transports.append(transport)
            original(protocol, transport)

        return connection_made

    def _left_over(self) -> set[asyncio.Task[Any]]:
        return asyncio.all_tasks() - self._before - {asyncio.current_task()}

    # -- requests ----------------------------------------------------------------------------------

    async def ask(
        self, method: str, path: str, *, headers: dict[str, str] | None = None, **options: Any
    ) -> Answer:
        """One request, with the token if there is one, and the whole answer."""
        sent = self.headers if headers is None else headers
        async with asyncio.timeout(PATIENCE_S):
            async with self.session.request(method, path, headers=sent, **options) as response:
                body = await response.read()
                answer = Answer(response.status, response.headers, json.loads(body) if body else None)
                described.check(
                    response.method, response.url.path, answer.status, answer.headers, answer.body
                )
                return answer

    async def get(self, path: str, **options: Any) -> Answer:
        """GET it."""
        return await self.ask("GET", path, **options)

    async def post(self, task: object = None, **options: Any) -> Answer:
        """Hand in a task, whatever the answer."""
        given = {"json": {"prompt": "hello"} if task is None else task} if "data" not in options else {}
        return await self.ask("POST", "/v1/tasks", **given, **options)

    async def submit(self, **task: Any) -> dict[str, Any]:
        """Hand in a task that is admitted; the body of the answer."""
        answer = await self.post({"prompt": "hello", **task} if "messages" not in task else task)
        assert answer.status == 202, answer.body
        return answer.body

    async def submit_held(self, **task: Any) -> dict[str, Any]:
        """Hand in a task that the engine gets at once, and keeps: it must `hold`."""
        count = len(self.engine.completions)
        created = await self.submit(**task)
        await self.engine.started(count + 1)
        return created

    async def snapshot(self, task: dict[str, Any]) -> dict[str, Any]:
        """The task as it stands."""
        answer = await self.get(f"/v1/tasks/{task['task_id']}")
        assert answer.status == 200, answer.body
        return answer.body

    async def cancel(self, task: dict[str, Any]) -> dict[str, Any]:
        """Cancel it; the body of the answer."""
        answer = await self.ask("POST", task["cancel_url"])
        assert answer.status == 200, answer.body
        return answer.body

    async def health(self) -> dict[str, Any]:
        """How the pool is."""
        return (await self.get("/v1/pools/default/health")).body

    async def scrape(self) -> str:
        """The text that Prometheus gets."""
        async with self.session.get("/metrics", headers=self.headers) as response:
            described.check("GET", "/metrics", response.status, response.headers, None)
            assert response.content_type == "text/plain"
            return await response.text()

    # -- streams -----------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def stream(
        self, task: dict[str, Any], last_event_id: object = None, **options: Any
    ) -> AsyncIterator[EventReader]:
        """A stream of the task, open."""
        headers = {**self.headers, **options.pop("headers", {})}
        if last_event_id is not None:
            headers["Last-Event-ID"] = str(last_event_id)
        async with self.session.get(task["stream_url"], headers=headers, **options) as response:
            assert response.status == 200, await response.text()
            yield EventReader(response)

    async def events(self, task: dict[str, Any], last_event_id: object = None, **options: Any) -> list[Event]:
        """Every event of the task, to the end of the stream."""
        async with self.stream(task, last_event_id, **options) as stream:
            return await stream.rest()

    # -- below HTTP --------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def connection(
        self, *, receive_buffer: int | None = None
    ) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        """A bare TCP connection, with a small receive buffer if asked."""
        sock = socket.socket()
        if receive_buffer is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", self.port))
        reader, writer = await asyncio.open_connection(sock=sock, limit=receive_buffer or 2**16)
        try:
            yield reader, writer
        finally:
            writer.transport.abort()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    def other_side(self, client: asyncio.StreamWriter) -> asyncio.Transport:
        """The server's transport of the connection that `client` has accepted by now."""
        mine = client.get_extra_info("sockname")
        return next(t for t in self.transports if t.get_extra_info("peername") == mine)

    async def raw(self, *blocks: bytes) -> bytes:
        """Send these bytes, and return all that comes until the server closes the connection."""
        async with self.connection() as (reader, writer), asyncio.timeout(PATIENCE_S):
            found = b""
            with contextlib.suppress(ConnectionError):
                for block in blocks:
                    writer.write(block)
                    await writer.drain()
                while block := await reader.read(2**16):
                    found += block
            return found


async def eventually(condition: Callable[[], object], otherwise: str) -> None:
    """Return once `condition` holds, after as many turns of the loop as that takes."""
    try:
        async with asyncio.timeout(PATIENCE_S):
            while not condition():  # noqa: ASYNC110  # no event tells
                await asyncio.sleep(0)
    except TimeoutError:
        raise AssertionError(otherwise) from None

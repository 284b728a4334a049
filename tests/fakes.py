"""A scripted llama-server on a real TCP socket, for every test that needs an engine.

    async with FakeLlamaServer(slots=2) as engine:          # engine.url, engine.requests, engine.completions
        engine.script(broken_off)                           # plays for the next /completion
        await engine.started(1)                             # a completion has been received

The one rule: it says what the real one says, byte for byte where that matters, unless a script says
otherwise. A script is a coroutine function: it is given the `Connection` and plays until it returns (which
ends the body properly) or the client closes the connection (which cancels it and frees the slot).
"""

import asyncio
import contextlib
import hashlib
import json
import socket
import struct
from collections import defaultdict, deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Literal

LINGER_0 = struct.pack("ii", 1, 0)  # close means RST
PATIENCE_S = 20.0  # before a test that waits in vain fails with a traceback, instead of hanging

Script = Callable[["Connection"], Awaitable[None]]


class ClientGone(Exception):
    """The client has closed the connection that a script still writes to."""


@dataclass(frozen=True)
class Request:
    """One request as it came: `headers` in lower case, `body` decoded from JSON, None if there was none."""

    method: str
    path: str
    headers: dict[str, str]
    raw: bytes
    body: Any


class Connection:
    """One request and the answer to it, piece by piece; a piece for one who has left raises ClientGone."""

    def __init__(
        self,
        engine: "FakeLlamaServer",
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        request: Request,
    ) -> None:
        self.request = request
        self.slot: int | None = None
        self.gone = asyncio.Event()  # the client closed it
        self.over = asyncio.Event()  # we ended it
        self.finished = False  # the final chunk has gone out
        self.tokens_out = 0
        self.bytes_sent = 0
        self._engine, self._reader, self._writer = engine, reader, writer
        self.begun = False

    # -- the answer of /completion -----------------------------------------------------------------

    async def headers(self, content_type: str = "text/event-stream", *, more: str = "") -> None:
        """The head of a streamed answer; the other pieces send it themselves if it has not gone out."""
        self.begun = True
        await self.send(
            "HTTP/1.1 200 OK\r\nServer: llama.cpp\r\nAccess-Control-Allow-Origin: \r\n"
            "X-Accel-Buffering: no\r\n"
            f"Content-Type: {content_type}\r\nTransfer-Encoding: chunked\r\n{more}"
            "Keep-Alive: timeout=5, max=100\r\n\r\n".encode()
        )

    async def token(self, text: str | None = None, *, tokens: int = 1) -> None:
        """One chunk with `text`, which took that many tokens; the next word of the default text for None."""
        if text is None:
            text = self.word(self.tokens_out)
        self.tokens_out += tokens
        await self.event(
            {
                "index": 0,
                "content": text,
                "tokens": [1000 + self.tokens_out],
                "stop": False,
                "id_slot": -1,
                "tokens_predicted": self.tokens_out,
                "tokens_evaluated": self._engine.count_tokens(self.request.body["prompt"]),
            }
        )

    async def progress(self, processed: int, total: int | None = None) -> None:
        """How far it is with the prompt, in tokens, if the request asks for that."""
        if not self.request.body.get("return_progress"):
            return
        total = self._engine.count_tokens(self.request.body["prompt"]) if total is None else total
        said = {"total": total, "cache": 0, "processed": processed, "time_ms": 7}
        await self.event(
            {
                "index": 0,
                "content": "",
                "tokens": [0],
                "stop": False,
                "id_slot": -1,
                "tokens_predicted": 0,
                "tokens_evaluated": total,
                "prompt_progress": said,
            }
        )

    async def final(self, stop_type: str = "limit", **fields: Any) -> None:
        """The final chunk, cut down to the `response_fields` of the request; `fields` override."""
        everything = {
            "index": 0,
            "content": "",
            "tokens": [],
            "id_slot": self.slot,
            "stop": True,
            "model": self._engine.model_path,
            "tokens_predicted": self.tokens_out,
            "tokens_evaluated": self._engine.count_tokens(self.request.body["prompt"]),
            "generation_settings": {"seed": self.request.body.get("seed", 4294967295)},
            "prompt": self.request.body["prompt"],
            "has_new_line": False,
            "truncated": False,
            "stop_type": stop_type,
            "stopping_word": "",
            "tokens_cached": self.tokens_out,
            "timings": {
                "cache_n": 0,
                "prompt_n": 1,
                "prompt_ms": 8.1,
                "predicted_n": 3,
                "predicted_ms": 16.8,
            },
        } | fields
        asked = self.request.body.get("response_fields") or list(everything)
        self.finished = True
        await self.event({name: everything[name] for name in asked if name in everything})

    async def finish(self, stop_type: str = "limit", **fields: Any) -> None:
        """The final chunk and the end of the body."""
        await self.final(stop_type, **fields)
        await self.end()

    async def error_frame(self, message: str = "kaputt", *, old: bool = False) -> None:
        """An error in mid-stream; `old`: as older builds sent it, in a line `error: …`."""
        error = {"code": 500, "message": message, "type": "server_error"}
        if old:
            await self.chunk(b"error: " + _json(error) + b"\n\n")
        else:
            await self.event({"error": error})

    async def event(self, said: object) -> None:
        """One `data:` event with `said` as JSON."""
        await self.chunk(b"data: " + _json(said) + b"\n\n")

    async def ping(self) -> None:
        """The comment that says nothing but that the socket lives."""
        await self.chunk(b":\n\n")

    async def chunk(self, data: bytes) -> None:
        """One HTTP chunk of the streamed body."""
        if not self.begun:
            await self.headers()
        await self.send(b"%x\r\n%b\r\n" % (len(data), data))

    async def end(self) -> None:
        """The proper end of the streamed body. A script that returns has it too."""
        self.over.set()
        await self.send(b"0\r\n\r\n")

    def word(self, index: int) -> str:
        """Word `index` of the default text: a function of prompt and seed alone."""
        body = self.request.body
        return f" {_digest(body['prompt'], body.get('seed'))}-{index}"

    # -- any answer --------------------------------------------------------------------------------

    async def answer(self, status: int, body: object = b"", *, more: str = "") -> None:
        """A whole answer that is not a stream; `body` is bytes or becomes JSON."""
        data = body if isinstance(body, bytes) else _json(body)
        kept = "Keep-Alive: timeout=5, max=100" if status == 200 else "Connection: close"
        head = (
            f"HTTP/1.1 {status} Whatever\r\nServer: llama.cpp\r\n{more}"
            "Content-Type: application/json; charset=utf-8\r\n"
            f"Content-Length: {len(data)}\r\n{kept}\r\n\r\n"
        )
        await self.send(head.encode() + data)
        self.begun = True
        self.over.set()

    async def send(self, data: bytes) -> None:
        """Any bytes; returns when the kernel has them."""
        if self.gone.is_set() or self._writer.is_closing():
            raise ClientGone
        self._writer.write(data)
        try:
            await self._writer.drain()
        except ConnectionError:
            raise ClientGone from None
        self.bytes_sent += len(data)
        self._engine.tell()

    def fin(self) -> None:
        """Close the connection here and now, whatever was said so far."""
        self.over.set()
        self._writer.close()

    def rst(self) -> None:
        """Reset the connection here and now."""
        self.over.set()
        _reset(self._writer)

    async def stall(self) -> None:
        """Say nothing more until the client has had enough."""
        await asyncio.Event().wait()

    async def play(self, script: Script) -> None:
        """Let `script` play to its end, or until the client leaves."""
        playing = asyncio.ensure_future(self._play(script))
        watching = asyncio.create_task(self._watch())
        try:
            await asyncio.wait({playing, watching}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            watching.cancel()
            playing.cancel()
            await asyncio.wait({playing, watching})
        with contextlib.suppress(asyncio.CancelledError, ClientGone):
            playing.result()

    async def _play(self, script: Script) -> None:
        await script(self)
        if self.begun and not self.over.is_set():
            await self.end()

    async def _watch(self) -> None:
        with contextlib.suppress(ConnectionError):
            while await self._reader.read(4096):
                pass
        if not self.over.is_set():
            self.gone.set()


_TURNS_TO_ACCEPT = 4


@dataclass
class FakeLlamaServer:
    """A llama-server that generates numbered words, or plays scripts. Attributes may be changed at any time.

    `hold`: completions send their headers and then only what the test lets out, by the methods of
    `engine.held[i]`. `lingering`: a slot whose client left stays busy until `let_go()`.
    `health`: "loading" answers 503 on every route, "error" and "hang" are `/health`'s alone.
    """

    slots: int = 2
    ctx: int = 4096
    hold: bool = False
    api_key: str = ""
    model_path: str = "/models/fake-1b.gguf"
    build: str = "b4242-fake"
    chat_template: str = "{{ messages }}"
    health: Literal["ok", "loading", "error", "hang"] = "ok"
    lingering: bool = False
    pace_s: float = 0.0  # between the tokens of the default script; for demonstrations, not for tests
    socket_path: str = ""  # listen there instead of on a port

    def __post_init__(self) -> None:
        self.requests: list[Request] = []
        self.completions: list[Connection] = []
        self.connections = 0  # TCP connections accepted
        self.waited = 0  # completions that found no free slot: llorch must never cause one
        self._busy: dict[int, Connection] = {}
        self._scripts: defaultdict[str, deque[Script]] = defaultdict(deque)
        self._always: dict[str, Script] = {}
        self._aborted = 0
        self._faults: list[BaseException] = []
        self._handlers: dict[asyncio.Task[None], asyncio.StreamWriter] = {}
        self._news = asyncio.Event()
        self._server: asyncio.Server | None = None
        # Bound for good but never listening: nobody else gets the port while the engine is down.
        self._port_keeper = socket.socket()
        self._port_keeper.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._port_keeper.bind(("127.0.0.1", 0))
        self.port: int = self._port_keeper.getsockname()[1]
        self.url = f"unix:{self.socket_path}" if self.socket_path else f"http://127.0.0.1:{self.port}"

    # -- life --------------------------------------------------------------------------------------

    async def __aenter__(self) -> "FakeLlamaServer":
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()
        self._port_keeper.close()
        if self._faults:
            raise self._faults[0]  # a script's own mistake

    async def start(self) -> None:
        """Listen, on the same port every time."""
        if self.socket_path:
            self._server = await asyncio.start_unix_server(self._serve, self.socket_path, backlog=1024)
        else:
            self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port, backlog=1024)

    async def stop(self) -> None:
        """Close every connection and refuse new ones, until `start`."""
        await self._stop(lambda writer: writer.close())

    async def kill(self) -> None:
        """As SIGKILL does it: reset every connection and refuse new ones, until `start`."""
        await self._stop(_reset)

    async def _stop(self, end: Callable[[asyncio.StreamWriter], None]) -> None:
        if self._server is not None:
            for sock in self._server.sockets:  # a server that closes while it accepts leaks the connection
                asyncio.get_running_loop().remove_reader(sock.fileno())
            for _ in range(_TURNS_TO_ACCEPT):  # handlers of connections just accepted begin
                await asyncio.sleep(0)
            self._server.close()
            self._server = None
        handlers = dict(self._handlers)
        for handler, writer in handlers.items():
            end(writer)
            handler.cancel()
        await asyncio.gather(*handlers, return_exceptions=True)
        self._busy.clear()

    # -- for the test ------------------------------------------------------------------------------

    def script(self, *scripts: Script, path: str = "/completion") -> None:
        """Play these, in this order, for the next requests of `path`, one each."""
        self._scripts[path].extend(scripts)

    def always(self, script: Script | None, path: str = "/completion") -> None:
        """Play this for every request of `path` that has no script of its own; None: behave again."""
        if script is None:
            self._always.pop(path, None)
        else:
            self._always[path] = script

    @property
    def held(self) -> list[Connection]:
        """The completions, oldest first; with `hold` the test steps them."""
        return self.completions

    async def started(self, count: int = 1) -> Connection:
        """Return completion number `count` once it has been received."""
        await self.until(lambda: len(self.completions) >= count)
        return self.completions[count - 1]

    async def closed(self, count: int = 1) -> None:
        """Return once the client has closed so many completions that had not had their final chunk."""
        await self.until(lambda: self._aborted >= count)

    async def idle(self) -> None:
        """Return once no slot is busy."""
        await self.until(lambda: not self._busy)

    async def until(self, condition: Callable[[], bool]) -> None:
        """Return once `condition` holds; it is looked at after each thing that happens here."""
        async with asyncio.timeout(PATIENCE_S):
            while not condition():
                await self._news.wait()

    @property
    def busy_slots(self) -> int:
        """What `/slots` shows."""
        return len(self._busy)

    @property
    def open_connections(self) -> int:
        """TCP connections that stand now."""
        return len(self._handlers)

    def let_go(self) -> None:
        """Free the slots that linger; those of later leavers are freed at once again."""
        self.lingering = False
        self._busy = {slot: it for slot, it in self._busy.items() if not it.gone.is_set()}
        self.tell()

    def count_tokens(self, text: str) -> int:
        """One token per word."""
        return len(text.split())

    # -- the server --------------------------------------------------------------------------------

    def tell(self) -> None:
        """Something happened: whoever waits in `until` looks again."""
        news, self._news = self._news, asyncio.Event()
        news.set()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.tell()
        handler = asyncio.current_task()
        assert handler is not None
        self._handlers[handler] = writer
        writer.transport.set_write_buffer_limits(0)
        try:
            while (request := await _read_request(reader)) is not None:
                connection = Connection(self, reader, writer, request)
                self.requests.append(request)
                self.tell()
                await self._handle(connection)
                if request.path == "/completion" or request.headers.get("connection") == "close":
                    break
                if connection.gone.is_set() or writer.is_closing():
                    break
        except asyncio.CancelledError:
            pass  # stopped
        except Exception as fault:
            self._faults.append(fault)
        finally:
            writer.close()
            del self._handlers[handler]
            self.tell()

    async def _handle(self, connection: Connection) -> None:
        path = connection.request.path
        if path != "/completion":
            await connection.play(self._script_for(path))
            return
        self.completions.append(connection)
        script = self._script_for(path)
        self.tell()
        try:
            await connection.play(lambda connection: self._in_a_slot(connection, script))
        finally:
            if connection.gone.is_set() and not connection.finished and not connection.over.is_set():
                self._aborted += 1
            if connection.slot is not None and not (self.lingering and connection.gone.is_set()):
                self._busy.pop(connection.slot, None)
            self.tell()

    async def _in_a_slot(self, connection: Connection, script: Script) -> None:
        asked = (connection.request.body or {}).get("id_slot", -1)
        wanted = [asked] if asked in range(self.slots) else range(self.slots)
        if all(slot in self._busy for slot in wanted):
            self.waited += 1
            self.tell()
            while all(slot in self._busy for slot in wanted):
                await self._news.wait()
        connection.slot = next(slot for slot in wanted if slot not in self._busy)
        self._busy[connection.slot] = connection
        self.tell()
        await script(connection)

    def _script_for(self, path: str) -> Script:
        if self._scripts[path]:
            return self._scripts[path].popleft()
        return self._always.get(path, self._behave)

    # -- what the real one does --------------------------------------------------------------------

    async def _behave(self, connection: Connection) -> None:
        request = connection.request
        if self.health == "loading":
            await connection.answer(503, error(503, "Loading model", "unavailable_error"))
        elif self.api_key and request.path != "/health" and not self._authorized(request):
            await connection.answer(401, error(401, "Invalid API Key", "authentication_error"))
        elif route := {
            ("POST", "/completion"): self._completion,
            ("POST", "/tokenize"): self._tokenize,
            ("POST", "/apply-template"): self._apply_template,
            ("GET", "/health"): self._health,
            ("GET", "/props"): self._props,
            ("GET", "/slots"): self._slots,
        }.get((request.method, request.path)):
            await route(connection)
        else:
            await connection.answer(404, error(404, "File Not Found", "not_found_error"))

    def _authorized(self, request: Request) -> bool:
        return request.headers.get("authorization") == f"Bearer {self.api_key}"

    async def _completion(self, connection: Connection) -> None:
        body = connection.request.body
        tokens_in = self.count_tokens(body["prompt"])
        grammar = body.get("grammar", "")
        if tokens_in >= self.ctx:
            message = f"request ({tokens_in} tokens) exceeds the available context size ({self.ctx} tokens)"
            numbers = {"n_prompt_tokens": tokens_in, "n_ctx": self.ctx}
            await connection.answer(400, error(400, message, "exceed_context_size_error", **numbers))
        elif grammar.count("(") != grammar.count(")"):
            await connection.answer(400, error(400, "failed to parse grammar", "invalid_request_error"))
        elif self.hold:
            if not connection.begun:
                await connection.headers()
            await connection.over.wait()
        else:
            await self._generate(connection, min(body["n_predict"], self.ctx - tokens_in))

    async def _generate(self, connection: Connection, tokens: int) -> None:
        words = [connection.word(index) for index in range(tokens)]
        text = "".join(words)
        stops = [stop for stop in connection.request.body.get("stop", ()) if stop in text]
        stop = min(stops, key=text.index, default="")
        left = text.index(stop) if stop else len(text)
        for processed in (0, self.count_tokens(connection.request.body["prompt"])):
            await connection.progress(processed)
        for word in words:
            if self.pace_s:
                await asyncio.sleep(self.pace_s)
            await connection.token(word[:left])  # empty where a stop string is held back
            left -= len(word[:left])
            if stop and not left:
                await connection.final("word", stopping_word=stop)
                return
        await connection.final("limit")

    async def _tokenize(self, connection: Connection) -> None:
        tokens = list(range(self.count_tokens(connection.request.body["content"])))
        await connection.answer(200, {"tokens": tokens})

    async def _apply_template(self, connection: Connection) -> None:
        turns = connection.request.body["messages"]
        prompt = "".join(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in turns)
        await connection.answer(200, {"prompt": f"{prompt}<|im_start|>assistant\n"})

    async def _health(self, connection: Connection) -> None:
        if self.health == "hang":
            await connection.stall()
        elif self.health == "error":
            await connection.answer(500, error(500, "kaputt", "server_error"))
        else:
            await connection.answer(200, {"status": "ok"})

    async def _props(self, connection: Connection) -> None:
        props = {
            "default_generation_settings": {"params": {"seed": 4294967295}, "n_ctx": self.ctx},
            "total_slots": self.slots,
            "model_alias": self.model_path,
            "model_path": self.model_path,
            "chat_template": self.chat_template,
            "build_info": self.build,
            "is_sleeping": False,
        }
        await connection.answer(200, props)

    async def _slots(self, connection: Connection) -> None:
        slots = [
            {"id": slot, "n_ctx": self.ctx, "speculative": False, "is_processing": slot in self._busy}
            for slot in range(self.slots)
        ]
        await connection.answer(200, slots)


# -- scripts ---------------------------------------------------------------------------------------


def answers(status: int, body: object = b"", *, more: str = "") -> Script:
    """A script that gives a whole answer; `more` are header lines, each with its CRLF."""

    async def script(connection: Connection) -> None:
        await connection.answer(status, body, more=more)

    return script


def says(*blocks: bytes, then: Literal["fin", "rst", "stall"] = "fin") -> Script:
    """A script that sends these very bytes, one write each, and then breaks off, resets or goes silent."""

    async def script(connection: Connection) -> None:
        for block in blocks:
            await connection.send(block)
        if then == "fin":
            connection.fin()
        elif then == "rst":
            connection.rst()
        else:
            await connection.stall()

    return script


def streams(*chunks: bytes) -> Script:
    """A script that streams these chunks of body with proper headers and a proper end."""

    async def script(connection: Connection) -> None:
        for chunk in chunks:
            await connection.chunk(chunk)

    return script


def error(code: int, message: str, kind: str, **more: object) -> dict[str, object]:
    """The body of an error as llama.cpp sends it."""
    return {"error": {"code": code, "message": message, "type": kind, **more}}


def _json(said: object) -> bytes:
    return json.dumps(said, ensure_ascii=False, separators=(",", ":")).encode()


def _digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:6]


def _reset(writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):  # it may be closed already
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_0)
    writer.transport.abort()


async def _read_chunked(reader: asyncio.StreamReader) -> bytes:
    body = b""
    while size := int(await reader.readuntil(b"\r\n"), 16):
        body += (await reader.readexactly(size + 2))[:-2]
    await reader.readexactly(2)
    return body


async def _read_request(reader: asyncio.StreamReader) -> Request | None:
    """The next request on a connection, None when there is none."""
    try:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        line, *fields = head.rstrip("\r\n").split("\r\n")
        headers = {
            name.lower(): value.strip() for name, _, value in (field.partition(":") for field in fields)
        }
        if headers.get("transfer-encoding") == "chunked":
            raw = await _read_chunked(reader)
        else:
            raw = await reader.readexactly(int(headers.get("content-length", "0")))
    except (asyncio.IncompleteReadError, ConnectionError):
        return None
    method, path, _ = line.split(" ")
    return Request(method, path, headers, raw, json.loads(raw) if raw else None)

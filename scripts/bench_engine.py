"""A stand-in for llama-server that costs little: it streams numbered words at a set pace, for scripts/bench.

    bench_engine.py PORT

It says what llama.cpp says, closes the connection after each streamed answer as that does, and notes when a
request was whole, when its last byte went out and when its client was gone. `POST /bench/set` changes its
`Settings`, `POST /bench/finish` ends what runs, `GET /bench/state` and `/bench/records` say what happened.
The one rule: a token costs one timer and one write; nothing is parsed or allocated that can wait.
"""

import asyncio
import json
import random
import sys
import time
from collections import deque
from dataclasses import asdict, dataclass
from typing import Any

SLOTS = 4096
CTX = 131072
BURST = 8  # tokens to a write where there is no pace: the engine must outrun what it measures
HEAD = (
    b"HTTP/1.1 200 OK\r\nServer: llama.cpp\r\nContent-Type: text/event-stream\r\n"
    b"Transfer-Encoding: chunked\r\nKeep-Alive: timeout=5, max=100\r\n\r\n"
)


@dataclass
class Settings:
    """How it generates. `rate`: tokens a second and stream, 0 as fast as it goes; `slots` 0: no limit."""

    rate: float = 0.0
    first_s: float = 0.0
    slots: int = 0
    stamp: bool = False  # a token's text is the monotonic clock in ns at its sending


@dataclass
class Record:
    """When things happened to one completion, on the monotonic clock in ns; 0: they did not."""

    arrived: int
    last: int = 0
    gone: int = 0


def chunk(said: dict[str, Any]) -> bytes:
    """One event in one HTTP chunk."""
    data = b"data: " + json.dumps(said, separators=(",", ":")).encode() + b"\n\n"
    return b"%x\r\n%b\r\n" % (len(data), data)


def token(text: str) -> bytes:
    """The chunk of one token."""
    counts = {"tokens_predicted": 1, "tokens_evaluated": 1}
    return chunk({"index": 0, "content": text, "tokens": [1], "stop": False, "id_slot": -1, **counts})


TOKEN = token(" word")


class Engine:
    """What all connections share: the settings, the slots and the records."""

    def __init__(self) -> None:
        self.settings = Settings()
        self.records: list[Record] = []
        self.busy: set[Completion] = set()
        self.waiting: deque[Completion] = deque()
        self.tokens = 0

    def arrive(self, completion: "Completion") -> None:
        """Give it a slot, now or when one is free."""
        self.records.append(completion.record)
        self.waiting.append(completion)
        self._fill()

    def leave(self, completion: "Completion") -> None:
        """It needs its slot no more."""
        if completion in self.busy:
            self.busy.remove(completion)
            self._fill()
        elif completion in self.waiting:
            self.waiting.remove(completion)

    def _fill(self) -> None:
        while self.waiting and len(self.busy) < (self.settings.slots or SLOTS):
            completion = self.waiting.popleft()
            self.busy.add(completion)
            completion.begin()

    def finish(self) -> None:
        """End every answer with its final frame; those that wait are answered without a token."""
        for completion in [*self.busy, *self.waiting]:
            completion.end()

    def state(self) -> dict[str, int]:
        """What is going on."""
        return {"busy": len(self.busy), "tokens": self.tokens, "completions": len(self.records)}


class Completion:
    """One answer of /completion."""

    def __init__(self, engine: Engine, transport: asyncio.Transport, wanted: int) -> None:
        self.record = Record(time.monotonic_ns())
        self._engine, self._transport, self._left, self._wanted = engine, transport, wanted, wanted
        self._timer: asyncio.Handle | None = None
        self._loop = asyncio.get_running_loop()
        self._due = 0.0
        self._begun = self._paused = False

    def begin(self) -> None:
        """The slot starts on the prompt: the headers go out, as llama.cpp's do."""
        self._transport.write(HEAD)
        self._begun = True
        settings = self._engine.settings
        jitter = random.random() / settings.rate if settings.rate > 0 else 0.0
        self._due = self._loop.time() + settings.first_s + jitter
        if self._due > self._loop.time():
            self._timer = self._loop.call_at(self._due, self._step)
        else:
            self._step()

    def _step(self) -> None:
        settings = self._engine.settings
        count = 1 if settings.rate > 0 else min(BURST, self._left)
        one = token(str(time.monotonic_ns())) if settings.stamp else TOKEN
        self._transport.write(one * count)
        self._engine.tokens += count
        self._left -= count
        if self._left <= 0:
            self.end()
        elif settings.rate > 0:
            self._due += 1 / settings.rate
            self._timer = self._loop.call_at(self._due, self._step)
        elif not self._paused:
            self._timer = self._loop.call_soon(self._step)

    def pause(self) -> None:
        """The client reads too slowly."""
        self._paused = True

    def resume(self) -> None:
        """It reads again."""
        self._paused = False
        if self._engine.settings.rate <= 0 and self in self._engine.busy:
            self._step()

    def end(self) -> None:
        """The final frame, the end of the body, and the end of the connection. Once."""
        if self.record.last:
            return
        if not self._begun:
            self._transport.write(HEAD)
        count = self._wanted - self._left
        counts = {"truncated": False, "tokens_predicted": count, "tokens_evaluated": 1, "tokens_cached": 1}
        final = {"content": "", "stop": True, "stop_type": "limit", "stopping_word": "", **counts}
        self._transport.write(chunk(final) + b"0\r\n\r\n")
        self.record.last = time.monotonic_ns()
        self._transport.close()
        self._stop()

    def lost(self) -> None:
        """The connection is gone; ours to close or not."""
        self.record.gone = self.record.gone or time.monotonic_ns()
        self._stop()

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._engine.leave(self)


class Connection(asyncio.Protocol):
    """One connection: requests one after another, a completion last."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._buffer = b""
        self._completion: Completion | None = None
        self._transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A client is there."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """Answer each request once it is whole; what comes during a completion is nobody's."""
        self._buffer += data
        while self._completion is None and (request := self._take()) is not None:
            self._answer(*request)

    def pause_writing(self) -> None:
        """Too much is on its way to this client."""
        if self._completion is not None:
            self._completion.pause()

    def resume_writing(self) -> None:
        """It was taken."""
        if self._completion is not None:
            self._completion.resume()

    def connection_lost(self, exc: Exception | None) -> None:
        """It is closed, by whomever."""
        if self._completion is not None:
            self._completion.lost()

    def _take(self) -> tuple[bytes, bytes] | None:
        """The path and the body of the first request in the buffer, None while it is not whole."""
        head, found, rest = self._buffer.partition(b"\r\n\r\n")
        if not found:
            return None
        lines = head.lower().split(b"\r\n")
        fields = dict(line.split(b": ", 1) for line in lines[1:] if b": " in line)
        if fields.get(b"transfer-encoding") == b"chunked":
            whole = dechunked(rest)
            if whole is None:
                return None
            body, self._buffer = whole
        else:
            length = int(fields.get(b"content-length", b"0"))
            if len(rest) < length:
                return None
            body, self._buffer = rest[:length], rest[length:]
        return head.split(b" ", 2)[1], body

    def _answer(self, path: bytes, body: bytes) -> None:
        if path == b"/completion":
            wanted = int(json.loads(body)["n_predict"])
            self._completion = Completion(self._engine, self._transport, wanted)
            self._engine.arrive(self._completion)
            return
        data = json.dumps(self._said(path, body)).encode()
        head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
        self._transport.write(head.encode() + data)

    def _said(self, path: bytes, body: bytes) -> object:
        if path == b"/props":
            defaults = {"n_ctx": CTX}
            return {"total_slots": SLOTS, "default_generation_settings": defaults, "build_info": "bench"}
        if path == b"/slots":  # those at work; a list of all would cost more than what is measured
            return [{"id": number, "is_processing": True} for number in range(len(self._engine.busy))]
        if path == b"/bench/set":
            self._engine.settings = Settings(**json.loads(body))
            self._engine.records.clear()
        elif path == b"/bench/finish":
            self._engine.finish()
        elif path == b"/bench/state":
            return self._engine.state()
        elif path == b"/bench/records":
            return [asdict(record) for record in self._engine.records]
        return {"status": "ok"}


def dechunked(rest: bytes) -> tuple[bytes, bytes] | None:
    """A chunked body and what follows it, None while it is not whole."""
    body = b""
    while True:
        size, found, rest = rest.partition(b"\r\n")
        if not found:
            return None
        count = int(size, 16)
        if len(rest) < count + 2:
            return None
        body, rest = body + rest[:count], rest[count + 2 :]
        if count == 0:
            return body, rest


async def main(port: int) -> None:
    """Serve until the process is ended."""
    engine = Engine()
    loop = asyncio.get_running_loop()
    await loop.create_server(lambda: Connection(engine), "127.0.0.1", port, backlog=4096)
    await loop.create_future()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1])))

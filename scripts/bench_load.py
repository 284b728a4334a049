"""The load of scripts/bench: one process, plain protocols, hardly a parser.

    bench_load.py '{"mode": "stream", "port": 8080, "conns": 16, "requests": 100, "body": {…}}'

It ends when all requests are done, on SIGTERM, or after `limit_s`, and says in one line of JSON what it saw.
The one rule: it looks for marks in the bytes and understands nothing, to cost less than what it loads.
"""

import asyncio
import json
import re
import signal
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

STAMP = re.compile(rb'"(?:t|content)":"(\d+)"')
ENDS = (b"event: end\n", b'"stop":true')  # of llorch, of an engine


@dataclass
class Load:
    """What to do. `task`: POST a task and GET its stream, instead of one POST that is answered by a stream.

    Modes: `stream` (a connection for each request), `sub` (GET `path`), `post` (kept connections, whole
    answers), `turn` (submit, look, cancel, on one connection).
    """

    mode: str
    port: int
    path: str = "/completion"
    body: dict[str, Any] | None = None
    conns: int = 1
    requests: int = 1
    task: bool = False
    stamp: bool = False
    limit_s: float = 60.0


@dataclass
class Seen:
    """What came. Times are ns until `report`."""

    ok: int = 0
    failed: int = 0
    tokens: int = 0
    first: list[int] = field(default_factory=list)  # from sending the request to its first token
    delays: list[int] = field(default_factory=list)  # of stamped tokens
    turns: dict[str, list[int]] = field(default_factory=dict)  # of each kind of request of a turn
    statuses: Counter[str] = field(default_factory=Counter)

    def report(self, seconds: float) -> dict[str, Any]:
        """All of it, times in microseconds."""
        return {
            "ok": self.ok,
            "failed": self.failed,
            "tokens": self.tokens,
            "seconds": seconds,
            "first_us": quantiles(self.first),
            "delay_us": quantiles(self.delays),
            "turn_us": {name: quantiles(times) for name, times in self.turns.items()},
            "statuses": self.statuses,
        }


def quantiles(times_ns: list[int]) -> dict[str, float]:
    """The median and the 99th percentile, in microseconds; empty if nothing was measured."""
    if not times_ns:
        return {}
    ordered = sorted(times_ns)
    return {name: ordered[int(len(ordered) * share)] / 1000 for name, share in (("p50", 0.5), ("p99", 0.99))}


def request(load: Load, method: str, path: str, body: dict[str, Any] | None = None) -> bytes:
    """The bytes of one request."""
    data = b"" if body is None else json.dumps(body).encode()
    typed = "" if body is None else "Content-Type: application/json\r\n"
    head = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1:{load.port}\r\n{typed}"
    head += f"Content-Length: {len(data)}\r\n\r\n"
    return head.encode() + data


class Driver:
    """Keeps `conns` connections at work until `requests` are done."""

    def __init__(self, load: Load) -> None:
        self.load, self.seen = load, Seen()
        self.over = asyncio.Event()
        self.post = request(load, "POST", load.path, load.body)
        self._started = 0
        self._connecting: set[asyncio.Task[None]] = set()

    async def run(self) -> dict[str, Any]:
        """Do it all; returns the report."""
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self.over.set)
        loop.call_later(self.load.limit_s, self.over.set)
        began = time.monotonic()
        for _ in range(min(self.load.conns, self.load.requests)):
            self.next()
        await self.over.wait()
        return self.seen.report(time.monotonic() - began)

    def take(self) -> bool:
        """Whether there is another request to make; it is counted as begun."""
        if self._started >= self.load.requests:
            return False
        self._started += 1
        return True

    def done(self, *, ok: bool) -> None:
        """One request is over."""
        self.seen.ok += ok
        self.seen.failed += not ok
        if self.seen.ok + self.seen.failed >= self.load.requests:
            self.over.set()

    def next(self) -> None:
        """Open a connection for the next request, if there is one."""
        if self.take():
            task = asyncio.get_running_loop().create_task(self._connect())
            self._connecting.add(task)
            task.add_done_callback(self._connecting.discard)

    async def _connect(self) -> None:
        kind = {"post": Posts, "turn": Turns}.get(self.load.mode, Stream)
        try:
            await asyncio.get_running_loop().create_connection(
                lambda: kind(self), "127.0.0.1", self.load.port
            )
        except OSError:
            self.done(ok=False)
            self.next()


class Client(asyncio.Protocol):
    """One connection."""

    def __init__(self, driver: Driver) -> None:
        self._driver, self._seen = driver, driver.seen
        self._transport: asyncio.Transport
        self._began = 0
        self._over = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send the first request."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._began = time.monotonic_ns()
        self.begin()

    def begin(self) -> None:
        """Say the first word."""
        self._transport.write(self._driver.post)

    def finish(self, *, ok: bool) -> None:
        """This request is over, and so is its connection."""
        if not self._over:
            self._over = True
            self._driver.done(ok=ok)
            self._driver.next()
        self._transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """The other side closed."""
        self.finish(ok=False)


class Stream(Client):
    """One stream, to its end."""

    def __init__(self, driver: Driver) -> None:
        super().__init__(driver)
        self._submitting = driver.load.task and driver.load.mode == "stream"
        self._mark = b'"t":' if driver.load.task else b'"content":'
        self._end = ENDS[0] if driver.load.task else ENDS[1]
        self._held, self._last, self._begun, self._ended = b"", b"", False, False

    def begin(self) -> None:
        """Ask for it."""
        load = self._driver.load
        self._transport.write(request(load, "GET", load.path) if load.mode == "sub" else self._driver.post)

    def data_received(self, data: bytes) -> None:
        """Count what came."""
        if self._submitting:
            self._held += data
            if self._held[9:12] != b"202":
                self.finish(ok=False)
            elif b'"stream_url":"' in self._held and self._held.endswith(b"}"):
                path = self._held.partition(b'"stream_url":"')[2].partition(b'"')[0].decode()
                self._submitting = False
                self._transport.write(request(self._driver.load, "GET", path))
            return
        if not self._last and data[9:12] != b"200":
            self.finish(ok=False)
            return
        if (count := data.count(self._mark)) > 0:
            if not self._begun:
                self._begun = True
                self._seen.first.append(time.monotonic_ns() - self._began)
            self._seen.tokens += count
            if self._driver.load.stamp:
                now = time.monotonic_ns()
                self._seen.delays += [now - int(stamp) for stamp in STAMP.findall(data)]
        self._ended = self._ended or self._end in self._last + data
        self._last = data[-20:]
        if self._ended and self._last.endswith(b"0\r\n\r\n"):
            self.finish(ok=True)

    def connection_lost(self, exc: Exception | None) -> None:
        """Well if the end had come."""
        self.finish(ok=self._ended)


class Posts(Client):
    """Requests one after another on a kept connection; each whole answer is counted by its status."""

    def __init__(self, driver: Driver) -> None:
        super().__init__(driver)
        self._held = b""

    def data_received(self, data: bytes) -> None:
        """Take the answer, and send the next request."""
        self._held += data
        head, found, body = self._held.partition(b"\r\n\r\n")
        if not found:
            return
        if (at := head.lower().find(b"content-length: ")) < 0:
            self.finish(ok=False)
            return
        if len(body) < int(head[at + 16 :].split(b"\r", 1)[0]):
            return
        self._held = b""
        self._seen.statuses[head[9:12].decode()] += 1
        self.answered(body)

    def answered(self, body: bytes) -> None:
        """A whole answer is there."""
        self._driver.done(ok=True)
        if self._driver.take():
            self._transport.write(self._driver.post)
        else:
            self._over = True
            self._transport.abort()


class Turns(Posts):
    """Submit a task, look where it stands, cancel it; each timed on its own."""

    def __init__(self, driver: Driver) -> None:
        super().__init__(driver)
        self._steps = ["submit", "position", "cancel"]
        self._task: dict[str, Any] = {}

    def answered(self, body: bytes) -> None:
        """Note how long it took, and go on to the next step."""
        now = time.monotonic_ns()
        step = self._steps[0]
        self._seen.turns.setdefault(step, []).append(now - self._began)
        self._steps = [*self._steps[1:], step]
        load = self._driver.load
        if step == "submit":
            self._task = json.loads(body)
            after = request(load, "GET", f"/v1/tasks/{self._task['task_id']}")
        elif step == "position":
            after = request(load, "POST", self._task["cancel_url"])
        else:
            self._driver.done(ok=True)
            if not self._driver.take():
                self._over = True
                self._transport.abort()
                return
            after = self._driver.post
        self._began = time.monotonic_ns()
        self._transport.write(after)


if __name__ == "__main__":
    print(json.dumps(asyncio.run(Driver(Load(**json.loads(sys.argv[1]))).run())))

"""Just enough HTTP to be fast: one keep-alive connection for requests, one connection for each stream."""

import asyncio
import contextlib
import socket
import struct
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable
from typing import Any, NamedTuple

import msgspec

from tests.fuzz.answers import FRAME, Event, Fault, event

IDLE_S = 4.0  # then a connection is not trusted any more: the server may be closing it
SILENCE_S = 120.0  # an answer, or a stream without so much as a heartbeat, is lost
_RST = struct.pack("ii", 1, 0)


class Reply(NamedTuple):
    """One whole answer; names of `headers` in lower case."""

    status: int
    headers: dict[str, str]
    body: Any


class Client:
    """Sends one request after the other to `address`."""

    def __init__(self, address: tuple[str, int]) -> None:
        self._address = address
        self._connection: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        self._used_at = 0.0

    async def ask(self, method: str, path: str, body: Any = None) -> Reply:
        """The answer to one request."""
        if self._connection is None or time.monotonic() - self._used_at > IDLE_S:
            self.close()
            self._connection = await asyncio.open_connection(*self._address)
        reader, writer = self._connection
        data = b"" if body is None else msgspec.json.encode(body)
        fields = "" if body is None else f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n"
        writer.write(f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n{fields}\r\n".encode() + data)
        async with asyncio.timeout(SILENCE_S):
            status, headers = await _head(reader)
            data = await reader.readexactly(int(headers.get("content-length", "0")))
        self._used_at = time.monotonic()
        return Reply(status, headers, msgspec.json.decode(data) if data else None)

    def close(self) -> None:
        """Close the connection; the next request opens another."""
        if self._connection is not None:
            self._connection[1].close()
            self._connection = None


async def _head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    line, *fields = (await reader.readuntil(b"\r\n\r\n")).decode().rstrip().split("\r\n")
    headers = dict(field.lower().split(": ", 1) for field in fields)
    return int(line.split()[1]), headers


class Stream:
    """A reader of one task's events. `status` other than 200: there are none."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, status: int) -> None:
        self.status = status
        self._reader, self._writer = reader, writer
        self._ready: deque[Event] = deque()

    def __aiter__(self) -> "Stream":
        return self

    async def __anext__(self) -> Event:
        """The next event; raises Fault where the stream is cut off or silent."""
        try:
            while not self._ready:
                size = int(await self._within(self._reader.readuntil(b"\r\n")), 16)
                if not size:
                    raise StopAsyncIteration
                block = await self._within(self._reader.readexactly(size + 2))
                self._ready += [event(frame) for frame in FRAME.finditer(block) if frame[1] is not None]
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            raise Fault(f"the stream is cut off: {error!r}") from None
        except TimeoutError:
            raise Fault(f"nothing came for {SILENCE_S:g} s") from None
        return self._ready.popleft()

    async def _within(self, reading: Awaitable[bytes]) -> bytes:
        async with asyncio.timeout(SILENCE_S):
            return await reading

    def reset(self) -> None:
        """Leave as a process that dies does."""
        sock = self._writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RST)
        self._writer.transport.abort()


@contextlib.asynccontextmanager
async def stream(
    address: tuple[str, int], path: str, *, after: int | None = None, buffer_bytes: int = 0
) -> AsyncIterator[Stream]:
    """A stream, opened; `after` is Last-Event-ID, `buffer_bytes` a receive buffer of that size."""
    sock = socket.socket()
    sock.setblocking(False)
    if buffer_bytes:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer_bytes)
    await asyncio.get_running_loop().sock_connect(sock, address)
    reader, writer = await asyncio.open_connection(sock=sock)
    try:
        resume = "" if after is None else f"Last-Event-ID: {after}\r\n"
        writer.write(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n{resume}\r\n".encode())
        async with asyncio.timeout(SILENCE_S):
            status, _ = await _head(reader)
        yield Stream(reader, writer, status)
    finally:
        writer.close()

"""A TCP proxy that cuts a stream half-way, when the test says so.

    async with CuttingProxy(live.port, after=5, how="reset") as proxy:
        ...  # a client reads from proxy.url; it gets five events and half of the sixth
        await proxy.cut()  # its connection breaks; later ones are left alone

The one rule: nothing depends on time: it holds until it is told to cut.
"""

import asyncio
import contextlib
import re
import socket
import struct
from collections.abc import AsyncIterator
from typing import Literal

from tests.fakes import PATIENCE_S

How = Literal["reset", "close"]
LINGER_0 = struct.pack("ii", 1, 0)  # close means RST
_EVENT = re.compile(rb"data: [^\n]*\n\n")


class CuttingProxy:
    """In front of `port`; `heads` are the request heads that went through, oldest first."""

    def __init__(self, port: int, *, after: int, how: How) -> None:
        self.port = port
        self.after = after
        self.how = how
        self.url = ""
        self.heads: list[bytes] = []
        self._armed = True
        self._holding = asyncio.Event()
        self._cut = asyncio.Event()
        self._handlers: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> "CuttingProxy":
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for handler in self._handlers:
            handler.cancel()
        await asyncio.gather(*self._handlers, return_exceptions=True)

    async def cut(self) -> None:
        """Break the connection that is held, once one is."""
        async with asyncio.timeout(PATIENCE_S):
            await self._holding.wait()
        self._cut.set()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        handler = asyncio.current_task()
        assert handler is not None
        self._handlers.add(handler)
        up_reader, up_writer = await asyncio.open_connection("127.0.0.1", self.port)
        up = asyncio.create_task(self._up(reader, up_writer))
        try:
            await self._down(up_reader, writer)
        except (ConnectionError, asyncio.CancelledError):
            pass  # the client has gone, or the test is over
        finally:
            up.cancel()
            up_writer.transport.abort()
            writer.close()
            self._handlers.discard(handler)

    async def _up(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while block := await reader.read(2**16):
                self.heads.append(block)
                writer.write(block)
                await writer.drain()

    async def _down(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        said, passed = b"", 0
        while block := await reader.read(2**16):
            said += block
            until = self._until(said)
            writer.write(said[passed:until])
            await writer.drain()
            passed = len(said) if until is None else until
            if until is not None:
                self._armed = False
                self._holding.set()
                await self._cut.wait()
                if self.how == "reset":
                    sock = writer.get_extra_info("socket")
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_0)
                    writer.transport.abort()
                return

    def _until(self, said: bytes) -> int | None:
        """Where to hold, None to go on."""
        ends = [match.end() for match in _EVENT.finditer(said)] if self._armed else []
        if len(ends) <= self.after:
            return None
        return (ends[self.after - 1] + ends[self.after]) // 2


async def lines(stream: asyncio.StreamReader) -> AsyncIterator[str]:
    """Lines as they come, each within the patience of a test."""
    while True:
        async with asyncio.timeout(PATIENCE_S):
            line = await stream.readline()
        if not line:
            return
        yield line.decode().removesuffix("\n")

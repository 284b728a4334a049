"""A TCP proxy that breaks connections when the test says so."""

import asyncio
import contextlib

from tests.fakes import _reset


class Proxy:
    """Passes everything on to `port`; `cuts[n]`: connection n is reset after so many bytes of the answer.

    `path`: only connections whose request names it are counted. `down`: connections are refused at once.
    """

    def __init__(self, port: int, cuts: list[int], path: bytes = b"/stream") -> None:
        self._to, self._cuts, self._path = port, cuts, path
        self.count = 0
        self.requests: list[bytes] = []
        self.down = False
        self._open: set[asyncio.StreamWriter] = set()
        self._handlers: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> "Proxy":
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        return self

    async def __aexit__(self, *failure: object) -> None:
        self._server.close()
        self.break_all()
        await asyncio.gather(*self._handlers, return_exceptions=True)

    def point_to(self, port: int) -> None:
        """Pass new connections on to another server."""
        self._to = port

    def break_all(self) -> None:
        """Reset what is open."""
        for writer in list(self._open):
            _reset(writer)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        handler = asyncio.current_task()
        assert handler is not None
        self._handlers.add(handler)
        handler.add_done_callback(self._handlers.discard)
        self._open.add(writer)
        try:
            with contextlib.suppress(OSError, asyncio.IncompleteReadError):
                await self._pass_on(reader, writer)
        finally:
            self._open.discard(writer)
            writer.close()

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.down:
            _reset(writer)
            return
        head = await reader.readuntil(b"\r\n\r\n")
        self.requests.append(head)
        left: int | None = None
        if self._path in head.split(b"\r\n")[0]:
            left = self._cuts[self.count] if self.count < len(self._cuts) else None
            self.count += 1
        upstream_reader, upstream = await asyncio.open_connection("127.0.0.1", self._to)
        upstream.write(head)
        there = asyncio.create_task(_copy(reader, upstream))
        back = asyncio.create_task(self._answer(upstream_reader, writer, left))
        try:  # whichever side leaves first, the other one is told at once
            await asyncio.wait({there, back}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            there.cancel()
            back.cancel()
            upstream.close()

    async def _answer(
        self, upstream: asyncio.StreamReader, writer: asyncio.StreamWriter, left: int | None
    ) -> None:
        with contextlib.suppress(OSError):
            while left is None or left > 0:
                block = await upstream.read(65536 if left is None else min(left, 65536))
                if not block:
                    return
                writer.write(block)
                await writer.drain()
                left = None if left is None else left - len(block)
            await asyncio.sleep(0)  # what was written goes out before the reset
            _reset(writer)


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while block := await reader.read(65536):
            writer.write(block)
            await writer.drain()

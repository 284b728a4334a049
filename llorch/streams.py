"""The writer of event streams: from a task's log to one client's socket.

The one rule: what is ready goes out in one write of at most 16 KiB, and only when the transport holds
nothing; so little is ever past recall, and a slow reader costs nobody anything.
"""

import asyncio
import logging
from collections.abc import Callable
from typing import Protocol, cast

from aiohttp import hdrs, web
from aiohttp.base_protocol import BaseProtocol
from aiohttp.http_writer import StreamWriter
from multidict import istr

from llorch.eventlog import EventLog

logger = logging.getLogger("llorch.streams")

STALLED_WRITE_S = 120.0
_HEADERS = {hdrs.CONTENT_TYPE: "text/event-stream", istr("X-Accel-Buffering"): "no"}
_PING = b": ping\n\n"


class Aside(Protocol):
    """What one reader is told besides the log."""

    def start(self, say: Callable[[bytes], bool]) -> None:
        """Begin, now that what the log had was written; `say` writes a frame, or returns False."""

    def stop(self) -> None:
        """The stream is over; plain, idempotent."""


class _Reader:
    """A place in a log, and the transport that gets what comes after it.

    Tokens are written in the step that appends them, without waking a coroutine; `until_noticed` is for what
    needs one: where the transport is full, and the end.
    """

    __slots__ = (
        "_chunked",
        "_heartbeat",
        "_log",
        "_notice",
        "_position",
        "_protocol",
        "_transport",
        "ended",
        "stalled",
    )

    def __init__(
        self,
        log: EventLog,
        position: int,
        protocol: BaseProtocol,
        transport: asyncio.Transport,
        *,
        chunked: bool,
    ) -> None:
        self.stalled = False
        self.ended = False
        self._log, self._position, self._chunked = log, position, chunked
        self._protocol, self._transport = protocol, transport
        self._notice: asyncio.Future[None] | None = None
        self._heartbeat: asyncio.TimerHandle | None = None

    async def until_noticed(self) -> None:
        """Return when the transport is full, or the end was written."""
        if not (self.stalled or self.ended):
            self._notice = asyncio.get_running_loop().create_future()
            await self._notice

    def changed(self) -> None:
        """The log has more. Its end is written a turn later: the slot's next task goes first."""
        if self._log.sealed:
            asyncio.get_running_loop().call_soon(self.write)
        else:
            self.write()

    def write(self) -> None:
        """Write what is ready, until that is all or the transport is full. Lets no exception out."""
        log, transport = self._log, self._transport
        try:
            while self._position < log.next_id and not self.stalled and not transport.is_closing():
                batch, self._position = log.read(self._position)
                block = b"".join(batch)
                transport.write(b"%x\r\n%b\r\n" % (len(block), block) if self._chunked else block)
                self.stalled = self._protocol.writing_paused
            self.ended = log.sealed and self._position >= log.next_id
        except Exception:
            logger.exception("a bug cut off a reader", extra={"event": "bug"})
            transport.abort()
        self._notice_if_needed()

    def _notice_if_needed(self) -> None:
        if (self.stalled or self.ended) and self._notice is not None and not self._notice.done():
            self._notice.set_result(None)

    def say(self, frame: bytes) -> bool:
        """Write a frame that is in no log, unless the transport holds something; False if it does."""
        if self.stalled or self.ended or self._position < self._log.next_id or self._transport.is_closing():
            return False
        self._transport.write(b"%x\r\n%b\r\n" % (len(frame), frame) if self._chunked else frame)
        self.stalled = self._protocol.writing_paused
        self._notice_if_needed()
        return True

    def ping_every(self, seconds: float) -> None:
        """Write a comment so often, from one interval on, unless the transport holds something."""
        loop = asyncio.get_running_loop()

        def ping() -> None:
            self.say(_PING)
            self._heartbeat = loop.call_later(seconds, ping)

        self._heartbeat = loop.call_later(seconds, ping)

    def stop(self) -> None:
        """Write nothing of its own accord any more."""
        self._log.unwatch(self.changed)
        if self._heartbeat is not None:
            self._heartbeat.cancel()


async def write_events(
    request: web.Request,
    log: EventLog,
    position: int,
    heartbeat_s: float,
    aside: Aside | None = None,
) -> web.StreamResponse:
    """Send `log` from `position` on until its terminal event was written; a stalled reader is cut off."""
    response = web.StreamResponse(headers=_HEADERS)
    response.force_close()
    writer = cast(StreamWriter, await response.prepare(request))
    transport = request.transport
    if transport is None:
        return response  # the reader has gone
    transport.set_write_buffer_limits(high=0)
    reader = _Reader(log, position, request.protocol, transport, chunked=writer.chunked)
    log.watch(reader.changed)
    try:
        reader.write()
        reader.ping_every(heartbeat_s)
        if aside is not None:
            aside.start(reader.say)
        while not reader.ended:
            await reader.until_noticed()
            if reader.stalled:
                async with asyncio.timeout(STALLED_WRITE_S):
                    await writer.drain()
                reader.stalled = False
                reader.write()
        async with asyncio.timeout(STALLED_WRITE_S):
            await response.write_eof()
    except TimeoutError:
        transport.abort()
    except ConnectionError:
        pass  # the reader has gone
    finally:
        reader.stop()
        if aside is not None:
            aside.stop()
    return response

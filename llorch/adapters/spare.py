"""A request that is under way before its body is known: connected, and holding everything back.

What a slot is idle for between two tasks is mostly connecting. The request is for a slot, not for a task:
not one byte of it is sent before its body comes, and unused it is given up after `SPARE_S`.
"""

import asyncio
from collections.abc import Awaitable, Callable

import aiohttp
from aiohttp.abc import AbstractStreamWriter

SPARE_S = 2.0  # well within the 5 s for which llama.cpp keeps a silent connection

Open = Callable[[aiohttp.Payload | bytes], Awaitable[aiohttp.ClientResponse]]


class HeldBody(aiohttp.Payload):
    """A body that the writer of a request waits for; then all of the request goes out in one write."""

    def __init__(self) -> None:
        super().__init__(b"", content_type="application/json")
        self._held: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    def send(self, body: bytes) -> None:
        """Let the request go with this body, unless its connection has just broken. Plain; once."""
        if not self._held.done():
            self._held.set_result(body)

    async def write(self, writer: AbstractStreamWriter) -> None:
        """Wait for the body, and write it with its end."""
        await writer.write_eof(await self._held)

    def decode(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        """Not possible: the body is not known. Raises TypeError."""
        raise TypeError("a held body can't be read")


class SpareRequest:
    """One request in reserve, opened by `open_request`."""

    def __init__(self, open_request: Open) -> None:
        self._open_request = open_request
        self._body: HeldBody | None = None
        self._answer: asyncio.Task[aiohttp.ClientResponse] | None = None
        self._expiry: asyncio.TimerHandle | None = None
        self._wanted = False

    def keep(self, wanted: bool) -> None:
        """Whether there is always to be one in reserve, or only for a while after each `prepare`. Plain."""
        if wanted and not self._wanted:
            self.prepare()
        self._wanted = wanted

    def close(self) -> None:
        """Give up what is in reserve, for good. Plain."""
        self._wanted = False
        self._drop()

    def prepare(self) -> None:
        """Open a request, if there is none in reserve. Plain."""
        if self._answer is None or self._answer.done():
            self._drop()
            self._body = HeldBody()
            self._answer = asyncio.create_task(self._open(self._body), name="spare-request")
            self._expiry = asyncio.get_running_loop().call_later(SPARE_S, self._expire)

    async def _open(self, body: HeldBody) -> aiohttp.ClientResponse:
        return await self._open_request(body)

    async def request(self, body: bytes) -> aiohttp.ClientResponse:
        """The answer to `body`: by the request in reserve, unless the engine has closed it."""
        answer, held = self._answer, self._body
        if answer is None or held is None or answer.done():
            self._drop()
            return await self._open_request(body)
        self._answer = self._body = None
        self._stop_expiry()
        held.send(body)
        try:
            return await answer
        except BaseException:
            _discard(answer)  # it may have come in the very turn that this was cancelled
            raise

    def _drop(self) -> None:
        self._stop_expiry()
        if self._answer is not None:
            _discard(self._answer)
        self._answer = self._body = None

    def _stop_expiry(self) -> None:
        if self._expiry is not None:
            self._expiry.cancel()

    def _expire(self) -> None:
        healthy = self._answer is not None and not self._answer.done()
        self._drop()
        if self._wanted and healthy:  # else the engine is not there: the next task connects by itself
            self.prepare()


def _discard(answer: "asyncio.Task[aiohttp.ClientResponse]") -> None:
    """Nobody wants this answer any more: it is closed if it has come, and its failure is no news."""
    answer.cancel()
    answer.add_done_callback(_close)


def _close(answer: "asyncio.Task[aiohttp.ClientResponse]") -> None:
    if not answer.cancelled() and answer.exception() is None:
        answer.result().close()

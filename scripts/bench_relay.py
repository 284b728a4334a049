"""The plainest streaming relay that aiohttp allows: what any proxy in Python costs. For scripts/bench.

    bench_relay.py PORT ENGINE_PORT SLOTS

`/accept` and `/reject` answer at once: what a handler costs that does nothing. With SLOTS over 0 so many
requests go to the engine at a time, and the others wait for a semaphore.
"""

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator

from aiohttp import ClientSession, ClientTimeout, TCPConnector, web

ENGINE = web.AppKey("engine", str)
SESSION = web.AppKey("session", ClientSession)
GATE = web.AppKey("gate", contextlib.AbstractAsyncContextManager)


async def relay(request: web.Request) -> web.StreamResponse:
    """Hand the body on, and the answer back as it comes."""
    body = await request.read()
    headers = {"Content-Type": "application/json"}
    async with (
        request.app[GATE],
        request.app[SESSION].post(request.app[ENGINE] + request.path, data=body, headers=headers) as answer,
    ):
        response = web.StreamResponse(
            status=answer.status, headers={"Content-Type": answer.headers["Content-Type"]}
        )
        await response.prepare(request)
        async for block in answer.content.iter_any():
            await response.write(block)
        return response


async def accept(request: web.Request) -> web.Response:
    """A 202 that promises nothing."""
    await request.read()
    return web.json_response({"task_id": "t-0123456789abcdef", "queue_position": 12}, status=202)


async def reject(request: web.Request) -> web.Response:
    """A 429."""
    await request.read()
    return web.json_response({"code": "ADMISSION_REJECT", "message": "the queue is full"}, status=429)


async def session(app: web.Application) -> AsyncIterator[None]:
    """One session for all; a connection for each request, as this engine wants it."""
    connector = TCPConnector(limit=0, force_close=True)
    async with ClientSession(connector=connector, timeout=ClientTimeout(total=None)) as opened:
        app[SESSION] = opened
        yield


async def main(port: int, engine_port: int, slots: int) -> None:
    """Serve until the process is ended."""
    app = web.Application()
    app[ENGINE] = f"http://127.0.0.1:{engine_port}"
    app[GATE] = asyncio.Semaphore(slots) if slots else contextlib.nullcontext()
    app.cleanup_ctx.append(session)
    app.router.add_post("/completion", relay)
    app.router.add_post("/accept", accept)
    app.router.add_post("/reject", reject)
    runner = web.AppRunner(app, access_log=None, handler_cancellation=True)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port, backlog=4096).start()
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(*(int(argument) for argument in sys.argv[1:4])))

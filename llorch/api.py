"""The HTTP face: decode, call the orchestrator, encode; and the writer of event streams.

The one rule: a handler owns nothing, so it may be cancelled at any await; what a request did is the
orchestrator's. Refusals are raised as types and answered in one place, `answer_refusals`.
"""

import asyncio
import functools
import logging
import math
import re
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from aiohttp import hdrs, web
from aiohttp.http_exceptions import HttpProcessingError
from multidict import istr

from llorch import control, openapi, operations, wire
from llorch.errors import (
    BodyTimeout,
    BodyTooLarge,
    InternalError,
    InvalidParams,
    LlorchError,
    MethodNotAllowed,
    NotFound,
    QueueFull,
    UnsupportedMediaType,
)
from llorch.metrics import Metrics
from llorch.orchestrator import Orchestrator
from llorch.outlook import Outlook, Teller
from llorch.page import get_page
from llorch.reload import Reloader
from llorch.security import Gate, check_ticket
from llorch.status import StatusBoard
from llorch.streams import write_events

log = logging.getLogger("llorch.api")

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class ApiSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What the handlers need to know of the configuration (seconds, bytes, tokens)."""

    home: bool
    max_tokens: int
    max_body_bytes: int
    body_timeout_s: float
    heartbeat_s: float


ORCHESTRATOR = web.AppKey("orchestrator", Orchestrator)
RELOADER = web.AppKey("reloader", Reloader)
GATE = web.AppKey("gate", Gate)
STATUS = web.AppKey("status", StatusBoard)
METRICS = web.AppKey("metrics", Metrics)
OUTLOOK = web.AppKey("outlook", Outlook)
SETTINGS = web.AppKey("settings", ApiSettings)
CORRELATION_ID = web.RequestKey("correlation_id", str)
IDENTITY = web.RequestKey("identity", str)

_X_CONTENT_TYPE_OPTIONS = istr("X-Content-Type-Options")  # as keys these cost nothing to convert
_X_CORRELATION_ID = istr("X-Correlation-Id")
_SANE_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}", re.ASCII)
_EVENT_ID = re.compile(r"[0-9]{1,9}", re.ASCII)
_PREFLIGHT = {
    "Access-Control-Allow-Methods": "GET, POST",
    "Access-Control-Allow-Headers": "Authorization, Content-Type, Last-Event-ID, X-Correlation-Id",
    "Access-Control-Max-Age": "600",
}


def make_app(
    orchestrator: Orchestrator,
    reloader: Reloader,
    gate: Gate,
    settings: ApiSettings,
    status: StatusBoard,
    metrics: Metrics,
) -> web.Application:
    """The application with every route of its profile."""
    app = web.Application(middlewares=[answer_refusals])
    app[ORCHESTRATOR], app[GATE], app[SETTINGS], app[STATUS] = orchestrator, gate, settings, status
    app[METRICS], app[OUTLOOK], app[RELOADER] = metrics, Outlook(orchestrator), reloader
    app.on_response_prepare.append(_add_headers)
    for method, path, handler in routes(home=settings.home):
        app.router.add_route(method, path, handler, expect_handler=_ignore_expect)
        if method == "GET" and handler is not stream_task:
            app.router.add_route("HEAD", path, handler, expect_handler=_ignore_expect)
    app.router.add_route("*", "/{tail:.*}", no_such_route, expect_handler=_ignore_expect)
    return app


# -- around every handler --------------------------------------------------------------------------


@web.middleware
async def answer_refusals(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Every refusal as the envelope; what is no refusal is a bug, logged and answered as one."""
    request[CORRELATION_ID] = _correlation_id(request)
    try:
        if _guard(request):
            return web.Response(status=204, headers=_PREFLIGHT)
        return await handler(request)
    except LlorchError as error:
        return _refuse(request, error)
    except web.HTTPMethodNotAllowed as error:
        return _refuse(request, _method_not_allowed(request, error.allowed_methods))
    except web.HTTPNotFound:
        return _refuse(request, _not_found(request))
    except (asyncio.CancelledError, ConnectionError):
        raise  # the client has gone
    except Exception:
        fields = {"event": "bug", "correlation_id": request[CORRELATION_ID]}
        log.exception("a bug in llorch failed a request", extra=fields)
        if request.writer.output_size > 0:  # the answer has begun: cutting it off is all that is left
            raise ConnectionAbortedError from None
        return _refuse(request, InternalError("a bug in llorch; its log has more under this correlation id"))


def _guard(request: web.Request) -> bool:
    """Host and Origin, then the token, before anything else; True if it is a preflight to be answered."""
    gate, headers = request.app[GATE], request.headers
    page = request.match_info.handler is get_page
    gate.check_site(headers, _target_host(request), navigable=page)
    if request.method == "OPTIONS" and gate.allows_cors(headers):
        return True
    if page:
        return False  # static, no data: open to whoever passed the checks above
    by_ticket = request.match_info.handler is stream_task and "ticket" in request.query
    if not (by_ticket and gate.token_needed and "Authorization" not in headers):
        request[IDENTITY] = gate.identify(request.remote, headers)
    return False


def _target_host(request: web.Request) -> str | None:
    """The host of an absolute request target, None for the usual kind."""
    return request.url.host if request.host != request.headers.get("Host", "") else None


async def _add_headers(request: web.Request, response: web.StreamResponse) -> None:
    headers, app = response.headers, request.app
    headers[hdrs.SERVER] = "llorch"
    headers[hdrs.CACHE_CONTROL] = "no-store"
    headers[_X_CONTENT_TYPE_OPTIONS] = "nosniff"
    if cors := app[GATE].cors_headers(request.headers):
        headers.update(cors)
    if not app[SETTINGS].home and CORRELATION_ID in request:
        headers[_X_CORRELATION_ID] = request[CORRELATION_ID]


async def _ignore_expect(request: web.Request) -> None:
    """100-continue is sent when a body is wanted, by `_read_body`; so a refusal comes before the body."""


def _correlation_id(request: web.Request) -> str:
    given = request.headers.get(_X_CORRELATION_ID, "")
    return given if _SANE_ID.fullmatch(given) else str(uuid.uuid4())


def _refuse(request: web.Request, error: LlorchError) -> web.Response:
    headers = dict(error.headers)
    if error.retry_after_ms is not None and error.status in (429, 503):
        headers["Retry-After"] = str(math.ceil(error.retry_after_ms / 1000))
    if isinstance(error, QueueFull):
        headers["X-Backoff-Ms"] = str(error.retry_after_ms)
    if error.status in (401, 403):
        fields = {"event": "refused", "correlation_id": request[CORRELATION_ID], "peer": request.remote}
        log.info("request refused: %s", error.code, extra=fields)  # its message quotes the client
    return _json(wire.refusal(error, home=request.app[SETTINGS].home), status=error.status, headers=headers)


def _json(answer: Any, *, status: int = 200, headers: dict[str, str] | None = None) -> web.Response:
    return web.Response(
        body=msgspec.json.encode(answer), status=status, headers=headers, content_type="application/json"
    )


# -- routes ----------------------------------------------------------------------------------------


async def get_health(request: web.Request) -> web.Response:
    """The process answers; nothing more."""
    return _json({"status": "ok"})


async def create_task(request: web.Request) -> web.Response:
    """Admit a task [MVP-030]."""
    settings = request.app[SETTINGS]
    body = await _read_body(request, settings)
    correlation_id = request[CORRELATION_ID]
    task = await request.app[ORCHESTRATOR].submit(
        wire.task_request(body, max_tokens=settings.max_tokens),
        correlation_id=correlation_id,
        identity=request[IDENTITY],
    )
    answer = wire.created(task, None if settings.home else correlation_id)
    return _json(answer, status=202, headers={hdrs.LOCATION: f"/v1/tasks/{task.id}"})


async def list_tasks(request: web.Request) -> web.Response:
    """Recent tasks, newest first."""
    for name in request.query:
        if name not in ("state", "limit"):
            raise InvalidParams(f"?{name[:60]}: unknown, expected state or limit")
    orchestrator = request.app[ORCHESTRATOR]
    state, limit = (
        wire.state_filter(request.query.get("state")),
        wire.limit_filter(request.query.get("limit")),
    )
    tasks = orchestrator.recent(state, limit)
    positions = orchestrator.queue_positions(tasks)
    views = [wire.snapshot(task, positions.get(task.id), with_stream_url=False) for task in tasks]
    return _json(wire.TaskList(views))


async def get_task(request: web.Request) -> web.Response:
    """One task as it stands."""
    orchestrator = request.app[ORCHESTRATOR]
    task = orchestrator.get(request.match_info["task_id"])
    position = orchestrator.queue_positions([task]).get(task.id)
    return _json(wire.snapshot(task, position, with_stream_url=True))


async def cancel_task(request: web.Request) -> web.Response:
    """End a task; from this answer on no token of it is sent to anybody [MVP-032]."""
    await _expect_no_body(request)
    task = request.app[ORCHESTRATOR].cancel(request.match_info["task_id"])
    return _json(wire.Cancelled(task_id=task.id, state=task.state.value, tokens_out=task.tokens_out))


async def get_pool_health(request: web.Request) -> web.Response:
    """How a pool is [MVP-041]."""
    return _json(request.app[ORCHESTRATOR].health(request.match_info["pool_id"]))


async def reload_pool(request: web.Request) -> web.Response:
    """Other replicas for a pool, or what the configuration says now; all of it, or nothing changes."""
    body = await _read_body(request, request.app[SETTINGS])
    pool_id = request.app[ORCHESTRATOR].pool(request.match_info["pool_id"]).pool_id
    replicas = control.new_replicas(body, pool_id)
    return _json(await request.app[RELOADER].reload_pool(pool_id, replicas))


async def drain_pool(request: web.Request) -> web.Response:
    """Take no new task, fail what is left at the deadline; until a reload, or until that is cancelled."""
    body = await _read_body(request, request.app[SETTINGS])
    pool = request.app[ORCHESTRATOR].pool(request.match_info["pool_id"])
    deadline_s = control.drain_deadline_s(body)
    if deadline_s is None:
        pool.end_drain()
        return _json(control.Drained(pool_id=pool.pool_id, draining=False))
    pool.drain(deadline_s)
    deadline_ms = round(deadline_s * 1000)
    return _json(control.Drained(pool_id=pool.pool_id, draining=True, deadline_ms=deadline_ms))


async def get_status(request: web.Request) -> web.Response:
    """Everything at a glance; cheap enough to be asked every second."""
    return _json(request.app[STATUS].status())


async def get_metrics(request: web.Request) -> web.Response:
    """Every number there is, for Prometheus."""
    return web.Response(
        body=request.app[METRICS].exposition(), headers={"Content-Type": operations.PROMETHEUS}
    )


async def get_capabilities(request: web.Request) -> web.Response:
    """The API's version, and what each pool can do."""
    return _json(request.app[ORCHESTRATOR].capabilities())


async def get_openapi(request: web.Request) -> web.Response:
    """The API's description."""
    home = request.app[SETTINGS].home
    return web.Response(body=_description(home=home), content_type="application/json")


@functools.cache
def _description(*, home: bool) -> bytes:
    return openapi.encoded((method, path) for method, path, _ in routes(home=home))


async def stream_task(request: web.Request) -> web.StreamResponse:
    """The events of a task, from the start or after `Last-Event-ID`; 204 if there are no more [MVP-033]."""
    orchestrator, task_id = request.app[ORCHESTRATOR], request.match_info["task_id"]
    if IDENTITY not in request:  # a ticket instead of a token
        check_ticket(request.query["ticket"], orchestrator.ticket(task_id))
    task = orchestrator.get(task_id)
    asked = wire.metrics_filter(request.query.get("metrics"))
    aside = Teller(task, request.app[OUTLOOK]) if asked else None
    position = task.log.resume(_last_event_id(request))
    if position is None:
        return web.Response(status=204)
    with orchestrator.reading(task):
        return await write_events(request, task.log, position, request.app[SETTINGS].heartbeat_s, aside)


async def no_such_route(request: web.Request) -> web.StreamResponse:
    """404, or 405 with the methods that the path does have."""
    allowed: set[str] = set()
    for resource in request.app.router.resources():
        if resource is not request.match_info.route.resource:
            allowed |= (await resource.resolve(request))[1]
    raise _method_not_allowed(request, allowed) if allowed else _not_found(request)


ROUTES: list[tuple[str, str, Handler]] = [
    ("GET", "/health", get_health),
    ("POST", "/v1/tasks", create_task),
    ("GET", "/v1/tasks", list_tasks),
    ("GET", "/v1/tasks/{task_id}", get_task),
    ("GET", "/v1/tasks/{task_id}/stream", stream_task),
    ("POST", "/v1/tasks/{task_id}/cancel", cancel_task),
    ("GET", "/v1/pools/{pool_id}/health", get_pool_health),
    ("POST", "/v1/pools/{pool_id}/reload", reload_pool),
    ("POST", "/v1/pools/{pool_id}/drain", drain_pool),
    ("GET", "/v1/status", get_status),
    ("GET", "/metrics", get_metrics),
    ("GET", "/", get_page),
    ("GET", "/v1/capabilities", get_capabilities),
    ("GET", "/openapi.json", get_openapi),
]


_NOT_AT_HOME = frozenset({"/v1/pools/{pool_id}/drain"})


def routes(*, home: bool) -> list[tuple[str, str, Handler]]:
    """Every route of the profile."""
    return [route for route in ROUTES if not home or route[1] not in _NOT_AT_HOME]


def _not_found(request: web.Request) -> NotFound:
    return NotFound(f"no route {request.path[:80]}: tasks are handed in at POST /v1/tasks")


def _method_not_allowed(request: web.Request, allowed: set[str]) -> MethodNotAllowed:
    methods = ", ".join(sorted(allowed))
    message = f"{request.method[:20]} is not possible on {request.path[:80]}, {methods} is"
    return MethodNotAllowed(message, headers={"Allow": methods})


# -- bodies ----------------------------------------------------------------------------------------


async def _read_body(request: web.Request, settings: ApiSettings) -> bytes:
    """The JSON body, bounded in type, bytes and time; refused before it is read where that can be known."""
    if "Content-Encoding" in request.headers:
        raise UnsupportedMediaType("Content-Encoding is not supported: send the body as it is")
    if request.body_exists and request.content_type != "application/json":
        message = f"expected Content-Type: application/json, got {request.content_type[:60]!r}"
        raise UnsupportedMediaType(message)
    limit = settings.max_body_bytes
    if (request.content_length or 0) > limit:
        raise BodyTooLarge(f"the body has {request.content_length} bytes, http.max_body_bytes is {limit}")
    return await _bounded(request, limit, settings.body_timeout_s)


async def _bounded(request: web.Request, limit: int, timeout_s: float) -> bytes:
    if request.content.is_eof() and request.content.exception() is None:  # all of it came with the headers
        whole = request.content.read_nowait()
        if len(whole) <= limit:
            return whole
        raise BodyTooLarge(f"the body has over {limit} bytes (http.max_body_bytes)")
    body = bytearray()
    try:
        async with asyncio.timeout(timeout_s):
            if request.headers.get("Expect", "").lower() == "100-continue":
                await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
                request.writer.output_size = 0
            async for block in request.content.iter_any():
                body += block
                if len(body) > limit:
                    raise BodyTooLarge(f"the body has over {limit} bytes (http.max_body_bytes)")
    except TimeoutError:
        raise BodyTimeout(f"the body took over {timeout_s:g} s (http.body_timeout_s)") from None
    except (web.RequestPayloadError, HttpProcessingError):
        raise InvalidParams("the body is not framed as HTTP says") from None
    return bytes(body)


async def _expect_no_body(request: web.Request) -> None:
    """Refuse what a form of another site could send; aiohttp's client gives an empty body a harmless type."""
    content_type = request.headers.get("Content-Type", "application/octet-stream")
    if content_type != "application/octet-stream" or "Content-Encoding" in request.headers:
        raise UnsupportedMediaType("this route takes no body and no Content-Type")
    if request.content_length:
        raise UnsupportedMediaType("this route takes no body")
    if request.body_exists:
        try:
            await _bounded(request, 0, request.app[SETTINGS].body_timeout_s)
        except BodyTooLarge:
            raise UnsupportedMediaType("this route takes no body") from None


# -- event streams ---------------------------------------------------------------------------------


def _last_event_id(request: web.Request) -> int | None:
    given = request.headers.get("Last-Event-ID")
    if given is None:
        given = request.query.get("last_event_id", "")
    return int(given) if _EVENT_ID.fullmatch(given) else None

"""The composition root: a Config becomes objects, the objects become a process that runs and stops well.

The one rule: decisions live in the objects; here they are only put together, started, and stopped in order.
"""

import asyncio
import contextlib
import errno
import functools
import logging
import os
import resource
import signal
import socket
import stat
import tomllib
from collections.abc import AsyncIterator, Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from aiohttp import web

from llorch import __version__, gpu, journal, logs, sdnotify
from llorch.api import ApiSettings, make_app
from llorch.blueprint import ConfiguredPools
from llorch.config import unknown_variables
from llorch.errors import ReloadFailed
from llorch.metrics import Metrics
from llorch.orchestrator import Orchestrator, StreamSettings
from llorch.reload import Reloader
from llorch.schema import Address, Config, parse_address, secrets_of
from llorch.security import Gate
from llorch.status import StatusBoard
from llorch.streams import STALLED_WRITE_S
from llorch.telemetry import GpuSampler

log = logging.getLogger("llorch.server")

STDIN = 0

EXIT_BUG = 1
EXIT_UNAVAILABLE = 69
EXIT_CONFIG = 78

FIRST_PROBE_S = 2.0
LINGERING_S = 2.0
READERS_LEAVE_S = 1.0
READERS_LEAVE_AT_ONCE_S = 0.5
RESERVED_FILES = 256  # for engines, clients that do not stream, and what the process itself needs
_LLAMA_SERVER_PORT = 8080
CPU_CARVE_OUT = "cpu (gpu.required = false)"

_NOT_HTTP = b'{"code":"INVALID_PARAMS","message":"this is not a valid HTTP request","engine":null}'
_BUG = b'{"code":"INTERNAL","message":"a bug in llorch; its log has more","engine":null}'


class StartError(Exception):
    """Something outside the configuration file keeps the service from starting."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Protocol(web.RequestHandler):
    """aiohttp's, but what its parser refuses is answered with constant bytes and logged in one line."""

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """The answer to what no handler can answer; closes the connection."""
        if request.writer.output_size > 0:
            raise ConnectionAbortedError  # the answer has begun: cutting it off is all that is left
        client_fault = status < 500
        if client_fault:
            log.info("not HTTP from %s", request.remote, extra={"event": "bad_request"})
        else:
            log.error("a bug failed a request before its handler", exc_info=exc, extra={"event": "bug"})
        body = _NOT_HTTP if client_fault else _BUG
        response = web.Response(
            status=status, body=body, content_type="application/json", headers={"Server": "llorch"}
        )
        response.force_close()
        return response

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        """Send the answer; what aiohttp itself would say, in text that quotes the request, is replaced."""
        if isinstance(resp, web.HTTPException):
            resp = self.handle_error(request, 400)
        return await super().finish_response(request, resp, start_time)


# -- put together ----------------------------------------------------------------------------------


class House(NamedTuple):
    """What `compose` puts together."""

    app: web.Application
    orchestrator: Orchestrator
    reloader: Reloader


class Reading(NamedTuple):
    """How the configuration is read again, and who is told of the secrets that come with it."""

    reread: Callable[[], Config]
    on_secrets: Callable[[Iterable[str]], None]

    @classmethod
    def nothing_new(cls, config: Config) -> "Reading":
        """There is no file: what is in force is read again."""
        return cls(lambda: config, lambda secrets: None)


def compose(config: Config, accelerator: str, reading: Reading) -> House:
    """Everything that `config` asks for; needs a running loop."""
    sampler = GpuSampler(required=config.gpu.required)
    configured = ConfiguredPools(
        config,
        accelerator,
        free_vram=sampler.free_vram,
        reread=reading.reread,
        on_secrets=reading.on_secrets,
    )
    orchestrator = Orchestrator(configured.pools(), _stream(config), tickets=bool(config.auth.token))
    orchestrator.listeners.append(journal.task_moved)
    orchestrator.refusal_listeners.append(journal.task_refused)
    reloader = Reloader(orchestrator, configured.plans, configured)
    gate = Gate(
        token=config.auth.token,
        optional_on_loopback=config.auth.optional,
        trust_proxy_auth=config.auth.trust_proxy_auth,
        own_names=(socket.gethostname(), *config.http.allowed_hosts),
        cors_origins=config.http.cors_origins,
    )
    home = config.profile == "home"
    settings = ApiSettings(
        home=home,
        max_tokens=config.limits.max_tokens,
        max_body_bytes=config.http.max_body_bytes,
        body_timeout_s=config.http.body_timeout_s,
        heartbeat_s=config.stream.heartbeat_s,
    )
    status = StatusBoard(orchestrator, lambda: sampler.reading, home=home)
    metrics = Metrics(orchestrator, lambda: sampler.reading, home=home)
    app = make_app(orchestrator, reloader, gate, settings, status, metrics)
    app.cleanup_ctx.append(functools.partial(_sampling, sampler))
    return House(app, orchestrator, reloader)


async def _sampling(sampler: GpuSampler, app: web.Application) -> AsyncIterator[None]:
    """GPU telemetry for as long as the application runs; neither end waits for the driver."""
    sampler.start()
    yield
    sampler.stop()


def _stream(config: Config) -> StreamSettings:
    stream = config.stream
    return StreamSettings(
        max_readers=_affordable_readers(stream.max_readers),
        retain_s=stream.retain_s,
        retain_bytes=stream.retain_bytes,
        cancel_on_disconnect=stream.on_disconnect == "cancel",
        disconnect_grace_s=stream.disconnect_grace_s,
    )


def _affordable_readers(wanted: int) -> int:
    """As many streams as wanted, or as there are file descriptors for."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            soft = hard
    if soft == resource.RLIM_INFINITY or wanted <= soft - RESERVED_FILES:
        return wanted
    affordable = max(soft - RESERVED_FILES, 1)
    message = "stream.max_readers is %d, the limit of %d open files leaves room for %d: raise LimitNOFILE"
    log.warning(message, wanted, soft, affordable, extra={"event": "start"})
    return affordable


# -- start -----------------------------------------------------------------------------------------


def serve(config: Config, config_file: Path | None = None, reread: Callable[[], Config] | None = None) -> int:
    """Run until SIGTERM or SIGINT, and return the exit code; SIGHUP has `reread` read the configuration anew.

    Raises StartError.
    """
    accelerator = _accelerator(config)
    sock = _bind(parse_address(config.bind_addr))
    secrets = secrets_of(msgspec.to_builtins(config))
    listener = logs.start(text=config.log.format == "text", level=config.log.level, secrets=secrets)
    try:
        _warn(config, config_file)
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            reading = Reading(reread or (lambda: config), listener.redact)
            return runner.run(_serve(config, sock, accelerator, reading))
    finally:
        listener.stop()


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop's where that is installed (`llorch[fast]`), else None: asyncio's own."""
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop


def _accelerator(config: Config) -> str:
    """What computes, for health; raises StartError without a GPU where one is required [MVP-010]."""
    if not config.gpu.required:
        return CPU_CARVE_OUT
    try:
        return str(gpu.preflight())
    except gpu.GpuUnavailable as error:
        raise StartError(f"no GPU: {error}", EXIT_CONFIG) from error


def _bind(address: Address) -> socket.socket:
    """A bound socket that does not listen yet; raises StartError."""
    host = "127.0.0.1" if address.host == "localhost" else address.host
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, address.port))
    except OSError as error:
        sock.close()
        raise _bind_error(address, error) from error
    return sock


def _bind_error(address: Address, error: OSError) -> StartError:
    if error.errno == errno.EADDRINUSE:
        default = "; 8080 is llama-server's own default: start that with --port 8081"
        return StartError(
            f"{address} is taken by another program: stop it, or choose another bind_addr "
            f"(`ss -ltnp 'sport = :{address.port}'` shows who has it"
            f"{default if address.port == _LLAMA_SERVER_PORT else ''})",
            EXIT_UNAVAILABLE,
        )
    return StartError(f"can't listen on {address}: {error.strerror}; mend bind_addr", EXIT_CONFIG)


def _warn(config: Config, config_file: Path | None) -> None:
    """Say what is allowed and yet should be known."""
    extra = {"event": "start"}
    if not config.gpu.required:
        log.warning("gpu.required = false: INFERENCE MAY RUN ON THE CPU; for CI and demos only", extra=extra)
    if config.auth.trust_proxy_auth:
        log.warning(
            "auth.trust_proxy_auth = true: the proxy must check and overwrite every Authorization header it "
            "passes on; whoever reaches it otherwise is let in",
            extra=extra,
        )
    for line in unknown_variables(os.environ):
        log.warning("%s", line, extra=extra)
    if config_file is not None and _shows_a_secret(config_file):
        log.warning(
            "others on this machine can read %s and the secrets in it: chmod 600 it", config_file, extra=extra
        )


def _shows_a_secret(config_file: Path) -> bool:
    """Whether the file itself holds a secret, not what came from elsewhere, and lets others read it."""
    if not config_file.is_file() or not stat.S_IMODE(config_file.stat().st_mode) & 0o077:
        return False
    return bool(secrets_of(tomllib.loads(config_file.read_text("utf-8"))))


# -- run and stop ----------------------------------------------------------------------------------


class _Signals:
    """SIGTERM and SIGINT: the first asks to stop, the second to stop at once. SIGHUP: read all anew."""

    def __init__(self) -> None:
        self.stop = asyncio.Event()
        self.stop_at_once = asyncio.Event()
        self._reload: asyncio.Task[None] | None = None
        self._in_terminal = os.isatty(STDIN)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._received)

    def on_hangup(self, reloader: Reloader) -> None:
        """Reload on SIGHUP from now on."""
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self._hang_up, reloader)

    def _hang_up(self, reloader: Reloader) -> None:
        if self._in_terminal and not os.isatty(STDIN):  # not asked for by anybody: its window was closed
            self._received()
            return
        self._reload = asyncio.create_task(_reload(reloader), name="hangup")

    def _received(self) -> None:
        (self.stop_at_once if self.stop.is_set() else self.stop).set()


async def _serve(config: Config, sock: socket.socket, accelerator: str, reading: Reading) -> int:
    signals = _Signals()
    async with listening(config, sock, accelerator, reading) as house:
        host, port = sock.getsockname()[:2]
        loop = type(asyncio.get_running_loop()).__module__.partition(".")[0]
        message = f"llorch {__version__} listens on http://{Address(host, port)}, computes on {accelerator}"
        log.info("%s; its event loop is %s's", message, loop, extra={"event": "start"})
        signals.on_hangup(house.reloader)
        sdnotify.notify(f"READY=1\nSTATUS={message}")
        return await _work(house.orchestrator, signals, config.shutdown.grace_s)


@contextlib.asynccontextmanager
async def listening(
    config: Config, sock: socket.socket, accelerator: str, reading: Reading | None = None
) -> AsyncIterator[House]:
    """Answer on `sock`, the first probe done; `run` the orchestrator inside. Everything is closed after."""
    house = compose(config, accelerator, reading or Reading.nothing_new(config))
    runner = web.AppRunner(house.app, handler_cancellation=True, access_log=None, shutdown_timeout=0.05)
    await runner.setup()
    try:
        await house.orchestrator.first_probe(FIRST_PROBE_S)
        async with _accepting(runner, sock, config.http.idle_timeout_s):
            yield house
    finally:
        await house.reloader.close()
        await house.orchestrator.close()
        await runner.cleanup()


@contextlib.asynccontextmanager
async def _accepting(
    runner: web.AppRunner, sock: socket.socket, idle_timeout_s: float
) -> AsyncIterator[asyncio.Server]:
    loop, server = asyncio.get_running_loop(), runner.server
    assert server is not None

    def protocol() -> Protocol:
        return Protocol(
            server,
            loop=loop,
            keepalive_timeout=idle_timeout_s,
            lingering_time=LINGERING_S,
            access_log=None,  # type: ignore[arg-type]  # aiohttp's own way to say off
            auto_decompress=False,
        )

    # Inherited by every connection: who takes nothing of an answer for so long is cut off by the kernel.
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(STALLED_WRITE_S * 1000))
    try:
        server_socket = await loop.create_server(protocol, sock=sock, backlog=1024)
    except OSError as error:
        host, port = sock.getsockname()[:2]
        raise _bind_error(Address(host, port), error) from error
    try:
        yield server_socket
    finally:
        server_socket.close()


async def _work(orchestrator: Orchestrator, signals: _Signals, grace_s: float) -> int:
    """Keep the pools at work until a signal, then stop; the exit code."""
    work = asyncio.create_task(orchestrator.run(), name="orchestrator")
    beat = asyncio.create_task(_feed_watchdog(work), name="watchdog")
    stop_asked = asyncio.create_task(signals.stop.wait(), name="stop-signal")
    await asyncio.wait({work, stop_asked}, return_when=asyncio.FIRST_COMPLETED)
    failed = work.done()
    if failed:
        log.critical(
            "a bug stopped the dispatcher, so llorch stops",
            exc_info=work.exception(),
            extra={"event": "bug"},
        )
        signals.stop_at_once.set()
    await _stop(orchestrator, work, signals, grace_s)
    await _end(beat, stop_asked)
    return EXIT_BUG if failed else 0


async def _reload(reloader: Reloader) -> None:
    """What was asked by signal is answered in the log."""
    try:
        await reloader.reload_all()
    except ReloadFailed:
        pass  # whoever reloads has logged it
    except Exception:
        log.exception("a bug in llorch failed a reload", extra={"event": "bug"})


async def _feed_watchdog(work: asyncio.Task[None]) -> None:
    """Tell systemd that all is well, as long as the dispatcher lives and the loop turns."""
    interval_s = sdnotify.watchdog_interval_s()
    while interval_s is not None and not work.done():
        sdnotify.notify("WATCHDOG=1")
        await asyncio.sleep(interval_s)


async def _stop(
    orchestrator: Orchestrator, work: asyncio.Task[None], signals: _Signals, grace_s: float
) -> None:
    """CONTRACT: waiting tasks fail at once, running ones have the grace, readers a second."""
    sdnotify.notify("STOPPING=1")
    if not signals.stop_at_once.is_set():
        log.info("stopping: running tasks have %g s", grace_s, extra={"event": "stop"})
    orchestrator.stop()
    finished = asyncio.create_task(orchestrator.finished(), name="grace")
    at_once = asyncio.create_task(signals.stop_at_once.wait(), name="second-signal")
    await asyncio.wait({finished, at_once}, timeout=grace_s, return_when=asyncio.FIRST_COMPLETED)
    await _end(finished, work)  # or it would find the engine's connections closed, and complain
    await orchestrator.close()
    leave_s = READERS_LEAVE_AT_ONCE_S if signals.stop_at_once.is_set() else READERS_LEAVE_S
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(leave_s):
            await orchestrator.readers_gone()
    await _end(at_once)
    log.info("stopped", extra={"event": "stop"})


async def _end(*tasks: asyncio.Task[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)

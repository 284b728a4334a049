"""`llorch serve` as a process of its own: how it starts, what it tells systemd, how it stops."""

import asyncio
import contextlib
import json
import os
import re
import resource
import signal
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from llorch.config import env_name
from tests.fakes import PATIENCE_S, Connection, FakeLlamaServer, answers
from tests.live import Event, EventReader, names

ROOT = Path(__file__).parent.parent
MAIN = "import sys; from llorch.cli import main; sys.exit(main())"


class Server:
    """The process, its log as it comes, and a client's view of it."""

    def __init__(self, process: asyncio.subprocess.Process, session: aiohttp.ClientSession) -> None:
        self.process = process
        self.session = session
        self.log: list[dict[str, Any]] = []
        self.url = ""

    async def logged(self, pattern: str) -> str:
        """The message of the next log line that has `pattern`."""
        assert self.process.stdout is not None
        async with asyncio.timeout(PATIENCE_S):
            async for line in self.process.stdout:
                self.log.append(json.loads(line))
                if re.search(pattern, self.log[-1]["msg"]):
                    return str(self.log[-1]["msg"])
        raise AssertionError(f"no line with {pattern!r}: {self.log}")

    def signal(self, number: signal.Signals) -> None:
        """Send it this signal; of two at once the kernel may make one."""
        self.process.send_signal(number)

    async def ended(self, code: int) -> None:
        """It has ended with `code`, and never said anything but log lines."""
        async with asyncio.timeout(PATIENCE_S):
            stdout, stderr = await self.process.communicate()
        self.log += [json.loads(line) for line in (stdout or b"").splitlines()]
        assert (self.process.returncode, stderr) == (code, b"")

    async def submit(self, **task: Any) -> dict[str, Any]:
        """Hand in a task that is admitted."""
        async with self.session.post(f"{self.url}/v1/tasks", json={"prompt": "hello", **task}) as answer:
            assert answer.status == 202, await answer.text()
            created: dict[str, Any] = await answer.json()
            return created

    async def ask(self, method: str, path: str, **options: Any) -> tuple[int, Any]:
        """Status and JSON of one request."""
        async with self.session.request(method, f"{self.url}{path}", **options) as answer:
            return answer.status, await answer.json()

    @contextlib.asynccontextmanager
    async def stream(self, task: dict[str, Any]) -> AsyncIterator[EventReader]:
        """A stream of the task, open, behind its `started`."""
        async with self.session.get(f"{self.url}{task['stream_url']}") as response:
            reader = EventReader(response)
            started = await reader.next()
            assert started is not None
            assert started.name == "started"
            yield reader


async def spawn(
    code: str, settings: dict[str, Any], env: dict[str, str], file: Path | None = None, **options: Any
) -> asyncio.subprocess.Process:
    """Start it, without a config file unless one is given."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("LLORCH_")}
    given = {env_name(key): str(value) for key, value in settings.items()}
    pipes = {"stdout": asyncio.subprocess.PIPE, "stderr": asyncio.subprocess.PIPE}
    return await asyncio.create_subprocess_exec(
        *[sys.executable, "-c", f"{code}\n{MAIN}", "serve", "--config", str(file or os.devnull)],
        cwd=ROOT,
        env=inherited | given | env,
        **(pipes | options),
    )


@contextlib.asynccontextmanager
async def serving(
    engine: FakeLlamaServer,
    settings: dict[str, Any] | None = None,
    *,
    code: str = "",
    env: dict[str, str] | None = None,
    **options: Any,
) -> AsyncIterator[Server]:
    """llorch in front of `engine`, listening; `settings` by dotted key, `code` is Python to run first."""
    settings = {
        "bind_addr": "127.0.0.1:0",
        "gpu.required": "false",
        "adapter.endpoint": engine.url,
        "adapter.self_test": "false",
        **(settings or {}),
    }
    process = await spawn(code, settings, env or {}, **options)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        server = Server(process, session)
        try:
            if process.stdout is not None:
                server.url = (await server.logged("^llorch .* listens on ")).split()[4].rstrip(",")
            yield server
        finally:
            if process.returncode is None:
                process.kill()
                await process.communicate()


@pytest.fixture
def held(fake_engine: FakeLlamaServer) -> FakeLlamaServer:
    """A fake engine that gives out only what the test lets out."""
    fake_engine.hold = True
    return fake_engine


def code_of(events: list[Event]) -> str:
    """The code of a stream's last event, or the reason of its end."""
    data = events[-1].data
    return str(data.get("code", data.get("finish_reason")))


# -- start and supervision -------------------------------------------------------------------------


@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
async def test_the_event_loop_is_the_best_there_is_and_is_named(
    fake_engine: FakeLlamaServer, loop: str
) -> None:
    """uvloop where it is installed, else asyncio's own; both do the work."""
    code = "" if loop == "uvloop" else "import sys; sys.modules['uvloop'] = None"
    async with serving(fake_engine, code=code) as server:
        assert server.log[-1]["msg"].endswith(f"its event loop is {loop}'s")
        async with server.stream(await server.submit(max_tokens=2)) as stream:
            assert names(await stream.rest()) == "token token end"


async def test_it_tells_systemd_how_it_is(fake_engine: FakeLlamaServer, tmp_path: Path) -> None:
    """READY once it listens, a beat for the watchdog while it works, STOPPING; all in order [P1, P6]."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        systemd.setblocking(False)

        async def told() -> str:
            async with asyncio.timeout(PATIENCE_S):
                return (await asyncio.get_running_loop().sock_recv(systemd, 4096)).decode()

        env = {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "40000"}
        async with serving(fake_engine, env=env) as server:
            ready = await told()
            assert ready.startswith("READY=1\nSTATUS=llorch ")
            assert server.url in ready
            assert await server.ask("GET", "/health") == (200, {"status": "ok"})
            assert [await told() for _ in range(3)] == ["WATCHDOG=1"] * 3
            server.signal(signal.SIGTERM)
            while (said := await told()) == "WATCHDOG=1":
                pass
            assert said == "STOPPING=1"
            await server.ended(0)


async def test_it_starts_without_its_engine(fake_engine: FakeLlamaServer) -> None:
    """It is ready to say that the pool is not, and takes tasks once the engine is there [E1, MVP-041]."""
    await fake_engine.kill()
    async with serving(fake_engine) as server:
        status, refusal = await server.ask("POST", "/v1/tasks", json={"prompt": "hello"})
        assert (status, refusal["code"]) == (503, "POOL_UNAVAILABLE")
        await fake_engine.start()
        await server.logged("is ready")
        async with server.stream(await server.submit(max_tokens=1)) as stream:
            assert names(await stream.rest()) == "token end"
        server.signal(signal.SIGTERM)
        await server.ended(0)


async def test_the_limit_of_open_files_is_raised(fake_engine: FakeLlamaServer) -> None:
    """To its hard limit; where that is too low, fewer streams are allowed, and the log says so [C7]."""

    def few_files() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (100, 400))

    fake_engine.hold = True
    async with serving(fake_engine, preexec_fn=few_files) as server:
        assert resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE) == (400, 400)
        assert any("leaves room for 144: raise LimitNOFILE" in line["msg"] for line in server.log)
        task = await server.submit()
        async with contextlib.AsyncExitStack() as streams:
            for _ in range(144):
                await streams.enter_async_context(server.stream(task))
            status, refusal = await server.ask("GET", task["stream_url"])
            assert (status, refusal["code"]) == (503, "TOO_MANY_STREAMS")
            assert await server.ask("GET", "/health") == (200, {"status": "ok"})
        await server.ask("POST", task["cancel_url"])
        server.signal(signal.SIGTERM)
        await server.ended(0)


async def test_more_connections_than_files(fake_engine: FakeLlamaServer) -> None:
    """Once files are free again it serves as before, by itself [C7]."""

    def few_files() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (60, 60))

    async with serving(fake_engine, {"http.idle_timeout_s": 0.2}, preexec_fn=few_files) as server:
        address = ("127.0.0.1", int(server.url.rpartition(":")[2]))
        async with contextlib.AsyncExitStack() as connections:
            readers = []
            for _ in range(80):
                reader, writer = await asyncio.open_connection(*address)
                connections.callback(writer.close)
                readers.append(reader)
            async with asyncio.timeout(PATIENCE_S):
                for reader in readers:  # each had its turn; uvloop closes at once what there is no file for
                    with contextlib.suppress(ConnectionError):
                        assert await reader.read() == b""
        async with server.stream(await server.submit(max_tokens=1)) as stream:
            assert names(await stream.rest()) == "token end"
        server.signal(signal.SIGTERM)
        await server.ended(0)


async def failed_to_start(settings: dict[str, Any]) -> tuple[int | None, str]:
    """Exit code and stderr of a start that is expected to fail; stdout stays empty."""
    process = await spawn("", {"gpu.required": "false", **settings}, {})
    async with asyncio.timeout(PATIENCE_S):
        stdout, stderr = await process.communicate()
    assert stdout == b""
    return process.returncode, stderr.decode()


async def test_a_port_that_is_taken() -> None:
    """Exit code 69, and one line that says how to find out who has it."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, said = await failed_to_start({"bind_addr": f"127.0.0.1:{port}"})
    assert code == 69
    assert said.startswith(f"llorch: 127.0.0.1:{port} is taken by another program: ")
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ({"bind_addr": "0.0.0.0:0"}, "NON_LOOPBACK_WITHOUT_TOKEN"),
        ({"bind_addr": "192.0.2.1:0", "auth.token": "x" * 16}, "can't listen on 192.0.2.1:0"),
        ({"profile": "home"}, "HOME_WITHOUT_TOKEN"),
        ({"queue.capacity": "0", "log.level": "loud"}, "LLORCH_LOG_LEVEL"),
    ],
)
async def test_a_configuration_that_can_not_work(settings: dict[str, Any], fault: str) -> None:
    """Exit code 78, every fault on a line of its own, no traceback [MVP-011]."""
    code, said = await failed_to_start(settings)
    assert code == 78
    assert fault in said
    assert all(line.startswith("llorch: ") for line in said.splitlines())


# -- SIGHUP ----------------------------------------------------------------------------------------


async def test_a_hangup_reads_the_configuration_anew(fake_engine: FakeLlamaServer, tmp_path: Path) -> None:
    """The whole file; what is wrong with it is a line in the log, and nothing changes."""
    file = tmp_path / "llorch.toml"
    file.write_text("queue.capacity = 3")
    async with serving(fake_engine, file=file) as server:
        file.write_text("queue.capacity = 5")
        server.signal(signal.SIGHUP)
        await server.logged("pool default was reloaded")
        pool = (await server.ask("GET", "/v1/pools/default/health"))[1]
        assert pool["queue"]["capacity"] == 5
        file.write_text("queue.capacity = 7\nstream.max_readers = 9")
        server.signal(signal.SIGHUP)
        said = await server.logged("nothing was changed")
        assert "stream.max_readers: can't change while llorch runs" in said
        assert (await server.ask("GET", "/v1/pools/default/health"))[1]["queue"]["capacity"] == 5
        server.signal(signal.SIGTERM)
        await server.ended(0)
        assert [line["event"] for line in server.log if line["event"].startswith("reload")] == [
            "reloaded",
            "reload_failed",
        ]


async def test_a_closed_terminal_stops_it(fake_engine: FakeLlamaServer) -> None:
    """Who closes the window of a server in the foreground wants it gone, not reloaded."""
    master, slave = os.openpty()
    async with serving(fake_engine, stdin=slave) as server:
        os.close(slave)
        os.close(master)
        server.signal(signal.SIGHUP)
        await server.ended(0)
        assert [line["event"] for line in server.log][-2:] == ["stop", "stop"]


# -- stop ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_when_idle(fake_engine: FakeLlamaServer, number: signal.Signals) -> None:
    """Exit code 0 at once, with kept-alive connections open, and the log says so [P1]."""
    async with serving(fake_engine) as server:
        assert await server.ask("GET", "/health") == (200, {"status": "ok"})
        server.signal(number)
        await server.ended(0)
        assert [line["event"] for line in server.log][-2:] == ["stop", "stop"]


async def test_a_signal_while_tasks_wait_and_run(held: FakeLlamaServer) -> None:
    """Waiting ones fail at once; running ones have the grace; new ones get 503; the rest answers [P1]."""
    async with serving(held) as server:
        running, waiting = await server.submit(), await server.submit()
        async with server.stream(running) as live, server.stream(waiting) as queued:
            connection = await held.started(1)
            await connection.token("a")
            server.signal(signal.SIGTERM)
            events = await queued.rest()
            assert names(events) == "error"
            assert (events[-1].data["code"], events[-1].data["retriable"]) == ("POOL_UNAVAILABLE", True)
            status, refusal = await server.ask("POST", "/v1/tasks", json={"prompt": "hello"})
            assert (status, refusal["code"], refusal["retriable"]) == (503, "POOL_UNAVAILABLE", True)
            assert await server.ask("GET", "/health") == (200, {"status": "ok"})
            status, pool = await server.ask("GET", "/v1/pools/default/health")
            assert (status, pool["ready"]) == (200, False)
            await connection.token("b")
            await connection.finish()
            assert names(await live.rest()) == "token token end"
        await server.ended(0)
        assert len(held.completions) == 1


async def headers_missing(connection: Connection) -> None:
    """The engine has the request, and has said nothing."""
    await connection.stall()


async def prefill(connection: Connection) -> None:
    """The engine works on the prompt."""
    await connection.headers()
    await connection.stall()


async def streaming(connection: Connection) -> None:
    """The engine has said a token."""
    await connection.token("a")
    await connection.stall()


@pytest.mark.parametrize("state", [headers_missing, prefill, streaming])
async def test_the_grace_has_an_end(fake_engine: FakeLlamaServer, state: Any) -> None:
    """What runs when it is over gets WORKER_RESET; the engine's connection is closed; exit code 0 [P1]."""
    fake_engine.script(state)
    async with serving(fake_engine, {"shutdown.grace_s": 0.1}) as server:
        async with server.stream(await server.submit()) as stream:
            await fake_engine.started(1)
            if state is streaming:
                await stream.next()
            server.signal(signal.SIGTERM)
            events = await stream.rest()
            assert (names(events), code_of(events)) == ("error", "WORKER_RESET")
            assert events[-1].data["retriable"] is True
        await server.ended(0)
        await fake_engine.closed(1)


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
async def test_a_second_signal_skips_the_grace(held: FakeLlamaServer, second: signal.Signals) -> None:
    """Terminal events at once, exit code 0, long before the grace is over [P2]."""
    async with serving(held, {"shutdown.grace_s": 600}) as server:
        async with server.stream(await server.submit()) as stream:
            await held.started(1)
            server.signal(signal.SIGTERM)
            await server.logged("stopping")
            server.signal(second)
            assert code_of(await stream.rest()) == "WORKER_RESET"
        await server.ended(0)


async def test_a_signal_while_a_cancelled_slot_drains(held: FakeLlamaServer) -> None:
    """The stop does not wait for the engine to let go [P1, C13]."""
    held.lingering = True
    async with serving(held) as server:
        task = await server.submit()
        await held.started(1)
        assert (await server.ask("POST", task["cancel_url"]))[1]["state"] == "cancelled"
        await held.closed(1)
        server.signal(signal.SIGTERM)
        await server.ended(0)


async def flood(connection: Connection) -> None:
    """More than sockets hold."""
    for _ in range(800):
        await connection.token("x" * 10_000)
    await connection.final()


def deaf_reader(server: Server, task: dict[str, Any]) -> socket.socket:
    """A reader of the task's stream that takes nothing yet."""
    deaf = socket.socket()
    deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    deaf.connect(("127.0.0.1", int(server.url.rpartition(":")[2])))
    deaf.sendall(f"GET {task['stream_url']} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    deaf.setblocking(False)
    return deaf


async def test_a_reader_that_does_not_read_holds_up_no_stop(fake_engine: FakeLlamaServer) -> None:
    """It has a second to take its terminal event; then the process ends without it [P1, C3]."""
    fake_engine.script(flood)
    async with serving(fake_engine) as server:
        with deaf_reader(server, await server.submit(max_tokens=4000)):
            await server.logged("task completed")
            server.signal(signal.SIGTERM)
            await server.ended(0)


async def test_a_slow_reader_still_gets_its_end(fake_engine: FakeLlamaServer) -> None:
    """The stop waits for readers that take what they have not read yet [P1, C3]."""
    fake_engine.script(flood)
    loop = asyncio.get_running_loop()
    async with serving(fake_engine, code="from llorch import server; server.READERS_LEAVE_S = 30") as server:
        with deaf_reader(server, await server.submit(max_tokens=4000)) as slow:
            await server.logged("task completed")
            server.signal(signal.SIGTERM)
            await server.logged("stopping")
            last = b""
            async with asyncio.timeout(PATIENCE_S):
                while block := await loop.sock_recv(slow, 2**16):
                    last = last[-200:] + block
            assert b"event: end\n" in last
        await server.ended(0)


async def test_a_stop_during_a_probe_is_quiet(fake_engine: FakeLlamaServer) -> None:
    """It does not look like an engine that fails: no line about readiness [P1, MVP-070]."""

    async def silent(connection: Connection) -> None:
        await connection.stall()

    fake_engine.script(answers(200, {"status": "ok"}), silent, path="/health")
    async with serving(fake_engine) as server:
        await fake_engine.until(lambda: [r.path for r in fake_engine.requests].count("/health") == 2)
        server.signal(signal.SIGTERM)
        await server.ended(0)
        assert [line["event"] for line in server.log][-3:] == ["start", "stop", "stop"]


# -- what goes wrong -------------------------------------------------------------------------------

BUG = """
import asyncio, signal
from llorch.replica import Replica
planted = []
signal.signal(signal.SIGUSR1, lambda *_: planted.append(1))
async def buggy(self):
    while not planted:
        await asyncio.sleep(0.01)
    raise ZeroDivisionError("a planted bug")
Replica.{method} = buggy
"""


@pytest.mark.parametrize("method", ["watch", "drain"])
async def test_a_bug_in_what_keeps_a_pool_at_work(held: FakeLlamaServer, method: str) -> None:
    """The process stops, exit code 1, so that systemd starts another; its readers are told [P6]."""
    async with serving(held, code=BUG.format(method=method)) as server:
        async with server.stream(await server.submit()) as stream:
            await held.started(1)
            server.signal(signal.SIGUSR1)
            events = await stream.rest()
            assert (names(events), code_of(events)) == ("error", "WORKER_RESET")
        await server.ended(1)
        [critical] = [line for line in server.log if line["level"] == "critical"]
        assert critical["event"] == "bug"
        assert critical["traceback"].startswith("ZeroDivisionError at buggy ")


async def test_the_watchdog_goes_hungry_when_the_loop_hangs(
    fake_engine: FakeLlamaServer, tmp_path: Path
) -> None:
    """No beat comes from a process whose loop stands still: systemd ends it [P6]."""
    hangs = """
import time
from llorch import api
async def hang(request):
    time.sleep(60)
api.ROUTES[0] = ("GET", "/health", hang)
"""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        env = {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "40000"}
        async with serving(fake_engine, code=hangs, env=env) as server:
            asking = asyncio.create_task(server.ask("GET", "/health"))
            systemd.settimeout(0.2)  # ten beats
            while await asyncio.to_thread(heard, systemd):
                pass
            asking.cancel()


def heard(systemd: socket.socket) -> bytes:
    """What systemd is told next, nothing if it is told nothing in time."""
    try:
        return systemd.recv(4096)
    except TimeoutError:
        return b""


async def test_a_log_that_nobody_reads(fake_engine: FakeLlamaServer) -> None:
    """With its stdout gone requests are served as before, and the stop is clean [P4]."""
    async with serving(fake_engine) as server:
        server.process._transport.get_pipe_transport(1).close()  # type: ignore[attr-defined]
        for _ in range(3):
            async with server.stream(await server.submit(max_tokens=1)) as stream:
                assert names(await stream.rest()) == "token end"
        server.signal(signal.SIGTERM)
        await server.ended(0)


def full_disk() -> None:
    """Make stdout a file that takes nothing."""
    os.dup2(os.open("/dev/full", os.O_WRONLY), 1)


@pytest.mark.parametrize("stdout", ["full", "closed"])
async def test_a_log_that_can_not_be_written(fake_engine: FakeLlamaServer, stdout: str) -> None:
    """A full disk, or no stdout at all, is no reason not to serve [P4]."""
    with socket.socket() as free:
        free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        redirected = (lambda: os.close(1)) if stdout == "closed" else full_disk
        options: dict[str, Any] = {"stdout": None, "preexec_fn": redirected}
        async with serving(fake_engine, {"bind_addr": f"127.0.0.1:{port}"}, **options) as server:
            server.url = f"http://127.0.0.1:{port}"
            task = None
            while task is None and server.process.returncode is None:
                with contextlib.suppress(aiohttp.ClientConnectorError):
                    task = await server.submit(max_tokens=1)
            assert task is not None, "it has not started"
            async with server.stream(task) as stream:
                assert names(await stream.rest()) == "token end"
            server.signal(signal.SIGTERM)
            await server.ended(0)

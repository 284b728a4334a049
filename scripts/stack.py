"""An engine and a llorch in front of it, as processes of their own, for the scripts that bring theirs along.

    with running_engine(logs, slots=2) as engine, running_llorch(engine.url, logs, capacity=4) as client:
        client.submit(prompt="hello")

The one rule: whatever happens here, both are stopped before the `with` is left.
"""

import contextlib
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from plain_http import Client

SCRIPTS = Path(__file__).resolve().parent
ROOT = SCRIPTS.parent
START_S = 120.0


def say(text: str) -> None:
    """One line of explanation."""
    print(f"\n* {text}", flush=True)


def leave_on_sigterm() -> None:
    """Let SIGTERM end this process as an exception does, so that what it started is stopped."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))


def python() -> str:
    """A Python that has what llorch and the engine need: this one, or that of .venv, set up if need be."""
    if all(importlib.util.find_spec(name) for name in ("xllamacpp", "aiohttp", "msgspec")):
        return sys.executable
    subprocess.run([SCRIPTS / "setup"], check=True)
    return str(ROOT / ".venv/bin/python")


def free_port(wanted: int) -> int:
    """`wanted` if nobody has it, else a free one."""
    for port in (wanted, 0):
        with socket.socket() as sock, contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(("127.0.0.1", port))
            return int(sock.getsockname()[1])
    raise SystemExit("no free port on 127.0.0.1")


class Process:
    """A child process with a log, of which there is one at most; `start` and `stop` as often as needed."""

    def __init__(self, command: list[str], log: Path, env: dict[str, str]) -> None:
        self.log = log
        self._command, self._env = command, env
        self._child: subprocess.Popen[bytes] | None = None

    @property
    def running(self) -> bool:
        """Whether it lives."""
        return self._child is not None and self._child.poll() is None

    def start(self) -> None:
        """Start it; out of reach of the terminal's Ctrl-C, which is for us."""
        with self.log.open("ab") as file:
            self._child = subprocess.Popen(
                self._command, cwd=ROOT, stdout=file, stderr=file, env=self._env, start_new_session=True
            )

    def stop(self) -> None:
        """End it, by force after ten seconds."""
        if self._child is None:
            return
        self._child.terminate()
        try:
            self._child.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()

    @contextlib.contextmanager
    def alive(self) -> Iterator["Process"]:
        """Started, and stopped at the end."""
        self.start()
        try:
            yield self
        finally:
            self.stop()


class Engine(Process):
    """The small llama.cpp on the CPU, always on the same port."""

    def __init__(self, logs: Path, port: int, slots: int) -> None:
        command = [python(), str(SCRIPTS / "embedded_engine.py"), "--port", str(port), "--slots", str(slots)]
        passive = {"OMP_WAIT_POLICY": "passive"}  # or its threads spin, and crawl once a core is shared
        super().__init__(command, logs / "engine.log", {**os.environ, **passive})
        self.url = f"http://127.0.0.1:{port}"


@contextlib.contextmanager
def running_engine(logs: Path, *, slots: int) -> Iterator[Engine]:
    """A llama.cpp server with the small model, loading."""
    port = free_port(8081)
    say(f"Starting llama.cpp on the CPU ({slots} slots, SmolLM2 135M) on port {port}.")
    engine = Engine(logs, port, slots)
    with engine.alive():
        yield engine


@contextlib.contextmanager
def running_llorch(
    engine_url: str, logs: Path, *, capacity: int, purpose: str = "this run"
) -> Iterator[Client]:
    """llorch in front of that engine, ready."""
    port = free_port(8080)
    say(f"Starting llorch on port {port}; a queue of {capacity}, no GPU required: for {purpose} alone.")
    settings = {
        "LLORCH_BIND_ADDR": f"127.0.0.1:{port}",
        "LLORCH_ADAPTER_ENDPOINT": engine_url,
        "LLORCH_ADAPTER_SLOTS": "auto",
        "LLORCH_QUEUE_CAPACITY": str(capacity),
        "LLORCH_GPU_REQUIRED": "false",
    }
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("LLORCH_")}
    os.environ.pop("LLORCH_AUTH_TOKEN", None)  # it is another's: this one asks for none
    command = [python(), "-m", "llorch", "serve", "--config", os.devnull]
    with Process(command, logs / "llorch.log", {**inherited, **settings}).alive() as child:
        client = Client(f"http://127.0.0.1:{port}")
        wait_until_ready(client, child)
        yield client


def wait_until_ready(client: Client, child: Process) -> None:
    """Show a dot every half second until the pool takes tasks."""
    print("  waiting for the model ", end="", flush=True)
    began = time.monotonic()
    while child.running and time.monotonic() - began < START_S:
        with contextlib.suppress(OSError):
            if client.pool()["ready"]:
                print(" ready.", flush=True)
                return
        print(".", end="", flush=True)
        time.sleep(0.5)
    raise SystemExit(f"\nllorch did not become ready:\n{child.log.read_text()[-2000:]}")

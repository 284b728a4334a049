"""What scripts/bench compares, as processes of their own, and what they cost as the kernel counts it.

The one rule: nothing outlives the bench. Each child is killed at the end, by the kernel if the bench dies.
"""

import contextlib
import ctypes
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from plain_http import Client
from stack import ROOT, SCRIPTS, free_port

START_S = 30.0
SLOTS = {
    "many": 1024,
    "few": 16,
    "one": 1,
}  # the variants of a peer: how many requests the engine gets at once
CAPACITY = {"many": 200_000, "few": 1, "one": 200_000}

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)
_WITHOUT_UVLOOP = "import sys; sys.modules['uvloop'] = None; "
_LLORCH = "import sys; from llorch.cli import main; sys.exit(main())"

NGINX = """
daemon off; master_process off; pid {folder}/nginx.pid; error_log {folder}/nginx.err warn;
events {{ worker_connections 8000; }}
http {{
  access_log off; keepalive_timeout 65; keepalive_requests 1000000; tcp_nodelay on;
  client_body_temp_path {folder}/b; proxy_temp_path {folder}/p;
  fastcgi_temp_path {folder}/f; uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;
  server {{
    listen 127.0.0.1:{port} backlog=4096;
    location / {{
      proxy_pass http://127.0.0.1:{engine}; proxy_http_version 1.1;
      proxy_buffering off; proxy_request_buffering off; proxy_read_timeout 600s;
    }}
    location = /accept {{ default_type application/json; return 202 '{{"task_id":"t-0123456789abcdef"}}'; }}
    location = /reject {{ default_type application/json; return 429 '{{"code":"ADMISSION_REJECT"}}'; }}
  }}
}}
"""
HAPROXY = """
global
  maxconn 4000
defaults
  mode http
  timeout connect 5s
  timeout client 600s
  timeout server 600s
  timeout queue 600s
  option http-no-delay
listen queue
  bind 127.0.0.1:{port}
  http-reuse never
  server engine 127.0.0.1:{engine} maxconn {slots}
"""


class Peer(NamedTuple):
    """One of those compared. `task`: it is llorch, that takes tasks; else what it is sent it hands on."""

    name: str
    task: bool = False
    uvloop: bool = False


DIRECT, NGINX_PEER, HAPROXY_PEER = Peer("direct"), Peer("nginx"), Peer("haproxy")
RELAY = Peer("aiohttp relay")
LLORCH, LLORCH_UVLOOP = Peer("llorch", task=True), Peer("llorch, uvloop", task=True, uvloop=True)


def find(program: str) -> str | None:
    """Where nginx or haproxy is, also where only root's PATH has it."""
    return shutil.which(program, path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/usr/local/sbin")


def die_with_parent() -> None:
    """Let the kernel kill this child when the bench is gone, however that came about."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


class Running:
    """A child process and the port that it listens on."""

    def __init__(self, command: list[str], port: int, log: Path, env: dict[str, str] | None = None) -> None:
        self.port, self.log = port, log
        with log.open("wb") as file:
            self._child = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                env=env,
                cwd=ROOT,
                start_new_session=True,
                preexec_fn=die_with_parent,
            )

    def wait(self, ready: "Ready") -> None:
        """Return once it is `ready`. Raises RuntimeError with its last words."""
        until = time.monotonic() + START_S
        while self._child.poll() is None and time.monotonic() < until:
            with contextlib.suppress(OSError):
                if ready(self.port):
                    return
            time.sleep(0.02)
        raise RuntimeError(f"it did not start: {' '.join(self.log.read_text()[-500:].split())}")

    def cpu_us(self) -> float:
        """How long its threads have been on a CPU, in microseconds, by the scheduler's own clock."""
        threads = Path(f"/proc/{self._child.pid}/task").glob("*/schedstat")
        return sum(int(thread.read_text().split()[0]) for thread in threads) / 1000

    def private_kb(self) -> float:
        """The memory that is its own, in kB."""
        lines = Path(f"/proc/{self._child.pid}/smaps_rollup").read_text().splitlines()
        return sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))

    def stop(self) -> None:
        """Kill it: there is nothing in it that anybody wants to keep."""
        self._child.kill()
        self._child.wait()


class Ready:
    """Whether what listens there can be measured: it accepts, and if it is llorch its pool takes tasks."""

    def __init__(self, task: bool) -> None:
        self._task = task

    def __call__(self, port: int) -> bool:
        if self._task:
            return bool(Client(f"http://127.0.0.1:{port}").pool()["ready"])
        socket.create_connection(("127.0.0.1", port), 1).close()
        return True


class Target(NamedTuple):
    """A peer that runs, in one of its variants; `process` is None for the engine itself."""

    peer: Peer
    variant: str
    port: int
    process: Running | None


class Stage:
    """The engine, and the peers in front of it, started when they are asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._running: dict[tuple[str, str], Running] = {}
        self._settings: dict[str, Any] = {}
        port = free_port(0)
        command = [sys.executable, str(SCRIPTS / "bench_engine.py"), str(port)]
        self._engine = Running(command, port, folder / "engine.log")
        try:
            self._engine.wait(Ready(task=False))
        except BaseException:  # a SIGTERM too: nobody else knows of it yet
            self._engine.stop()
            raise

    def close(self) -> None:
        """Stop everything."""
        self.clear()
        self._engine.stop()

    def clear(self) -> None:
        """Stop the peers."""
        while self._running:
            self._running.popitem()[1].stop()

    def ask(self, path: str, **body: Any) -> Any:
        """Say something to the engine, or ask it."""
        method = "POST" if path in ("set", "finish") else "GET"
        url = f"http://127.0.0.1:{self._engine.port}"
        return Client(url).ask(method, f"/bench/{path}", body if method == "POST" else None).body

    def set(self, **settings: Any) -> None:
        """How the engine generates from now on; its records begin anew."""
        self._settings = settings
        self.ask("set", **settings)

    def until_busy(self, count: int, within_s: float = 20.0) -> None:
        """Return once so many completions run. Raises TimeoutError."""
        until = time.monotonic() + within_s
        while self.ask("state")["busy"] != count:
            if time.monotonic() > until:
                raise TimeoutError(f"{self.ask('state')['busy']} streams after {within_s} s, not {count}")
            time.sleep(0.02)

    def drop(self, peer: Peer) -> None:
        """Stop that peer in all its variants, with whatever is in its queues."""
        for key in [key for key in self._running if key[0] == peer.name]:
            self._running.pop(key).stop()
        self.until_busy(0)

    def target(self, peer: Peer, variant: str = "many") -> Target:
        """That peer, running and warm."""
        if peer == DIRECT:
            return Target(peer, variant, self._engine.port, None)
        key = (peer.name, variant)
        new = key not in self._running
        if new:
            self._running[key] = self._start(peer, variant)
        target = Target(peer, variant, self._running[key].port, self._running[key])
        if new:
            self._warm(target)
        return target

    def _warm(self, target: Target) -> None:
        settings = self._settings
        self.set()
        seen = run_load(target, requests=50, conns=2, tokens=20)
        self.set(**settings)
        if seen["failed"]:
            raise RuntimeError(f"{target.peer.name}: {seen['failed']} of the first 50 requests failed")

    def _start(self, peer: Peer, variant: str) -> Running:
        port, log, env = free_port(0), self._folder / f"{peer.name}-{variant}.log", None
        if peer.task:
            command, env = llorch(port, self._engine.port, variant, uvloop=peer.uvloop)
        elif peer == RELAY:
            slots = str(SLOTS[variant] if variant == "one" else 0)
            command = [
                sys.executable,
                str(SCRIPTS / "bench_relay.py"),
                str(port),
                str(self._engine.port),
                slots,
            ]
        else:
            config = self._folder / f"{peer.name}-{variant}.conf"
            text = NGINX if peer == NGINX_PEER else HAPROXY
            filled = {
                "folder": self._folder,
                "port": port,
                "engine": self._engine.port,
                "slots": SLOTS[variant],
            }
            config.write_text(text.format(**filled))
            quiet = ["-p", str(self._folder), "-c"] if peer == NGINX_PEER else ["-q", "-db", "-f"]
            command = [find(peer.name) or peer.name, *quiet, str(config)]
        running = Running(command, port, log, env)
        self._running[(peer.name, variant)] = running  # so that it is stopped if it never gets ready
        running.wait(Ready(peer.task))
        return running


def llorch(port: int, engine: int, variant: str, *, uvloop: bool) -> tuple[list[str], dict[str, str]]:
    """The command and the environment of a llorch with the built-in settings, but for its size."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("LLORCH_")}
    env |= {
        "LLORCH_BIND_ADDR": f"127.0.0.1:{port}",
        "LLORCH_ADAPTER_ENDPOINT": f"http://127.0.0.1:{engine}",
        "LLORCH_ADAPTER_SLOTS": str(SLOTS[variant]),
        "LLORCH_ADAPTER_SELF_TEST": "false",  # this engine heeds no seed
        "LLORCH_QUEUE_CAPACITY": str(CAPACITY[variant]),
        "LLORCH_GPU_REQUIRED": "false",
        "LLORCH_LOG_LEVEL": "warning",
    }
    program = _LLORCH if uvloop else _WITHOUT_UVLOOP + _LLORCH
    return [sys.executable, "-c", program, "serve", "--config", os.devnull], env


# -- the load --------------------------------------------------------------------------------------


class Loading:
    """The load generator at work; use it by `with`, which ends it."""

    def __init__(self, target: Target, *, tokens: int = 8, **load: Any) -> None:
        task = target.peer.task
        body = {"prompt": "x"} | ({"max_tokens": tokens} if task else {"n_predict": tokens, "stream": True})
        given = {"mode": "stream", "port": target.port, "task": task, "body": body}
        given["path"] = "/v1/tasks" if task else "/completion"
        self._limit_s = load.setdefault("limit_s", 30.0)
        self._child = subprocess.Popen(
            [sys.executable, str(SCRIPTS / "bench_load.py"), json.dumps(given | load)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            preexec_fn=die_with_parent,
            start_new_session=True,
        )

    def __enter__(self) -> "Loading":
        return self

    def __exit__(self, *_: object) -> None:
        self._child.kill()
        self._child.wait()
        if self._child.stdout is not None:
            self._child.stdout.close()

    def result(self, *, now: bool = False) -> dict[str, Any]:
        """What it saw once it is done, or until now."""
        if now:
            self._child.terminate()
        said, _ = self._child.communicate(timeout=self._limit_s + 10)
        result: dict[str, Any] = json.loads(said)
        return result


def run_load(target: Target, **load: Any) -> dict[str, Any]:
    """Load it to the end of the load."""
    with Loading(target, **load) as loading:
        return loading.result()

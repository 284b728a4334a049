"""A llorch in a process of its own, for the tools that try it from outside: its log, its memory, its files.

The one rule: every line that the child says is read; one that is no JSON object, speaks of an error, or
tells a secret is a fault.
"""

import asyncio
import contextlib
import os
import re
import signal
import sys
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any

import msgspec

from llorch.config import env_name

ROOT = Path(__file__).parent.parent
START_S = 30.0
STOP_S = 20.0
KEPT_FAULTS = 20

_BAD_LEVEL = re.compile(rb'"level":"(?:error|critical)"')
_ADDRESS = re.compile(r"llorch \S+ listens on http://(?P<host>[^:]+):(?P<port>\d+)")


class Child:
    """The process, and what is wrong with what it said; `secrets` are texts that no line may hold."""

    def __init__(self, process: asyncio.subprocess.Process, secrets: Iterable[bytes]) -> None:
        self.process = process
        self.faults: list[str] = []
        self.fault_count = 0
        self.lines = 0
        self.address = ("", 0)
        self._secrets = list(secrets)
        self._listening = asyncio.Event()
        self._reader = asyncio.create_task(self._read(), name="child-log")

    @property
    def url(self) -> str:
        """Where it listens."""
        return "http://{}:{}".format(*self.address)

    @property
    def rss_kib(self) -> int:
        """Resident memory in KiB."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.partition("VmRSS:")[2].split()[0])

    @property
    def open_files(self) -> int:
        """Open descriptors."""
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    async def _read(self) -> None:
        assert self.process.stdout is not None
        async for line in self.process.stdout:
            self.lines += 1
            if not self._listening.is_set() and (match := _ADDRESS.search(line.decode("utf-8", "replace"))):
                self.address = (match["host"], int(match["port"]))
                self._listening.set()
            self._check(line)

    def _check(self, line: bytes) -> None:
        try:
            msgspec.json.decode(line, type=dict[str, Any])
            bad = _BAD_LEVEL.search(line) is not None or any(secret in line for secret in self._secrets)
        except msgspec.DecodeError:
            bad = True
        if bad:
            self.fault_count += 1
            if len(self.faults) < KEPT_FAULTS:
                self.faults.append(line.decode("utf-8", "replace").rstrip())

    async def listening(self) -> None:
        """Return once it listens; raises RuntimeError if it ends before that."""
        waits = {asyncio.create_task(self._listening.wait()), asyncio.create_task(self.process.wait())}
        _, pending = await asyncio.wait(waits, timeout=START_S, return_when=asyncio.FIRST_COMPLETED)
        for wait in pending:
            wait.cancel()
        if not self._listening.is_set():
            raise RuntimeError(f"llorch did not start: {self.faults}")

    async def stop(self) -> int:
        """Send SIGTERM and return the exit code; SIGKILL, and so -9, if it takes over 20 s."""
        if self.process.returncode is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(STOP_S):
                await self.process.wait()
        except TimeoutError:
            self.process.kill()
        code = await self.process.wait()
        await self._reader
        return code


@contextlib.asynccontextmanager
async def llorch(
    settings: dict[str, Any], *, before: str = "", secrets: Iterable[bytes] = (), file: Path | None = None
) -> AsyncIterator[Child]:
    """A `llorch serve` on a free port, listening; `settings` by dotted key, `before` is Python run first.

    `file` is a configuration for what settings can't say.
    """
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("LLORCH_")}
    settings = {"bind_addr": "127.0.0.1:0", "gpu.required": False} | settings
    given = {env_name(key): msgspec.json.encode(value).decode().strip('"') for key, value in settings.items()}
    start = ["-m", "llorch"]
    if before:
        start = ["-c", f"{before}\nimport sys\nfrom llorch.cli import main\nsys.exit(main())"]
    process = await asyncio.create_subprocess_exec(
        *[sys.executable, *start, "serve", "--config", str(file or os.devnull)],
        cwd=ROOT,
        env=inherited | given,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    child = Child(process, secrets)
    try:
        await child.listening()
        yield child
    finally:
        await child.stop()

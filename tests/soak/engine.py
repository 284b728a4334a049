"""Engines in processes of their own, which can be killed: the fake one and the real one.

`python -m tests.soak.engine PORT SLOTS` is the fake one.
"""

import asyncio
import os
import random
import socket
import sys
import time

from tests.child import ROOT
from tests.fakes import FakeLlamaServer

PACE_S = 0.001
START_S = 60.0
FORGET_EVERY_S = 1.0


class Engine:
    """A llama-server on a port of its own, the same each time it starts."""

    def __init__(self, *, real: bool, slots: int) -> None:
        self.port = _free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        fake = ["-m", "tests.soak.engine", str(self.port), str(slots)]
        embedded = ["scripts/embedded_engine.py", "--port", str(self.port), "--slots", str(slots)]
        self._command = [sys.executable, *(embedded if real else fake)]
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        """Return once it accepts connections."""
        self._process = await asyncio.create_subprocess_exec(
            *self._command,
            cwd=ROOT,
            env=os.environ | {"OMP_WAIT_POLICY": "passive"},
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
        )
        until = time.monotonic() + START_S
        while not await self._accepts():
            if self._process.returncode is not None or time.monotonic() > until:
                raise RuntimeError("the engine did not start")
            await asyncio.sleep(0.05)

    async def _accepts(self) -> bool:
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", self.port)
        except OSError:
            return False
        writer.close()
        return True

    async def kill(self) -> None:
        """SIGKILL."""
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
            await self._process.wait()


def _free_port() -> int:
    """A free one that no outgoing connection is given while the engine is down."""
    while True:
        port = random.randrange(20_000, 30_000)
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                sock.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


async def _serve(port: int, slots: int) -> None:
    engine = FakeLlamaServer(slots=slots, pace_s=PACE_S)
    engine.port = port
    await engine.start()
    while True:
        await asyncio.sleep(FORGET_EVERY_S)
        engine.requests.clear()
        engine.completions.clear()


if __name__ == "__main__":
    asyncio.run(_serve(int(sys.argv[1]), int(sys.argv[2])))

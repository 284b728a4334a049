"""The command line as a user has it: a process of its own, on a real terminal or in a real pipe.

    async with Command(live, "run", "hello", out="tty", err="tty") as command:
        await command.sees("waiting")          # on the terminal
        command.press(b"\x03")
        assert await command.exit_code() == 130

The one rule: nobody sleeps; whatever is waited for has a deadline and shows what came instead.
"""

import asyncio
import contextlib
import fcntl
import os
import pty
import struct
import sys
import termios
from pathlib import Path
from typing import Literal

from tests.fakes import PATIENCE_S

ROOT = Path(__file__).parent.parent
Kind = Literal["tty", "pipe", "closed", "null", "full"]


class Command:
    """`llorch …` with its three streams on a terminal of its own or on pipes; `url` is what it talks to."""

    def __init__(
        self,
        url: str,
        *argv: str,
        stdin: Kind = "null",
        out: Kind = "pipe",
        err: Kind = "pipe",
        size: tuple[int, int] = (80, 24),
        **env: str,
    ) -> None:
        self.argv = argv
        self.out = b""
        self.err = b""
        self.screen = b""  # all that came to the terminal
        self._kinds = {0: stdin, 1: out, 2: err}
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("LLORCH_")}
        inherited.pop("NO_COLOR", None)
        self._env = inherited | {"PYTHONPATH": str(ROOT), "TERM": "xterm", "LLORCH_URL": url} | env
        self._master, self._slave = pty.openpty()
        fcntl.ioctl(self._slave, termios.TIOCSWINSZ, struct.pack("HHHH", size[1], size[0], 0, 0))
        self._pipes: dict[int, int] = {}  # our ends
        self._news = asyncio.Event()
        self._reading: set[int] = set()

    async def __aenter__(self) -> "Command":
        theirs = {stream: self._their_end(stream, kind) for stream, kind in self._kinds.items()}
        slave = self._slave

        def on_the_terminal() -> None:
            os.setsid()
            fcntl.ioctl(slave, termios.TIOCSCTTY, 0)
            for stream, kind in self._kinds.items():
                if kind == "closed":
                    os.close(stream)

        self.process = await asyncio.create_subprocess_exec(
            *[sys.executable, "-m", "llorch", *self.argv],
            stdin=theirs[0],
            stdout=theirs[1],
            stderr=theirs[2],
            env=self._env,
            cwd="/",
            preexec_fn=on_the_terminal,
        )
        for descriptor in {*theirs.values(), slave}:
            os.close(descriptor)
        self._read(self._master, "screen")
        for stream, name in ((1, "out"), (2, "err")):
            if stream in self._pipes:
                self._read(self._pipes[stream], name)
        return self

    async def stopped(self) -> None:
        """Return once the process has been stopped by a signal; nothing tells, so its state is looked at."""
        async with asyncio.timeout(PATIENCE_S):
            while self._state() != "T":  # noqa: ASYNC110
                await asyncio.sleep(0.01)

    def _state(self) -> str:
        """The process's state, as ps shows it."""
        return Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()[0]

    async def __aexit__(self, *failure: object) -> None:
        if self.process.returncode is None:
            self.process.kill()
        await self.process.wait()
        for descriptor in list(self._reading):
            self._stop_reading(descriptor)
        for descriptor in {self._master, *self._pipes.values()}:
            with contextlib.suppress(OSError):
                os.close(descriptor)

    def _their_end(self, stream: int, kind: Kind) -> int:
        if kind == "tty":
            return os.dup(self._slave)
        if kind in ("null", "closed"):
            return os.open(os.devnull, os.O_RDWR)
        if kind == "full":
            return os.open("/dev/full", os.O_WRONLY)
        reading, writing = os.pipe()
        self._pipes[stream] = writing if stream == 0 else reading
        return reading if stream == 0 else writing

    def _read(self, descriptor: int, name: str) -> None:
        def ready() -> None:
            try:
                block = os.read(descriptor, 65536)
            except OSError:  # a terminal whose last user has gone
                block = b""
            setattr(self, name, getattr(self, name) + block)
            if not block:
                self._stop_reading(descriptor)
            self._news.set()

        self._reading.add(descriptor)
        asyncio.get_running_loop().add_reader(descriptor, ready)

    def _stop_reading(self, descriptor: int) -> None:
        asyncio.get_running_loop().remove_reader(descriptor)
        self._reading.discard(descriptor)

    # -- for the test ------------------------------------------------------------------------------

    def press(self, keys: bytes) -> None:
        """Type on the terminal."""
        os.write(self._master, keys)

    def resize(self, columns: int, lines: int) -> None:
        """Make the terminal another size."""
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def say(self, data: bytes) -> None:
        """Write into its stdin."""
        os.write(self._pipes[0], data)

    def no_more(self) -> None:
        """Close its stdin."""
        os.close(self._pipes.pop(0))

    def stop_reading(self) -> None:
        """Leave its stdout full."""
        self._stop_reading(self._pipes[1])

    def hang_up(self) -> None:
        """Close our end of its stdout, as `head` does."""
        self._stop_reading(self._pipes[1])
        os.close(self._pipes.pop(1))

    async def sees(self, text: str, on: Literal["screen", "out", "err"] = "screen") -> None:
        """Return once `text` has come."""
        try:
            async with asyncio.timeout(PATIENCE_S):
                while text.encode() not in getattr(self, on):
                    self._news.clear()
                    await self._news.wait()
        except TimeoutError:
            came = f"{self.screen[-500:]!r} {self.out[-500:]!r} {self.err[-500:]!r}"
            raise AssertionError(f"no {text!r} in {came}") from None

    async def exit_code(self) -> int:
        """Return its exit code once it has ended and all it said has been read."""
        async with asyncio.timeout(PATIENCE_S):
            code = await self.process.wait()
            while self._reading:
                self._news.clear()
                await self._news.wait()
        return code

    @property
    def complaints(self) -> list[str]:
        """The lines on stderr without `llorch: `."""
        return [line.removeprefix("llorch: ") for line in self.err.decode().splitlines()]


def shown(screen: bytes) -> str:
    """What a terminal shows in the end of what it was sent: lines, with what was erased gone."""
    text = screen.decode().replace("\r\n", "\n")
    lines = []
    for line in text.split("\n"):
        kept = line.rpartition("\r\x1b[K")[2]
        lines.append(kept)
    return "\n".join(lines)

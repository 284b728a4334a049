"""What a person sees: text on stdout as it comes, one line of progress on stderr that erases itself.

The one rule: nothing that came from a server or a model is obeyed by the terminal. In tables and messages its
control characters are dropped. The text of a model goes out byte for byte, except to a terminal: there an
escape sequence could rename the window, write the clipboard or overpaint what stands above, and whoever
wrote the prompt's web page chooses it; so it is shown, as `cat -v` does, and not obeyed.
"""

import asyncio
import contextlib
import os
import queue
import re
import sys
import threading
import unicodedata
from collections.abc import Iterable, Sequence

_OBEYED = re.compile("[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_ESCAPES = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # prose may say which way it runs
_SPACES = re.compile(r"[ \t\r\n\v\f\x85\u2028\u2029]+")
_ERASE = "\r\x1b[K"
_DEFAULT_COLUMNS = 80
_STYLES = {"bold": "1", "dim": "2", "red": "31", "green": "32", "yellow": "33"}


class StdoutGone(Exception):
    """Whoever read stdout has left: no fault, but nobody is there to write for."""


class StdoutBroken(Exception):
    """Stdout can't be written; the message says why."""


# -- text ------------------------------------------------------------------------------------------


def clean(text: str) -> str:
    """`text` in one line, without anything that a terminal obeys."""
    return _OBEYED.sub("", _SPACES.sub(" ", text)).strip()


def visible(text: str) -> str:
    """`text` with its lines and tabs, every other control character shown: `^[` for ESC."""
    return _ESCAPES.sub(_shown, text)


def _shown(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"^{chr(code ^ 0x40)}" if code < 0x80 else f"\\x{code:02x}"


def width(text: str) -> int:
    """The columns that `text` takes."""
    return sum(
        0 if unicodedata.combining(char) else 2 if unicodedata.east_asian_width(char) in "WF" else 1
        for char in text
    )


def fit(text: str, columns: int) -> str:
    """`text`, cut off with an ellipsis where it takes more columns."""
    if width(text) <= columns:
        return text
    kept = ""
    for char in text:
        if width(kept + char) > columns - 1:
            break
        kept += char
    return f"{kept}…" if columns > 0 else ""


def table(rows: Iterable[Sequence[str]], *, right: Iterable[int] = ()) -> list[str]:
    """Rows in columns of equal width, cleaned; the columns `right` are aligned to the right."""
    cells = [[clean(cell) for cell in row] for row in rows]
    widths = [max(map(width, column)) for column in zip(*cells, strict=True)]
    to_the_right = set(right)

    def padded(index: int, cell: str) -> str:
        space = " " * (widths[index] - width(cell))
        return space + cell if index in to_the_right else cell + space

    return ["  ".join(padded(*cell) for cell in enumerate(row)).rstrip() for row in cells]


def duration(milliseconds: float | None) -> str:
    """`120 ms`, `3.4 s`, `12 s`, `5 min`, `3 h`, `2 d`; `-` for None."""
    if milliseconds is None:
        return "-"
    seconds = max(milliseconds, 0) / 1000
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    for unit, size, most in (("s", 1, 120), ("min", 60, 120), ("h", 3600, 48)):
        if seconds < size * most:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds / 86400:.0f} d"


def style(text: str, name: str, *, colour: bool) -> str:
    """`text` in bold, dim, red, green or yellow, if `colour`."""
    return f"\x1b[{_STYLES[name]}m{text}\x1b[0m" if colour else text


# -- stdout and stderr -----------------------------------------------------------------------------


class _Writer:
    """Writes to a descriptor in a thread of its own: a pager that stands still must not stop Ctrl-C."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._orders: queue.SimpleQueue[tuple[bytes, asyncio.Future[None]]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    async def write(self, data: bytes) -> None:
        """Return when the kernel has all of it. Raises OSError."""
        if self._thread is None:  # a daemon: one that hangs in a write does not keep the process
            self._thread = threading.Thread(target=self._work, name="stdout", daemon=True)
            self._thread.start()
        written: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._orders.put((data, written))
        await written

    def _work(self) -> None:
        while True:
            data, written = self._orders.get()
            fault: OSError | None = None
            try:
                self._write_all(data)
            except OSError as error:
                fault = error
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                written.get_loop().call_soon_threadsafe(_settle, written, fault)

    def _write_all(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(self._descriptor, rest) :]


def _settle(written: "asyncio.Future[None]", fault: OSError | None) -> None:
    if written.done():
        return  # whoever waited was cancelled
    if fault is None:
        written.set_result(None)
    else:
        written.set_exception(fault)


class Console:
    """Stdout and stderr by their descriptors, None where there is none."""

    def __init__(self, out: int | None, err: int | None, *, env: dict[str, str] | None = None) -> None:
        env = dict(os.environ) if env is None else env
        dumb = env.get("TERM", "") in ("", "dumb")
        self.out, self.err = out, err
        self.out_is_terminal = out is not None and os.isatty(out)
        self.err_is_terminal = err is not None and os.isatty(err)
        self.shows_progress = self.err_is_terminal and not dumb
        self.colour = self.out_is_terminal and not dumb and not env.get("NO_COLOR")
        self.last_char = "\n"
        self._writer = _Writer(out) if out is not None else None
        self._progress = ""

    @classmethod
    def standard(cls) -> "Console":
        """That of this process."""
        return cls(_descriptor(sys.stdout), _descriptor(sys.stderr))

    @property
    def columns(self) -> int:
        """The width of stdout's terminal, of stderr's if stdout is none, else 80."""
        return self.size[0]

    @property
    def size(self) -> tuple[int, int]:
        """Columns and lines, as `columns` says."""
        for descriptor in (self.out, self.err):
            with contextlib.suppress(OSError):
                if descriptor is not None and (found := os.get_terminal_size(descriptor)).columns > 0:
                    return found.columns, found.lines
        return _DEFAULT_COLUMNS, 24

    async def write(self, text: str, *, trusted: bool = False) -> None:
        """Write to stdout, at once; to a terminal control characters are shown, unless `trusted` is ours.

        Raises StdoutGone or StdoutBroken.
        """
        if not text or self._writer is None:
            return
        self.clear_progress()
        if self.out_is_terminal and not trusted:
            text = visible(text)
        self.last_char = text[-1]
        try:
            await self._writer.write(text.encode("utf-8", "replace"))
        except BrokenPipeError:
            raise StdoutGone from None
        except OSError as error:
            raise StdoutBroken(f"stdout can't be written: {error.strerror}") from None

    async def lines(self, lines: Iterable[str]) -> None:
        """Write lines that are clean already, colours and all."""
        await self.write("".join(f"{line}\n" for line in lines), trusted=True)

    async def end_line(self) -> None:
        """On a terminal, see to it that the shell's prompt begins a line of its own."""
        if self.out_is_terminal and self.last_char != "\n":
            await self.write("\n")

    def complain(self, *lines: str) -> None:
        """Lines on stderr, each beginning `llorch: `, none in the middle of what stands on the terminal."""
        self.clear_progress()
        if self.out_is_terminal and self.err_is_terminal and self.last_char != "\n":
            self._to_stderr("\n")
            self.last_char = "\n"
        self._to_stderr("".join(f"llorch: {clean(line)}\n" for line in lines))

    def progress(self, text: str) -> None:
        """Show this as the one line of progress, if stderr is a terminal that can erase it again."""
        if not self.shows_progress or (self.out_is_terminal and self.last_char != "\n"):
            return  # erasing it would erase the answer that stands there
        line = fit(clean(text), self.columns - 1)
        if line != self._progress:
            self._progress = line
            self._to_stderr(f"{_ERASE}{line}")

    def clear_progress(self) -> None:
        """Erase the line of progress, if there is one."""
        if self._progress:
            self._progress = ""
            self._to_stderr(_ERASE)

    def _to_stderr(self, text: str) -> None:
        if self.err is not None:
            with contextlib.suppress(OSError):  # nobody is there to be told
                os.write(self.err, text.encode("utf-8", "replace"))


def _descriptor(stream: object) -> int | None:
    try:
        return stream.fileno()  # type: ignore[attr-defined, no-any-return]
    except (AttributeError, OSError, ValueError):
        return None  # closed before we were started, or never there

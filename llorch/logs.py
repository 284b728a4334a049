"""JSON Lines on stdout: one object a line, no secret, no text of a client's, at most 2 KiB [MVP-070].

The one rule: a log line never hurts a request. Lines are written by a thread of their own; if stdout is
gone or stands still, they are dropped and counted.
"""

import datetime
import logging
import logging.handlers
import queue
import re
import sys
import threading
import traceback
from collections.abc import Iterable
from typing import Any, TextIO

import msgspec
from pythonjsonlogger.core import RESERVED_ATTRS

MAX_LINE_BYTES = 2048
_MAX_FIELD_CHARS = 256
_MAX_MSG_CHARS = 600
_MAX_TRACEBACK_CHARS = 900
_BACKLOG_LINES = 10_000
_LAST_LINES_S = 0.5
_HEADER = re.compile(  # as text, JSON, or Python's repr: the whole value, whatever the scheme
    r"(?i)(\b(?:authorization|x-api-key)\b['\"\\]*\s*[:=,]\s*(?:b?['\"\\]+)?)[^\r\n'\"]+"
)
_SECRET = re.compile(r"(?i)(\bbearer\s+|\bticket=)[^\s\"',;&]+")
_QUERY = re.compile(r"(?<=[\w/])\?[\w%.~-]+=[^\s\"']*")
_KNOWN = frozenset(RESERVED_ATTRS) | {"event", "message", "asctime", "taskName"}


class Redactor:
    """Takes known secrets, credentials in headers, and query strings out of a text."""

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        self._secrets = sorted((secret for secret in secrets if secret), key=len, reverse=True)

    def add(self, secrets: Iterable[str]) -> None:
        """Know these too."""
        known = {*self._secrets, *(secret for secret in secrets if secret)}
        self._secrets = sorted(known, key=len, reverse=True)

    def __call__(self, text: str) -> str:
        """`text` with `[redacted]` in the place of each secret."""
        for secret in self._secrets:
            text = text.replace(secret, "[redacted]")
        for credentials in (_HEADER, _SECRET):
            text = credentials.sub(r"\1[redacted]", text)
        return _QUERY.sub("?[redacted]", text)


class JsonLines(logging.Formatter):
    """One record as one JSON object: `ts, level, event, msg`, then the fields that are known."""

    def __init__(self, redact: Redactor) -> None:
        super().__init__()
        self._redact = redact

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its newline, at most 2 KiB: the longest texts give way."""
        entry = self._entry(record)
        while len(line := msgspec.json.encode(entry)) > MAX_LINE_BYTES:
            texts = {name: text for name, text in entry.items() if isinstance(text, str)}
            longest = max(texts, key=lambda name: len(msgspec.json.encode(texts[name])))
            entry[longest] = texts[longest][: len(texts[longest]) // 2]
        return line.decode()

    def _entry(self, record: logging.LogRecord) -> dict[str, Any]:
        entry = {
            "ts": timestamp(datetime.datetime.fromtimestamp(record.created, datetime.UTC)),
            "level": record.levelname.lower(),
            "event": getattr(record, "event", record.name.rpartition(".")[2]),
            "msg": self._text(_message(record), _MAX_MSG_CHARS),
        }
        for name, value in _fields(record).items():
            entry[name] = self._text(value, _MAX_FIELD_CHARS) if isinstance(value, str) else value
        if record.exc_info and record.exc_info[1] is not None:
            entry["traceback"] = self._text(_where(record.exc_info[1]), _MAX_TRACEBACK_CHARS)
        return entry

    def _text(self, text: str, chars: int) -> str:
        """`text` as JSON can carry it: lone surrogates have no UTF-8."""
        return self._redact(text)[:chars].encode("utf-8", "backslashreplace").decode()


class TextLines(logging.Formatter):
    """The same for a person at a terminal."""

    def __init__(self, redact: Redactor) -> None:
        super().__init__()
        self._redact = redact

    def format(self, record: logging.LogRecord) -> str:
        """One line, with control characters escaped."""
        known = " ".join(f"{name}={value}" for name, value in _fields(record).items())
        clock = datetime.datetime.fromtimestamp(record.created).strftime("%H:%M:%S")
        text = f"{clock} {record.levelname.lower():7} {_message(record)}" + (f"  [{known}]" if known else "")
        if record.exc_info and record.exc_info[1] is not None:
            text += "  " + _where(record.exc_info[1])
        safe = "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in self._redact(text))
        return safe[: MAX_LINE_BYTES // 4]


def timestamp(moment: datetime.datetime) -> str:
    """RFC 3339 in UTC with milliseconds."""
    return moment.astimezone(datetime.UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    return {
        name: value
        for name, value in record.__dict__.items()
        if name not in _KNOWN and value is not None and isinstance(value, str | int | float | bool)
    }


def _message(record: logging.LogRecord) -> str:
    try:
        return record.getMessage()
    except (TypeError, ValueError):
        return str(record.msg)


def _where(error: BaseException) -> str:
    """Class and places of an exception, without its message, which may quote what a client sent."""
    frames = traceback.extract_tb(error.__traceback__)
    places = " < ".join(f"{f.name} ({f.filename.rpartition('/')[2]}:{f.lineno})" for f in reversed(frames))
    return f"{type(error).__name__} at {places}"


class _Lossy(logging.handlers.QueueHandler):
    """Hands records to the writing thread as they are; drops them when it can't keep up."""

    dropped = 0

    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        return record

    def enqueue(self, record: logging.LogRecord) -> None:
        try:
            self.queue.put_nowait(record)
        except queue.Full:
            self.dropped += 1


class Writer(threading.Thread):
    """Writes the lines, and says nothing when it can't: there is nobody to say it to.

    Not a `logging.Handler`: `logging` waits at exit for each of those, and this one may stand still.
    """

    def __init__(
        self,
        backlog: "queue.Queue[logging.LogRecord | None]",
        formatter: logging.Formatter,
        stream: TextIO,
        redactor: Redactor,
    ) -> None:
        super().__init__(name="log", daemon=True)
        self._backlog = backlog
        self._formatter = formatter
        self._stream = stream
        self._redactor = redactor

    def run(self) -> None:
        """Until `stop`."""
        while (record := self._backlog.get()) is not None:
            try:
                self._stream.write(self._formatter.format(record) + "\n")
                self._stream.flush()
            except Exception:
                pass

    def redact(self, secrets: Iterable[str]) -> None:
        """Keep these out of the log from now on too."""
        self._redactor.add(secrets)

    def stop(self) -> None:
        """Write what is left, for a moment: a stdout that stands still keeps no process alive."""
        try:
            self._backlog.put(None, timeout=_LAST_LINES_S)
        except queue.Full:
            return
        self.join(_LAST_LINES_S)


def start(*, text: bool, level: str, secrets: Iterable[str], stream: TextIO | None = None) -> Writer:
    """Send every log record of this process to `stream` (stdout); call `stop()` on what comes back."""
    redact = Redactor(secrets)
    backlog: queue.Queue[logging.LogRecord | None] = queue.Queue(_BACKLOG_LINES)
    lines = TextLines(redact) if text else JsonLines(redact)
    writer = Writer(backlog, lines, stream or sys.stdout, redact)
    root = logging.getLogger()
    root.handlers = [_Lossy(backlog)]
    root.setLevel(level.upper())
    for name in ("asyncio", "aiohttp"):
        logging.getLogger(name).setLevel(max(logging.WARNING, root.level))
    writer.start()
    return writer

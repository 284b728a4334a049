"""Log lines: valid, short, without secrets; and that writing them hurts nobody."""

import contextlib
import datetime
import errno
import io
import json
import logging
import os
import string
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llorch import logs
from llorch.logs import MAX_LINE_BYTES, JsonLines, Redactor, TextLines, Writer, start, timestamp

SECRET = "canary-token-0123456789"
TEXTS = st.text(st.characters()) | st.text(max_size=5).map(lambda text: text * 500)  # surrogates too
FIELDS = ["correlation_id", "job_id", "session_id", "engine_version", "model_digest", "pool_id", "identity"]
VALUES = TEXTS | st.integers(-(2**63), 2**63) | st.floats() | st.booleans() | st.none()


def record(
    message: str = "hello", *args: object, error: BaseException | None = None, **extra: object
) -> logging.LogRecord:
    """A log record as a logger makes it."""
    logger = logging.getLogger("llorch.pool")
    exc_info = None if error is None else (type(error), error, error.__traceback__)
    return logger.makeRecord(logger.name, logging.INFO, __file__, 1, message, args, exc_info, extra=extra)


def line(*args: Any, secrets: list[str] | None = None, **extra: Any) -> dict[str, Any]:
    """What is in the JSON line of such a record."""
    text = JsonLines(Redactor(secrets or [])).format(record(*args, **extra))
    assert "\n" not in text
    assert len(text.encode()) <= MAX_LINE_BYTES
    entry = json.loads(text)
    assert isinstance(entry, dict)
    return entry


def raised(error: Exception, depth: int = 0) -> Exception:
    """`error` with a traceback of so many frames."""
    try:
        if depth:
            raised(error, depth - 1)
        raise error
    except Exception as caught:
        return caught


# -- JSON lines ------------------------------------------------------------------------------------


def test_a_line_has_the_fields_of_the_contract() -> None:
    """ts, level, event and msg first, then what is known; None and objects are left out [MVP-070]."""
    entry = line(
        "task %s",
        "done",
        event="completed",
        job_id="1f3a",
        tokens_out=3,
        strict=True,
        lease=object(),
        tokens_in=None,
    )
    assert list(entry) == ["ts", "level", "event", "msg", "job_id", "tokens_out", "strict"]
    assert (entry["level"], entry["event"], entry["msg"]) == ("info", "completed", "task done")
    assert (entry["job_id"], entry["tokens_out"], entry["strict"]) == ("1f3a", 3, True)


def test_the_time_is_rfc_3339_in_utc() -> None:
    """With milliseconds and a Z, whatever zone the machine is in."""
    zone = datetime.timezone(datetime.timedelta(hours=2))
    assert timestamp(datetime.datetime(2025, 6, 1, 12, 0, 0, 1500, zone)) == "2025-06-01T10:00:00.001Z"
    assert datetime.datetime.fromisoformat(line()["ts"]).tzinfo == datetime.UTC


def test_an_event_without_a_name_is_called_after_its_module() -> None:
    """Every line has an event."""
    assert line()["event"] == "pool"


@given(TEXTS, st.dictionaries(st.sampled_from(FIELDS), VALUES))
@example("a lone \ud800 surrogate", {"job_id": "\udfff"})
@settings(deadline=None)
def test_every_line_is_one_short_json_object(message: str, fields: dict[str, Any]) -> None:
    """T17: whatever a client or an engine says, surrogates and control characters included."""
    entry = line("%s", message, **fields)
    assert set(entry) - {"ts", "level", "event", "msg"} <= set(fields)


def test_control_characters_are_escaped() -> None:
    """T17: no text ends a line, or moves a terminal's cursor."""
    text = JsonLines(Redactor()).format(record("a\nb\r\0\x1b[2J\u2028"))
    assert not set(text) & {"\n", "\r", "\0", "\x1b"}
    assert json.loads(text)["msg"] == "a\nb\r\0\x1b[2J\u2028"


def test_the_longest_texts_give_way_and_the_short_ones_stay() -> None:
    """A line that would be too long keeps what identifies it."""
    entry = line("\1" * 5000, job_id="1f3a" * 8, session_id="\1" * 5000, engine_version="\1" * 5000)
    assert entry["job_id"] == "1f3a" * 8
    assert entry["msg"]


def test_a_message_that_does_not_fit_its_arguments_is_written_as_it_is() -> None:
    """A wrong call loses no line."""
    assert line("%d of %d", "x")["msg"] == "%d of %d"


def test_a_traceback_has_no_message() -> None:
    """T18: class and places, innermost first; the message may quote what a client sent."""
    error = raised(ValueError("canary prompt"), depth=1)
    error.__cause__ = KeyError("canary cause")
    entry = line("a bug", error=error)
    assert "canary" not in json.dumps(entry)
    assert entry["traceback"].startswith("ValueError at raised (test_logs.py:")


def test_a_long_traceback_keeps_what_was_raised_and_where() -> None:
    """The innermost places say most."""
    entry = line("a bug", error=raised(ZeroDivisionError(), depth=200))
    assert entry["traceback"].startswith("ZeroDivisionError at raised (test_logs.py:")


# -- redaction -------------------------------------------------------------------------------------


@given(
    st.text(string.ascii_letters + string.digits + "-_", min_size=16, max_size=64),
    TEXTS, TEXTS, st.sampled_from(["msg", "job_id", "args"]), st.booleans(),
)  # fmt: skip
@settings(deadline=None)
def test_a_known_secret_is_in_no_line(
    secret: str, before: str, after: str, place: str, as_text: bool
) -> None:
    """T18: a canary anywhere in message, arguments or fields comes out nowhere, in either format."""
    text = f"{before}{secret}{after}"
    args = {
        "msg": record(text.replace("%", "")),
        "job_id": record("x", job_id=text),
        "args": record("%s %r", text, {"key": text}),
    }[place]
    kind = TextLines if as_text else JsonLines
    assert secret not in kind(Redactor(["", secret])).format(args)


@pytest.mark.parametrize(
    "text",
    [
        "Authorization: Bearer canary",
        "authorization: Basic canary",
        "AUTHORIZATION: canary",
        "Authorization=canary",
        "{'Authorization': 'Bearer canary'}",
        '{"authorization": "Basic canary"}',
        "(b'Authorization', b'Basic canary')",
        "X-API-Key: canary",
        "x-api-key=canary",
        '"X-Api-Key": "canary"',
        "Bearer canary",
        "bearer   canary, and more",
        "/v1/tasks/1/stream?ticket=canary",
        "ticket=canary&x=1",
        "GET /v1/tasks?state=canary HTTP/1.1",
        "http://host/a?x=canary&y=canary#canary",
    ],
)  # fmt: skip
def test_credentials_and_queries_are_taken_out(text: str) -> None:
    """T18: unknown tokens too: what stands in a header of credentials, a ticket, any query string."""
    redacted = Redactor()(f"before {text}")
    assert "canary" not in redacted
    assert "[redacted]" in redacted
    assert redacted.startswith("before ")


@pytest.mark.parametrize("text", ["is it so? yes=no", "the bearer of news", "3 tickets", "author: x", "a?b"])
def test_plain_sentences_stay(text: str) -> None:
    """Redaction does not eat what is no secret."""
    assert Redactor()(text) in (text, "the bearer [redacted] news")


def test_the_longer_of_two_secrets_goes_first() -> None:
    """A secret that begins another one leaves no tail of it."""
    assert Redactor([SECRET, SECRET + "-tail"])(f"x {SECRET}-tail") == "x [redacted]"


# -- text lines ------------------------------------------------------------------------------------


def test_a_text_line_is_for_a_person() -> None:
    """Clock, level, sentence, and the known fields at the end."""
    text = TextLines(Redactor()).format(record("task admitted", job_id="1f3a"))
    assert text[8:] == " info    task admitted  [job_id=1f3a]"


@given(TEXTS, TEXTS)
@example("a lone \ud800 surrogate", "\udfff\n")
@settings(deadline=None)
def test_a_text_line_is_one_short_printable_line(message: str, field: str) -> None:
    """T17: the same promises as for JSON."""
    text = TextLines(Redactor()).format(record("%s", message, job_id=field))
    assert text.isprintable()
    assert len(text.encode()) <= MAX_LINE_BYTES


# -- the writing thread ----------------------------------------------------------------------------


@pytest.fixture
def root() -> Iterator[logging.Logger]:
    """The root logger, put back as it was."""
    loggers = [logging.getLogger(name) for name in ("", "asyncio", "aiohttp")]
    handlers, levels = loggers[0].handlers, [logger.level for logger in loggers]
    yield loggers[0]
    loggers[0].handlers = handlers
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


def written(stream: io.StringIO) -> list[str]:
    """The messages in it."""
    return [json.loads(text)["msg"] for text in stream.getvalue().splitlines()]


def test_records_of_all_loggers_are_written_in_order(root: logging.Logger) -> None:
    """From the level on; stop() returns when the last one is out."""
    stream = io.StringIO()
    listener = start(text=False, level="info", secrets=[SECRET], stream=stream)
    for number in range(100):
        logging.getLogger(f"llorch.{number % 3}").info("line %d", number)
    logging.getLogger("llorch").debug("too little")
    logging.getLogger("aiohttp.access").info("not ours")
    logging.getLogger("asyncio").warning("a secret: %s", SECRET)
    listener.stop()
    assert written(stream) == [*(f"line {number}" for number in range(100)), "a secret: [redacted]"]


def test_text_is_the_other_format(root: logging.Logger) -> None:
    """For a terminal."""
    stream = io.StringIO()
    listener = start(text=True, level="warning", secrets=[], stream=stream)
    logging.getLogger("llorch").warning("look")
    logging.getLogger("llorch").info("not this")
    listener.stop()
    assert stream.getvalue()[8:] == " warning look\n"


class Full(io.StringIO):
    """A disk with no space left for its first lines."""

    refusals = 3

    def write(self, text: str) -> int:
        """ENOSPC, or as usual."""
        if self.refusals:
            self.refusals -= 1
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(text)


def test_a_full_disk_costs_only_its_lines(root: logging.Logger, capsys: pytest.CaptureFixture[str]) -> None:
    """P4: lines are lost in silence, and come again when there is room."""
    stream = Full()
    listener = start(text=False, level="info", secrets=[], stream=stream)
    for number in range(5):
        logging.getLogger("llorch").info("line %d", number)
    listener.stop()
    assert written(stream) == ["line 3", "line 4"]
    assert capsys.readouterr() == ("", "")


def test_a_closed_pipe_hurts_nobody(root: logging.Logger, capsys: pytest.CaptureFixture[str]) -> None:
    """P4: EPIPE on every write, and every log call returns."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    stream = os.fdopen(write_end, "w")
    listener = start(text=False, level="info", secrets=[], stream=stream)
    for _ in range(1000):
        logging.getLogger("llorch").info("into the void")
    listener.stop()
    with contextlib.suppress(BrokenPipeError):
        stream.close()
    assert capsys.readouterr() == ("", "")


class Stuck(io.StringIO):
    """A terminal that was stopped: a write does not return before `released`."""

    def __init__(self) -> None:
        super().__init__()
        self.entered, self.released = threading.Event(), threading.Event()

    def write(self, text: str) -> int:
        """Stand still."""
        self.entered.set()
        self.released.wait()
        return super().write(text)


@pytest.fixture
def stuck(root: logging.Logger, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Stuck, Writer]]:
    """A log whose stream stands still in the middle of its first line, with room for three more."""
    monkeypatch.setattr(logs, "_BACKLOG_LINES", 3)
    monkeypatch.setattr(logs, "_LAST_LINES_S", 0.01)
    stream = Stuck()
    listener = start(text=False, level="info", secrets=[], stream=stream)
    logging.getLogger("llorch").info("first")
    stream.entered.wait()
    yield stream, listener
    stream.released.set()


def test_what_can_not_be_written_in_time_is_dropped_and_counted(
    stuck: tuple[Stuck, Writer], root: logging.Logger
) -> None:
    """P4: with stdout standing still no log call waits; the backlog is bounded; the losses are told later."""
    stream, listener = stuck
    for number in range(5):
        logging.getLogger("llorch").info("line %d", number)
    stream.released.set()
    listener.stop()
    assert written(stream) == ["first", "line 0", "line 1", "line 2"]
    assert root.handlers[0].dropped == 2  # type: ignore[attr-defined]


@pytest.mark.parametrize("waiting", [0, 2, 5])
def test_stopping_does_not_wait_for_a_stdout_that_stands_still(
    stuck: tuple[Stuck, Writer], waiting: int
) -> None:
    """P4: the process can end although its last lines never get out, the backlog full or not."""
    _, listener = stuck
    for _ in range(waiting):
        logging.getLogger("llorch").info("never written")
    listener.stop()


def test_a_process_whose_stdout_is_never_read_ends_well() -> None:
    """P4: with a full pipe the exit code is still the program's own."""
    program = """
import logging
from llorch.logs import start
listener = start(text=False, level="info", secrets=[])
for _ in range(2000):
    logging.info("x" * 500)
listener.stop()
raise SystemExit(7)
"""
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.wait(timeout=60) == 7
        assert process.stderr is not None
        assert process.stderr.read() == b""

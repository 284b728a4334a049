"""The bytes of SSE frames, and that no text can break out of one."""

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llorch.events import End, Error, Started, Token, frame

ANY_TEXT = st.text() | st.text(st.sampled_from('\r\n\0: \ufeff\u0085\u2028\u2029datieven"\\{}'))


@pytest.mark.parametrize(
    ("event", "expected"),
    [
        (Started(0), b'id: 7\nevent: started\ndata: {"queue_position":0}\n\n'),
        (Started(3, 90), b'id: 7\nevent: started\ndata: {"queue_position":3,"predicted_start_ms":90}\n\n'),
        (Token("hi", 0), b'id: 7\nevent: token\ndata: {"t":"hi","i":0}\n\n'),
        (Token("ö\n", 6), 'id: 7\nevent: token\ndata: {"t":"ö\\n","i":6}\n\n'.encode()),
        (
            End(2, "stop", 15, 9),
            b"id: 7\nevent: end\n"
            b'data: {"tokens_out":2,"finish_reason":"stop","decode_time_ms":15,"tokens_in":9}\n\n',
        ),
        (
            End(0, "cancelled"),
            b'id: 7\nevent: end\ndata: {"tokens_out":0,"finish_reason":"cancelled"}\n\n',
        ),
        (
            Error("WORKER_RESET", True, 250, "gone"),
            b"id: 7\nevent: error\n"
            b'data: {"code":"WORKER_RESET","retriable":true,"retry_after_ms":250,"message":"gone"}\n\n',
        ),
        (
            Error("INTERNAL", retriable=False),
            b'id: 7\nevent: error\ndata: {"code":"INTERNAL","retriable":false}\n\n',
        ),
    ],
)
def test_a_frame_is_these_bytes(event: Started | Token | End | Error, expected: bytes) -> None:
    """Frames are byte-stable: field order, no blanks in JSON, absent fields left out [MVP-020]."""
    assert frame(7, event) == expected


def parse(stream: bytes) -> list[dict[str, str]]:
    """The events of a stream, read as the HTML standard says."""
    events: list[dict[str, str]] = []
    fields: dict[str, str] = {}
    for line in re.split("\r\n|\r|\n", stream.decode().removeprefix("\ufeff")):
        name, _, value = line.partition(":")
        if not line and "data" in fields:
            events.append(fields)
        if not line:
            fields = {}
        elif name == "data" and "data" in fields:
            fields["data"] += "\n" + value.removeprefix(" ")
        elif name in ("data", "event", "id"):
            fields[name] = value.removeprefix(" ")
    return events


@given(texts=st.lists(ANY_TEXT, min_size=1), first=st.integers(0, 10**9))
@settings(deadline=None)
def test_a_standard_parser_reads_back_what_was_appended(texts: list[str], first: int) -> None:
    """T13: no text of a model, of all Unicode, begins a line, an event or a field of its own."""
    read = parse(b"".join(frame(first + i, Token(text, i)) for i, text in enumerate(texts)))
    assert [json.loads(event.pop("data")) for event in read] == [
        {"t": t, "i": i} for i, t in enumerate(texts)
    ]
    assert read == [{"id": str(first + i), "event": "token"} for i in range(len(texts))]


@given(message=ANY_TEXT, code=ANY_TEXT)
@settings(deadline=None)
def test_a_frame_is_four_lines_whatever_it_says(message: str, code: str) -> None:
    """T13: exactly id, event, data and a blank line, by every notion of a line end that SSE knows."""
    written = frame(1, Error(code, True, None, message))
    assert written.replace(b"\r\n", b"\n").replace(b"\r", b"\n").count(b"\n") == 4
    id_line, event_line, data_line, _ = written.split(b"\n", 3)
    assert (id_line, event_line) == (b"id: 1", b"event: error")
    assert json.loads(data_line.removeprefix(b"data: "))["message"] == message


def test_a_lone_surrogate_is_no_event() -> None:
    """What is not Unicode text can't be framed; the adapter has to refuse it before."""
    with pytest.raises(UnicodeEncodeError):
        frame(1, Token("\ud800", 0))

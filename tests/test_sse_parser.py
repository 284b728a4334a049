"""The SSE parser: the standard, whatever the cuts; and its bounds."""

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llorch.adapters.sse import EventTooLong, ServerEvent, SseParser

MAX = 1024 * 1024


def parse(data: bytes, *, cuts: list[int] | None = None, max_event_bytes: int = MAX) -> list[ServerEvent]:
    """What the parser makes of `data`, fed in pieces that end at `cuts`."""
    parser = SseParser(max_event_bytes)
    places = [0, *sorted(cuts or []), len(data)]
    pieces = (data[start:end] for start, end in pairwise(places))
    return [event for piece in pieces for event in parser.feed(piece)]


def reference(data: bytes) -> list[ServerEvent]:
    """The standard's algorithm on the whole text, plainly; `error` is llama.cpp's own field."""
    text = data.removeprefix(b"\xef\xbb\xbf").replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    events, name, last_id, value_lines = [], b"", b"", []
    for line in text.split(b"\n")[:-1]:
        if line == b"":
            if value_lines:
                events.append(ServerEvent(name, b"\n".join(value_lines), last_id))
            name, value_lines = b"", []
            continue
        if line.startswith(b":"):
            continue
        field, value = line.split(b":", 1) if b":" in line else (line, b"")
        if value[:1] == b" ":
            value = value[1:]
        if field in (b"data", b"error"):
            value_lines.append(value)
        if field in (b"event", b"error"):
            name = value if field == b"event" else b"error"
        if field == b"id" and b"\x00" not in value:
            last_id = value
    return events


FIELDS = [b"data", b"data:", b"data: ", b"event: x", b"error: ", b"id: 7", b"retry", b":", b": ping", b"a:b"]
ENDS = [b"\n", b"\n", b"\r", b"\r\n", b"\n\n", b"\r\r", b"\r\n\r\n"]
TEXTS = [
    b" ",
    b"  ",
    b"{}",
    b"\xef\xbb\xbf",
    b"\x00",
    b"\xff",
    *map(str.encode, "\u2028\x85\x0b\x0c\x1c\x1e😀"),
]
pieces = st.sampled_from(FIELDS) | st.sampled_from(ENDS) | st.sampled_from(TEXTS)
texts = st.lists(pieces | st.binary(max_size=4), max_size=40).map(b"".join)


@given(data=texts, cuts=st.lists(st.integers(0, 200), max_size=20))
def test_any_cut_of_any_bytes_gives_the_events_of_the_standard(data: bytes, cuts: list[int]) -> None:
    """However the bytes arrive, the events are those the standard reads in the whole [E13]."""
    assert parse(data, cuts=[min(cut, len(data)) for cut in cuts]) == reference(data)


@given(data=texts)
def test_one_byte_per_segment_gives_the_events_of_the_standard(data: bytes) -> None:
    """One byte at a time is as good as all at once [E13]."""
    assert parse(data, cuts=list(range(len(data)))) == reference(data)


@given(
    texts=st.lists(st.text(), max_size=20), end=st.sampled_from(["\n", "\r", "\r\n"]), cut=st.integers(0, 999)
)
def test_every_text_that_json_can_carry_passes_unchanged(texts: list[str], end: str, cut: int) -> None:
    """U+2028, U+0085 and all the rest of Unicode are text, whatever ends the lines [E13, E16]."""
    said = [json.dumps({"content": text}, ensure_ascii=False) for text in texts]
    data = "".join(f"data: {line}{end}{end}" for line in said).encode("utf-8", "surrogatepass")
    events = parse(data, cuts=[min(cut, len(data))])
    assert [event.data.decode("utf-8", "surrogatepass") for event in events] == said


def test_ten_thousand_events_in_one_block_are_all_given_back() -> None:
    """A block may hold any number of events [E13]."""
    events = parse(b"".join(b"data: %d\n\n" % i for i in range(10_000)))
    assert [int(event.data) for event in events] == list(range(10_000))


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"data: a\ndata: b\n\n", [(b"", b"a\nb")]),
        (b"data:a\n\n", [(b"", b"a")]),
        (b"data:  a\n\n", [(b"", b" a")]),
        (b"data\n\n", [(b"", b"")]),
        (b"\xef\xbb\xbfdata: a\n\n", [(b"", b"a")]),
        (b"\n\xef\xbb\xbfdata: a\n\n", []),
        (b":\n\n: ping\n\ndata: a\n:\n\n", [(b"", b"a")]),
        (b"event: x\n\ndata: a\n\n", [(b"", b"a")]),
        (b"event: x\ndata: a\n\ndata: b\n\n", [(b"x", b"a"), (b"", b"b")]),
        (b"data: a\r\rdata: b\r\n\r\ndata: c\n\r\n", [(b"", b"a"), (b"", b"b"), (b"", b"c")]),
        (b'error: {"code":500}\n\n', [(b"error", b'{"code":500}')]),
        (b'event: error\ndata: {"code":500}\n\n', [(b"error", b'{"code":500}')]),
        (b"Data: a\n\nid: 1\nretry: 2\nnonsense\n\n", []),
    ],
)
def test_fields_are_read_by_the_standard(data: bytes, expected: list[tuple[bytes, bytes]]) -> None:
    """Multi-line data, the optional space, BOM, comments, names, llama.cpp's `error:` line [E8, E13]."""
    assert [event[:2] for event in parse(data)] == expected


def test_an_id_holds_until_the_next() -> None:
    """It is the stream's, so an event without one has the last; one with a NUL is none."""
    data = b"data: a\n\nid: 1\ndata: b\n\ndata: c\n\nid: 2\n\nid: \x00\ndata: d\n\nid\ndata: e\n\n"
    assert [(event.data, event.id) for event in parse(data)] == [
        (b"a", b""),
        (b"b", b"1"),
        (b"c", b"1"),
        (b"d", b"2"),
        (b"e", b""),
    ]


@pytest.mark.parametrize(
    "unfinished", [b"data: a", b"data: a\n", b"data: a\r\n", b"da", b"event: x\ndata: a\r"]
)
def test_an_event_that_never_ends_is_never_shown(unfinished: bytes) -> None:
    """Without its blank line an event does not exist [E9]."""
    assert parse(b"data: whole\n\n" + unfinished) == [ServerEvent(b"", b"whole")]


@pytest.mark.parametrize(
    "flood",
    [b"x", b"data: y", b"data: z\n", b"data:\n", b"data\r", b": comment ", b"event: n"],
)
def test_a_line_or_event_without_end_is_cut_off_at_the_bound(flood: bytes) -> None:
    """What never ends is refused once it outgrows the bound, however little each line of it adds [E14]."""
    data = flood * 20_000
    with pytest.raises(EventTooLong):
        parse(data, cuts=list(range(0, len(data), 1000)), max_event_bytes=10_000)


@given(block=st.integers(1, 300))
def test_what_stays_within_the_bound_passes(block: int) -> None:
    """The bound is on one event, not on the stream [E14]."""
    data = b"data: " + b"x" * 80 + b"\n\n"
    cuts = list(range(block, 50 * len(data), block))
    assert len(parse(data * 50, cuts=cuts, max_event_bytes=100)) == 50

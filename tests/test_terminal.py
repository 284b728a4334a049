"""What a person sees: text that no terminal obeys, tables, durations; stdout and stderr."""

import asyncio
import os
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llorch.terminal import (
    Console,
    StdoutBroken,
    StdoutGone,
    clean,
    duration,
    fit,
    style,
    table,
    visible,
    width,
)


@given(st.text())
def test_clean_text_is_one_line_that_no_terminal_obeys(text: str) -> None:
    """No control character, no line, nothing that turns the direction of writing."""
    shown = clean(text)
    assert not [char for char in shown if unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp")]
    assert not set(shown) & set("\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
    assert clean(shown) == shown


def test_words_stay_words() -> None:
    """A line break is a space, an escape sequence loses its escape."""
    assert clean(" a\n\tb\r\n \x1b[31mc\x9b2J é ") == "a b [31mc2J é"


@given(st.text())
def test_visible_text_keeps_lines_and_tabs_and_shows_the_rest(text: str) -> None:
    """Nothing is lost, and nothing is obeyed."""
    shown = visible(text)
    assert not [char for char in shown if unicodedata.category(char) == "Cc" and char not in "\n\t"]
    assert len(shown) >= len(text)


@pytest.mark.parametrize(
    ("text", "shown"),
    [("\x1b]52;c;x\x07", "^[]52;c;x^G"), ("\r\x7f", "^M^?"), ("\x9b", "\\x9b"), ("é\u200e", "é\u200e")],
)
def test_control_characters_are_shown_as_cat_does(text: str, shown: str) -> None:
    """So that whoever reads sees that they were there."""
    assert visible(text) == shown


def test_width_is_what_a_terminal_takes() -> None:
    """Wide characters take two columns, combining ones none."""
    assert [width(text) for text in ("abc", "日本", "e\u0301", "")] == [3, 4, 1, 0]
    assert [fit("日本語", columns) for columns in (6, 5, 4, 1, 0)] == ["日本語", "日本…", "日…", "…", ""]


def test_a_table_is_aligned_and_clean() -> None:
    """Whatever stands in it."""
    rows = [("NAME", "N"), ("日本", "1"), ("a\x1b[2J\nb", "10")]
    assert table(rows, right=[1]) == ["NAME     N", "日本     1", "a[2J b  10"]


@pytest.mark.parametrize(
    ("milliseconds", "said"),
    [
        (None, "-"),
        (-5, "0 ms"),
        (0, "0 ms"),
        (999, "999 ms"),
        (1000, "1.0 s"),
        (9940, "9.9 s"),
        (9960, "10 s"),
        (119_000, "119 s"),
        (120_000, "2 min"),
        (7_200_000, "2 h"),
        (172_800_000, "2 d"),
    ],
)
def test_durations_are_said_in_the_unit_that_fits(milliseconds: float | None, said: str) -> None:
    """As a person would."""
    assert duration(milliseconds) == said


def test_colour_is_only_where_it_is_wanted() -> None:
    """Else the text is bare."""
    assert (style("a", "red", colour=True), style("a", "red", colour=False)) == ("\x1b[31ma\x1b[0m", "a")


@pytest.mark.parametrize(
    ("env", "colour", "progress"),
    [
        ({"TERM": "xterm"}, True, True),
        ({"TERM": "xterm", "NO_COLOR": "1"}, False, True),
        ({"TERM": "xterm", "NO_COLOR": ""}, True, True),
        ({"TERM": "dumb"}, False, False),
        ({}, False, False),
    ],
)
def test_a_terminal_is_asked_what_it_can(env: dict[str, str], colour: bool, progress: bool) -> None:
    """NO_COLOR is honoured, a dumb terminal gets no escape sequence (no-color.org)."""
    master, slave = os.openpty()
    try:
        console = Console(slave, slave, env=env)
        assert (console.colour, console.shows_progress) == (colour, progress)
    finally:
        os.close(master)
        os.close(slave)


async def test_what_is_no_terminal_gets_bare_text() -> None:
    """No colour, no progress, 80 columns; a fault on stderr is no fault of ours."""
    reading, writing = os.pipe()
    closed = os.dup(writing)
    os.close(closed)
    console = Console(writing, closed, env={"TERM": "xterm"})
    console.progress("waiting")
    console.complain("told to nobody")
    await console.write("a\x1b[0m")
    assert (console.colour, console.shows_progress, console.size) == (False, False, (80, 24))
    assert os.read(reading, 99) == b"a\x1b[0m"
    os.close(reading)
    with pytest.raises(StdoutGone):
        await console.write("b")
    os.close(writing)
    with pytest.raises(StdoutBroken, match="Bad file descriptor"):
        await console.write("c")


async def test_progress_erases_itself_and_never_the_answer() -> None:
    """It is gone before anything else is said, and does not come while an unfinished line stands there."""
    master, slave = os.openpty()
    try:
        console = Console(slave, slave, env={"TERM": "xterm"})
        console.progress("wait\x1b[2Jing")
        console.progress("wait\x1b[2Jing")
        await console.write("half")
        console.progress("not now")
        console.complain("a\nb")
        await console.end_line()
        seen = b""
        while not seen.endswith(b"b\r\n"):
            seen += os.read(master, 999)
        assert seen == b"\r\x1b[Kwait[2Jing\r\x1b[Khalf\r\nllorch: a b\r\n"
    finally:
        os.close(master)
        os.close(slave)


async def test_a_blocked_stdout_does_not_block_the_loop() -> None:
    """The write waits in its own thread; whoever gives up waiting is free at once."""
    reading, writing = os.pipe()
    console = Console(writing, None)
    stuck = asyncio.create_task(console.write("x" * 1_000_000))
    done, _ = await asyncio.wait({stuck}, timeout=0.05)
    assert not done
    stuck.cancel()
    with pytest.raises(asyncio.CancelledError):
        await stuck
    os.close(reading)
    with pytest.raises(StdoutGone):
        await console.write("y")
    os.close(writing)

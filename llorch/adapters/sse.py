"""A bounded parser of Server-Sent Events, by the standard, on bytes.

Lines end in LF, CR or CRLF and nothing else: a model may well say U+2028, so text is never split as text.
"""

from typing import NamedTuple

_BOM = b"\xef\xbb\xbf"


class ServerEvent(NamedTuple):
    """One event: its name, empty for a plain message, its data, and the last `id` said so far."""

    name: bytes
    data: bytes
    id: bytes = b""


class EventTooLong(Exception):
    """A line or an event outgrew the bound."""


class SseParser:
    """Feed it blocks of bytes, cut anywhere; it gives back whole events. What never ends is never shown."""

    __slots__ = ("_data", "_ended_in_cr", "_first_line", "_id", "_max", "_name", "_partial", "_size")

    def __init__(self, max_event_bytes: int) -> None:
        self._max = max_event_bytes
        self._partial = bytearray()
        self._ended_in_cr = False
        self._first_line = True
        self._name = b""
        self._id = b""  # of the stream, not of one event: the standard keeps it
        self._data: list[bytes] = []
        self._size = 0

    def feed(self, block: bytes) -> list[ServerEvent]:
        """The events that `block` completes, in order. Raises EventTooLong."""
        if self._ended_in_cr and block:
            self._ended_in_cr = False
            if block.startswith(b"\n"):
                block = block[1:]
        if self._partial:
            if b"\n" not in block and b"\r" not in block:
                self._hold(block)
                return []
            block = bytes(self._partial) + block
            self._partial.clear()
        if not block:
            return []
        lines = block.splitlines()
        if block.endswith(b"\r"):
            self._ended_in_cr = True
        elif not block.endswith(b"\n"):
            self._hold(lines.pop())
        events: list[ServerEvent] = []
        for line in lines:
            self._line(line, events)
        return events

    @property
    def between_events(self) -> bool:
        """Whether nothing is open: the next block begins a new event."""
        return not (self._partial or self._data or self._name or self._ended_in_cr)

    def _hold(self, part: bytes) -> None:
        self._partial += part
        if len(self._partial) > self._max:
            raise EventTooLong(f"a line of over {self._max} bytes")

    def _line(self, line: bytes, events: list[ServerEvent]) -> None:
        if self._first_line:
            self._first_line = False
            line = line.removeprefix(_BOM)
        if not line:
            if self._data:
                events.append(ServerEvent(self._name, b"\n".join(self._data), self._id))
            self._name, self._data, self._size = b"", [], 0
            return
        field, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if field == b"data":
            self._add(value)
        elif field == b"event":
            self._name = value
        elif field == b"id" and b"\x00" not in value:
            self._id = value
        elif field == b"error":  # older llama.cpp sends its error frame as a field of this name
            self._name = b"error"
            self._add(value)

    def _add(self, value: bytes) -> None:
        self._size += len(value) + 1  # an empty line takes room too
        if self._size > self._max:
            raise EventTooLong(f"an event of over {self._max} bytes")
        self._data.append(value)

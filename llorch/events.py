"""The four events of a task's stream and the bytes of their SSE frames, each encoded once.

A frame is `id:`, `event:`, one line of JSON in `data:`, and a blank line. JSON escapes every CR and LF,
so no text of a model can begin a line of its own.
"""

from typing import ClassVar, Literal

import msgspec

FinishReason = Literal["stop", "length", "cancelled"]


class Started(msgspec.Struct, frozen=True, omit_defaults=True):
    """First event: the place in the queue and the predicted start (ms from admission), as of admission."""

    event: ClassVar[bytes] = b"started"
    queue_position: int
    predicted_start_ms: int | None = None


class Token(msgspec.Struct, frozen=True):
    """One piece of text, never empty; `i` counts 0, 1, 2 … without a gap."""

    event: ClassVar[bytes] = b"token"
    t: str
    i: int


class End(msgspec.Struct, frozen=True, omit_defaults=True):
    """Last event of a task that completed or was cancelled; `decode_time_ms` is first to last token."""

    event: ClassVar[bytes] = b"end"
    tokens_out: int
    finish_reason: FinishReason
    decode_time_ms: int | None = None
    tokens_in: int | None = None


class Error(msgspec.Struct, frozen=True, omit_defaults=True):
    """Last event of a task that failed; `retriable` says whether the same task may succeed later."""

    event: ClassVar[bytes] = b"error"
    code: str
    retriable: bool
    retry_after_ms: int | None = None
    message: str | None = None


_encoder = msgspec.json.Encoder()


def token_frame(event_id: int, text: str, index: int) -> bytes:
    """The same as `frame(event_id, Token(text, index))`, for the event that there are most of."""
    return b'id: %d\nevent: token\ndata: {"t":%b,"i":%d}\n\n' % (event_id, _encoder.encode(text), index)


def frame(event_id: int, event: Started | Token | End | Error) -> bytes:
    """The bytes of one SSE frame."""
    return b"id: %d\nevent: %b\ndata: %b\n\n" % (event_id, event.event, _encoder.encode(event))

"""The append-only log of one task's frames; a reader is a position in it.

The one rule: position, frames and end are read in the same step, after every wait. So replay and live
are the same call, no reader misses an event, and a slow one costs nobody anything.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable

MAX_BATCH_BYTES = 16 * 1024


class EventLog:
    """Frames of one task; the id of a frame is its place, 0 for the first.

    `append` and `seal` are plain and atomic. After `seal` nothing can be appended.
    """

    __slots__ = ("_end", "_end_id", "_frames", "_watchers", "size_bytes")

    def __init__(self) -> None:
        self._frames: list[bytes] = []
        self._end: bytes | None = None
        self._end_id = 0
        self._watchers: list[Callable[[], None]] = []
        self.size_bytes = 0

    @property
    def next_id(self) -> int:
        """The id of the next frame; once sealed, one past the last."""
        return self._end_id + 1 if self._end is not None else len(self._frames)

    @property
    def sealed(self) -> bool:
        """Whether the terminal frame is in the log."""
        return self._end is not None

    def append(self, frame: bytes) -> None:
        """Add a frame and tell every reader. Raises RuntimeError once sealed."""
        if self._end is not None:
            raise RuntimeError("append to a sealed log")
        self._frames.append(frame)
        self.size_bytes += len(frame)
        for changed in self._watchers:
            changed()

    def seal(self, end: bytes, *, recall: bool = False) -> None:
        """Add the terminal frame. Raises RuntimeError once sealed.

        `recall` takes back every frame but the first that has not been handed out: after a cancel no
        reader gets a token any more. The terminal frame keeps the id it would have had.
        """
        if self._end is not None:
            raise RuntimeError("seal of a sealed log")
        self._end, self._end_id = end, len(self._frames)
        if recall:
            del self._frames[1:]
            self.size_bytes = sum(map(len, self._frames))
        self.size_bytes += len(end)
        for changed in self._watchers:
            changed()

    def resume(self, last_event_id: int | None) -> int | None:
        """The position after `last_event_id`, or None at or past the terminal event.

        No id, or one beyond what a live log holds, replays from the start.
        """
        position = 0 if last_event_id is None else last_event_id + 1
        if self._end is not None:
            return None if position > self._end_id else position
        return 0 if position > len(self._frames) else position

    def read(self, position: int) -> tuple[list[bytes], int]:
        """What is ready from `position` on, at most 16 KiB or one frame; and the next position."""
        batch: list[bytes] = []
        size = 0
        for index in range(position, len(self._frames)):
            size += len(self._frames[index])
            if batch and size > MAX_BATCH_BYTES:
                return batch, index
            batch.append(self._frames[index])
        if self._end is None:
            return batch, max(position, len(self._frames))
        if position <= self._end_id and (not batch or size + len(self._end) <= MAX_BATCH_BYTES):
            batch.append(self._end)
            return batch, self._end_id + 1
        return batch, max(position, len(self._frames))

    def watch(self, changed: Callable[[], None]) -> None:
        """Have `changed` called in the very step of every change; it may schedule, and must not raise."""
        self._watchers.append(changed)

    def unwatch(self, changed: Callable[[], None]) -> None:
        """Call `changed` no more."""
        self._watchers.remove(changed)

    async def follow(self, position: int = 0) -> AsyncGenerator[list[bytes], None]:
        """Yield what is ready from `position` on, as batches, until the terminal frame was handed out."""
        changed = asyncio.Event()
        self.watch(changed.set)
        try:
            while True:
                batch, position = self.read(position)
                if batch:
                    yield batch
                elif self._end is not None:
                    return
                else:
                    changed.clear()
                    await changed.wait()
        finally:
            self.unwatch(changed.set)

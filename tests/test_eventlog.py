"""The log of one task: what a reader gets, from every position, live and later."""

import asyncio
from collections.abc import Iterator

import pytest

from llorch.eventlog import MAX_BATCH_BYTES, EventLog
from tests.virtualtime import settled, turns, virtual_time

STARTED, END = b"id: 0 started", b"end"


def tokens(count: int, size: int = 8) -> list[bytes]:
    """So many frames of so many bytes, all different."""
    return [b"%*d" % (size, index) for index in range(count)]


def log_of(*frames: bytes, end: bytes | None = None) -> EventLog:
    """A log with these frames."""
    log = EventLog()
    for frame in frames:
        log.append(frame)
    if end is not None:
        log.seal(end)
    return log


def batches(log: EventLog, position: int = 0) -> Iterator[list[bytes]]:
    """What is ready, as a reader gets it."""
    while True:
        batch, position = log.read(position)
        if not batch:
            return
        yield batch


def frames_of(log: EventLog, position: int = 0) -> list[bytes]:
    """The same without the borders of the batches."""
    return [frame for batch in batches(log, position) for frame in batch]


class Reader:
    """A reader in the background: all it got, and whether it came to the end."""

    def __init__(self, log: EventLog, position: int = 0) -> None:
        self.got: list[bytes] = []
        self.work = asyncio.create_task(self._read(log, position))

    async def _read(self, log: EventLog, position: int) -> None:
        async for batch in log.follow(position):
            self.got += batch


# -- append and seal -------------------------------------------------------------------------------


def test_ids_count_up_from_zero() -> None:
    """`next_id` is the number of frames, the terminal one included."""
    log = EventLog()
    assert log.next_id == 0
    log.append(STARTED)
    log.append(b"a")
    assert (log.next_id, log.sealed) == (2, False)
    log.seal(END)
    assert (log.next_id, log.sealed) == (3, True)


def test_nothing_enters_a_sealed_log() -> None:
    """Neither a frame nor a second end can follow the first."""
    log = log_of(STARTED, end=END)
    with pytest.raises(RuntimeError):
        log.append(b"late")
    with pytest.raises(RuntimeError):
        log.seal(b"second end")
    assert list(batches(log)) == [[STARTED, END]]


@pytest.mark.parametrize("recall", [False, True])
def test_size_is_what_the_log_holds(recall: bool) -> None:
    """`size_bytes` is the sum of the frames that are kept: retention counts it."""
    log = log_of(STARTED, *tokens(5))
    log.seal(END, recall=recall)
    assert log.size_bytes == sum(map(len, frames_of(log)))


# -- positions -------------------------------------------------------------------------------------


def test_every_position_of_a_finished_log_gives_exactly_the_rest() -> None:
    """Resumed after any id, a reader gets what follows it: nothing twice, nothing lost [MVP-020]."""
    frames = [STARTED, *tokens(6), END]
    log = log_of(*frames[:-1], end=END)
    for last_id in range(len(frames) - 1):
        position = log.resume(last_id)
        assert position == last_id + 1
        assert frames_of(log, position) == frames[position:]


def test_a_reader_at_or_past_the_end_is_told_so() -> None:
    """C4: once sealed, the terminal id and everything beyond is None: 204."""
    log = log_of(STARTED, b"a", end=END)
    assert [log.resume(last_id) for last_id in (1, 2, 3, 999_999_999)] == [2, None, None, None]


def test_an_id_beyond_a_live_log_replays_from_the_start() -> None:
    """C4: such an id can't be of this log; the last frame's own is fine and waits for more."""
    log = log_of(STARTED, b"a")
    assert [log.resume(last_id) for last_id in (None, 0, 1, 2, 999_999_999)] == [0, 1, 2, 0, 0]


def test_resuming_without_an_id_replays_a_finished_log_whole() -> None:
    """No id is the start, sealed or not."""
    assert log_of(STARTED, end=END).resume(None) == 0


# -- batches ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 100, 1000, 8192, 8193, 16384, 16385, 40_000])
def test_a_batch_is_at_most_16_kib_or_one_frame(size: int) -> None:
    """No more than one write's worth is ever handed out at once, yet every frame goes out."""
    frames = tokens(50, size)
    log = log_of(*frames, end=b"e" * 40)
    assert frames_of(log) == [*frames, b"e" * 40]
    for batch in batches(log):
        assert len(batch) == 1 or sum(map(len, batch)) <= MAX_BATCH_BYTES


def test_batches_are_as_full_as_the_bound_allows() -> None:
    """Small frames go out together: two batches for 20,000 bytes."""
    read = list(batches(log_of(*tokens(200, 100))))
    assert [len(batch) for batch in read] == [163, 37]


def test_an_end_that_does_not_fit_goes_out_alone() -> None:
    """The terminal frame counts toward the bound too, and so does a single byte."""
    frames = tokens(2, MAX_BATCH_BYTES // 2)
    assert list(batches(log_of(*frames, end=END))) == [frames, [END]]
    frames = [b"x" * (MAX_BATCH_BYTES // 2), b"x" * (MAX_BATCH_BYTES // 2 + 1)]
    assert list(batches(log_of(*frames))) == [frames[:1], frames[1:]]


# -- recall ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("position", range(6))
def test_after_a_recall_there_is_nothing_but_the_end(position: int) -> None:
    """A reader from the start gets `started` and `end`, every other one `end` alone [MVP-032]."""
    log = log_of(STARTED, *tokens(4))
    log.seal(END, recall=True)
    assert frames_of(log, position) == ([STARTED, END] if position == 0 else [END])


def test_a_recalled_log_keeps_the_id_of_its_end() -> None:
    """The end's id is the last token's + 1, so readers that had all of them can resume."""
    log = log_of(STARTED, *tokens(4))
    assert log.next_id == 5
    log.seal(END, recall=True)
    assert log.next_id == 6
    assert [log.resume(last_id) for last_id in (None, 0, 4, 5)] == [0, 1, 5, None]


# -- following -------------------------------------------------------------------------------------


@virtual_time
async def test_following_live_and_replaying_give_the_same() -> None:
    """A reader from the first moment and one that comes after the end see the same frames."""
    log = EventLog()
    live = Reader(log)
    frames = [STARTED, *tokens(5)]
    for frame in frames:
        log.append(frame)
        await settled()
        assert live.got[-1] == frame
    log.seal(END)
    late = Reader(log)
    await asyncio.wait({live.work, late.work})
    assert live.got == late.got == [*frames, END]


@virtual_time
async def test_every_reader_is_woken() -> None:
    """Several readers, each at its own place, all get what comes."""
    log = log_of(STARTED, b"a")
    readers = [Reader(log, position) for position in (0, 1, 2)]
    await settled()
    log.append(b"b")
    await settled()
    assert [reader.got for reader in readers] == [[STARTED, b"a", b"b"], [b"a", b"b"], [b"b"]]
    log.seal(END)
    await asyncio.wait({reader.work for reader in readers})
    assert all(reader.got[-1] == END for reader in readers)


@virtual_time
async def test_frames_appended_in_one_step_come_as_one_batch() -> None:
    """A reader that was late takes all that is ready at once."""
    log = log_of(STARTED)
    follow = log.follow(1)
    waiting = asyncio.create_task(anext(follow))
    await settled()
    log.append(b"a")
    log.append(b"b")
    assert await waiting == [b"a", b"b"]
    await follow.aclose()


@virtual_time
async def test_a_recall_overtakes_a_reader_that_was_woken_but_has_not_looked() -> None:
    """Frames appended and recalled before the reader runs are never handed out [MVP-032]."""
    log = log_of(STARTED)
    reader = Reader(log, 1)
    await settled()
    log.append(b"a")
    log.seal(END, recall=True)
    await settled()
    assert reader.got == [END]


@virtual_time
async def test_a_recall_between_two_batches_leaves_the_end_alone() -> None:
    """A slow reader that holds one batch gets no further token after the cancel."""
    frames = tokens(10, 10_000)
    log = log_of(STARTED, *frames)
    follow = log.follow()
    assert await anext(follow) == [STARTED, frames[0]]
    log.seal(END, recall=True)
    assert [batch async for batch in follow] == [[END]]


@pytest.mark.parametrize("later", range(5))
@virtual_time
async def test_no_reader_misses_an_end_that_comes_soon_after_a_frame(later: int) -> None:
    """However many turns lie between them: frames and end are read in one step."""
    log = log_of(STARTED)
    readers = [Reader(log), Reader(log, 1)]
    await settled()
    log.append(b"a")
    await turns(later)
    log.seal(END)
    await asyncio.wait({reader.work for reader in readers})
    assert [reader.got for reader in readers] == [[STARTED, b"a", END], [b"a", END]]


@virtual_time
async def test_a_reader_that_leaves_is_forgotten() -> None:
    """A cancelled reader leaves no waiter behind, whether it was woken or not."""
    log = log_of(STARTED)
    readers = [Reader(log) for _ in range(3)]
    await settled()
    readers[0].work.cancel()
    await settled()
    assert len(log._watchers) == 2
    log.append(b"a")
    readers[1].work.cancel()  # woken, and gone before it looked
    await settled()
    assert len(log._watchers) == 1
    log.seal(END)
    await asyncio.wait({reader.work for reader in readers})
    assert (readers[2].got, log._watchers) == ([STARTED, b"a", END], [])


@virtual_time
async def test_a_reader_that_does_not_wait_any_more_is_not_in_the_way() -> None:
    """Closing the iterator at a batch ends the reader; the log goes on."""
    log = log_of(STARTED)
    follow = log.follow()
    await anext(follow)
    await follow.aclose()
    log.append(b"a")
    assert log._watchers == []

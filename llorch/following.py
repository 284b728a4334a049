"""`run` and `stream`: one task from its admission to its end, on a console, with a person at Ctrl-C.

The one rule: `run` owns its task, `stream` only watches. What ends a `run` early (a signal, a closed stdout)
cancels the task on the server, and says so; what ends a `stream` leaves the task alone.
"""

import argparse
import asyncio
import contextlib
import os
import signal
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import msgspec

from llorch.answers import (
    Broken,
    Cancelled,
    ClientError,
    Created,
    Later,
    Metrics,
    NotFound,
    Unavailable,
    Unreachable,
)
from llorch.client import Client
from llorch.events import End, Error, Started, Token
from llorch.exits import Exit
from llorch.tables import describe
from llorch.terminal import Console, StdoutBroken, StdoutGone, duration

CANCEL_S = 10.0
CANCEL_AGAIN_S = 0.5
TICK_S = 0.5
TOLD_S = 1.0
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(Exception):
    """A signal ended the command."""


# -- what is shown while nothing comes -------------------------------------------------------------


class Progress:
    """What a task that has given no token yet is waiting for, in one line. `clock` is seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._begun = clock()
        self._position: int | None = None
        self._starts_at: float | None = None
        self._prompt: tuple[int, int] | None = None
        self._note: str | None = None
        self.live = False  # told by the server as it changes, not only as of admission

    def waits(self, position: int | None, predicted_start_ms: int | None) -> None:
        """Its place in the queue, None once started; its start, from now."""
        self._note = None
        self._position = position
        predicted = None if predicted_start_ms is None else predicted_start_ms / 1000
        self._starts_at = None if predicted is None else self._clock() + predicted

    def metrics(self, said: Metrics) -> None:
        """What the server says of it now."""
        self.live = True
        self.waits(said.queue_position, said.predicted_start_ms)
        self._prompt = None
        if said.prompt_tokens and said.prompt_tokens_done is not None:
            self._prompt = (min(said.prompt_tokens_done, said.prompt_tokens), said.prompt_tokens)

    def note(self, text: str) -> None:
        """Something else, until there is news."""
        self._note = text

    def line(self) -> str:
        """The line, as of now."""
        if self._note is not None:
            return self._note
        if self._prompt is not None:
            done, whole = self._prompt
            return f"reading the prompt: {done:,} of {whole:,} tokens ({100 * done // whole} %)"
        if self._position is None or (self._position == 0 and not self.live and not self._left_s()):
            return f"waiting for the first token ({duration(1000 * (self._clock() - self._begun))})"
        ahead = f"{self._position} ahead" if self._position else "next in line"
        left_s = self._left_s()
        if left_s is None:
            return f"waiting: {ahead}"
        return f"waiting: {ahead}, starts {f'in about {duration(1000 * left_s)}' if left_s else 'any moment'}"

    def _left_s(self) -> float | None:
        return None if self._starts_at is None else max(self._starts_at - self._clock(), 0.0)


@contextlib.asynccontextmanager
async def ticking(console: Console, progress: Progress) -> AsyncIterator[None]:
    """Keep the line of progress up to date meanwhile, and erase it at the end."""

    async def tick() -> None:
        while True:
            console.progress(progress.line())
            await asyncio.sleep(TICK_S)

    ticker = asyncio.create_task(tick(), name="progress") if console.shows_progress else None
    try:
        yield
    finally:
        if ticker is not None:
            ticker.cancel()
        console.clear_progress()


# -- signals ---------------------------------------------------------------------------------------


class Signals:
    """Ctrl-C and its kin: the first asks, the second leaves at once. A signal that is ignored stays so."""

    def __init__(self, console: Console, leave: Callable[[int], object] = os._exit) -> None:
        self.number: int = signal.SIGINT
        self.parting = "left"  # what a second one says
        self._console, self._leave = console, leave
        self._first = asyncio.Event()

    def __enter__(self) -> "Signals":
        loop = asyncio.get_running_loop()
        for number in ENDING:
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup, or a shell's background job
                loop.add_signal_handler(number, self.received, number)
        return self

    def __exit__(self, *failure: object) -> None:
        loop = asyncio.get_running_loop()
        for number in ENDING:
            loop.remove_signal_handler(number)

    def received(self, number: int) -> None:
        """A signal has come."""
        if not self._first.is_set():
            self.number = number
            self._first.set()
            return
        self._console.complain(self.parting)
        self._leave(128 + number)

    @property
    def exit_code(self) -> int:
        """As shells have it."""
        return 128 + self.number

    async def before(self, work: "asyncio.Task[Any]", timeout_s: float | None = None) -> bool:
        """Whether a signal came before `work` was done, or `timeout_s` over; nothing is cancelled."""
        waiting = asyncio.create_task(self._first.wait(), name="signal")
        try:
            await asyncio.wait({waiting, work}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            waiting.cancel()
        return self._first.is_set() and not work.done()

    async def within(self, seconds: float) -> bool:
        """Whether a signal comes in so many seconds."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._first.wait()
        return self._first.is_set()


# -- commands --------------------------------------------------------------------------------------


async def run(client: Client, console: Console, options: argparse.Namespace, body: dict[str, Any]) -> int:
    """Submit, show, and answer for the task. Raises ClientError."""
    with Signals(console) as signals:
        progress = Progress()
        try:
            async with ticking(console, progress):
                created = await admitted(client, console, options, body, signals, progress)
        except Interrupted:
            return signals.exit_code
        signals.parting = f"left; task {created.task_id} may still run: llorch cancel {created.task_id}"
        progress.waits(created.queue_position, created.predicted_start_ms)
        watch = Watch(client, console, options, progress, created.task_id)
        watching = asyncio.create_task(watch.to_the_end(), name="watch")
        try:
            if await signals.before(watching):
                raise Interrupted
            return watching.result()
        except Interrupted:
            await _stopped(watching)
            console.complain(await _cancel(client, console, created.task_id))
            return signals.exit_code
        except StdoutGone:  # `| head` has what it wanted
            await _cancel(client, console, created.task_id)
            return Exit.DONE
        except StdoutBroken:
            console.complain(await _cancel(client, console, created.task_id))
            raise
        except ClientError as error:
            if not isinstance(error, NotFound):
                console.complain(f"task {created.task_id} may go on: llorch stream {created.task_id}")
            raise
        finally:
            await _stopped(watching)


async def stream(client: Client, console: Console, options: argparse.Namespace) -> int:
    """Show a task that somebody has submitted. Raises ClientError."""
    task = await client.snapshot(options.task_id)
    with Signals(console) as signals:
        progress = Progress()
        progress.waits(task.queue_position, None)  # what was predicted was from its admission
        watch = Watch(client, console, options, progress, task.task_id, after=options.last_event_id)
        watching = asyncio.create_task(watch.to_the_end(), name="watch")
        try:
            if not await signals.before(watching):
                return watching.result()
            console.complain(f"left; task {task.task_id} goes on: llorch cancel {task.task_id} ends it")
            return signals.exit_code
        except StdoutGone:
            return Exit.DONE
        finally:
            await _stopped(watching)


async def admitted(
    client: Client,
    console: Console,
    options: argparse.Namespace,
    body: dict[str, Any],
    signals: Signals,
    progress: Progress,
) -> Created:
    """The task, once the server took it; with `--wait`, however long that takes.

    Raises Interrupted, and then no task of ours is left, or it is said; or ClientError.
    """
    told = False
    while True:
        signals.parting = "left; whether the task was admitted is not known: llorch ps"
        progress.note("submitting")
        posting = asyncio.create_task(client.submit(body), name="submit")
        try:
            if await signals.before(posting):
                progress.note("cancelling; Ctrl-C again leaves at once")
                console.progress(progress.line())
                await _take_back(client, console, posting)
                raise Interrupted
            return posting.result()
        except (Later, Unreachable) as error:
            if not options.wait or (isinstance(error, Unreachable) and error.sent):
                raise
            wait_s = error.retry_after_s if isinstance(error, Later) else 2.0
            if not (told or console.shows_progress):
                console.complain(f"{error}; waiting, as --wait says")
                told = True
            reason = str(error)
        signals.parting = "left"
        progress.note(f"next try in {duration(1000 * wait_s)}: {reason}")
        if await signals.within(wait_s):
            raise Interrupted


async def _take_back(client: Client, console: Console, posting: "asyncio.Task[Created]") -> None:
    """Cancel what is just being submitted: it has a name only once the answer is here."""
    await asyncio.wait({posting}, timeout=CANCEL_S)
    if not posting.done():
        await _stopped(posting)
        console.complain("no answer: whether the task was admitted is not known: llorch ps")
    elif posting.exception() is None:
        console.complain(await _cancel(client, console, posting.result().task_id))
    elif isinstance(error := posting.exception(), Unreachable) and error.sent:
        console.complain(f"{error}: whether the task was admitted is not known: llorch ps")


async def _cancel(client: Client, console: Console, task_id: str) -> str:
    """Cancel it, as often as it takes for some seconds; what became of it, in words."""
    console.progress(f"cancelling task {task_id}; Ctrl-C again leaves at once")
    until, told = time.monotonic() + CANCEL_S, False
    while True:
        try:
            return fate(await client.cancel(task_id))
        except (Unreachable, Unavailable) as error:
            if not told:
                told = True
                console.complain(f"can't cancel yet ({error}); Ctrl-C again leaves it running")
            if time.monotonic() > until:
                return f"task {task_id} could not be cancelled ({error}); later: llorch cancel {task_id}"
        except ClientError as error:
            return f"task {task_id} could not be cancelled: {error}"
        await asyncio.sleep(CANCEL_AGAIN_S)


def fate(cancelled: Cancelled) -> str:
    """What became of a task, in words."""
    tokens = f"{cancelled.tokens_out} token{'' if cancelled.tokens_out == 1 else 's'}"
    if cancelled.state == "cancelled":
        return f"cancelled task {cancelled.task_id} on the server after {tokens}"
    return f"task {cancelled.task_id} had already {cancelled.state}, after {tokens}"


async def _stopped(work: "asyncio.Task[Any]") -> None:
    work.cancel()
    await asyncio.wait({work})
    if not work.cancelled():
        work.exception()  # looked at, or asyncio complains that nobody did


class Watch:
    """One task on a console, to its end."""

    def __init__(
        self,
        client: Client,
        console: Console,
        options: argparse.Namespace,
        progress: Progress,
        task_id: str,
        *,
        after: int | None = None,
    ) -> None:
        self._client, self._console, self._options, self._progress = client, console, options, progress
        self._task_id, self._after = task_id, after
        self._as_lines = options.json and options.command == "stream"
        self._texts: list[str] | None = [] if options.json and not self._as_lines else None
        self._told = False

    async def to_the_end(self) -> int:
        """Write what comes; the exit code. Raises ClientError, StdoutGone, StdoutBroken."""
        ending = await self._show()
        if self._texts is not None:
            await self._console.write(f"{_json(self._result(ending))}\n", trusted=True)
        await self._console.end_line()
        return self._verdict(ending)

    async def _show(self) -> End | Error:
        events = self._client.follow(
            self._task_id,
            after=self._after,
            metrics=self._console.shows_progress,
            patience_s=self._options.reconnect_s,
        )
        async with ticking(self._console, self._progress) as _, contextlib.aclosing(events):
            async for event in events:
                if isinstance(event, Broken):
                    self._broken(event)
                elif isinstance(event, Metrics):
                    self._progress.metrics(event)
                    self._console.progress(self._progress.line())
                else:
                    await self._write(event)
                    if isinstance(event, End | Error):
                        return event
        raise AssertionError("a stream without an end")

    async def _write(self, event: Started | Token | End | Error) -> None:
        if self._as_lines:
            line = {"event": event.event.decode(), **msgspec.to_builtins(event)}
            await self._console.write(f"{_json(line)}\n", trusted=True)
        elif isinstance(event, Token):
            if self._texts is None:
                await self._console.write(event.t)
            else:
                self._texts.append(event.t)
            self._progress.note(f"{event.i + 1:,} tokens so far")

    def _broken(self, event: Broken) -> None:
        self._progress.note(f"next try in {duration(1000 * event.retry_in_s)}: {event.reason}")
        if event.retry_in_s > TOLD_S and not self._told:
            self._told = True
            self._console.complain(f"{event.reason}; trying for {self._options.reconnect_s:g} s to go on")

    def _result(self, ending: End | Error) -> dict[str, Any]:
        result: dict[str, Any] = {"task_id": self._task_id, "text": "".join(self._texts or ())}
        if isinstance(ending, Error):
            return {**result, "state": "failed", "error": msgspec.to_builtins(ending)}
        state = "cancelled" if ending.finish_reason == "cancelled" else "completed"
        return {**result, "state": state, **msgspec.to_builtins(ending)}

    def _verdict(self, ending: End | Error) -> int:
        if isinstance(ending, Error):
            self._console.complain(f"task {self._task_id} failed: {describe(ending)}")
            return Exit.FAILED
        if ending.finish_reason == "cancelled":
            said = f"task {self._task_id} was cancelled by somebody else, after {ending.tokens_out} tokens"
            self._console.complain(said)
            return Exit.CANCELLED
        if ending.finish_reason == "length" and self._console.err_is_terminal:
            self._console.complain(f"cut off after {ending.tokens_out} tokens; --max-tokens allows more")
        return Exit.DONE


def _json(value: Any) -> str:
    return msgspec.json.encode(value).decode()

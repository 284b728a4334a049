"""`llorch top`: the server at work, drawn anew each second.

The one rule: `picture` is a pure function of two snapshots; the loop around it only asks, draws and waits.
"""

import argparse
import asyncio
import contextlib
import datetime
import os
import re
import signal
import sys
import termios
import time
import tty
from typing import Any, NamedTuple

import msgspec

from llorch.answers import BadAnswer, Gpu, Lane, Pool, Snapshot, Status, TooOld, Unavailable, Unreachable
from llorch.client import STATUS, Client
from llorch.exits import Exit
from llorch.tables import drained, now, readiness, replica_lines, task_lines
from llorch.terminal import Console, clean, duration, fit, style

_ENTER = "\x1b[?1049h\x1b[?25l"  # the alternate screen, no cursor
_LEAVE = "\x1b[?25h\x1b[?1049l"
_HOME, _TO_LINE_END, _TO_SCREEN_END = "\x1b[H", "\x1b[K", "\x1b[J"
_BAR_COLUMNS = 20
_LEAVING_KEYS = (b"q", b"Q", b"")  # and the end of the keyboard
_STYLE = re.compile("\x1b\\[[0-9]*m")
_RUNNING = ("queued", "running")


class Sample(NamedTuple):
    """A snapshot and when it was taken: monotonic seconds, and the wall clock."""

    status: Status
    at: float
    wall: datetime.datetime


# -- the picture -----------------------------------------------------------------------------------


def picture(before: Sample | None, last: Sample, *, url: str, colour: bool = False) -> list[str]:
    """The lines that show `last`; rates are those since `before`, if the same server gave it."""
    status = last.status
    lines = [_head(status, url), _speed(before, last), _totals(before, last), ""]
    for pool in status.pools:
        lines += _pool(pool, colour)
    lines += [_gpu(gpu) for gpu in status.gpus]
    if status.gpu_fault:
        lines.append(f"GPU      {clean(status.gpu_fault)}")
    return [*lines, "", *task_lines(_in_order(status.tasks), last.wall, colour=colour)]


def _in_order(tasks: list[Snapshot]) -> list[Snapshot]:
    """What runs, oldest first; what waits, of each pool the next one first; then the newest of the others."""
    running = [task for task in reversed(tasks) if task.state == "running"]
    waiting = [task for task in reversed(tasks) if task.state == "queued"]
    waiting.sort(key=lambda task: (task.pool_id, task.queue_position or 0))
    return [*running, *waiting, *(task for task in tasks if task.state not in _RUNNING)]


def _pool(pool: Pool, colour: bool) -> list[str]:
    lines = [_slots(pool, colour), _lane("queue", pool.queue.first)]
    if pool.queue.batch is not None:
        lines.append(_lane("batch", pool.queue.batch))
    if told := drained(pool):
        lines.append(style(f"  {clean(told)}", "yellow", colour=colour))
    if len(pool.replicas) > 1:
        lines += replica_lines(pool, "  ", colour=colour)
    elif pool.last_error:
        lines.append(style(f"  {clean(pool.last_error)}", "red", colour=colour))
    return lines


def _head(status: Status, url: str) -> str:
    up = duration(1000 * status.uptime_s)
    return f"llorch {clean(status.version)} at {url}, up {up}, {status.readers} readers"


def _same_server(before: Sample | None, last: Sample) -> bool:
    return (
        before is not None
        and last.at > before.at
        and last.status.uptime_s >= before.status.uptime_s
        and last.status.totals.tokens_out >= before.status.totals.tokens_out
    )


def _speed(before: Sample | None, last: Sample) -> str:
    status = last.status
    tokens_per_s = status.tokens_per_s
    if before is not None and _same_server(before, last):
        tokens_per_s = (status.totals.tokens_out - before.status.totals.tokens_out) / (last.at - before.at)
    first = status.first_token_ms
    return (
        f"speed    {tokens_per_s:.1f} tokens/s"
        f"   first token: half within {duration(first.p50)}, 95 % within {duration(first.p95)}"
    )


def _totals(before: Sample | None, last: Sample) -> str:
    totals = last.status.totals
    refused = ""
    if before is not None and _same_server(before, last):
        lately = totals.refused - before.status.totals.refused
        refused = f" (+{lately} now)" if lately > 0 else ""
    return (
        f"tasks    {totals.completed} completed, {totals.failed} failed, {totals.cancelled} cancelled, "
        f"{totals.refused} refused{refused}; {totals.tokens_out} tokens"
    )


def _slots(pool: Pool, colour: bool) -> str:
    state = style(readiness(pool), "green" if pool.ready else "red", colour=colour)
    draining = f", {pool.slots.draining} draining" if pool.slots.draining else ""
    at_work = pool.slots.busy + pool.slots.draining
    named = f"{clean(pool.pool_id)}: {state}, {clean(pool.model or pool.engine)}"
    return (
        f"slots    {bar(at_work, pool.slots.total)} {pool.slots.busy} of {pool.slots.total} at work{draining}"
        f"   {named}, seeds {clean(pool.determinism)}"
    )


def _lane(name: str, lane: Lane) -> str:
    return f"{name:<8} {bar(lane.depth, lane.capacity)} {lane.depth} of {lane.capacity} places taken"


def _gpu(gpu: Gpu) -> str:
    used, total = gpu.vram_used_bytes / 2**30, gpu.vram_total_bytes / 2**30
    busy = "use not known" if gpu.utilization is None else f"{gpu.utilization} % busy"
    heat = "" if gpu.temperature_c is None else f", {gpu.temperature_c} °C"
    return (
        f"VRAM {gpu.index:<3} {bar(gpu.vram_used_bytes, gpu.vram_total_bytes)} {used:.1f} of {total:.1f} GiB"
        f"   {clean(gpu.name)}: {busy}{heat}"
    )


def bar(part: float, whole: float) -> str:
    """`[#####.....]`; something is never nothing, and only the whole is full."""
    share = min(max(part / whole, 0.0), 1.0) if whole else 0.0
    filled = round(share * _BAR_COLUMNS)
    if 0 < share < 1:
        filled = min(max(filled, 1), _BAR_COLUMNS - 1)
    return f"[{'#' * filled}{'.' * (_BAR_COLUMNS - filled)}]"


# -- the loop --------------------------------------------------------------------------------------


async def watch(client: Client, console: Console, options: argparse.Namespace) -> int:
    """Show the server until q or Ctrl-C, or `--count` pictures; without a terminal one, plainly."""
    if options.json:
        return await _as_json(client, console, options)
    first = await _sample(client)
    if not console.out_is_terminal or options.count == 1:
        return await _plainly(client, console, options, first)
    with _Screen(console) as screen:
        await _draw_on(screen, client, options, first)
    return Exit.DONE


async def _as_json(client: Client, console: Console, options: argparse.Namespace) -> int:
    for number in range(options.count or 1):
        if number:
            await asyncio.sleep(options.interval)
        status = await client.ask("GET", STATUS, msgspec.Raw)
        await console.write(f"{bytes(status).decode()}\n", trusted=True)
    return Exit.DONE


async def _plainly(client: Client, console: Console, options: argparse.Namespace, first: Sample) -> int:
    await console.lines(picture(None, first, url=client.url, colour=console.colour))
    before = first
    for _ in range((options.count or 1) - 1):
        await asyncio.sleep(options.interval)
        last = await _sample(client)
        await console.lines(["", *picture(before, last, url=client.url, colour=console.colour)])
        before = last
    return Exit.DONE


async def _draw_on(screen: "_Screen", client: Client, options: argparse.Namespace, first: Sample) -> None:
    before: Sample | None = None
    last, fault, drawn = first, "", 0
    while True:
        await screen.draw(picture(before, last, url=client.url, colour=screen.console.colour), fault)
        drawn += 1
        if drawn == options.count or await screen.left_within(options.interval):
            return
        try:
            before, last, fault = last, await _sample(client), ""
        except (Unreachable, Unavailable, BadAnswer, TooOld) as error:
            fault = f"{error}; trying again"


async def _sample(client: Client) -> Sample:
    return Sample(await client.status(), time.monotonic(), now())


class _Screen:
    """The terminal while it is ours: given back as it was, however we leave, and on Ctrl-Z too."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._leaving = asyncio.Event()
        self._redraw: tuple[list[str], str] = ([], "")
        self._keyboard = sys.stdin.fileno() if sys.stdin is not None and sys.stdin.isatty() else None
        self._was: list[Any] | None = None

    def __enter__(self) -> "_Screen":
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, self._leaving.set)
        loop.add_signal_handler(signal.SIGTSTP, self._suspend)
        loop.add_signal_handler(signal.SIGWINCH, self._paint)
        if self._keyboard is not None:
            loop.add_reader(self._keyboard, self._key)
        self._take()
        return self

    def __exit__(self, *failure: object) -> None:
        self._give_back()
        loop = asyncio.get_running_loop()
        if self._keyboard is not None:
            loop.remove_reader(self._keyboard)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGTSTP, signal.SIGWINCH):
            loop.remove_signal_handler(number)

    async def draw(self, lines: list[str], fault: str) -> None:
        """Show these lines, `fault` above them, cut to the size of the terminal."""
        self._redraw = (lines, fault)
        self._paint()

    async def left_within(self, seconds: float) -> bool:
        """Whether whoever watches has left in so many seconds."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._leaving.wait()
        return self._leaving.is_set()

    def _paint(self) -> None:
        lines, fault = self._redraw
        columns, rows = self.console.size
        shown = [style(clean(fault), "red", colour=self.console.colour), *lines] if fault else lines
        body = f"{_TO_LINE_END}\n".join(_cut(line, columns) for line in shown[: rows - 1])
        self._write(f"{_HOME}{body}{_TO_LINE_END}{_TO_SCREEN_END}")

    def _key(self) -> None:
        assert self._keyboard is not None
        pressed = os.read(self._keyboard, 64)
        if pressed[:1] in _LEAVING_KEYS:
            self._leaving.set()

    def _take(self) -> None:
        if self._keyboard is not None:
            self._was = termios.tcgetattr(self._keyboard)
            tty.setcbreak(self._keyboard)
        self._write(_ENTER)

    def _give_back(self) -> None:
        self._write(_LEAVE)
        if self._keyboard is not None and self._was is not None:
            with contextlib.suppress(termios.error):  # the terminal has gone
                termios.tcsetattr(self._keyboard, termios.TCSADRAIN, self._was)

    def _suspend(self) -> None:
        """Ctrl-Z: the shell gets its own screen back, and we ours when we go on."""
        self._give_back()
        os.kill(os.getpid(), signal.SIGSTOP)
        self._take()
        self._paint()

    def _write(self, text: str) -> None:
        assert self.console.out is not None
        rest = memoryview(text.encode("utf-8", "replace"))
        with contextlib.suppress(OSError):  # the terminal has gone: SIGHUP says so too
            while rest:
                rest = rest[os.write(self.console.out, rest) :]


def _cut(line: str, columns: int) -> str:
    """`line` within the width; a coloured one that is too long loses its colours."""
    if "\x1b" not in line:
        return fit(line, columns)
    plain = _STYLE.sub("", line)
    return line if fit(plain, columns) == plain else fit(plain, columns)

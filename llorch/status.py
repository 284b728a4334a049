"""Everything at a glance, for the status page and the command line: pools, tasks, totals, rates, GPUs.

The one rule: it only listens. Nothing is counted per token: what runs is looked at when somebody asks, and
once a second while anything runs.
"""

import asyncio
import math
from collections import deque
from collections.abc import Callable
from itertools import islice

import msgspec

from llorch import __version__
from llorch.errors import LlorchError
from llorch.health import PoolHealth
from llorch.orchestrator import Orchestrator
from llorch.pool import Pool
from llorch.task import State, Task
from llorch.telemetry import GpuReading
from llorch.wire import Snapshot, snapshot

MAX_TASKS = 50
_MAX_HEADS = 20  # of the tasks shown, so many are the next ones of each queue, however long it is
_RATE_WINDOW_S = 5.0
_TICK_S = 1.0
_FIRST_TOKENS = 200


class Totals(msgspec.Struct, frozen=True, kw_only=True):
    """Tasks since start, by what became of them; `refused`: for the pool's reasons, not for a bad body."""

    admitted: int
    refused: int
    completed: int
    failed: int
    cancelled: int
    tokens_out: int


class Percentiles(msgspec.Struct, frozen=True):
    """Of recent tasks, in ms from start; null before the first, p95 also in the home profile."""

    p50: int | None
    p95: int | None


class GpuView(msgspec.Struct, frozen=True, kw_only=True):
    """One GPU; utilization in percent."""

    index: int
    name: str
    utilization: int | None
    vram_used_bytes: int
    vram_total_bytes: int
    temperature_c: int | None


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of `GET /v1/status`.

    `tasks` are those that run, the next of each queue, and the newest others; newest first, at most 50.
    """

    version: str
    uptime_s: float
    pools: list[PoolHealth]
    tasks: list[Snapshot]
    totals: Totals
    tokens_per_s: float
    first_token_ms: Percentiles
    readers: int
    gpus: list[GpuView]
    gpu_fault: str | None


class StatusBoard:
    """Listens to an orchestrator from its construction on; `status` is what there is to know now."""

    def __init__(
        self, orchestrator: Orchestrator, gpu_reading: Callable[[], GpuReading], *, home: bool
    ) -> None:
        self._orchestrator = orchestrator
        self._gpu_reading = gpu_reading
        self._home = home
        self._loop = asyncio.get_running_loop()
        self._began = self._loop.time()
        self._ended = {State.COMPLETED: 0, State.FAILED: 0, State.CANCELLED: 0}
        self._admitted = 0
        self._refused = 0
        self._tokens_of_ended = 0
        self._running: dict[str, Task] = {}
        self._samples: deque[tuple[float, int]] = deque(maxlen=math.ceil(_RATE_WINDOW_S / _TICK_S) + 2)
        self._tick: asyncio.TimerHandle | None = None
        self._first_token_ms: deque[int] = deque(maxlen=_FIRST_TOKENS)
        orchestrator.listeners.append(self._task_moved)
        orchestrator.refusal_listeners.append(self._task_refused)

    def status(self) -> Status:
        """The pools, their tasks, and what was counted."""
        orchestrator, reading = self._orchestrator, self._gpu_reading()
        tasks = self._shown()
        positions = orchestrator.queue_positions(tasks)
        return Status(
            version=__version__,
            uptime_s=round(self._loop.time() - self._began, 1),
            pools=[pool.health() for pool in orchestrator.pools.values()],
            tasks=[snapshot(task, positions.get(task.id), with_stream_url=False) for task in tasks],
            totals=Totals(
                admitted=self._admitted,
                refused=self._refused,
                completed=self._ended[State.COMPLETED],
                failed=self._ended[State.FAILED],
                cancelled=self._ended[State.CANCELLED],
                tokens_out=self._tokens_out(),
            ),
            tokens_per_s=self._tokens_per_s(),
            first_token_ms=self._percentiles(),
            readers=orchestrator.reader_count,
            gpus=[
                GpuView(
                    index=gpu.index,
                    name=gpu.name,
                    utilization=gpu.utilization,
                    vram_used_bytes=gpu.vram_used_bytes,
                    vram_total_bytes=gpu.vram_total_bytes,
                    temperature_c=gpu.temperature_c,
                )
                for gpu in reading.gpus
            ],
            gpu_fault=reading.fault,
        )

    # -- what happens to tasks -----------------------------------------------------------------

    def _task_moved(self, pool: Pool, task: Task, previous: State | None) -> None:
        if previous is None:
            self._admitted += 1
        elif task.state is State.RUNNING:
            if self._tick is None:
                self._sample()
            self._running[task.id] = task
        else:
            self._ended[task.state] += 1
            self._tokens_of_ended += task.tokens_out
            self._running.pop(task.id, None)
            if task.first_token_ms is not None:
                self._first_token_ms.append(task.first_token_ms)

    def _task_refused(
        self, pool: Pool, refusal: LlorchError, correlation_id: str | None, identity: str | None
    ) -> None:
        self._refused += 1

    def _tokens_out(self) -> int:
        return self._tokens_of_ended + sum(task.tokens_out for task in self._running.values())

    def _sample(self) -> None:
        """Note how many tokens there were; again in a second, as long as anything runs."""
        self._samples.append((self._loop.time(), self._tokens_out()))
        self._tick = self._loop.call_later(_TICK_S, self._sample_again)

    def _sample_again(self) -> None:
        self._tick = None
        if self._running:
            self._sample()

    def _tokens_per_s(self) -> float:
        """Over the last few seconds, or since work began if that is less."""
        now = self._loop.time()
        for at, tokens in self._samples:
            if now - at <= _RATE_WINDOW_S:
                return round((self._tokens_out() - tokens) / max(now - at, _TICK_S), 1)
        return 0.0

    def _percentiles(self) -> Percentiles:
        running = (task.first_token_ms for task in self._running.values())
        known = sorted([*self._first_token_ms, *(ms for ms in running if ms is not None)])
        if not known:
            return Percentiles(None, None)
        p50, p95 = (known[math.ceil(share * len(known)) - 1] for share in (0.5, 0.95))
        return Percentiles(p50, None if self._home else p95)

    def _shown(self) -> list[Task]:
        shown = {task.id: task for task in islice(self._running.values(), MAX_TASKS - _MAX_HEADS)}
        for pool in self._orchestrator.pools.values():
            heads = islice(pool.queue, min(_MAX_HEADS, MAX_TASKS - len(shown)))
            shown |= {task.id: task for task in heads}
        recent = {task.id: task for task in self._orchestrator.recent(None, MAX_TASKS)}
        older = [task for task in reversed(shown.values()) if task.id not in recent]
        for task in recent.values():
            if len(shown) < MAX_TASKS:
                shown[task.id] = task
        newest = [task for task in recent.values() if task.id in shown]
        both = [*newest, *older]  # in order but for several pools; a sort that is stable keeps it so
        return sorted(both, key=lambda task: task.admitted_at, reverse=True)

"""The registry of tasks and the only door for `api`: submit, get, cancel, list, read, health, close.

The one rule: a task is in the registry from the step that admits it until retention forgets it; what it
does in between is the business of its pool.
"""

import asyncio
import logging
import secrets
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import islice

import msgspec

from llorch.capabilities import Capabilities, pool_capabilities
from llorch.errors import LlorchError, TaskNotFound, TooManyStreams, UnknownPool
from llorch.health import PoolHealth
from llorch.pool import Pool
from llorch.task import State, Task, TaskRequest

log = logging.getLogger("llorch.orchestrator")

KEPT_AT_LEAST_S = 10.0


class StreamSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What readers may do and how long finished tasks stay readable (seconds, bytes)."""

    max_readers: int
    retain_s: float
    retain_bytes: int
    cancel_on_disconnect: bool
    disconnect_grace_s: float


class Orchestrator:
    """All tasks of all pools."""

    def __init__(self, pools: list[Pool], settings: StreamSettings, *, tickets: bool) -> None:
        self.pools = {pool.pool_id: pool for pool in pools}
        self.default_pool = pools[0].pool_id
        self.settings = settings
        self.stopping = False
        self._tickets = tickets
        self._tasks: dict[str, Task] = {}
        self._finished: OrderedDict[str, Task] = OrderedDict()
        self._finished_bytes = 0
        self._readers: dict[str, int] = {}
        self._reader_count = 0
        self._no_readers = asyncio.Event()
        self._no_readers.set()
        self._abandoned: dict[str, asyncio.TimerHandle] = {}
        self._sweep: asyncio.TimerHandle | None = None
        self._told = self._on_transition  # one bound method for all tasks
        self.listeners: list[Callable[[Pool, Task, State | None], None]] = []
        self.refusal_listeners: list[Callable[[Pool, LlorchError, str | None, str | None], None]] = []

    # -- the door -----------------------------------------------------------------------------

    def pool(self, pool_id: str | None) -> Pool:
        """The pool of that name, the default one for None; raises UnknownPool."""
        name = self.default_pool if pool_id is None else pool_id
        if name not in self.pools:
            known = ", ".join(sorted(self.pools))
            raise UnknownPool(f"no pool {name!r}", hint=f"the pools are: {known}")
        return self.pools[name]

    async def submit(
        self, request: TaskRequest, *, correlation_id: str | None = None, identity: str | None = None
    ) -> Task:
        """Admit a task [MVP-030, MVP-031].

        Raises UnknownPool, PoolUnready, PoolUnavailable, QueueFull, ContextOverflow, InvalidParams,
        BodyTooLarge; a refused or cancelled call leaves nothing behind.
        """
        pool = self.pool(request.pool_id)
        try:
            return await self._submit(pool, request, correlation_id, identity)
        except LlorchError as refusal:
            for listener in self.refusal_listeners:
                listener(pool, refusal, correlation_id, identity)
            raise

    async def _submit(
        self, pool: Pool, request: TaskRequest, correlation_id: str | None, identity: str | None
    ) -> Task:
        pool.check_determinism(request)
        pool.check_readiness()
        reservation = pool.reserve(request.size_bytes, request.priority)
        try:
            prompt, max_tokens = await pool.fit(request, reservation)
            pool.check_determinism(request)  # the world may have changed while the engine was asked
            pool.check_readiness()
            task = Task(
                secrets.token_hex(16),
                request,
                prompt=prompt,
                max_tokens=max_tokens,
                pool_id=pool.pool_id,
                now=_now,
                on_transition=self._told,
                correlation_id=correlation_id,
                identity=identity,
                ticket=secrets.token_hex(16) if self._tickets else None,
            )
            pool.admit(reservation, task)
            return task
        finally:
            reservation.release()

    def get(self, task_id: str) -> Task:
        """The task; raises TaskNotFound."""
        task = self._tasks.get(task_id)
        if task is None:
            raise TaskNotFound(
                f"no task {task_id[:40]!r}", hint="finished tasks are kept for stream.retain_s"
            )
        return task

    def ticket(self, task_id: str) -> str | None:
        """What opens the task's stream instead of a token; None for an unknown task."""
        task = self._tasks.get(task_id)
        return None if task is None else task.ticket

    def recent(self, state: State | None, limit: int) -> list[Task]:
        """At most `limit` tasks, newest first, in `state` if one is given."""
        chosen = (task for task in reversed(self._tasks.values()) if state is None or task.state is state)
        return list(islice(chosen, limit))

    def queue_positions(self, tasks: list[Task]) -> dict[str, int]:
        """How many tasks wait before each task that still waits, by id; one pass for many `tasks`."""
        if len(tasks) == 1:
            position = self.pools[tasks[0].pool_id].queue.position(tasks[0])
            return {} if position is None else {tasks[0].id: position}
        pool_ids = {task.pool_id for task in tasks if task.state is State.QUEUED}
        queues = (self.pools[pool_id].queue for pool_id in pool_ids)
        return {task.id: position for queue in queues for position, task in enumerate(queue)}

    def health(self, pool_id: str) -> PoolHealth:
        """How the pool of that name is; raises UnknownPool."""
        return self.pool(pool_id).health()

    def capabilities(self) -> Capabilities:
        """What clients can count on."""
        return Capabilities(
            pools=[
                pool_capabilities(pool.health(), pool.props, pool.settings.max_tokens)
                for pool in self.pools.values()
            ]
        )

    def cancel(self, task_id: str) -> Task:
        """End the task now if it has not ended [MVP-032]; raises TaskNotFound."""
        task = self.get(task_id)
        task.cancel()
        return task

    @property
    def reader_count(self) -> int:
        """How many streams are open."""
        return self._reader_count

    @contextmanager
    def reading(self, task: Task) -> Iterator[None]:
        """Count a reader of `task` while it reads; raises TooManyStreams."""
        if self._reader_count >= self.settings.max_readers:
            raise TooManyStreams(
                f"{self._reader_count} streams are open", hint="raise stream.max_readers", retry_after_ms=1000
            )
        self._reader_count += 1
        self._no_readers.clear()
        self._readers[task.id] = self._readers.get(task.id, 0) + 1
        if (abandoned := self._abandoned.pop(task.id, None)) is not None:
            abandoned.cancel()
        try:
            yield
        finally:
            self._reader_count -= 1
            self._readers[task.id] -= 1
            if not self._readers[task.id]:
                del self._readers[task.id]
                self._last_reader_left(task)
            if not self._reader_count:
                self._no_readers.set()

    def _last_reader_left(self, task: Task) -> None:
        if self.settings.cancel_on_disconnect and not task.state.final:
            grace_s = self.settings.disconnect_grace_s
            self._abandoned[task.id] = asyncio.get_running_loop().call_later(grace_s, self._abandon, task)

    def _abandon(self, task: Task) -> None:
        del self._abandoned[task.id]
        task.cancel("disconnect")

    # -- what follows from a transition ---------------------------------------------------------

    def _on_transition(self, task: Task, previous: State | None) -> None:
        pool = self.pools[task.pool_id]
        if previous is None:
            self._tasks[task.id] = task
        elif task.state.final:
            self._keep(task)
            if (abandoned := self._abandoned.pop(task.id, None)) is not None:
                abandoned.cancel()
        for listener in self.listeners:
            listener(pool, task, previous)
        if previous is State.QUEUED and task.state.final:
            pool.withdraw(task)

    def _keep(self, task: Task) -> None:
        self._finished[task.id] = task
        self._finished_bytes += task.log.size_bytes
        if self._sweep is None or self._finished_bytes > self.settings.retain_bytes:
            self._forget_old()

    def _forget_old(self) -> None:
        """Drop finished tasks over age or bytes, oldest ended first; look again when the next is due."""
        loop, settings = asyncio.get_running_loop(), self.settings
        if self._sweep is not None:
            self._sweep.cancel()
        now, due_s = loop.time(), settings.retain_s
        over_bytes = self._finished_bytes - settings.retain_bytes
        forgotten: list[Task] = []
        for task in self._finished.values():
            age_s = now - (task.ended_at or now)
            keep_s = min(KEPT_AT_LEAST_S, settings.retain_s) if over_bytes > 0 else settings.retain_s
            if age_s < keep_s:
                due_s = keep_s - age_s
                break
            if task.id not in self._readers:
                forgotten.append(task)
                over_bytes -= task.log.size_bytes
        for task in forgotten:
            del self._finished[task.id], self._tasks[task.id]
            self._finished_bytes -= task.log.size_bytes
        self._sweep = loop.call_later(max(due_s, 1.0), self._forget_old) if self._finished else None

    # -- life -----------------------------------------------------------------------------------

    async def first_probe(self, within_s: float) -> None:
        """Probe every pool once, for at most `within_s` seconds."""
        with suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                await asyncio.gather(*(pool.replicas.first_probe() for pool in self.pools.values()))

    async def run(self) -> None:
        """Keep every pool at work until cancelled; raises if one of its coroutines has a bug."""
        try:
            async with asyncio.TaskGroup() as group:
                for pool in self.pools.values():
                    group.create_task(pool.run(), name=f"pool-{pool.pool_id}")
        except ExceptionGroup as bugs:
            bug: Exception = bugs
            while isinstance(bug, ExceptionGroup):  # the log shows where one exception comes from
                bug = bug.exceptions[0]
            raise bug from None

    def stop(self) -> None:
        """Refuse new tasks, fail the waiting ones; running ones go on."""
        self.stopping = True
        for pool in self.pools.values():
            pool.stop()

    async def finished(self) -> None:
        """Return when no task runs."""
        for pool in self.pools.values():
            await pool.finished()

    async def readers_gone(self) -> None:
        """Return when no stream is open."""
        await self._no_readers.wait()

    async def close(self) -> None:
        """Fail what still runs and close every engine connection; call `stop` first."""
        for pool in self.pools.values():
            await pool.close()
        if self._sweep is not None:
            self._sweep.cancel()
        for abandoned in self._abandoned.values():
            abandoned.cancel()


def _now() -> float:
    return asyncio.get_running_loop().time()

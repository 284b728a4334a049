"""One pool: a queue, its replicas, and the dispatcher between them.

The one rule: `dispatch` is a plain method, and every plain change that can let the head of the queue go
ends by calling it. So a task goes out in the same step that freed its slot; nothing polls, nothing overtakes.
"""

import asyncio
import contextlib
import functools
import logging
import math
import random
from collections.abc import Callable, Sequence
from typing import NoReturn

from llorch.admission import AdmissionQueue, Reservation
from llorch.engine import Engine, EngineFailure, EngineLoading, EngineStalled, Props
from llorch.errors import (
    BodyTooLarge,
    ContextOverflow,
    DeterminismUnavailable,
    InvalidParams,
    LlorchError,
    PoolUnavailable,
    PoolUnready,
    QueueFull,
)
from llorch.estimate import ServiceEstimate
from llorch.events import Error
from llorch.execution import Execution
from llorch.health import DrainState, LaneCounts, PoolHealth, QueueCounts
from llorch.placement import Decision, choose
from llorch.plan import PoolSettings
from llorch.replica import Replica
from llorch.replicaset import FreeVram, ReplicaSet
from llorch.selftest import CURE
from llorch.task import SAMPLER_PROFILE_VERSION, Priority, Task, TaskRequest

log = logging.getLogger("llorch.pool")

TEMPLATE_SLACK_TOKENS = 8
NOT_DETERMINISTIC = "this engine gave the same seed two different texts"


class Pool:
    """Admission and dispatch of the tasks of one engine and model, on one or more replicas of it.

    `free_vram` says how many bytes some GPUs have free, None if that is not known.
    """

    def __init__(
        self,
        pool_id: str,
        engine_name: str,
        settings: PoolSettings,
        replicas: Sequence[Replica],
        *,
        on_readiness: Callable[["Pool", Replica], None],
        free_vram: FreeVram = lambda devices: None,
        chance: random.Random | None = None,
    ) -> None:
        self.pool_id = pool_id
        self.engine_name = engine_name
        self.settings = settings
        self.estimate = ServiceEstimate(settings.default_retry_after_ms)
        now = asyncio.get_running_loop().time
        self.queue = AdmissionQueue(settings.queue, self._queue_full, now)
        self.stopping = False
        self.placement_listeners: list[Callable[[Pool, Task, Decision], None]] = []
        self._dispatching = False
        self._chance = chance or random.Random()
        self._running: dict[asyncio.Task[None], Task] = {}
        self._due_sooner = asyncio.Event()
        self._watched_until = math.inf
        self._drain_until: float | None = None
        self._drain_timer: asyncio.TimerHandle | None = None
        self.replicas = ReplicaSet(
            replicas,
            on_change=self.dispatch,
            on_readiness=functools.partial(on_readiness, self),
            free_vram=free_vram,
        )

    # -- what is ------------------------------------------------------------------------------

    @property
    def props(self) -> Props | None:
        """What the engine says of itself, None until it has."""
        return self.replicas.props

    @property
    def engine_version(self) -> str | None:
        """The version that every replica at work has, None until one has told it."""
        return self.replicas.engine_version

    def log_fields(self) -> dict[str, object]:
        """What log lines about this pool's tasks carry besides the task's own fields [MVP-052, MVP-070]."""
        return {
            "engine": self.engine_name,
            "engine_version": self.engine_version,
            "model_digest": self.replicas.model_digest,
            "sampler_profile_version": SAMPLER_PROFILE_VERSION,
        }

    def health(self) -> PoolHealth:
        """What there is to know now."""
        queue, replicas, props = self.queue, self.replicas, self.props
        lanes = {
            lane: LaneCounts(depth=queue.depth(lane), capacity=queue.capacity(lane)) for lane in queue.lanes
        }
        return PoolHealth(
            pool_id=self.pool_id,
            live=replicas.live,
            ready=replicas.ready and not self.stopping and not self.draining,
            engine=self.engine_name,
            engine_version=self.engine_version,
            model=props.model if props else None,
            model_digest=replicas.model_digest,
            ctx=self.ctx or None,
            slots=replicas.slots,
            queue=QueueCounts(
                depth=len(queue),
                capacity=queue.limits.capacity,
                bytes=queue.waiting_bytes,
                interactive=lanes["interactive"],
                batch=lanes["batch"],
            ),
            replicas=replicas.health(),
            determinism=replicas.determinism,
            sampler_profile_version=SAMPLER_PROFILE_VERSION,
            last_error=replicas.fault,
            accelerator=self.settings.accelerator,
            drain=self._drain_state(),
        )

    # -- admission ----------------------------------------------------------------------------

    def check_readiness(self) -> None:
        """Raise PoolUnready or PoolUnavailable if no new task can be taken now."""
        if self.stopping:
            raise self._refusal(PoolUnavailable, "llorch is stopping")
        if self.draining:
            cure = 'reload it, or end the drain with {"cancel": true}'
            raise self._refusal(PoolUnavailable, f"pool {self.pool_id} is drained: {cure}")
        if self.replicas.ready:
            return
        what = self.replicas[0].health.value
        if self.replicas.starting:
            message = f"pool {self.pool_id} is not ready: {what}; try again in a moment"
            raise self._refusal(PoolUnready, message)
        reason = self.replicas.fault or what
        raise self._refusal(PoolUnavailable, f"pool {self.pool_id} is unavailable: {reason}")

    def check_determinism(self, request: TaskRequest) -> None:
        """Raise DeterminismUnavailable for a strict task that no replica can keep the promise for."""
        if request.determinism == "strict" and self.replicas.determinism == "failed":
            raise DeterminismUnavailable(NOT_DETERMINISTIC, engine=self.engine_name, hint=CURE)

    def reserve(self, size_bytes: int, priority: Priority) -> Reservation:
        """Hold a place for a prompt of `size_bytes`; raises QueueFull, BodyTooLarge if it can never fit."""
        self._check_size(size_bytes)
        free_slots = 0 if len(self.queue) else self.replicas.free_slots
        return self.queue.reserve(size_bytes, priority, free_slots)

    def _check_size(self, size_bytes: int) -> None:
        limit = self.queue.limits.max_bytes
        if size_bytes > limit:
            message = f"the prompt has {size_bytes} bytes, queue.max_bytes is {limit}"
            raise BodyTooLarge(message, engine=self.engine_name)

    async def fit(self, request: TaskRequest, reservation: Reservation) -> tuple[str, int]:
        """The prompt as the engine will get it, and its max_tokens, checked against the context [MVP-030].

        Asks the engine only where bytes alone don't settle it. Raises ContextOverflow, QueueFull,
        BodyTooLarge, InvalidParams, PoolUnready, PoolUnavailable.
        """
        while True:
            replica = self.replicas.least_busy()
            try:
                return await self._fit(replica.engine, request, reservation)
            except EngineFailure as failure:
                if replica in self.replicas:  # else it was let go while it was asked: another will know
                    self._refuse_for(replica, failure)

    async def _fit(self, engine: Engine, request: TaskRequest, reservation: Reservation) -> tuple[str, int]:
        prompt = request.prompt
        if prompt is None:
            prompt = await engine.render(request.messages)
            size_bytes = len(prompt.encode())
            self._check_size(size_bytes)
            reservation.resize(size_bytes)
        return prompt, await self._max_tokens(engine, prompt, reservation.size_bytes, request.max_tokens)

    async def _max_tokens(self, engine: Engine, prompt: str, size_bytes: int, asked: int | None) -> int:
        ctx = self.ctx
        wanted = asked or min(self.settings.max_tokens_default, self.settings.max_tokens)
        if size_bytes + TEMPLATE_SLACK_TOKENS + wanted <= ctx:
            return wanted
        tokens_in = await engine.tokenize(prompt)
        left = ctx - tokens_in
        if left < (asked or 1):
            raise ContextOverflow(
                f"{tokens_in} prompt tokens + {asked or 'at least 1'} max_tokens > {ctx} tokens of context",
                engine=self.engine_name,
                hint="shorten the prompt, ask for fewer max_tokens, or give the engine a larger context "
                "(llama-server's -c is for all slots together; limits.ctx lowers it)",
            )
        return min(wanted, left)

    @property
    def ctx(self) -> int:
        """Tokens of context that one task may use."""
        return min((limit for limit in (self.settings.ctx, self.replicas.ctx) if limit), default=0)

    def _refuse_for(self, replica: Replica, failure: EngineFailure) -> NoReturn:
        name = self.engine_name
        if failure.code == "INVALID_PARAMS":
            raise InvalidParams(f"the engine refused the prompt: {failure}", engine=name) from failure
        if failure.code == "CONTEXT_OVERFLOW":
            raise ContextOverflow(str(failure), engine=name) from failure
        if not isinstance(failure, EngineStalled):  # a huge prompt may take it long, and that is the client's
            replica.notice(failure)
        kind = PoolUnready if isinstance(failure, EngineLoading) else PoolUnavailable
        raise self._refusal(kind, f"the engine did not answer: {failure}") from failure

    def admit(self, reservation: Reservation, task: Task) -> None:
        """Give `task` its place, append `started`, and let it go if it can; raises QueueFull."""
        ahead, strict_ahead = self.queue.ahead_of_next(task.request.priority)
        position = self.queue.admit(reservation, task)
        start_ms = self.predicted_start_ms(ahead=ahead, strict_ahead=strict_ahead, strict=task.strict)
        task.admit(position, start_ms)
        self.dispatch()

    def predicted_start_ms(self, *, ahead: int, strict_ahead: int, strict: bool) -> int | None:
        """Milliseconds from now until a task with so many ahead starts; None until something was measured."""
        return self.estimate.predicted_start_ms(
            self.replicas.at_work(), ahead=ahead, strict_ahead=strict_ahead, strict=strict
        )

    def _queue_full(self, priority: Priority, message: str) -> QueueFull:
        head = self.queue.lanes[priority].head
        ahead = self.queue.ahead_of_head(priority) if head is not None else 0
        strict = head is not None and head.strict
        wait_ms = self.estimate.retry_after_ms(self.replicas.at_work(), ahead=ahead, head_is_strict=strict)
        return QueueFull(message, engine=self.engine_name, retry_after_ms=wait_ms)

    def _refusal(self, kind: type[LlorchError], message: str) -> LlorchError:
        return kind(message, engine=self.engine_name, retry_after_ms=self.settings.default_retry_after_ms)

    # -- dispatch -----------------------------------------------------------------------------

    def dispatch(self) -> None:
        """While the head of the queue can go, start it. Plain; safe to call at any time."""
        if self._dispatching:
            return  # what is under way looks again
        self._dispatching = True
        try:
            if self.queue.strict and self.replicas.determinism == "failed":
                self._fail_strict()
            while not self.stopping and (head := self.queue.head) is not None and self._start(head):
                pass
            wanted = not self.stopping and len(self.queue) > 0
            for replica in self.replicas:
                replica.engine.keep_spare(wanted)
            if wanted and self._next_due() < self._watched_until:
                self._due_sooner.set()
        finally:
            self._dispatching = False

    def _fail_strict(self) -> None:
        error = Error("DETERMINISM_UNAVAILABLE", False, message=f"{NOT_DETERMINISTIC}: {CURE}")
        for task in [task for task in self.queue if task.strict]:
            task.fail(error)

    def _start(self, task: Task) -> bool:
        """Start the head of the queue; False if it has to wait."""
        if not self.replicas.free_slots:
            return False
        decision = choose(self.replicas.candidates(), strict=task.strict)
        if (replica := self.replicas.named(decision.replica_id)) is None:
            return False
        lease = replica.try_lease(exclusive=task.strict)
        assert lease is not None, "a replica was chosen that can't take the task"
        self.queue.start(task)
        if not task.start(lease):
            lease.close(clean=True)
            return True
        for listener in self.placement_listeners:
            listener(self, task, decision)
        execution = Execution(task, lease, self.settings, self.estimate, self._chance)
        runner = asyncio.create_task(execution.run(), name=f"run-{task.id[:8]}")
        lease.runner = runner
        self._running[runner] = task
        runner.add_done_callback(functools.partial(self._ran, execution))
        return True

    def _ran(self, execution: Execution, runner: asyncio.Task[None]) -> None:
        del self._running[runner]
        execution.over(None if runner.cancelled() else runner.exception())

    def withdraw(self, task: Task) -> None:
        """Take an ended task out of the queue if it stands there, and let the next go."""
        if self.queue.remove(task):
            self.dispatch()

    def switch(self, replicas: Sequence[Replica], settings: PoolSettings) -> None:
        """Have other replicas and settings, in one step; the queue keeps every task and its order.

        Whoever is no longer among the replicas finishes what it runs and is let go. Ends a drain.
        """
        self.settings = settings
        self.estimate.default_retry_after_ms = settings.default_retry_after_ms
        self.queue.limits = settings.queue
        self.replicas.take(replicas)
        self.end_drain()
        self.queue.wake()
        self.dispatch()

    # -- drain --------------------------------------------------------------------------------

    @property
    def draining(self) -> bool:
        """Whether it takes no new tasks because somebody asked for that."""
        return self._drain_until is not None

    def drain(self, deadline_s: float) -> None:
        """Take no new task; what waits and runs has `deadline_s` and is failed then. Until `end_drain`."""
        if self._drain_timer is not None:
            self._drain_timer.cancel()
        loop = asyncio.get_running_loop()
        self._drain_until = loop.time() + deadline_s
        self._drain_timer = loop.call_later(deadline_s, self._drain_is_due)
        waiting, running = len(self.queue), len(self._running)
        message = f"pool {self.pool_id} drains: {running} tasks run and {waiting} wait, for {deadline_s:g} s"
        log.info(message, extra={"event": "draining", "pool_id": self.pool_id, **self.log_fields()})

    def end_drain(self) -> None:
        """Take tasks again."""
        if self._drain_until is not None:
            message = f"pool {self.pool_id} takes tasks again"
            log.info(message, extra={"event": "drain_ended", "pool_id": self.pool_id, **self.log_fields()})
        self._drain_until = None
        if self._drain_timer is not None:
            self._drain_timer.cancel()
            self._drain_timer = None

    def _drain_state(self) -> DrainState | None:
        if self._drain_until is None:
            return None
        left_s = self._drain_until - asyncio.get_running_loop().time()
        return DrainState(max(round(left_s * 1000), 0))

    def _drain_is_due(self) -> None:
        self._drain_timer = None
        left = [*reversed(list(self.queue)), *self._running.values()]  # from its end: so nothing starts
        message = f"pool {self.pool_id} was drained"
        said = f"{message}: {len(left)} tasks had not ended"
        log.info(said, extra={"event": "drained", "pool_id": self.pool_id, **self.log_fields()})
        for task in left:
            task.fail(Error("POOL_UNAVAILABLE", True, self.settings.default_retry_after_ms, message))

    # -- life ---------------------------------------------------------------------------------

    async def run(self) -> None:
        """Look after the replicas and the queue until cancelled; raises if a coroutine has a bug."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self.replicas.run(), name=f"replicas-{self.pool_id}")
            group.create_task(self.watch_queue(), name=f"queue-{self.pool_id}")

    async def watch_queue(self) -> None:
        """Fail tasks that waited longer than `max_wait_s`, let promoted ones go. Runs until cancelled."""
        while True:
            self._due_sooner.clear()
            self._watched_until = self._next_due()
            with contextlib.suppress(TimeoutError):  # a head has waited long enough
                async with asyncio.timeout_at(
                    self._watched_until if self._watched_until < math.inf else None
                ):
                    await self._due_sooner.wait()
            self._expire()
            self.dispatch()

    def _next_due(self) -> float:
        """When a head of the queue will have waited for as long as it may, or long enough to be promoted."""
        due = [head.admitted_at + self.settings.max_wait_s for head in self.queue.oldest()]
        if (promotes_at := self.queue.promotes_at()) is not None:
            due.append(promotes_at)
        return min(due, default=math.inf)

    def _expire(self) -> None:
        limit_s = self.settings.max_wait_s
        message = f"waited {limit_s:g} s for a free slot"
        while late := [head for head in self.queue.oldest() if head.now() >= head.admitted_at + limit_s]:
            head = late[0]  # one at a time: once it is out, the other may go after all
            retry_after_ms = self._queue_full(head.request.priority, "").retry_after_ms
            if not head.fail(Error("QUEUE_TIMEOUT", True, retry_after_ms, message)):
                return  # whoever ended it takes it out

    def stop(self) -> None:
        """Stop dispatch and admission; fail what waits, at once."""
        self.stopping = True
        if self._drain_timer is not None:
            self._drain_timer.cancel()
        for task in list(self.queue):
            task.fail(
                Error("POOL_UNAVAILABLE", True, self.settings.default_retry_after_ms, "llorch is stopping")
            )

    async def finished(self) -> None:
        """Return when nothing runs."""
        while self._running:
            await asyncio.wait(self._running)

    async def close(self) -> None:
        """Fail what still runs and close every engine connection; call `stop` first."""
        for task in list(self._running.values()):
            task.fail(Error("WORKER_RESET", True, self.settings.default_retry_after_ms, "llorch is stopping"))
        await self.finished()
        await self.replicas.close()

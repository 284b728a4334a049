"""One pool: a queue, a replica, and the dispatcher between them.

The one rule: `dispatch` is a plain method, and every plain change that can let the head of the queue go
ends by calling it. So a task goes out in the same step that freed its slot; nothing polls, nothing overtakes.
"""

import asyncio
import contextlib
import functools
import logging
import random
from collections.abc import Callable, Iterator
from typing import NoReturn

import msgspec

from llorch.admission import AdmissionQueue, Reservation
from llorch.engine import (
    Engine,
    EngineBroken,
    EngineFailure,
    EngineLoading,
    EngineMisconfigured,
    EngineRefused,
    EngineStalled,
    Final,
    Generation,
)
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
from llorch.health import PoolHealth, QueueCounts, ReplicaHealth, SlotCounts
from llorch.replica import Health, Lease, Replica, SelfTest
from llorch.selftest import CURE
from llorch.task import SAMPLER_PROFILE_VERSION, Task, TaskRequest

log = logging.getLogger("llorch.pool")

TEMPLATE_SLACK_TOKENS = 8
RETRY_JITTER_S = (0.05, 0.25)
MAX_IDLE_SLACK_S = 1.0
NOT_DETERMINISTIC = "this engine gave the same seed two different texts"


class PoolSettings(msgspec.Struct, frozen=True, kw_only=True):
    """The limits of one pool, in seconds and tokens; `ctx` 0 is the engine's own."""

    capacity: int
    max_bytes: int
    max_wait_s: float
    default_retry_after_ms: int
    ctx: int
    max_tokens_default: int
    max_tokens: int
    retries: int
    first_token_s: float
    idle_s: float
    wall_s: float
    accelerator: str = "unknown"


class Pool:
    """Admission, dispatch and execution of the tasks of one engine and model."""

    def __init__(
        self,
        pool_id: str,
        engine: Engine,
        settings: PoolSettings,
        *,
        slots: int | None,
        drain_s: float,
        on_readiness: Callable[["Pool", Replica], None],
        self_test: SelfTest | None = None,
        chance: random.Random | None = None,
    ) -> None:
        self.pool_id = pool_id
        self.engine = engine
        self.settings = settings
        self.estimate = ServiceEstimate(settings.default_retry_after_ms)
        self.queue = AdmissionQueue(settings.capacity, settings.max_bytes, self._queue_full)
        self.replica = Replica(
            f"{pool_id}-0",
            engine,
            slots=slots,
            drain_s=drain_s,
            on_change=self._replica_changed,
            self_test=self_test,
            chance=chance,
        )
        self.stopping = False
        self._dispatching = False
        self._on_readiness = on_readiness
        self._said_readiness: tuple[bool, str, str | None] | None = None
        self._chance = chance or random.Random()
        self._running: dict[asyncio.Task[None], Task] = {}

    # -- admission ----------------------------------------------------------------------------

    def log_fields(self) -> dict[str, object]:
        """What log lines about this pool's tasks carry besides the task's own fields [MVP-052, MVP-070]."""
        props = self.replica.props
        return {
            "engine": self.engine.name,
            "engine_version": props.engine_version if props else None,
            "model_digest": self.replica.model_digest,
            "sampler_profile_version": SAMPLER_PROFILE_VERSION,
        }

    def health(self) -> PoolHealth:
        """What there is to know now."""
        replica, props = self.replica, self.replica.props
        last_error = replica.stuck or replica.last_error or replica.self_test_fault
        return PoolHealth(
            pool_id=self.pool_id,
            live=replica.live,
            ready=replica.ready and not self.stopping,
            engine=self.engine.name,
            engine_version=props.engine_version if props else None,
            model=props.model if props else None,
            model_digest=replica.model_digest,
            ctx=self.ctx or None,
            slots=SlotCounts(total=replica.slots, busy=replica.busy, draining=replica.draining),
            queue=QueueCounts(
                depth=len(self.queue), capacity=self.queue.capacity, bytes=self.queue.waiting_bytes
            ),
            replicas=[
                ReplicaHealth(
                    replica_id=replica.replica_id,
                    ready=replica.ready,
                    slots=replica.slots,
                    last_error=last_error,
                )
            ],
            determinism=replica.determinism,
            sampler_profile_version=SAMPLER_PROFILE_VERSION,
            last_error=last_error,
            accelerator=self.settings.accelerator,
        )

    def check_readiness(self) -> None:
        """Raise PoolUnready or PoolUnavailable if no new task can be taken now."""
        if self.stopping:
            raise self._refusal(PoolUnavailable, "llorch is stopping")
        replica = self.replica
        if replica.ready:
            return
        if replica.health in (Health.UNKNOWN, Health.LOADING):
            message = f"pool {self.pool_id} is not ready: {replica.health.value}; try again in a moment"
            raise self._refusal(PoolUnready, message)
        reason = replica.stuck or replica.last_error or replica.health.value
        raise self._refusal(PoolUnavailable, f"pool {self.pool_id} is unavailable: {reason}")

    def check_determinism(self, request: TaskRequest) -> None:
        """Raise DeterminismUnavailable for a strict task that this engine can't keep the promise for."""
        if request.determinism == "strict" and self.replica.determinism == "failed":
            raise DeterminismUnavailable(NOT_DETERMINISTIC, engine=self.engine.name, hint=CURE)

    def reserve(self, size_bytes: int) -> Reservation:
        """Hold a place for a prompt of `size_bytes`; raises QueueFull, BodyTooLarge if it can never fit."""
        self._check_size(size_bytes)
        return self.queue.reserve(size_bytes, 0 if len(self.queue) else self.replica.free_slots)

    def _check_size(self, size_bytes: int) -> None:
        if size_bytes > self.queue.max_bytes:
            message = f"the prompt has {size_bytes} bytes, queue.max_bytes is {self.queue.max_bytes}"
            raise BodyTooLarge(message, engine=self.engine.name)

    async def fit(self, request: TaskRequest, reservation: Reservation) -> tuple[str, int]:
        """The prompt as the engine will get it, and its max_tokens, checked against the context [MVP-030].

        Asks the engine only where bytes alone don't settle it. Raises ContextOverflow, QueueFull,
        BodyTooLarge, InvalidParams, PoolUnready, PoolUnavailable.
        """
        try:
            prompt = request.prompt
            if prompt is None:
                prompt = await self.engine.render(request.messages)
                size_bytes = len(prompt.encode())
                self._check_size(size_bytes)
                reservation.resize(size_bytes)
            return prompt, await self._max_tokens(prompt, reservation.size_bytes, request.max_tokens)
        except EngineFailure as failure:
            self._refuse_for(failure)

    async def _max_tokens(self, prompt: str, size_bytes: int, asked: int | None) -> int:
        ctx = self.ctx
        wanted = asked or min(self.settings.max_tokens_default, self.settings.max_tokens)
        if size_bytes + TEMPLATE_SLACK_TOKENS + wanted <= ctx:
            return wanted
        tokens_in = await self.engine.tokenize(prompt)
        left = ctx - tokens_in
        if left < (asked or 1):
            raise ContextOverflow(
                f"{tokens_in} prompt tokens + {asked or 'at least 1'} max_tokens > {ctx} tokens of context",
                engine=self.engine.name,
                hint="shorten the prompt, ask for fewer max_tokens, or give the engine a larger context "
                "(llama-server's -c is for all slots together; limits.ctx lowers it)",
            )
        return min(wanted, left)

    @property
    def ctx(self) -> int:
        """Tokens of context that one task may use."""
        props = self.replica.props
        limits = [limit for limit in (self.settings.ctx, props.ctx if props else 0) if limit]
        return min(limits, default=0)

    def _refuse_for(self, failure: EngineFailure) -> NoReturn:
        name = self.engine.name
        if failure.code == "INVALID_PARAMS":
            raise InvalidParams(f"the engine refused the prompt: {failure}", engine=name) from failure
        if failure.code == "CONTEXT_OVERFLOW":
            raise ContextOverflow(str(failure), engine=name) from failure
        if not isinstance(failure, EngineStalled):  # a huge prompt may take it long, and that is the client's
            self.replica.notice(failure)
        kind = PoolUnready if isinstance(failure, EngineLoading) else PoolUnavailable
        raise self._refusal(kind, f"the engine did not answer: {failure}") from failure

    def admit(self, reservation: Reservation, task: Task) -> None:
        """Give `task` its place, append `started`, and let it go if it can; raises QueueFull."""
        before = self.queue.waiting_strict
        position = self.queue.admit(reservation, task)
        task.admit(position, self.predicted_start_ms(ahead=position, strict_ahead=before, strict=task.strict))
        self.dispatch()

    def predicted_start_ms(self, *, ahead: int, strict_ahead: int, strict: bool) -> int | None:
        """Milliseconds from now until a task with so many ahead starts; None until something was measured."""
        return self.estimate.predicted_start_ms(
            self._running_s(), self.replica.slots, ahead=ahead, strict_ahead=strict_ahead, strict=strict
        )

    def _running_s(self) -> Iterator[float]:
        now = asyncio.get_running_loop().time()
        return (now - lease.since for lease in self.replica.leases)

    def _queue_full(self, message: str) -> QueueFull:
        head = self.queue.head
        wait_ms = self.estimate.retry_after_ms(
            self._running_s(), self.replica.slots, head_is_strict=head is not None and head.strict
        )
        return QueueFull(message, engine=self.engine.name, retry_after_ms=wait_ms)

    def _refusal(self, kind: type[LlorchError], message: str) -> LlorchError:
        return kind(message, engine=self.engine.name, retry_after_ms=self.settings.default_retry_after_ms)

    # -- dispatch -----------------------------------------------------------------------------

    def dispatch(self) -> None:
        """While the head of the queue can go, start it. Plain; safe to call at any time."""
        if self._dispatching:
            return  # what is under way looks again
        self._dispatching = True
        try:
            if self.queue.waiting_strict and self.replica.determinism == "failed":
                self._fail_strict()
            while not self.stopping and (head := self.queue.head) is not None and self._start(head):
                pass
            self.engine.keep_spare(not self.stopping and self.queue.head is not None)
        finally:
            self._dispatching = False

    def _fail_strict(self) -> None:
        error = Error("DETERMINISM_UNAVAILABLE", False, message=f"{NOT_DETERMINISTIC}: {CURE}")
        for task in [task for task in self.queue if task.strict]:
            task.fail(error)

    def _start(self, task: Task) -> bool:
        """Start the head of the queue; False if it has to wait."""
        lease = self.replica.try_lease(exclusive=task.strict)
        if lease is None:
            return False
        self.queue.remove(task)
        if not task.start(lease):
            lease.close(clean=True)
            return True
        runner = asyncio.create_task(self._run(task, lease), name=f"run-{task.id[:8]}")
        lease.runner = runner
        self._running[runner] = task
        runner.add_done_callback(functools.partial(self._ran, task, lease))
        return True

    def withdraw(self, task: Task) -> None:
        """Take an ended task out of the queue if it stands there, and let the next go."""
        if self.queue.remove(task):
            self.dispatch()

    def _replica_changed(self, replica: Replica) -> None:
        fault = replica.self_test_fault if replica.ready else replica.stuck or replica.last_error
        said = (replica.ready, replica.determinism, fault)
        if said != self._said_readiness:
            self._said_readiness = said
            self._on_readiness(self, replica)
        self.dispatch()

    # -- execution ----------------------------------------------------------------------------

    async def _run(self, task: Task, lease: Lease) -> None:
        """Carry one task through: generate, retry while no byte came, end the task, close the lease."""
        loop = asyncio.get_running_loop()
        started = loop.time()
        one_slot = self.replica.slots == 1
        generation = Generation(
            prompt=task.prompt,
            max_tokens=task.max_tokens,
            sampling=task.request.sampling,
            slot=0 if task.strict or one_slot else None,
            cache_prompt=not task.strict,
        )
        retries_left = self.settings.retries
        while True:
            failure = await self._attempt(task, lease, generation, started)
            if failure is None:
                return
            if not isinstance(failure, EngineRefused):
                break
            log.warning(
                "the engine did not take the task, %d tries left: %s",
                retries_left,
                failure.summary,
                extra={"event": "retry", **task.log_fields()},
            )
            self.replica.notice(failure)
            if not retries_left or not await self._wait_to_retry(lease, failure, started):
                break
            retries_left -= 1
        self._fail(task, lease, failure)

    async def _attempt(
        self, task: Task, lease: Lease, generation: Generation, started: float
    ) -> EngineFailure | None:
        """Generate once; None when the task has ended, else what went wrong."""
        settings = self.settings
        wall = started + settings.wall_s
        slack_s = min(MAX_IDLE_SLACK_S, settings.idle_s / 16)
        renew_at = 0.0
        silence = f"no token for {settings.idle_s:g} s, or over {settings.wall_s:g} s in all"
        phase = f"no token within {settings.first_token_s:g} s of dispatch"
        try:
            async with asyncio.timeout_at(min(started + settings.first_token_s, wall)) as deadline:
                lease.sent = True
                async with contextlib.aclosing(self.engine.generate(generation)) as chunks:
                    async for chunk in chunks:
                        lease.answered = True
                        if chunk.begun:
                            if chunk.prefill is not None:
                                task.prefill(chunk.prefill.total, chunk.prefill.done)
                            continue
                        if chunk.texts:
                            task.tokens(chunk.texts)
                        if chunk.final is not None:
                            self._complete(task, lease, chunk.final)
                            return None
                        if (now := task.now()) >= renew_at:  # not for each token: moving a timer is dear
                            renew_at = now + slack_s
                            self.replica.progress()
                            phase = silence
                            deadline.reschedule(min(renew_at + settings.idle_s, wall))
        except EngineFailure as failure:
            lease.sent = failure.sent
            return failure
        except TimeoutError:
            return EngineStalled(phase)
        return EngineBroken("the engine's stream ended without its final frame")

    def _complete(self, task: Task, lease: Lease, final: Final) -> None:
        """Give the slot back, and with it the next task its start, before the readers get their end."""
        self.estimate.record(asyncio.get_running_loop().time() - lease.since)
        lease.close(clean=True)
        task.complete(final.finish_reason, tokens_out=final.tokens_out, tokens_in=final.tokens_in)

    async def _wait_to_retry(self, lease: Lease, failure: EngineFailure, started: float) -> bool:
        """Wait on the same lease until the engine can be tried again; False if that comes too late."""
        try:
            async with asyncio.timeout_at(started + self.settings.first_token_s):
                if failure.sent:
                    await lease.drain()
                await self.replica.until_dispatchable()
                await asyncio.sleep(self._chance.uniform(*RETRY_JITTER_S))
        except TimeoutError:
            return False
        return True

    def _fail(self, task: Task, lease: Lease, failure: EngineFailure) -> None:
        if isinstance(failure, EngineMisconfigured):
            self.replica.misconfigured(failure.summary)
        elif isinstance(failure, EngineBroken):
            self.replica.notice(failure)
        lease.close(clean=not failure.sent)
        retry_after_ms = self.settings.default_retry_after_ms if failure.retriable else None
        error = Error(failure.code, failure.retriable, retry_after_ms, str(failure))
        task.fail(error, cause=failure.summary)

    def _ran(self, task: Task, lease: Lease, runner: asyncio.Task[None]) -> None:
        """The last word on every runner, however it ended: its task has ended and its lease is closed."""
        del self._running[runner]
        bug = None if runner.cancelled() else runner.exception()
        if bug is not None:
            log.error("a bug ended a task", exc_info=bug, extra={"event": "bug", **task.log_fields()})
        lease.close(clean=not lease.sent)
        task.fail(Error("INTERNAL", retriable=False, message="a bug in llorch ended this task; see its log"))

    # -- life ---------------------------------------------------------------------------------

    async def watch_queue(self) -> None:
        """Fail tasks that waited longer than `max_wait_s`. Runs until cancelled."""
        while True:
            async with self.queue.changed:
                head = self.queue.head
                deadline = None if head is None else head.admitted_at + self.settings.max_wait_s
                try:
                    async with asyncio.timeout_at(deadline):
                        await self.queue.changed.wait()
                except TimeoutError:
                    pass  # the head has waited long enough
            self._expire()

    def _expire(self) -> None:
        limit_s = self.settings.max_wait_s
        message = f"waited {limit_s:g} s for a free slot"
        while (head := self.queue.head) is not None and head.now() >= head.admitted_at + limit_s:
            error = Error("QUEUE_TIMEOUT", True, self._queue_full("").retry_after_ms, message)
            if not head.fail(error):
                return  # whoever ended it takes it out

    def stop(self) -> None:
        """Stop dispatch and admission; fail what waits, at once."""
        self.stopping = True
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
        await self.replica.close()
        await self.engine.close()

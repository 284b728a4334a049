"""One task on one slot: generate, retry while no byte came, end the task, give the slot back.

The one rule: once dispatched a task never goes back to the queue; whatever happens here ends with the task
ended and its lease closed.
"""

import asyncio
import contextlib
import logging
import random

from llorch.engine import (
    EngineBroken,
    EngineFailure,
    EngineMisconfigured,
    EngineRefused,
    EngineStalled,
    Final,
    Generation,
)
from llorch.estimate import ServiceEstimate
from llorch.events import Error
from llorch.plan import PoolSettings
from llorch.replica import Lease
from llorch.task import Task

log = logging.getLogger("llorch.execution")

RETRY_JITTER_S = (0.05, 0.25)
MAX_IDLE_SLACK_S = 1.0


class Execution:
    """Carries `task` through under `lease`; `settings` are those of the moment in which it starts."""

    __slots__ = ("_chance", "_engine", "_estimate", "_replica", "_settings", "_started", "lease", "task")

    def __init__(
        self,
        task: Task,
        lease: Lease,
        settings: PoolSettings,
        estimate: ServiceEstimate,
        chance: random.Random,
    ) -> None:
        self.task = task
        self.lease = lease
        self._replica = lease.replica
        self._engine = lease.replica.engine
        self._settings = settings
        self._estimate = estimate
        self._chance = chance
        self._started = asyncio.get_running_loop().time()

    async def run(self) -> None:
        """Return when the task has ended and the lease is closed; a cancel is left to `over`."""
        task = self.task
        generation = Generation(
            prompt=task.prompt,
            max_tokens=task.max_tokens,
            sampling=task.request.sampling,
            slot=0 if task.strict or self._replica.slots == 1 else None,
            cache_prompt=not task.strict,
        )
        retries_left = self._settings.retries
        while True:
            failure = await self._attempt(generation)
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
            self._replica.notice(failure)
            if not retries_left or not await self._wait_to_retry(failure):
                break
            retries_left -= 1
        self._fail(failure)

    async def _attempt(self, generation: Generation) -> EngineFailure | None:
        """Generate once; None when the task has ended, else what went wrong."""
        settings, task, lease, started = self._settings, self.task, self.lease, self._started
        wall = started + settings.wall_s
        slack_s = min(MAX_IDLE_SLACK_S, settings.idle_s / 16)
        renew_at = 0.0
        try:
            async with asyncio.timeout_at(min(started + settings.first_token_s, wall)) as deadline:
                lease.sent = True
                async with contextlib.aclosing(self._engine.generate(generation)) as chunks:
                    async for chunk in chunks:
                        lease.answered = True
                        if chunk.begun:
                            if chunk.hang_up is not None:
                                lease.hang_up = chunk.hang_up
                            if chunk.prefill is not None:
                                task.prefill(chunk.prefill.total, chunk.prefill.done)
                            continue
                        if chunk.texts:
                            task.tokens(chunk.texts)
                        if chunk.final is not None:
                            self._complete(chunk.final)
                            return None
                        if (now := task.now()) >= renew_at:  # not for each token: moving a timer is dear
                            renew_at = now + slack_s
                            self._replica.progress()
                            deadline.reschedule(min(renew_at + settings.idle_s, wall))
        except EngineFailure as failure:
            lease.sent = failure.sent
            return failure
        except TimeoutError:
            if not renew_at:
                return EngineStalled(f"no token within {settings.first_token_s:g} s of dispatch")
            return EngineStalled(f"no token for {settings.idle_s:g} s, or over {settings.wall_s:g} s in all")
        return EngineBroken("the engine's stream ended without its final frame")

    def _complete(self, final: Final) -> None:
        """Give the slot back, and with it the next task its start, before the readers get their end."""
        self._estimate.record(asyncio.get_running_loop().time() - self.lease.since)
        self.lease.close(clean=True)
        self.task.complete(final.finish_reason, tokens_out=final.tokens_out, tokens_in=final.tokens_in)

    async def _wait_to_retry(self, failure: EngineFailure) -> bool:
        """Wait on the same lease until the engine can be tried again; False if that comes too late."""
        try:
            async with asyncio.timeout_at(self._started + self._settings.first_token_s):
                if failure.sent:
                    await self.lease.drain()
                await self._replica.until_dispatchable()
                await asyncio.sleep(self._chance.uniform(*RETRY_JITTER_S))
        except TimeoutError:
            return False
        return True

    def _fail(self, failure: EngineFailure) -> None:
        if isinstance(failure, EngineMisconfigured):
            self._replica.misconfigured(failure.summary)
        elif isinstance(failure, EngineBroken):
            self._replica.notice(failure)
        self.lease.close(clean=not failure.sent)
        retry_after_ms = self._settings.default_retry_after_ms if failure.retriable else None
        error = Error(failure.code, failure.retriable, retry_after_ms, str(failure))
        self.task.fail(error, cause=failure.summary)

    def over(self, bug: BaseException | None) -> None:
        """The last word, however `run` ended: its task has ended and its lease is closed."""
        task, lease = self.task, self.lease
        if bug is not None:
            log.error("a bug ended a task", exc_info=bug, extra={"event": "bug", **task.log_fields()})
        lease.close(clean=not lease.sent)
        task.fail(Error("INTERNAL", retriable=False, message="a bug in llorch ended this task; see its log"))

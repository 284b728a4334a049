"""Bugs planted in the core, one at a time, each of a kind that a system like this one had.

`MUTANTS[name]` is a context manager under which the core has that bug.
"""

import asyncio
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any
from unittest.mock import patch

import msgspec

from llorch import pool
from llorch.admission import AdmissionQueue, Reservation
from llorch.engine import EngineBroken, EngineFailure, EngineRefused
from llorch.eventlog import EventLog
from llorch.execution import Execution
from llorch.orchestrator import Orchestrator
from llorch.placement import Candidate
from llorch.pool import Pool
from llorch.replica import Lease, Replica
from llorch.replicaset import ReplicaSet
from llorch.task import State, Task

Mutant = Callable[[], AbstractContextManager[Any]]
MUTANTS: dict[str, Mutant] = {}


def plant(owner: type, name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register the decorated function as a bug: it stands in for `owner.name`."""

    def register(bug: Callable[..., Any]) -> Callable[..., Any]:
        named = bug.fget if isinstance(bug, property) else bug
        MUTANTS[named.__name__] = lambda: patch.object(owner, name, bug)
        return bug

    return register


@plant(Task, "cancel")
def cancel_ends_the_task_a_turn_later(self: Task, reason: str = "client") -> bool:
    if self.state.final:
        return False
    asyncio.get_running_loop().call_soon(_cancel, self)
    return True


@plant(Lease, "interrupt")
def cancel_leaves_the_engine_at_work(self: Lease) -> None:
    pass


@plant(EventLog, "seal")
def cancel_recalls_nothing(self: EventLog, end: bytes, *, recall: bool = False) -> None:
    _seal(self, end)


@plant(EventLog, "seal")
def only_one_reader_is_told_of_the_end(self: EventLog, end: bytes, *, recall: bool = False) -> None:
    with patch.object(self, "_watchers", self._watchers[:1]):
        _seal(self, end, recall=recall)


@plant(EventLog, "follow")
async def events_are_read_then_the_end(self: EventLog, position: int = 0) -> Any:
    changed = asyncio.Event()
    self.watch(changed.set)
    try:
        while True:
            changed.clear()
            batch, position = self.read(position)
            if batch:
                yield batch
            if self.sealed:
                return
            if not batch:
                await changed.wait()
    finally:
        self.unwatch(changed.set)


@plant(EventLog, "resume")
def resume_repeats_an_event(self: EventLog, last_event_id: int | None) -> int | None:
    position = _resume(self, last_event_id)
    return position - 1 if position else position


@plant(Replica, "_release")
def freed_slot_tells_nobody(self: Replica, lease: Lease) -> None:
    self.leases.discard(lease)


@plant(Lease, "close")
def slot_is_free_before_the_engine_let_go(self: Lease, *, clean: bool) -> None:
    _close(self, clean=True)


@plant(Replica, "_look_idle")
async def any_lease_explains_a_busy_slot(self: Replica) -> bool:
    return await self.engine.busy_slots() <= self.busy


@plant(Replica, "_look_idle")
async def one_look_is_enough(self: Replica) -> bool:
    idle = await self.engine.busy_slots() == 0
    for lease in self.leases:
        lease.idle_looks += idle and lease.draining
    return idle


@plant(Pool, "_start")
def strict_task_does_not_wait_for_idle(self: Pool, task: Task) -> bool:
    with (
        patch.object(pool, "choose", lambda candidates, *, strict: _choose(candidates, strict=False)),
        patch.object(
            Replica, "try_lease", lambda replica, *, exclusive: _try_lease(replica, exclusive=False)
        ),
    ):
        return _start(self, task)


@plant(Pool, "_ran")
def runner_that_never_ran_keeps_its_lease(self: Pool, execution: Execution, runner: Any) -> None:
    del self._running[runner]


@plant(Pool, "withdraw")
def cancelled_entry_stays_in_the_queue(self: Pool, task: Task) -> None:
    if task.state is not State.CANCELLED:
        _withdraw(self, task)


@plant(Pool, "stop")
def stop_forgets_the_queue(self: Pool) -> None:
    self.stopping = True


@plant(Execution, "_attempt")
async def broken_answer_is_tried_again(self: Execution, *args: Any) -> EngineFailure | None:
    failure = await _attempt(self, *args)
    return EngineRefused(failure.summary) if isinstance(failure, EngineBroken) else failure


@plant(AdmissionQueue, "admit")
def bound_is_not_looked_at_again_at_admission(self: AdmissionQueue, place: Reservation, task: Task) -> int:
    with patch.object(self, "capacity", lambda priority: 1000):
        return _admit(self, place, task)


@plant(Execution, "run")
async def strict_task_shares_the_prompt_cache(self: Execution) -> None:
    self.task.request = msgspec.structs.replace(self.task.request, determinism="best_effort")
    await _run(self)


@plant(AdmissionQueue, "head")
@property
def last_come_first_served(self: AdmissionQueue) -> Task | None:
    return next(reversed(list(self)), None)


@plant(Orchestrator, "submit")
async def client_that_leaves_keeps_its_place(self: Orchestrator, request: Any, **_: Any) -> Task:
    home = self.pool(None)
    home.check_readiness()
    reservation = home.reserve(request.size_bytes, request.priority)
    try:
        await home.fit(request, reservation)
        home.check_readiness()
    except Exception:
        reservation.release()
        raise
    reservation.release()
    return await _submit(self, request)


@plant(Pool, "check_readiness")
def stopping_pool_admits(self: Pool) -> None:
    if not self.replicas.ready:
        _check_readiness(self)


@plant(Reservation, "release")
def place_is_given_back_twice(self: Reservation) -> None:
    self._queue.lanes[self._priority].reserved -= 1
    self._queue.reserved_bytes -= self.size_bytes


@plant(AdmissionQueue, "_promoted")
def promotion_is_forgotten(self: AdmissionQueue) -> int:
    return 0


@plant(AdmissionQueue, "promotes_at")
def promotion_has_no_timer(self: AdmissionQueue) -> float | None:
    return None


@plant(AdmissionQueue, "start")
def promoted_batch_work_shuts_out_interactive(self: AdmissionQueue, head: Task) -> None:
    self.remove(head)


@plant(AdmissionQueue, "head")
@property
def batch_work_goes_first(self: AdmissionQueue) -> Task | None:
    return self.lanes["batch"].head or self.lanes["interactive"].head


@plant(AdmissionQueue, "position")
def position_ignores_the_other_lane(self: AdmissionQueue, task: Task) -> int | None:
    return self.lanes[task.request.priority].position(task)


@plant(AdmissionQueue, "reserve")
def lanes_share_one_bound(self: AdmissionQueue, size_bytes: int, priority: Any, free_slots: int) -> Any:
    if len(self) + self.reserved >= self.capacity(priority) + free_slots:
        raise self._refuse(priority, self._full(priority))
    return _reserve(self, size_bytes, priority, free_slots)


@plant(ReplicaSet, "candidates")
def placement_ignores_readiness(self: ReplicaSet) -> list[Candidate]:
    return [msgspec.structs.replace(one, ready=True, open=True) for one in _candidates(self)]


@plant(ReplicaSet, "candidates")
def strict_task_goes_to_one_that_failed(self: ReplicaSet) -> list[Candidate]:
    return [msgspec.structs.replace(one, determinism="verified") for one in _candidates(self)]


@plant(Replica, "ready")
@property
def kept_out_replica_gets_work(self: Replica) -> bool:
    return self.able


@plant(ReplicaSet, "_agree")
def kept_out_replica_is_never_let_in(self: ReplicaSet) -> None:
    excluded = {replica: replica.excluded for replica in self}
    _agree(self)
    for replica, reason in excluded.items():
        replica.excluded = reason or replica.excluded


@plant(ReplicaSet, "take")
def retired_replica_gets_work(self: ReplicaSet, replicas: Any) -> None:
    _take(self, [*(replica for replica in self if replica not in replicas), *replicas])


@plant(ReplicaSet, "take")
def new_replica_tells_nobody(self: ReplicaSet, replicas: Any) -> None:
    _take(self, replicas)
    replicas[-1].on_change = lambda replica: None


@plant(ReplicaSet, "_keep")
async def engine_of_a_retired_replica_is_never_closed(self: ReplicaSet, replica: Replica) -> None:
    await replica.run()


@plant(Replica, "retire")
def retired_replica_does_not_end_what_it_runs(self: Replica) -> None:
    self._retired = True
    self._vacated.set()


@plant(Pool, "switch")
def switch_lets_the_last_go_first(self: Pool, replicas: Any, settings: Any) -> None:
    for lane in self.queue.lanes.values():
        if lane.head is not None:
            lane._waiting.move_to_end(lane.head.id)
    _switch(self, replicas, settings)


@plant(Pool, "draining")
@property
def drained_pool_admits(self: Pool) -> bool:
    return False


@plant(Pool, "_drain_is_due")
def drain_has_no_end(self: Pool) -> None:
    pass


_cancel, _seal, _resume = Task.cancel, EventLog.seal, EventLog.resume
_close, _try_lease = Lease.close, Replica.try_lease
_attempt, _admit, _submit = Execution._attempt, AdmissionQueue.admit, Orchestrator.submit
_run, _withdraw, _start, _choose = Execution.run, Pool.withdraw, Pool._start, pool.choose
_check_readiness, _switch, _reserve = Pool.check_readiness, Pool.switch, AdmissionQueue.reserve
_candidates, _agree, _take = ReplicaSet.candidates, ReplicaSet._agree, ReplicaSet.take

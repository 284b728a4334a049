"""One log line for each thing that happens to a task or a pool [MVP-070].

The one rule: it only listens. Nothing it does can change or hold up what it writes about.
"""

import logging

from llorch.errors import LlorchError
from llorch.placement import Decision
from llorch.pool import Pool
from llorch.replica import Replica
from llorch.task import State, Task

log = logging.getLogger("llorch.journal")


def task_moved(pool: Pool, task: Task, previous: State | None) -> None:
    """Write down a transition; `previous` is None at admission."""
    level, event, message = _sentence(task, previous)
    if not log.isEnabledFor(level):
        return
    log.log(level, message, extra={"event": event, **pool.log_fields(), **task.log_fields()})


def _sentence(task: Task, previous: State | None) -> tuple[int, str, str]:
    match task.state:
        case State.QUEUED:
            return logging.INFO, "admitted", f"task admitted, {task.queue_position} wait before it"
        case State.RUNNING:
            return logging.INFO, "started", f"task started on {task.replica_id}"
        case State.COMPLETED:
            return (
                logging.INFO,
                "completed",
                f"task completed ({task.finish_reason}), {task.tokens_out} tokens",
            )
        case State.CANCELLED:
            stage = "while it waited" if previous is State.QUEUED else f"after {task.tokens_out} tokens"
            return logging.INFO, "cancelled", f"task cancelled {stage}"
        case State.FAILED:
            code = task.error.code if task.error else "unknown"
            return logging.WARNING, "failed", f"task failed: {code}: {task.cause}"


def task_placed(pool: Pool, task: Task, decision: Decision) -> None:
    """Write down which replica a task went to and why, where there was a choice to make."""
    if len(pool.replicas) > 1:
        message = f"task placed on {decision.replica_id}: {decision.reason}"
        log.info(message, extra={"event": "placed", **pool.log_fields(), **task.log_fields()})


def task_refused(pool: Pool, refusal: LlorchError, correlation_id: str | None, identity: str | None) -> None:
    """Write down that a task was not admitted; the code alone, for a message may quote a prompt."""
    fields = {
        "event": "rejected",
        "code": refusal.code,
        "pool_id": pool.pool_id,
        "correlation_id": correlation_id,
        "identity": identity,
        "retry_after_ms": refusal.retry_after_ms,
        **pool.log_fields(),
    }
    log.info("task rejected: %s", refusal.code, extra=fields)


def readiness_changed(pool: Pool, replica: Replica) -> None:
    """Write down that a replica can take tasks, or no longer can, and why."""
    fields = {"pool_id": pool.pool_id, "replica_id": replica.replica_id, **pool.log_fields()}
    if replica.ready:
        level = logging.WARNING if replica.self_test_fault else logging.INFO
        what = f"{replica.slots} slots, {pool.ctx} tokens of context, determinism {replica.determinism}"
        message = f"replica {replica.replica_id} is ready: {replica.self_test_fault or what}"
        log.log(level, "%s", message, extra={"event": "ready", "determinism": replica.determinism, **fields})
    else:
        reason = replica.fault or replica.health.value
        message = f"replica {replica.replica_id} is not ready: {reason}"
        log.warning("%s", message, extra={"event": "unready", **fields})

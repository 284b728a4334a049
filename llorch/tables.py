"""Snapshots as lines of text: pure, for `ps`, `health` and `top`.

The one rule: what came from the server is cleaned before it is shown.
"""

import datetime

from llorch.answers import Lane, Pool, Replica, Snapshot
from llorch.events import Error
from llorch.terminal import clean, duration, style, table

_STATE_STYLES = {"running": "green", "queued": "yellow", "failed": "red", "cancelled": "dim"}


_LANES = {"interactive": "inter"}  # any other by its own name


def readiness(pool: Pool) -> str:
    """In a word or two."""
    if pool.drain is not None:
        return "drained"
    return "ready" if pool.ready else "not ready" if pool.live else "no engine"


def drained(pool: Pool) -> str:
    """What a drain means for the pool, and how it ends; empty if there is none."""
    if pool.drain is None:
        return ""
    left = duration(pool.drain.deadline_ms)
    what = f"what it has is failed in {left}" if pool.drain.deadline_ms else "what it had is over"
    return f"it takes no new tasks, and {what}; llorch drain --end {pool.pool_id} ends that, a reload too"


def replica_line(replica: Replica) -> tuple[str, ...]:
    """The cells that say how one is: name, state, slots, seeds, GPUs, and why if something is wrong."""
    devices = ", ".join(str(index) for index in replica.devices)
    draining = f", {replica.draining} draining" if replica.draining else ""
    return (
        replica.replica_id,
        "ready" if replica.ready else "not ready",
        f"{replica.busy} of {replica.slots} at work{draining}",
        f"seeds {replica.determinism}",
        f"GPU {devices}" if devices else "-",
        replica.last_error or "",
    )


def _taken(lane: Lane | None) -> str:
    return f"{lane.depth}/{lane.capacity}" if lane else "-"


def pool_lines(pools: list[Pool], *, colour: bool) -> list[str]:
    """A line for each pool, and why if something is wrong."""
    rows = [("POOL", "STATE", "SLOTS", "QUEUE", "BATCH", "DETERMINISM", "MODEL")]
    rows += [
        (
            pool.pool_id,
            readiness(pool),
            f"{pool.slots.busy}/{pool.slots.total}",
            _taken(pool.queue.first),
            _taken(pool.queue.batch),
            pool.determinism,
            pool.model or "-",
        )
        for pool in pools
    ]
    header, *lines = table(rows)
    shown = [style(header, "dim", colour=colour)]
    for pool, line in zip(pools, lines, strict=True):
        shown.append(line if pool.ready else style(line, "red", colour=colour))
        shown += [f"  {clean(told)}" for told in (drained(pool), pool.last_error) if told]
    return shown


def task_lines(tasks: list[Snapshot], at: datetime.datetime, *, colour: bool) -> list[str]:
    """A line for each task, in the order given; `at` is the wall clock."""
    if not tasks:
        return ["no tasks"]
    rows = [("TASK", "STATE", "LANE", "AGE", "FIRST", "TOKENS", "TOK/S", "NOTE")]
    rows += [
        (
            task.task_id,
            task.state,
            _LANES.get(task.priority, task.priority) or "-",
            duration(_age_ms(task, at)),
            duration(task.timings.first_token_ms),
            str(task.tokens_out),
            _speed(task),
            _note(task, at),
        )
        for task in tasks
    ]
    header, *lines = table(rows, right=(3, 4, 5, 6))
    shown = [style(header, "dim", colour=colour)]
    for task, line in zip(tasks, lines, strict=True):
        named = _STATE_STYLES.get(task.state)
        shown.append(style(line, named, colour=colour) if named else line)
    return shown


def _note(task: Snapshot, at: datetime.datetime) -> str:
    if task.state == "queued":
        ahead = f"{task.queue_position or 0} ahead"
        if task.pool_id not in ("", "default"):
            ahead += f" in {task.pool_id}"
        age_ms = _age_ms(task, at)
        if task.predicted_start_ms is None or age_ms is None:
            return ahead
        left_ms = task.predicted_start_ms - age_ms  # it was predicted when the task came
        return f"{ahead}, starts {f'in about {duration(left_ms)}' if left_ms > 0 else 'any moment'}"
    if task.error is not None:
        return describe(task.error)[:100]
    if task.state == "running":
        return f"on {task.replica_id}" if task.replica_id else ""
    return "" if task.finish_reason in (None, task.state) else str(task.finish_reason)


def _speed(task: Snapshot) -> str:
    decode_ms = task.timings.decode_time_ms
    return f"{1000 * task.tokens_out / decode_ms:.1f}" if decode_ms and task.tokens_out > 1 else "-"


def _age_ms(task: Snapshot, at: datetime.datetime) -> float | None:
    try:
        created = datetime.datetime.fromisoformat(task.created_at)
        return max((at - created).total_seconds() * 1000, 0.0)
    except (ValueError, TypeError):
        return None


def now() -> datetime.datetime:
    """The wall clock, which is what `created_at` is of."""
    return datetime.datetime.now(datetime.UTC)


def health_lines(pools: list[Pool], *, colour: bool) -> list[str]:
    """All there is to know of each pool."""
    lines: list[str] = []
    for pool in pools:
        state = style(readiness(pool), "green" if pool.ready else "red", colour=colour)
        lines.append(f"{clean(pool.pool_id)}: {state}")
        queue = pool.queue
        facts = [
            ("drain", drained(pool)),
            ("fault" if pool.ready else "why", pool.last_error),
            ("engine", " ".join(filter(None, (pool.engine, pool.engine_version)))),
            ("model", pool.model),
            ("context", f"{pool.ctx} tokens a slot" if pool.ctx else None),
            (
                "slots",
                f"{pool.slots.busy} of {pool.slots.total} at work"
                + (f", {pool.slots.draining} not let go of yet" if pool.slots.draining else ""),
            ),
            ("interactive" if queue.interactive else "queue", _waiting(queue.first)),
            ("batch", _waiting(queue.batch) if queue.batch else None),
            ("seeds", _SEEDS.get(pool.determinism, pool.determinism)),
            ("computes on", pool.accelerator),
        ]
        lines += [f"  {line}" for line in table([(name, value) for name, value in facts if value])]
        if pool.replicas:
            lines.append("  replicas")
            lines += replica_lines(pool, "    ", colour=colour)
    return lines or ["no pools"]


def replica_lines(pool: Pool, indent: str, *, colour: bool) -> list[str]:
    """A line for each replica of the pool, red for one that can't take tasks."""
    lines = [f"{indent}{line}" for line in table([replica_line(replica) for replica in pool.replicas])]
    return [
        line if replica.ready else style(line, "red", colour=colour)
        for replica, line in zip(pool.replicas, lines, strict=True)
    ]


def _waiting(lane: Lane) -> str:
    return f"{lane.depth} waiting, room for {lane.capacity}"


_SEEDS = {
    "verified": "verified: the same seed gives the same bytes",
    "failed": "failed: this engine gives one seed two texts; seeded tasks are refused",
    "unknown": "not examined yet",
}


def describe(error: Error) -> str:
    """Why a task failed, and whether to try again."""
    told = f"{error.code}: {error.message}" if error.message else error.code
    if not error.retriable:
        return told
    after = f" in {duration(error.retry_after_ms)}" if error.retry_after_ms else ""
    return f"{told} (it may succeed if tried again{after})"

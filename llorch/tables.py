"""Snapshots as lines of text: pure, for `ps`, `health` and `top`.

The one rule: what came from the server is cleaned before it is shown.
"""

import datetime

from llorch.answers import Pool, Snapshot
from llorch.events import Error
from llorch.terminal import clean, duration, style, table

_STATE_STYLES = {"running": "green", "queued": "yellow", "failed": "red", "cancelled": "dim"}


def readiness(pool: Pool) -> str:
    """In a word or two."""
    return "ready" if pool.ready else "not ready" if pool.live else "no engine"


def pool_lines(pools: list[Pool], *, colour: bool) -> list[str]:
    """A line for each pool, and why if something is wrong."""
    rows = [("POOL", "STATE", "SLOTS", "QUEUE", "DETERMINISM", "MODEL")]
    rows += [
        (
            pool.pool_id,
            readiness(pool),
            f"{pool.slots.busy}/{pool.slots.total}",
            f"{pool.queue.depth}/{pool.queue.capacity}",
            pool.determinism,
            pool.model or "-",
        )
        for pool in pools
    ]
    header, *lines = table(rows)
    shown = [style(header, "dim", colour=colour)]
    for pool, line in zip(pools, lines, strict=True):
        shown.append(line if pool.ready else style(line, "red", colour=colour))
        if pool.last_error:
            shown.append(f"  {clean(pool.last_error)}")
    return shown


def task_lines(tasks: list[Snapshot], at: datetime.datetime, *, colour: bool) -> list[str]:
    """A line for each task, in the order given; `at` is the wall clock."""
    if not tasks:
        return ["no tasks"]
    rows = [("TASK", "STATE", "AGE", "FIRST", "TOKENS", "TOK/S", "NOTE")]
    rows += [
        (
            task.task_id,
            task.state,
            duration(_age_ms(task, at)),
            duration(task.timings.first_token_ms),
            str(task.tokens_out),
            _speed(task),
            _note(task, at),
        )
        for task in tasks
    ]
    header, *lines = table(rows, right=(2, 3, 4, 5))
    shown = [style(header, "dim", colour=colour)]
    for task, line in zip(tasks, lines, strict=True):
        named = _STATE_STYLES.get(task.state)
        shown.append(style(line, named, colour=colour) if named else line)
    return shown


def _note(task: Snapshot, at: datetime.datetime) -> str:
    if task.state == "queued":
        ahead = f"{task.queue_position or 0} ahead"
        age_ms = _age_ms(task, at)
        if task.predicted_start_ms is None or age_ms is None:
            return ahead
        left_ms = task.predicted_start_ms - age_ms  # it was predicted when the task came
        return f"{ahead}, starts {f'in about {duration(left_ms)}' if left_ms > 0 else 'any moment'}"
    if task.error is not None:
        return describe(task.error)[:100]
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
        facts = [
            ("why", pool.last_error),
            ("engine", " ".join(filter(None, (pool.engine, pool.engine_version)))),
            ("model", pool.model),
            ("context", f"{pool.ctx} tokens a slot" if pool.ctx else None),
            (
                "slots",
                f"{pool.slots.busy} of {pool.slots.total} at work"
                + (f", {pool.slots.draining} not let go of yet" if pool.slots.draining else ""),
            ),
            ("queue", f"{pool.queue.depth} waiting, room for {pool.queue.capacity}"),
            ("seeds", _SEEDS.get(pool.determinism, pool.determinism)),
            ("computes on", pool.accelerator),
        ]
        lines += [f"  {line}" for line in table([(name, value) for name, value in facts if value])]
    return lines or ["no pools"]


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

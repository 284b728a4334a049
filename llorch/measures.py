"""Every metric there is: its name, what it tells, its labels, and how many series it may have.

The one rule: the names and labels that Prometheus sees stand here alone; docs/observability/metrics.json is
the same for those who read them, and a test holds the two together.
"""

from typing import Literal

import msgspec


class Family(msgspec.Struct, frozen=True, kw_only=True):
    """One metric: its name, what it tells, its labels in order.

    `budget` is the most sets of label values it may have; `home`: whether the home profile has it too.
    """

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    budget: int = 1
    home: bool = False


_POOL = ("engine", "engine_version", "pool_id")
_REPLICA = (*_POOL, "replica_id")
_OWN = ("pool_id", "replica_id")

QUEUE_DEPTH = Family(
    name="queue_depth",
    kind="gauge",
    help="Tasks that wait.",
    labels=(*_POOL, "priority"),
    budget=32,
    home=True,
)
TASKS_ENQUEUED = Family(
    name="tasks_enqueued_total",
    kind="counter",
    help="Tasks admitted. Which replica will run one is not known then, so replica_id is unknown.",
    labels=(*_REPLICA, "priority"),
    budget=64,
    home=True,
)
TASKS_REJECTED = Family(
    name="tasks_rejected_total",
    kind="counter",
    help="Tasks that a pool did not admit; reason is the code of the refusal.",
    labels=("engine", "reason"),
    budget=32,
    home=True,
)
TOKENS_IN = Family(
    name="tokens_in_total",
    kind="counter",
    help="Tokens of prompts, by the engine's own count, of the tasks that were completed.",
    labels=_REPLICA,
    budget=128,
    home=True,
)
TOKENS_OUT = Family(
    name="tokens_out_total",
    kind="counter",
    help="Tokens generated, those of running tasks and of tasks that failed or were cancelled too.",
    labels=_REPLICA,
    budget=128,
    home=True,
)
GPU_UTILIZATION = Family(
    name="gpu_utilization",
    kind="gauge",
    help="How busy a GPU is, in percent, once for each replica that may use it; device is its index.",
    labels=(*_REPLICA, "device"),
    budget=256,
    home=True,
)
VRAM_USED = Family(
    name="vram_used_bytes",
    kind="gauge",
    help="Memory in use on a GPU, by everybody, once for each replica that may use it.",
    labels=(*_REPLICA, "device"),
    budget=256,
    home=True,
)
MODEL_STATE = Family(
    name="model_state",
    kind="gauge",
    help="1 for the state that a model is in: Active while a pool has it, Retired after.",
    labels=("model_id", "state"),
    budget=64,
    home=True,
)
TASKS_STARTED = Family(
    name="tasks_started_total",
    kind="counter",
    help="Tasks that were given to an engine.",
    labels=(*_REPLICA, "priority"),
    budget=256,
)
TASKS_CANCELED = Family(
    name="tasks_canceled_total",
    kind="counter",
    help="Tasks cancelled, by their client or because all readers left; replica_id is unknown if it waited.",
    labels=(*_REPLICA, "reason"),
    budget=256,
)
KV_CACHE_USAGE = Family(
    name="kv_cache_usage_ratio",
    kind="gauge",
    help="Share of the context cache in use, where the engine tells it; llama.cpp's server does not.",
    labels=_REPLICA,
    budget=64,
)
BACKPRESSURE = Family(
    name="admission_backpressure_events_total",
    kind="counter",
    help="Tasks turned away because a queue was full, by the policy for that.",
    labels=("engine", "policy"),
    budget=16,
)
PLACEMENT_DECISIONS = Family(
    name="placement_decisions_total",
    kind="counter",
    help="Tasks placed on a replica; pinned: there was only one; fallback: no free VRAM was known.",
    labels=("outcome", "pinned", "fallback"),
    budget=8,
)
PLACEMENT_CANDIDATES = Family(
    name="placement_candidates_considered",
    kind="histogram",
    help="How many replicas could take a task when it was placed.",
    buckets=(0, 1, 2, 3, 4, 6, 8),
)
LATENCY_FIRST_TOKEN = Family(
    name="latency_first_token_ms",
    kind="histogram",
    help="Milliseconds from the start on the engine to the first token; waiting in the queue is not in it.",
    labels=(*_POOL, "priority"),
    buckets=(50, 100, 150, 200, 300, 500, 750, 1000, 1500, 2000, 3000),
    budget=64,
)
LATENCY_DECODE = Family(
    name="latency_decode_ms",
    kind="histogram",
    help="Milliseconds from the first to the last token of completed tasks.",
    labels=(*_POOL, "priority"),
    buckets=(250, 500, 1000, 1500, 2000, 3000, 4000, 6000, 8000, 12000),
    budget=64,
)
CANCEL_SECONDS = Family(
    name="llorch_cancel_seconds",
    kind="histogram",
    help="Seconds from the cancel of a running task to the moment its slot is free.",
    labels=_OWN,
    buckets=(0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60),
    budget=64,
)
SLOTS = Family(
    name="llorch_slots",
    kind="gauge",
    help="Slots of a replica: busy, draining (cancelled, and not let go of yet), free for a task now.",
    labels=(*_OWN, "state"),
    budget=192,
)
REPLICA_READY = Family(
    name="llorch_replica_ready",
    kind="gauge",
    help="1 while a replica takes tasks, else 0.",
    labels=_OWN,
    budget=64,
)
QUEUE_CAPACITY = Family(
    name="llorch_queue_capacity",
    kind="gauge",
    help="How many tasks may wait.",
    labels=("pool_id", "priority"),
    budget=32,
)
TASKS_FAILED = Family(
    name="llorch_tasks_failed_total",
    kind="counter",
    help="Tasks that ended with an error, by its code.",
    labels=("pool_id", "code"),
    budget=128,
)
READERS = Family(name="llorch_readers", kind="gauge", help="Open streams.")
PREDICTED_START_ERROR = Family(
    name="llorch_predicted_start_error_ms",
    kind="histogram",
    help="Milliseconds between predicted and real start of a task that had to wait, either way.",
    labels=("pool_id", "priority"),
    buckets=(50, 100, 250, 500, 1000, 2500, 5000, 10_000, 30_000, 60_000, 300_000),
    budget=32,
)
VRAM_TOTAL = Family(
    name="llorch_vram_total_bytes",
    kind="gauge",
    help="Memory that a GPU has.",
    labels=("device",),
    budget=32,
)
BUILD_INFO = Family(
    name="llorch_build_info",
    kind="gauge",
    help="1; the version of llorch is a label.",
    labels=("version",),
)

FAMILIES = (
    *(QUEUE_DEPTH, TASKS_ENQUEUED, TASKS_REJECTED, TOKENS_IN, TOKENS_OUT),
    *(GPU_UTILIZATION, VRAM_USED, MODEL_STATE),
    *(TASKS_STARTED, TASKS_CANCELED, KV_CACHE_USAGE, BACKPRESSURE),
    *(PLACEMENT_DECISIONS, PLACEMENT_CANDIDATES, LATENCY_FIRST_TOKEN, LATENCY_DECODE),
    *(CANCEL_SECONDS, SLOTS, REPLICA_READY, QUEUE_CAPACITY, TASKS_FAILED, READERS, PREDICTED_START_ERROR),
    *(VRAM_TOTAL, BUILD_INFO),
)

"""The numbers for Prometheus: counted as tasks move, and read off the pools when somebody scrapes.

The one rule: it only listens, and nothing happens per token. What runs is looked at when it ends and when
somebody scrapes. No text of a client becomes a label: those are names from the configuration, the engine's
version and model, and words of our own. docs/observability/metrics.json is the contract of all this.
"""

import asyncio
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric

from llorch import __version__, errors
from llorch.errors import LlorchError, QueueFull
from llorch.measures import (
    BACKPRESSURE,
    BUILD_INFO,
    CANCEL_SECONDS,
    FAMILIES,
    GPU_UTILIZATION,
    KV_CACHE_USAGE,
    LATENCY_DECODE,
    LATENCY_FIRST_TOKEN,
    MODEL_STATE,
    PLACEMENT_CANDIDATES,
    PLACEMENT_DECISIONS,
    PREDICTED_START_ERROR,
    QUEUE_CAPACITY,
    QUEUE_DEPTH,
    READERS,
    REPLICA_READY,
    SLOTS,
    TASKS_CANCELED,
    TASKS_ENQUEUED,
    TASKS_FAILED,
    TASKS_REJECTED,
    TASKS_STARTED,
    TOKENS_IN,
    TOKENS_OUT,
    VRAM_TOTAL,
    VRAM_USED,
)
from llorch.orchestrator import Orchestrator
from llorch.placement import Decision
from llorch.pool import Pool
from llorch.replica import Lease, Replica
from llorch.series import UNKNOWN, Counter, Histogram, Values, gauge
from llorch.task import CancelReason, Priority, State, Task
from llorch.telemetry import GpuReading, GpuUsage

Rows = Iterable[tuple[Values, float]]

PRIORITIES: tuple[Priority, ...] = ("interactive", "batch")
CANCEL_REASONS: tuple[CancelReason, ...] = ("client", "disconnect")
PLACED, WAITS = "placed", "no_candidate"
ACTIVE, RETIRED = "Active", "Retired"
_REASONS = (
    *(errors.InvalidParams, errors.ContextOverflow, errors.BodyTooLarge, errors.DeterminismUnavailable),
    *(errors.QueueFull, errors.PoolUnready, errors.PoolUnavailable),
)  # for which `submit` refuses
_MAX_MODELS = MODEL_STATE.budget // 2


class _Run:
    """A task at work, and what of it has been counted; its labels are those of its start."""

    __slots__ = ("lease", "pool_labels", "task", "tokens", "told_first_token")

    def __init__(self, task: Task, pool_labels: Values) -> None:
        self.task = task
        self.pool_labels = pool_labels
        self.lease = task.lease
        self.tokens = 0
        self.told_first_token = False


class Metrics:
    """Listens to an orchestrator from its construction on; `exposition` is what Prometheus gets."""

    def __init__(
        self, orchestrator: Orchestrator, gpu_reading: Callable[[], GpuReading], *, home: bool
    ) -> None:
        self._orchestrator = orchestrator
        self._gpu_reading = gpu_reading
        self._families = [family for family in FAMILIES if family.home or not home]
        self._now = asyncio.get_running_loop().time
        self._runs: dict[str, _Run] = {}
        self._models: dict[str, None] = {}  # every one that was seen, the longest known first
        self._enqueued = Counter(TASKS_ENQUEUED)
        self._rejected = Counter(TASKS_REJECTED)
        self._tokens_in = Counter(TOKENS_IN)
        self._tokens_out = Counter(TOKENS_OUT)
        self._started = Counter(TASKS_STARTED)
        self._canceled = Counter(TASKS_CANCELED)
        self._failed = Counter(TASKS_FAILED)
        self._backpressure = Counter(BACKPRESSURE)
        self._placed = Counter(PLACEMENT_DECISIONS)
        self._candidates = Histogram(PLACEMENT_CANDIDATES)
        self._first_token = Histogram(LATENCY_FIRST_TOKEN)
        self._decode = Histogram(LATENCY_DECODE)
        self._cancel = Histogram(CANCEL_SECONDS)
        self._start_error = Histogram(PREDICTED_START_ERROR)
        counted: tuple[Counter | Histogram, ...] = (
            *(self._enqueued, self._rejected, self._tokens_in, self._tokens_out, self._started),
            *(self._canceled, self._failed, self._backpressure, self._placed, self._candidates),
            *(self._first_token, self._decode, self._cancel, self._start_error),
        )
        self._counted = {one.family.name: one for one in counted}
        self._read: dict[str, Callable[[], Rows]] = {
            QUEUE_DEPTH.name: self._on_each_pool(_queue_depth),
            GPU_UTILIZATION.name: self._on_each_pool(lambda pool: self._of_gpus(pool, _utilization)),
            VRAM_USED.name: self._on_each_pool(lambda pool: self._of_gpus(pool, _vram_used)),
            MODEL_STATE.name: self._model_states,
            KV_CACHE_USAGE.name: lambda: (),  # no engine tells it
            SLOTS.name: self._on_each_pool(_slots),
            REPLICA_READY.name: self._on_each_pool(_readiness),
            QUEUE_CAPACITY.name: self._on_each_pool(_capacities),
            READERS.name: lambda: [((), orchestrator.reader_count)],
            VRAM_TOTAL.name: self._vram_total,
            BUILD_INFO.name: lambda: [((__version__,), 1)],
        }
        self._registry = CollectorRegistry()
        self._registry.register(self)
        orchestrator.listeners.append(self._task_moved)
        orchestrator.refusal_listeners.append(self._task_refused)
        for pool in orchestrator.pools.values():
            pool.placement_listeners.append(self._task_placed)

    def exposition(self) -> bytes:
        """Every series of the profile in the text format 0.0.4."""
        return generate_latest(self._registry)

    # -- what happens ------------------------------------------------------------------------------

    def _task_moved(self, pool: Pool, task: Task, previous: State | None) -> None:
        labels, priority = _pool_labels(pool), task.request.priority
        if previous is None:
            self._enqueued.add((*labels, UNKNOWN, priority))
        elif task.state is State.RUNNING:
            self._runs[task.id] = _Run(task, labels)
            self._started.add((*labels, task.replica_id, priority))
            self._note_prediction(task)
        else:
            run = self._runs.pop(task.id, None)
            if run is not None:
                self._catch_up(run)
            self._note_end(task, run, labels if run is None else run.pool_labels)

    def _note_end(self, task: Task, run: _Run | None, labels: Values) -> None:
        if task.state is State.COMPLETED:
            self._tokens_in.add((*labels, task.replica_id), task.tokens_in or 0)
            if task.decode_time_ms is not None:
                self._decode.observe((*labels, task.request.priority), task.decode_time_ms)
        elif task.state is State.FAILED:
            self._failed.add((task.pool_id, task.error.code if task.error else None))
        else:
            self._canceled.add((*labels, task.replica_id, task.cancel_reason))
            if run is not None and isinstance(run.lease, Lease):
                where = (task.pool_id, task.replica_id)
                run.lease.on_freed = functools.partial(self._note_freed, where, self._now())

    def _note_freed(self, where: Values, cancelled_at: float) -> None:
        self._cancel.observe(where, self._now() - cancelled_at)

    def _note_prediction(self, task: Task) -> None:
        """How far off it was; a task that never waited was nothing to predict."""
        predicted, waited = task.predicted_start_ms, task.queue_ms
        if predicted is not None and waited is not None and (predicted or waited):
            self._start_error.observe((task.pool_id, task.request.priority), abs(predicted - waited))

    def _catch_up(self, run: _Run) -> None:
        """Count what a task at work has made since the last look; a count that shrinks takes nothing back."""
        task = run.task
        if task.tokens_out > run.tokens:
            self._tokens_out.add((*run.pool_labels, task.replica_id), task.tokens_out - run.tokens)
            run.tokens = task.tokens_out
        if not run.told_first_token and task.first_token_ms is not None:
            run.told_first_token = True
            self._first_token.observe((*run.pool_labels, task.request.priority), task.first_token_ms)

    def _task_placed(self, pool: Pool, task: Task, decision: Decision) -> None:
        outcome = WAITS if decision.replica_id is None else PLACED
        self._placed.add((outcome, _yes(decision.pinned), _yes(decision.fallback)))
        self._candidates.observe((), decision.considered)

    def _task_refused(
        self, pool: Pool, refusal: LlorchError, correlation_id: str | None, identity: str | None
    ) -> None:
        self._rejected.add((pool.engine_name, refusal.code))
        if isinstance(refusal, QueueFull):
            self._backpressure.add((pool.engine_name, refusal.policy_label))

    # -- what is -----------------------------------------------------------------------------------

    def collect(self) -> Iterator[Metric]:
        """All families of the profile, as they are now; called by the registry."""
        for run in self._runs.values():
            self._catch_up(run)
        self._candidates.prepare(())
        for pool in self._orchestrator.pools.values():
            if pool.replicas.ready:  # before that its version is not known
                self._prepare(pool)
        for family in self._families:
            if (counted := self._counted.get(family.name)) is not None:
                yield counted.metric()
            else:
                yield gauge(family, self._read[family.name]())

    def _prepare(self, pool: Pool) -> None:
        """Make every series appear that may rise: a rise from nothing would not be seen as one."""
        labels, engine = _pool_labels(pool), pool.engine_name
        for refusal in _REASONS:
            self._rejected.add((engine, refusal.code), 0)
        self._backpressure.add((engine, QueueFull.policy_label), 0)
        for priority in PRIORITIES:
            self._enqueued.add((*labels, UNKNOWN, priority), 0)
            for histogram in (self._first_token, self._decode):
                histogram.prepare((*labels, priority))
            self._start_error.prepare((pool.pool_id, priority))
        for reason in CANCEL_REASONS:
            self._canceled.add((*labels, UNKNOWN, reason), 0)
        for replica in pool.replicas:
            self._prepare_replica(pool.pool_id, labels, replica.replica_id)

    def _prepare_replica(self, pool_id: str, labels: Values, replica_id: str) -> None:
        for counter in (self._tokens_in, self._tokens_out):
            counter.add((*labels, replica_id), 0)
        for priority in PRIORITIES:
            self._started.add((*labels, replica_id, priority), 0)
        for reason in CANCEL_REASONS:
            self._canceled.add((*labels, replica_id, reason), 0)
        self._cancel.prepare((pool_id, replica_id))

    def _on_each_pool(self, read: Callable[[Pool], Rows]) -> Callable[[], Rows]:
        return lambda: itertools.chain.from_iterable(map(read, self._orchestrator.pools.values()))

    def _of_gpus(self, pool: Pool, amount: Callable[[GpuUsage], int | None]) -> Rows:
        """An amount of each GPU, for every replica that may use it; left out where the GPU can't tell."""
        gpus = self._gpu_reading().gpus
        for replica in pool.replicas:
            for gpu in gpus:
                if _may_use(replica, gpu) and (value := amount(gpu)) is not None:
                    yield (*_pool_labels(pool), replica.replica_id, str(gpu.index)), value

    def _vram_total(self) -> Rows:
        return (((str(gpu.index),), gpu.vram_total_bytes) for gpu in self._gpu_reading().gpus)

    def _model_states(self) -> Rows:
        """Every model that was seen, and `unknown` while a pool has not told its own."""
        told = (pool.props.model if pool.props else None for pool in self._orchestrator.pools.values())
        active = {model or UNKNOWN for model in told}
        seen = self._models
        seen |= dict.fromkeys(sorted(active - {UNKNOWN}))
        while len(seen) > _MAX_MODELS and (retired := next((it for it in seen if it not in active), None)):
            del seen[retired]
        for model in (*seen, *(active & {UNKNOWN})):
            yield (model, ACTIVE), model in active
            yield (model, RETIRED), model not in active


def _utilization(gpu: GpuUsage) -> int | None:
    return gpu.utilization


def _vram_used(gpu: GpuUsage) -> int | None:
    return gpu.vram_used_bytes


def _queue_depth(pool: Pool) -> Rows:
    return (((*_pool_labels(pool), priority), pool.queue.depth(priority)) for priority in PRIORITIES)


def _slots(pool: Pool) -> Rows:
    for replica in pool.replicas:
        counts = {"busy": replica.busy, "draining": replica.draining, "free": replica.free_slots}
        for state, count in counts.items():
            yield (pool.pool_id, replica.replica_id, state), count


def _readiness(pool: Pool) -> Rows:
    return (((pool.pool_id, replica.replica_id), replica.ready) for replica in pool.replicas)


def _capacities(pool: Pool) -> Rows:
    return (((pool.pool_id, priority), pool.queue.capacity(priority)) for priority in PRIORITIES)


def _yes(value: bool) -> str:
    return "true" if value else "false"


def _pool_labels(pool: Pool) -> Values:
    return pool.engine_name, pool.engine_version, pool.pool_id


def _may_use(replica: Replica, gpu: GpuUsage) -> bool:
    """Whether its engine may compute on that GPU: on any, if the configuration names none."""
    return not replica.devices or gpu.index in replica.devices

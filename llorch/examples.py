"""One value of each answer and each refusal, as the API's description shows them.

The one rule: they are values of the very types that go over the wire, so none can be wrong.
"""

import msgspec

from llorch import control, errors, wire
from llorch.capabilities import Capabilities, Features, PoolCapabilities
from llorch.errors import LlorchError
from llorch.events import Error
from llorch.health import DrainState, LaneCounts, PoolHealth, QueueCounts, ReplicaHealth, SlotCounts
from llorch.reload import Reloaded
from llorch.status import GpuView, Percentiles, Status, Totals

TASK_ID = "a12aafdd9e8b4c1f8d3e5f60718293a4"
CREATED_AT = "2026-11-21T11:48:34.120Z"
STREAM_URL = f"/v1/tasks/{TASK_ID}/stream"
SNAPSHOT = wire.Snapshot(
    task_id=TASK_ID,
    state="running",
    priority="interactive",
    determinism="strict",
    pool_id="default",
    replica_id="default-0",
    metadata={"project": "haiku"},
    queue_position=None,
    predicted_start_ms=0,
    tokens_out=12,
    created_at=CREATED_AT,
    timings=wire.Timings(queue_ms=0, first_token_ms=74, decode_time_ms=101),
    stream_url=STREAM_URL,
)
FAILED = msgspec.structs.replace(
    SNAPSHOT,
    state="failed",
    error=Error("WORKER_RESET", True, message="the engine broke off in mid-answer"),
)
HEALTH = PoolHealth(
    pool_id="default",
    live=True,
    ready=True,
    engine="llamacpp",
    engine_version="b11434-5c8a1b2",
    model="your-model.gguf",
    model_digest="sha256:" + "5f" * 32,
    ctx=8192,
    slots=SlotCounts(total=4, busy=1, draining=0),
    queue=QueueCounts(
        depth=0,
        capacity=64,
        bytes=0,
        interactive=LaneCounts(depth=0, capacity=64),
        batch=LaneCounts(depth=0, capacity=256),
    ),
    replicas=[
        ReplicaHealth(replica_id="default-0", ready=True, slots=4, busy=1, draining=0, determinism="verified")
    ],
    determinism="verified",
    sampler_profile_version="1",
    accelerator="NVIDIA GeForce RTX 4090 (24564 MiB); driver 575.64",
)
TWO_REPLICAS = msgspec.structs.replace(
    HEALTH,
    pool_id="big",
    slots=SlotCounts(total=4, busy=4, draining=0),
    queue=QueueCounts(
        depth=33,
        capacity=64,
        bytes=51_200,
        interactive=LaneCounts(depth=1, capacity=64),
        batch=LaneCounts(depth=32, capacity=256),
    ),
    replicas=[
        ReplicaHealth(
            replica_id="gpu0",
            ready=True,
            slots=4,
            busy=4,
            draining=0,
            determinism="verified",
            devices=(0,),
        ),
        ReplicaHealth(
            replica_id="gpu1",
            ready=False,
            slots=4,
            busy=0,
            draining=0,
            determinism="unknown",
            devices=(1,),
            last_error="it runs engine b11210-77f3c40, the pool b11434-5c8a1b2",
        ),
    ],
    last_error="gpu1: it runs engine b11210-77f3c40, the pool b11434-5c8a1b2",
)
DRAINED = msgspec.structs.replace(HEALTH, ready=False, drain=DrainState(deadline_ms=28_500))
CAPABILITIES = Capabilities(
    pools=[
        PoolCapabilities(
            pool_id="default",
            engine="llamacpp",
            engine_version=HEALTH.engine_version,
            model=HEALTH.model,
            model_digest=HEALTH.model_digest,
            ctx=8192,
            max_tokens=4096,
            slots=4,
            features=Features(chat_template=True, grammar=True, determinism="verified"),
            accelerator=HEALTH.accelerator,
        )
    ]
)
STATUS = Status(
    version="0.1.0",
    uptime_s=86400.5,
    pools=[HEALTH],
    tasks=[msgspec.structs.replace(SNAPSHOT, stream_url=None)],
    totals=Totals(admitted=1042, refused=3, completed=1030, failed=2, cancelled=9, tokens_out=310_442),
    tokens_per_s=41.7,
    first_token_ms=Percentiles(74, 310),
    readers=1,
    gpus=[
        GpuView(
            index=0,
            name="NVIDIA GeForce RTX 4090",
            utilization=93,
            vram_used_bytes=11_811_160_064,
            vram_total_bytes=25_757_220_864,
            temperature_c=61,
        )
    ],
    gpu_fault=None,
)
CREATED = wire.Created(
    task_id=TASK_ID,
    queue_position=0,
    predicted_start_ms=0,
    stream_url=STREAM_URL,
    cancel_url=f"/v1/tasks/{TASK_ID}/cancel",
    correlation_id="my-batch-17",
)
CANCELLED = wire.Cancelled(task_id=TASK_ID, state="cancelled", tokens_out=12)
RELOADS = {
    "the file again": {},
    "two engines": {
        "replicas": [
            {"id": "gpu0", "endpoint": "http://127.0.0.1:8081", "slots": 4, "devices": [0]},
            {"id": "gpu1", "endpoint": "unix:/run/llama/gpu1.sock", "slots": 2, "devices": [1]},
        ]
    },
}
RELOADED = Reloaded(
    pool_id="default",
    replicas=["gpu0", "gpu1"],
    retired=["default-0"],
    model="your-model.gguf",
    steps=[
        errors.ReloadStep(name="validate", ok=True, ms=1),
        *(
            errors.ReloadStep(name=name, ok=True, ms=ms, replica_id=replica_id)
            for replica_id in ("gpu0", "gpu1")
            for name, ms in (("probe", 3), ("decode", 1240))
        ),
        errors.ReloadStep(name="agree", ok=True, ms=0),
        errors.ReloadStep(name="switch", ok=True, ms=0),
    ],
)
DRAINS = {"for five minutes": {"deadline_ms": 300_000}, "no longer": {"cancel": True}}
DRAIN_ANSWER = control.Drained(pool_id="default", draining=True, deadline_ms=300_000)
TASKS = {
    "prompt": {"prompt": "Once upon a time", "max_tokens": 40},
    "reproducible": {"prompt": "Once upon a time", "max_tokens": 40, "seed": 7},
    "chat": {
        "messages": [
            {"role": "system", "content": "You answer in one sentence."},
            {"role": "user", "content": "Why is the sky blue?"},
        ],
        "temperature": 0.2,
        "stop": ["\n"],
        "metadata": {"project": "haiku"},
    },
    "batch": {"prompt": "Summarize: …", "priority": "batch", "pool_id": "big"},
    "json": {
        "prompt": "A person, as JSON: ",
        "json_schema": {"type": "object", "properties": {"name": {"type": "string"}}},
    },
}
FRAMES = (
    'id: 0\nevent: started\ndata: {"queue_position":0,"predicted_start_ms":0}\n\n'
    'id: 1\nevent: token\ndata: {"t":",","i":0}\n\n'
    'id: 2\nevent: end\ndata: {"tokens_out":1,"finish_reason":"length","tokens_in":4}\n\n'
)
METRICS = """\
# HELP queue_depth Tasks that wait.
# TYPE queue_depth gauge
queue_depth{engine="llamacpp",engine_version="b11434-5c8a1b2",pool_id="default",priority="interactive"} 2.0
"""

REFUSALS: tuple[LlorchError, ...] = (
    errors.InternalError("a bug in llorch; its log has more under this correlation id"),
    errors.InvalidParams("$.temperatur: unknown field, did you mean temperature?"),
    errors.ContextOverflow(
        "8300 prompt tokens + 512 max_tokens > 8192 tokens of context",
        engine="llamacpp",
        hint="shorten the prompt, ask for fewer max_tokens, or give the engine a larger context",
    ),
    errors.MissingToken("a token is needed", hint="send Authorization: Bearer <the configured auth.token>"),
    errors.BadToken(
        "a different token is expected", hint="send Authorization: Bearer <the configured auth.token>"
    ),
    errors.ForbiddenHost(
        "the Host 'evil.example' is not this server",
        hint="use localhost or an IP address, or add the name to http.allowed_hosts",
    ),
    errors.ForbiddenOrigin(
        "pages of 'https://evil.example' may not ask", hint="add the origin to http.cors_origins"
    ),
    errors.NotFound("no route /v2"),
    errors.UnknownPool("no pool 'big'", hint="the pools are: default"),
    errors.TaskNotFound("no task 'a12aafdd'", hint="finished tasks are kept for stream.retain_s"),
    errors.MethodNotAllowed("DELETE is not possible on /v1/tasks, GET, HEAD, POST is"),
    errors.BodyTimeout("the body took over 10 s (http.body_timeout_s)"),
    errors.DeterminismUnavailable(
        "this engine gives one seed two texts", engine="llamacpp", hint="start llama-server with …"
    ),
    errors.ReloadFailed(
        "nothing was changed: probe of gpu1: nothing listens on unix:/run/llama/gpu1.sock",
        engine="llamacpp",
        steps=[
            errors.ReloadStep(name="validate", ok=True, ms=1),
            errors.ReloadStep(
                name="probe",
                ok=False,
                ms=1,
                replica_id="gpu1",
                fault="nothing listens on unix:/run/llama/gpu1.sock",
            ),
        ],
    ),
    errors.BodyTooLarge("the body has 5000000 bytes, http.max_body_bytes is 4194304"),
    errors.UnsupportedMediaType("expected Content-Type: application/json, got 'text/plain'"),
    errors.QueueFull("64 tasks wait already", engine="llamacpp", retry_after_ms=3400),
    errors.PoolUnready(
        "pool default is not ready: the model is loading", engine="llamacpp", retry_after_ms=2000
    ),
    errors.PoolUnavailable(
        "pool default is unavailable: nothing listens on http://127.0.0.1:8081",
        engine="llamacpp",
        retry_after_ms=2000,
    ),
    errors.TooManyStreams("4096 streams are open", hint="raise stream.max_readers", retry_after_ms=1000),
)

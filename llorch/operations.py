"""What each route takes and answers, for those who write clients: what the types of the wire don't say.

The one rule: whoever adds a route adds its row here, with every status that it can answer.
"""

from typing import Any

import msgspec

from llorch import control, errors, examples, reload, wire
from llorch.capabilities import Capabilities
from llorch.errors import LlorchError
from llorch.events import End, Error, Started, Token
from llorch.health import PoolHealth
from llorch.outlook import Metrics
from llorch.status import Status
from llorch.task import State

JSON, EVENTS = "application/json", "text/event-stream"
PROMETHEUS = "text/plain; version=0.0.4; charset=utf-8"
EVENT_TYPES = {"started": Started, "token": Token, "end": End, "error": Error, "metrics": Metrics}
WITHOUT_ID = {"metrics"}
EVENT_CODES = (
    *("WORKER_RESET", "DECODE_TIMEOUT", "QUEUE_TIMEOUT", "POOL_UNAVAILABLE"),  # retriable
    *("INVALID_PARAMS", "CONTEXT_OVERFLOW", "DETERMINISM_UNAVAILABLE", "INTERNAL"),
)


class Parameter(msgspec.Struct, frozen=True, kw_only=True):
    """A value outside the body; `place` is path, query or header."""

    name: str
    place: str
    description: str
    schema: dict[str, Any] = msgspec.field(default_factory=lambda: {"type": "string"})
    example: Any = None


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """A status that is no refusal. `body`: a type of ours, a JSON schema, or None for no body at all."""

    description: str
    body: Any = None
    examples: dict[str, Any] = {}
    media_type: str = JSON
    headers: tuple[str, ...] = ()
    links: dict[str, dict[str, Any]] = {}


class Operation(msgspec.Struct, frozen=True, kw_only=True):
    """One route: what it takes, and everything that it can answer; `refusals` beyond those of every route.

    `ticket`: a task's ticket will do instead of the token; `open`: no token is asked for.
    """

    id: str
    tag: str
    summary: str
    description: str = ""
    parameters: tuple[Parameter, ...] = ()
    body: Any = None
    body_optional: bool = False
    examples: dict[str, Any] = {}
    answers: dict[int, Answer]
    refusals: tuple[type[LlorchError], ...] = ()
    ticket: bool = False
    open: bool = False


TAGS = {
    "tasks": "Hand work in, watch it, end it.",
    "pools": "The engines: how they are, and what they can do.",
    "service": "The process itself.",
}
EVERYWHERE: tuple[type[LlorchError], ...] = (
    *(errors.InvalidParams, errors.MissingToken, errors.BadToken),
    *(errors.ForbiddenHost, errors.ForbiddenOrigin, errors.InternalError),
)

_STATES = [state.value for state in State]

_TASK_ID = Parameter(
    name="task_id", place="path", description="The task, as its 202 said.", example=examples.TASK_ID
)
_POOL_ID = Parameter(name="pool_id", place="path", description="The pool's name.", example="default")
CORRELATION = Parameter(
    name="X-Correlation-Id",
    place="header",
    description="A name of your own for this request, 1 to 128 of `A-Za-z0-9._:-`, said back in the answer "
    "and in the log. Anything else is replaced by a random one.",
    example="my-batch-17",
)

_LINKS: dict[str, dict[str, Any]] = {
    name: {"operationId": name, "parameters": {"task_id": "$response.body#/task_id"}}
    for name in ("getTask", "streamTask", "cancelTask")
}

OPERATIONS: dict[tuple[str, str], Operation] = {
    ("GET", "/"): Operation(
        id="getPage",
        tag="service",
        summary="The status page",
        description="For a browser. It holds no data, so it asks for no token; what it then reads does.",
        answers={
            200: Answer(
                description="One file, with its script and style inside.",
                body={"type": "string"},
                media_type="text/html",
                headers=("Content-Security-Policy",),
            )
        },
        open=True,
    ),
    ("GET", "/health"): Operation(
        id="getHealth",
        tag="service",
        summary="Whether the process answers",
        description="Nothing more: how the engine is, its pool says.",
        answers={
            200: Answer(
                description="It does.",
                body={
                    "type": "object",
                    "properties": {"status": {"const": "ok", "description": "Always `ok`."}},
                    "required": ["status"],
                },
                examples={"ok": {"status": "ok"}},
            )
        },
    ),
    ("POST", "/v1/tasks"): Operation(
        id="createTask",
        tag="tasks",
        summary="Submit a task",
        description="It is admitted into the queue of its pool, or refused at once. Once admitted it runs on "
        "whether or not anybody reads its stream.",
        body=wire.TaskBody,
        examples=examples.TASKS,
        answers={
            202: Answer(
                description="Admitted.",
                body=wire.Created,
                examples={"admitted": examples.CREATED},
                headers=("Location",),
                links=_LINKS,
            )
        },
        refusals=(
            *(errors.ContextOverflow, errors.UnknownPool, errors.BodyTimeout, errors.DeterminismUnavailable),
            *(errors.BodyTooLarge, errors.UnsupportedMediaType, errors.QueueFull),
            *(errors.PoolUnready, errors.PoolUnavailable),
        ),
    ),
    ("GET", "/v1/tasks"): Operation(
        id="listTasks",
        tag="tasks",
        summary="Recent tasks, newest first",
        description="Without `stream_url`. A query parameter that is not one of these is a 400.",
        parameters=(
            Parameter(
                name="state",
                place="query",
                description="Only tasks in this state.",
                schema={"enum": _STATES, "type": "string"},
                example="queued",
            ),
            Parameter(
                name="limit",
                place="query",
                description="At most so many.",
                schema={"type": "integer", "minimum": 1, "maximum": 1000, "default": 100},
                example=20,
            ),
        ),
        answers={
            200: Answer(
                description="Those there are.",
                body=wire.TaskList,
                examples={
                    "one": wire.TaskList([msgspec.structs.replace(examples.SNAPSHOT, stream_url=None)])
                },
            )
        },
    ),
    ("GET", "/v1/tasks/{task_id}"): Operation(
        id="getTask",
        tag="tasks",
        summary="One task as it stands",
        parameters=(_TASK_ID,),
        answers={
            200: Answer(
                description="The task.",
                body=wire.Snapshot,
                examples={"running": examples.SNAPSHOT, "failed": examples.FAILED},
            )
        },
        refusals=(errors.TaskNotFound,),
    ),
    ("GET", "/v1/tasks/{task_id}/stream"): Operation(
        id="streamTask",
        tag="tasks",
        summary="The events of a task, live or replayed",
        description="One `started`, any number of `token`, then exactly one of `end` and `error`; then the "
        "server closes. Each has an `id`, counting from 0. A broken connection is resumed with "
        "`Last-Event-ID`: nothing is repeated and nothing is missing. Lines that begin with a colon "
        "are heartbeats. Losing a reader does not end the task, unless the server is configured so.",
        parameters=(
            _TASK_ID,
            Parameter(
                name="Last-Event-ID",
                place="header",
                description="Continue after this event: `[0-9]{1,9}`; anything else replays from the start.",
                example="41",
            ),
            Parameter(
                name="last_event_id",
                place="query",
                description="The same, for clients that can't send the header, which wins.",
                example="41",
            ),
            Parameter(
                name="metrics",
                place="query",
                description="1 for `metrics` events too, until the first token: what a waiting task may "
                "expect. They are this reader's own, have no id, and are not replayed.",
                schema={"type": "string", "enum": ["0", "1"], "default": "0"},
                example="1",
            ),
        ),
        answers={
            200: Answer(
                description="The events; the schema is that of each.",
                body={"$ref": "#/components/schemas/Event"},
                media_type=EVENTS,
                examples={"whole": examples.FRAMES},
            ),
            204: Answer(description="There is nothing after `Last-Event-ID`: a browser's EventSource stops."),
        },
        refusals=(errors.TaskNotFound, errors.TooManyStreams),
        ticket=True,
    ),
    ("POST", "/v1/tasks/{task_id}/cancel"): Operation(
        id="cancelTask",
        tag="tasks",
        summary="End a task",
        description="From this answer on no token of it is sent to anybody. Takes no body. A task that has "
        "ended stays as it is, so it can be said again.",
        parameters=(_TASK_ID,),
        answers={
            200: Answer(
                description="The state it is in for ever.",
                body=wire.Cancelled,
                examples={"cancelled": examples.CANCELLED},
            )
        },
        refusals=(errors.TaskNotFound, errors.BodyTimeout, errors.UnsupportedMediaType),
    ),
    ("GET", "/v1/pools/{pool_id}/health"): Operation(
        id="getPoolHealth",
        tag="pools",
        summary="How a pool is",
        description="Its engine and model, slots, the two lanes of its queue, every replica; and why, if "
        "something is wrong. A replica that has another engine version or another model than those that were "
        "ready before it is kept out, and says so in its `last_error`.",
        parameters=(_POOL_ID,),
        answers={
            200: Answer(
                description="As it is now.",
                body=PoolHealth,
                examples={
                    "ready": examples.HEALTH,
                    "one of two replicas kept out": examples.TWO_REPLICAS,
                    "drained": examples.DRAINED,
                },
            )
        },
        refusals=(errors.UnknownPool,),
    ),
    ("POST", "/v1/pools/{pool_id}/reload"): Operation(
        id="reloadPool",
        tag="pools",
        summary="Give a pool other engines",
        description="Without a body, or without `replicas`: what the configuration file says of the pool "
        "now. Every new engine is probed, has to decode and to pass the test of seeds; then all changes in "
        "one step. The queue keeps every task and its order; engines that go finish what they run. If "
        "anything is wrong, nothing changes.",
        parameters=(_POOL_ID,),
        body=control.ReloadBody,
        body_optional=True,
        examples=examples.RELOADS,
        answers={
            200: Answer(
                description="Done.", body=reload.Reloaded, examples={"two engines": examples.RELOADED}
            )
        },
        refusals=(
            *(errors.UnknownPool, errors.BodyTimeout, errors.ReloadFailed),
            *(errors.BodyTooLarge, errors.UnsupportedMediaType),
        ),
    ),
    ("POST", "/v1/pools/{pool_id}/drain"): Operation(
        id="drainPool",
        tag="pools",
        summary="Let a pool run empty",
        description="New tasks are refused with 503; what waits and runs goes on until the deadline and is "
        "failed then. Until a reload, or until the drain is cancelled. Not in the home profile.",
        parameters=(_POOL_ID,),
        body=control.DrainBody,
        examples=examples.DRAINS,
        answers={
            200: Answer(
                description="As it is now.", body=control.Drained, examples={"one": examples.DRAIN_ANSWER}
            )
        },
        refusals=(
            *(errors.UnknownPool, errors.BodyTimeout, errors.BodyTooLarge, errors.UnsupportedMediaType),
        ),
    ),
    ("GET", "/v1/capabilities"): Operation(
        id="getCapabilities",
        tag="pools",
        summary="What a client can plan with",
        description="The version of this API, and what each pool can do; the default pool comes first.",
        answers={
            200: Answer(
                description="As the engines run now.",
                body=Capabilities,
                examples={"one": examples.CAPABILITIES},
            )
        },
    ),
    ("GET", "/v1/status"): Operation(
        id="getStatus",
        tag="service",
        summary="Everything at a glance",
        description="Made for a page or a terminal that asks every second.",
        answers={
            200: Answer(description="As it is now.", body=Status, examples={"one": examples.STATUS}),
        },
    ),
    ("GET", "/metrics"): Operation(
        id="getMetrics",
        tag="service",
        summary="The numbers for Prometheus",
        description="In Prometheus' text format 0.0.4; docs/metrics.md explains each. The home profile has "
        "fewer.",
        answers={
            200: Answer(
                description="As they are now.",
                body={"type": "string"},
                media_type=PROMETHEUS,
                examples={"part": examples.METRICS},
            )
        },
    ),
    ("GET", "/openapi.json"): Operation(
        id="getOpenapi",
        tag="service",
        summary="This document",
        answers={
            200: Answer(
                description="OpenAPI 3.1.",
                body={
                    "type": "object",
                    "properties": {"openapi": {"type": "string", "description": "The version of OpenAPI."}},
                    "required": ["openapi"],
                },
            )
        },
    ),
}

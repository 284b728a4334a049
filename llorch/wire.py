"""The JSON of requests and answers: strict types, and the one place that turns them into ours and back.

The one rule: a body is checked whole, here; an error names the path of the field and the way to mend it.
Absent and null are different: an optional field may be left out, never null.
"""

import difflib
import re
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Annotated, Any, TypeVar, get_args

import msgspec
from msgspec import UNSET, Meta, UnsetType

from llorch.errors import InvalidParams, LlorchError, QueueFull, ReloadFailed, ReloadStep
from llorch.events import Error, FinishReason
from llorch.logs import timestamp
from llorch.task import (
    DEFAULT_SAMPLING,
    NO_METADATA,
    Determinism,
    Message,
    Priority,
    Sampling,
    State,
    Task,
    TaskRequest,
)

MAX_STOP_BYTES = 128
MAX_GRAMMAR_BYTES = 64 * 1024
MAX_GROUPS = 1000
MAX_REPEATS = 10_000
MAX_SESSION_ID_BYTES = 128
MAX_METADATA_KEY_BYTES = 64
MAX_METADATA_VALUE_BYTES = 512

T = TypeVar("T")
Unit = Annotated[float, Meta(ge=0, le=1)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
Count = Annotated[int, Meta(ge=0)]
TaskId = Annotated[str, Meta(pattern="^[0-9a-f]{32}$")]
StateName = Annotated[str, Meta(extra_json_schema={"enum": [state.value for state in State]})]
StopText = Annotated[str, Meta(min_length=1, extra_json_schema={"maxLength": MAX_STOP_BYTES})]
Grammar = Annotated[str, Meta(min_length=1, extra_json_schema={"maxLength": MAX_GRAMMAR_BYTES})]
SessionId = Annotated[str, Meta(min_length=1, extra_json_schema={"maxLength": MAX_SESSION_ID_BYTES})]


class TaskBody(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """The body of `POST /v1/tasks` [MVP-030]. The ranges are ours: the engine coerces silently."""

    prompt: Annotated[str, Meta(min_length=1)] | UnsetType = UNSET
    messages: Annotated[tuple[Message, ...], Meta(min_length=1)] | UnsetType = UNSET
    max_tokens: Annotated[int, Meta(ge=1)] | UnsetType = UNSET
    seed: Annotated[int, Meta(ge=0, le=2**32 - 2)] | UnsetType = UNSET
    temperature: Annotated[float, Meta(ge=0, le=5)] | UnsetType = UNSET
    top_k: Annotated[int, Meta(ge=0, le=1000)] | UnsetType = UNSET
    top_p: Unit | UnsetType = UNSET
    min_p: Unit | UnsetType = UNSET
    typical_p: Unit | UnsetType = UNSET
    repeat_penalty: Annotated[float, Meta(ge=0.5, le=2)] | UnsetType = UNSET
    repeat_last_n: Annotated[int, Meta(ge=0, le=4096)] | UnsetType = UNSET
    presence_penalty: Penalty | UnsetType = UNSET
    frequency_penalty: Penalty | UnsetType = UNSET
    stop: Annotated[tuple[StopText, ...], Meta(max_length=8)] | UnsetType = UNSET
    grammar: Grammar | UnsetType = UNSET
    json_schema: dict[str, Any] | UnsetType = UNSET
    priority: Priority = "interactive"
    pool_id: str | UnsetType = UNSET
    session_id: SessionId | UnsetType = UNSET
    determinism: Determinism | UnsetType = UNSET
    metadata: Annotated[dict[str, str], Meta(max_length=16)] | UnsetType = UNSET


class Created(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The 202 of `POST /v1/tasks`; `predicted_start_ms` is milliseconds from admission."""

    task_id: TaskId
    queue_position: Count
    predicted_start_ms: Count | None = None
    stream_url: str
    cancel_url: str
    correlation_id: str | None = None


class Cancelled(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to a cancel: the state the task is in for ever."""

    task_id: TaskId
    state: StateName
    tokens_out: Count


class Timings(msgspec.Struct, frozen=True, kw_only=True):
    """Milliseconds: admission to start, start to first token, first to last token; null until known."""

    queue_ms: Count | None
    first_token_ms: Count | None
    decode_time_ms: Count | None


class Snapshot(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A task as it stands; `queue_position` is null once it started or ended."""

    task_id: TaskId
    state: StateName
    priority: Priority
    determinism: Determinism
    pool_id: str
    replica_id: str | None = None
    session_id: str | None = None
    metadata: Mapping[str, str] | UnsetType = UNSET
    queue_position: Count | None
    predicted_start_ms: Count | None = None
    tokens_in: Count | None = None
    tokens_out: Count
    created_at: str
    timings: Timings
    finish_reason: FinishReason | None = None
    error: Error | None = None
    stream_url: str | None = None


class TaskList(msgspec.Struct, frozen=True):
    """Recent tasks, newest first."""

    tasks: list[Snapshot]


class Refusal(msgspec.Struct, frozen=True, kw_only=True):
    """The envelope of every error."""

    code: str
    message: str
    engine: str | None
    policy_label: str | UnsetType = UNSET
    retriable: bool | UnsetType = UNSET
    retry_after_ms: Count | UnsetType = UNSET
    hint: str | UnsetType = UNSET
    steps: list[ReloadStep] | UnsetType = UNSET


# -- what comes in ---------------------------------------------------------------------------------

_decode_body = msgspec.json.Decoder(TaskBody).decode
_SAMPLING_FIELDS = [field.name for field in msgspec.structs.fields(Sampling)]
_WHERE = re.compile(r"(?P<what>.*?)(?: - at `(?P<path>[^`]*)`)?", re.DOTALL)
_UNKNOWN = re.compile(r"Object contains unknown field `(?P<field>.*)`", re.DOTALL)
_MAX_NAME_CHARS = 60
_ELSEWHERE = {  # what people bring along from other APIs
    "model": "leave it out: a pool has one model (pool_id chooses the pool)",
    "stream": "leave it out: every task has a stream, at the stream_url of its answer",
    **dict.fromkeys(
        ("n_predict", "num_predict", "max_new_tokens", "max_completion_tokens"), "did you mean max_tokens?"
    ),
}
_REPEATS = re.compile(  # {m,n} in a grammar or a pattern; bounds in a schema
    r'\{\s*([0-9]*)\s*,?\s*([0-9]*)\s*\}|"(?:min|max)(?:Items|Length|Properties)":([0-9][0-9.]*(?:e[+-]?[0-9]+)?)',
    re.ASCII,
)
_CHOICES = {"$.priority": get_args(Priority), "$.determinism": get_args(Determinism)}


def task_request(body: bytes, *, max_tokens: int) -> TaskRequest:
    """The checked request in `body`; `max_tokens` is the configured ceiling. Raises InvalidParams."""
    return _request(decoded(body, _decode_body, {"$": TaskBody, "$.messages": Message}), max_tokens)


def decoded(body: bytes, decode: Callable[[bytes], T], kinds: Mapping[str, type]) -> T:
    """What is in `body`; `kinds` are the structs at its paths, for suggestions. Raises InvalidParams."""
    if not body:
        raise InvalidParams("$: the body is empty, expected a JSON object")
    try:
        return decode(body)
    except msgspec.MsgspecError as error:
        raise InvalidParams(_explain(str(error), kinds)) from None
    except UnicodeDecodeError as error:
        raise InvalidParams(f"$: the body is not UTF-8 (at byte {error.start} of a string)") from None
    except RecursionError:
        raise InvalidParams("$: nested too deeply") from None


def _explain(text: str, kinds: Mapping[str, type]) -> str:
    """msgspec's message as `path: what is wrong, and what was meant`."""
    match = _WHERE.fullmatch(text)
    what, path = (match["what"], match["path"] or "$") if match else (text, "$")
    if unknown := _UNKNOWN.fullmatch(what):
        field = unknown["field"][:_MAX_NAME_CHARS]
        kind = kinds.get(path.partition("[")[0], kinds["$"])
        known = [f.name for f in msgspec.structs.fields(kind)]
        if kind is TaskBody and field in _ELSEWHERE:
            return f"$.{field}: unknown field, {_ELSEWHERE[field]}"
        near = difflib.get_close_matches(field, known, n=1)
        return f"{path}.{field}: unknown field" + (f", did you mean {near[0]}?" if near else "")
    if path in _CHOICES:
        return f"{path}: expected one of {', '.join(_CHOICES[path])}"
    what = what.replace("`", "")
    if missing := re.fullmatch(r"Object missing required field (\w+)", what):
        return f"{path}.{missing[1]}: this field is required"
    return (
        f"{path}: {what[:1].lower()}{what[1:200]}" if not what.startswith("JSON") else f"{path}: {what[:200]}"
    )


def _request(said: TaskBody, max_tokens: int) -> TaskRequest:
    given: dict[str, Any] = {
        field: value for field in _SAMPLING_FIELDS if (value := getattr(said, field)) is not UNSET
    }
    _check_fields(said, max_tokens)
    if said.json_schema is not UNSET:
        given["json_schema"] = _encoded_schema(said.json_schema)
    return TaskRequest(
        prompt=_or(said.prompt, None),
        messages=_or(said.messages, ()),
        max_tokens=_or(said.max_tokens, None),
        sampling=Sampling(**given) if given else DEFAULT_SAMPLING,
        determinism=_or(said.determinism, "best_effort" if said.seed is UNSET else "strict"),
        priority=said.priority,
        pool_id=_or(said.pool_id, None),
        session_id=_or(said.session_id, None),
        metadata=_or(said.metadata, NO_METADATA),
    )


def _check_fields(said: TaskBody, max_tokens: int) -> None:
    """What no single field's type can say."""
    if (said.prompt is UNSET) == (said.messages is UNSET):
        raise InvalidParams("$: exactly one of prompt and messages is needed")
    if said.max_tokens is not UNSET and said.max_tokens > max_tokens:
        raise InvalidParams(f"$.max_tokens: expected int <= {max_tokens} (limits.max_tokens)")
    if said.grammar is not UNSET and said.json_schema is not UNSET:
        raise InvalidParams("$: at most one of grammar and json_schema")
    if said.determinism == "strict" and said.seed is UNSET:
        raise InvalidParams("$.determinism: strict needs a seed")
    for index, text in enumerate(_or(said.stop, ())):
        _check_size(f"$.stop[{index}]", text, MAX_STOP_BYTES)
    _check_size("$.grammar", _or(said.grammar, ""), MAX_GRAMMAR_BYTES)
    _check_bombs("$.grammar", _or(said.grammar, ""))
    _check_size("$.session_id", _or(said.session_id, ""), MAX_SESSION_ID_BYTES)
    for key, value in _or(said.metadata, {}).items():
        _check_size("$.metadata: a key", key, MAX_METADATA_KEY_BYTES)
        _check_size(f"$.metadata[{key!r}]", value, MAX_METADATA_VALUE_BYTES)


def _encoded_schema(schema: dict[str, Any]) -> bytes:
    try:
        encoded = msgspec.json.encode(schema)
    except (OverflowError, ValueError, RecursionError, msgspec.MsgspecError):
        raise InvalidParams("$.json_schema: has a number or a depth that no engine takes") from None
    if len(encoded) > MAX_GRAMMAR_BYTES:
        raise InvalidParams(f"$.json_schema: {len(encoded)} bytes, at most {MAX_GRAMMAR_BYTES}")
    _check_bombs("$.json_schema", encoded.decode())
    return encoded


def _check_bombs(path: str, text: str) -> None:
    """Refuse what takes the engine down: nested thousands of groups crash it, vast repeats eat its memory."""
    if text.count("(") > MAX_GROUPS:
        raise InvalidParams(f"{path}: {text.count('(')} groups, at most {MAX_GROUPS}")
    numbers = (number for match in _REPEATS.finditer(text) for number in match.groups() if number)
    if any(float(number) > MAX_REPEATS for number in numbers):
        raise InvalidParams(f"{path}: a repeat of over {MAX_REPEATS}")


def _check_size(path: str, text: str, most: int) -> None:
    size = len(text.encode())
    if size > most:
        raise InvalidParams(f"{path}: {size} bytes, at most {most}")


def _or(value: T | UnsetType, default: T) -> T:
    return default if isinstance(value, UnsetType) else value


# -- what goes out ---------------------------------------------------------------------------------


def created(task: Task, correlation_id: str | None) -> Created:
    """The answer to an admitted task."""
    return Created(
        task_id=task.id,
        queue_position=task.queue_position,
        predicted_start_ms=task.predicted_start_ms,
        stream_url=stream_url(task),
        cancel_url=f"/v1/tasks/{task.id}/cancel",
        correlation_id=correlation_id,
    )


def stream_url(task: Task) -> str:
    """The path of the task's stream, with its ticket where a token is needed."""
    ticket = f"?ticket={task.ticket}" if task.ticket else ""
    return f"/v1/tasks/{task.id}/stream{ticket}"


def snapshot(task: Task, queue_position: int | None, *, with_stream_url: bool) -> Snapshot:
    """The task as it stands."""
    return Snapshot(
        task_id=task.id,
        state=task.state.value,
        priority=task.request.priority,
        determinism=task.request.determinism,
        pool_id=task.pool_id,
        replica_id=task.replica_id,
        session_id=task.request.session_id,
        metadata=task.request.metadata or UNSET,
        queue_position=queue_position,
        predicted_start_ms=task.predicted_start_ms,
        tokens_in=task.tokens_in,
        tokens_out=task.tokens_out,
        created_at=timestamp(datetime.fromtimestamp(task.created_at, UTC)),
        timings=Timings(
            queue_ms=task.queue_ms, first_token_ms=task.first_token_ms, decode_time_ms=task.decode_time_ms
        ),
        finish_reason=task.finish_reason,
        error=task.error,
        stream_url=stream_url(task) if with_stream_url else None,
    )


def refusal(error: LlorchError, *, home: bool) -> Refusal:
    """The envelope of `error`; the home profile has fewer fields."""
    waits = error.status in (429, 503)
    extended = not home or waits
    return Refusal(
        code=error.code,
        message=error.message,
        engine=error.engine,
        policy_label=error.policy_label if isinstance(error, QueueFull) and not home else UNSET,
        retriable=error.retriable if extended and error.retriable is not None else UNSET,
        retry_after_ms=error.retry_after_ms if extended and error.retry_after_ms is not None else UNSET,
        hint=error.hint if error.hint is not None and not home else UNSET,
        steps=list(error.steps) if isinstance(error, ReloadFailed) and error.steps and not home else UNSET,
    )


def state_filter(text: str | None) -> State | None:
    """`?state=` as a State; raises InvalidParams."""
    if text is None:
        return None
    try:
        return State(text)
    except ValueError:
        known = ", ".join(state.value for state in State)
        raise InvalidParams(f"?state: expected one of {known}, got {text[:_MAX_NAME_CHARS]!r}") from None


def limit_filter(text: str | None) -> int:
    """`?limit=` as 1 … 1000, 100 if not given; raises InvalidParams."""
    if text is None:
        return 100
    if not re.fullmatch(r"[0-9]{1,4}", text, re.ASCII) or not 1 <= int(text) <= 1000:
        raise InvalidParams(f"?limit: expected 1 to 1000, got {text[:_MAX_NAME_CHARS]!r}")
    return int(text)


def metrics_filter(text: str | None) -> bool:
    """Whether `?metrics=` asks for metrics events: 1, or 0 and absent; raises InvalidParams."""
    if text not in (None, "0", "1"):
        raise InvalidParams(f"?metrics: expected 0 or 1, got {text[:_MAX_NAME_CHARS]!r}")
    return text == "1"

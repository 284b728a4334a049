"""The API's description in OpenAPI 3.1: from the routes, the types of the wire, and what neither can say.

The one rule: it says exactly as much as the code does. The same code gives the same bytes, which stand in
docs/openapi.json and are served at `GET /openapi.json`.
"""

import http
import inspect
import json
import re
from collections.abc import Iterable
from typing import Any

import msgspec

from llorch import examples, wire
from llorch.capabilities import API_VERSION
from llorch.errors import LlorchError, MethodNotAllowed, NotFound
from llorch.glossary import meaning
from llorch.operations import (
    CORRELATION,
    EVENT_CODES,
    EVENT_TYPES,
    EVERYWHERE,
    JSON,
    OPERATIONS,
    TAGS,
    WITHOUT_ID,
    Answer,
    Operation,
    Parameter,
)

Schema = dict[str, Any]

DESCRIPTION = """\
llorch queues tasks for the engines of one GPU workstation and streams their tokens back.

JSON in, JSON out, UTF-8. Bodies are strict: an unknown field, a wrong type or a value out of range is a 400
whose message names the path. Every error is the same envelope, `Refusal`, in every route; besides those
listed at each, 404 `NOT_FOUND` answers a path that is none, and 405 `METHOD_NOT_ALLOWED` a method that a
path has not. Ignore fields that you don't know: a later version may add some. Each GET but the stream has its
HEAD. What no schema can say: sizes "of UTF-8" are bytes, and an integer is written 7, never 7.0."""

_REF = "#/components/schemas/{name}"
_REQUIREMENT = re.compile(r" ?\[[A-Z]+-[0-9]+(?:, [A-Z]+-[0-9]+)*\]")

_TASK_RULES: Schema = {  # what the decoder's types can't say, and the code checks
    "oneOf": [{"required": ["prompt"]}, {"required": ["messages"]}],
    "not": {"required": ["grammar", "json_schema"]},
    "if": {"properties": {"determinism": {"const": "strict"}}, "required": ["determinism"]},
    "then": {"required": ["seed"]},
}
_TASK_FIELDS: dict[str, Schema] = {
    "max_tokens": {"maximum": 2**31},
    "metadata": {
        "propertyNames": {"maxLength": wire.MAX_METADATA_KEY_BYTES},
        "additionalProperties": {"type": "string", "maxLength": wire.MAX_METADATA_VALUE_BYTES},
    },
}
_HEADERS: dict[str, Schema] = {
    "X-Correlation-Id": {
        "description": "The name of this request: yours, or a random one. Not in the home profile.",
        "schema": {"type": "string", "pattern": "^[A-Za-z0-9._:-]{1,128}$"},
    },
    "Content-Security-Policy": {
        "description": "What the page may do: run what is in it, and ask this server.",
        "schema": {"type": "string"},
        "required": True,
    },
    "Location": {"description": "The task's path.", "schema": {"type": "string"}, "required": True},
    "Retry-After": {
        "description": "When to try again, in whole seconds.",
        "schema": {"type": "integer", "minimum": 1},
        "required": True,
    },
    "X-Backoff-Ms": {
        "description": "The same in milliseconds, as `retry_after_ms` in the body.",
        "schema": {"type": "integer", "minimum": 1},
        "required": True,
    },
    "WWW-Authenticate": {
        "description": "How to authenticate.",
        "schema": {"const": "Bearer"},
        "required": True,
    },
    "Allow": {
        "description": "The methods that the path has.",
        "schema": {"type": "string"},
        "required": True,
    },
}
_OF_STATUS = {
    401: ("WWW-Authenticate",),
    405: ("Allow",),
    429: ("Retry-After", "X-Backoff-Ms"),
    503: ("Retry-After",),
}


def encoded(routes: Iterable[tuple[str, str]]) -> bytes:
    """The document of these routes (method, path) as JSON; the same bytes every time."""
    return json.dumps(document(routes), indent=1, ensure_ascii=False).encode() + b"\n"


def document(routes: Iterable[tuple[str, str]]) -> Schema:
    """The document of these routes (method, path), in their order; raises KeyError for one not described."""
    operations = {route: OPERATIONS[route] for route in routes}
    paths: dict[str, Schema] = {}
    for (method, path), operation in operations.items():
        paths.setdefault(path, {})[method.lower()] = _operation(operation)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "llorch",
            "summary": "An LLM orchestrator for one GPU workstation",
            "description": DESCRIPTION,
            "version": API_VERSION,
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/", "description": "The server that this document came from."}],
        "security": [{"token": []}, {}],
        "tags": [{"name": name, "description": text} for name, text in TAGS.items()],
        "paths": paths,
        "components": {
            "schemas": _schemas(operations.values()),
            "responses": _refusals(operations.values()),
            "parameters": {CORRELATION.name: _parameter(CORRELATION)},
            "headers": _HEADERS,
            "securitySchemes": {
                "token": {
                    "type": "http",
                    "scheme": "bearer",
                    "description": "The configured `auth.token`. Without one configured, none is asked for.",
                },
                "ticket": {
                    "type": "apiKey",
                    "in": "query",
                    "name": "ticket",
                    "description": "Opens one task's stream instead of the token; `stream_url` carries it.",
                },
            },
        },
    }


# -- operations ------------------------------------------------------------------------------------


def _operation(operation: Operation) -> Schema:
    said: Schema = {
        "operationId": operation.id,
        "tags": [operation.tag],
        "summary": operation.summary,
    }
    if operation.description:
        said["description"] = operation.description
    said["parameters"] = [
        *map(_parameter, operation.parameters),
        {"$ref": f"#/components/parameters/{CORRELATION.name}"},
    ]
    if operation.body is not None:
        content = {"schema": _reference(operation.body), "examples": _examples(operation.examples)}
        said["requestBody"] = {"required": not operation.body_optional, "content": {JSON: content}}
    if operation.open:
        said["security"] = []
    elif operation.ticket:
        said["security"] = [{"token": []}, {"ticket": []}, {}]
    answers = {str(status): _answer(answer) for status, answer in operation.answers.items()}
    refusals = {
        str(status): {"$ref": f"#/components/responses/{_name(kinds)}"}
        for status, kinds in _by_status(operation).items()
    }
    said["responses"] = answers | refusals
    return said


def _parameter(parameter: Parameter) -> Schema:
    said = {
        "name": parameter.name,
        "in": parameter.place,
        "description": parameter.description,
        "schema": parameter.schema,
    }
    required = {"required": True} if parameter.place == "path" else {}
    return said | required | {"example": parameter.example}


def _answer(answer: Answer) -> Schema:
    said: Schema = {"description": answer.description, "headers": _headers(*answer.headers)}
    if answer.body is not None:
        content = {"schema": _reference(answer.body)}
        if answer.examples:
            content["examples"] = _examples(answer.examples)
        said["content"] = {answer.media_type: content}
    if answer.links:
        said["links"] = answer.links
    return said


def _headers(*names: str) -> Schema:
    return {name: {"$ref": f"#/components/headers/{name}"} for name in ("X-Correlation-Id", *names)}


def _examples(values: dict[str, Any]) -> Schema:
    return {name: {"value": msgspec.to_builtins(value)} for name, value in values.items()}


# -- refusals --------------------------------------------------------------------------------------


def _by_status(operation: Operation) -> dict[int, list[type[LlorchError]]]:
    kinds = {kind for kind in EVERYWHERE if not (operation.open and kind.status == 401)} | {
        *operation.refusals
    }
    statuses = sorted({kind.status for kind in kinds})
    ordered = [type(example) for example in examples.REFUSALS]
    return {
        status: [kind for kind in ordered if kind in kinds and kind.status == status] for status in statuses
    }


def _refusals(operations: Iterable[Operation]) -> Schema:
    """Every set of refusals that shares a status in some route, and those that no route has."""
    sets: list[list[type[LlorchError]]] = [[NotFound], [MethodNotAllowed]]
    sets += [kinds for operation in operations for kinds in _by_status(operation).values()]
    return {_name(kinds): _refusal(kinds) for kinds in sets}


def _name(kinds: list[type[LlorchError]]) -> str:
    return ".".join(kind.code for kind in kinds)


def _refusal(kinds: list[type[LlorchError]]) -> Schema:
    status = kinds[0].status
    schema = {"properties": {"code": {"enum": [kind.code for kind in kinds]}}}
    shown = {
        error.code: wire.refusal(error, home=False) for error in examples.REFUSALS if type(error) in kinds
    }
    texts = [f"`{kind.code}`: {_text(kind)}" for kind in kinds]
    return {
        "description": f"{http.HTTPStatus(status).phrase}. " + " ".join(texts),
        "headers": _headers(*_OF_STATUS.get(status, ())),
        "content": {
            JSON: {
                "schema": {"allOf": [_reference(wire.Refusal), schema]},
                "examples": _examples(shown),
            }
        },
    }


# -- schemas ---------------------------------------------------------------------------------------


def _reference(body: Any) -> Schema:
    return body if isinstance(body, dict) else {"$ref": _REF.format(name=body.__name__)}


def _schemas(operations: Iterable[Operation]) -> Schema:
    """Every type that goes over the wire, by name, in the order of the alphabet."""
    asked = {operation.body for operation in operations} - {None}
    bodies = [answer.body for operation in operations for answer in operation.answers.values()]
    answered = {body for body in bodies if isinstance(body, type)} | {wire.Refusal, *EVENT_TYPES.values()}
    schemas = _components(asked, sent=False) | _components(answered, sent=True) | {"Event": _event()}
    _tighten(schemas)
    return dict(sorted(schemas.items()))


def _components(types: set[Any], *, sent: bool) -> dict[str, Schema]:
    structs = {name: kind for it in types for name, kind in _structs(it).items()}
    ordered = sorted(types, key=lambda it: it.__name__)
    _, schemas = msgspec.json.schema_components(ordered, ref_template=_REF)
    for name, schema in schemas.items():
        del schema["title"]
        schema["description"] = _text(structs[name])
        if sent:
            _as_sent(structs[name], schema)
        if not schema["required"]:
            del schema["required"]
        for field, its in schema["properties"].items():
            schema["properties"][field] = {"description": meaning(name, field)} | its
    return schemas


def _structs(kind: Any) -> dict[str, type[msgspec.Struct]]:
    """Every struct in `kind`, which is one, by name."""
    found = {kind.__name__: kind}
    waiting: list[Any] = [msgspec.inspect.type_info(kind)]
    while waiting:
        info = waiting.pop()
        if isinstance(info, msgspec.inspect.StructType):
            found[info.cls.__name__] = info.cls
            waiting += [field.type for field in info.fields]
        elif isinstance(info, msgspec.inspect.UnionType):
            waiting += info.types
        elif isinstance(info, msgspec.inspect.Metadata):
            waiting.append(info.type)
        elif hasattr(info, "item_type"):
            waiting.append(info.item_type)
    return found


def _as_sent(kind: type[msgspec.Struct], schema: Schema) -> None:
    """What we encode is stricter than what we would decode: a default is left out always, or never."""
    leaves_out = kind.__struct_config__.omit_defaults
    for field in msgspec.structs.fields(kind):
        its = schema["properties"][field.encode_name]
        if field.default is msgspec.NODEFAULT or field.default is msgspec.UNSET:
            continue
        its.pop("default", None)
        if not leaves_out:
            schema["required"].append(field.encode_name)
        elif field.default is None and "anyOf" in its:
            [value] = [choice for choice in its.pop("anyOf") if choice != {"type": "null"}]
            its |= value


def _event() -> Schema:
    """One event of a stream, as the convention for `text/event-stream` is: `data` is text that is JSON."""
    return {
        "description": "One event of a stream; its `data` is JSON, on one line.",
        "oneOf": [
            {
                "type": "object",
                "properties": {
                    "id": {"type": "string", "pattern": "^[0-9]{1,9}$", "description": "Counts from 0."},
                    "event": {"const": name, "description": "The kind of event."},
                    "data": {
                        "type": "string",
                        "contentMediaType": JSON,
                        "contentSchema": _reference(kind),
                        "description": _text(kind),
                    },
                },
                "required": ["event", "data"] if name in WITHOUT_ID else ["id", "event", "data"],
                "additionalProperties": False,
            }
            for name, kind in EVENT_TYPES.items()
        ],
    }


def _tighten(schemas: dict[str, Schema]) -> None:
    """Add the rules that no single type can say."""
    task = schemas["TaskBody"]
    task |= _TASK_RULES
    for field, rule in _TASK_FIELDS.items():
        task["properties"][field] |= rule
    schemas["ReplicaBody"]["properties"]["devices"]["default"] = []
    if "DrainBody" in schemas:
        drain = schemas["DrainBody"]
        drain["oneOf"] = [{"required": ["deadline_ms"]}, {"required": ["cancel"]}]
        drain["properties"]["cancel"]["const"] = True
    schemas["Error"]["properties"]["code"]["enum"] = list(EVENT_CODES)
    schemas["Refusal"]["required"] = ["code", "message", "engine"]


def _text(kind: type) -> str:
    """The docstring of a type, for those who don't know its requirements' numbers."""
    return _REQUIREMENT.sub("", inspect.cleandoc(kind.__doc__ or ""))

"""The API's description, as the tests hold answers against it: `Live.ask` does so with each that it gets.

The one rule: a description leaves room for later fields, a test doesn't: what is not described may not come.
"""

import functools
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jsonschema_rs

FILE = Path(__file__).parent.parent / "docs" / "openapi.json"
ALWAYS = {"content-type", "content-length", "date", "server", "connection", "cache-control", "vary"}
ALWAYS |= {"cross-origin-opener-policy", "cross-origin-resource-policy", "referrer-policy", "x-frame-options"}
ALWAYS |= {"x-content-type-options", "x-accel-buffering", "transfer-encoding"}  # what the transport is about


@functools.cache
def document() -> dict[str, Any]:
    """The description, with every object of an answer closed."""
    described = json.loads(FILE.read_text("utf-8"))
    schemas = described["components"]["schemas"]
    described["components"]["schemas"] = {name: closed(schema) for name, schema in schemas.items()}
    return described


def closed(schema: Any) -> Any:
    """The same schema, with room for nothing but what it names."""
    if isinstance(schema, list):
        return [closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    parts = {name: closed(part) for name, part in schema.items()}
    if schema.get("type") == "object" and "properties" in schema:
        parts.setdefault("additionalProperties", False)
    return parts


@functools.cache
def validator(pointer: str) -> jsonschema_rs.Draft202012Validator:
    """What judges by the schema at `pointer` of the description."""
    return jsonschema_rs.Draft202012Validator({**document(), "$ref": f"#{quote(pointer)}"})


def operation(method: str, path: str) -> tuple[str, dict[str, Any]] | None:
    """The JSON pointer to the operation and the operation itself, None if there is no such route."""
    for template, methods in document()["paths"].items():
        if re.fullmatch(re.sub(r"\{\w+\}", "[^/]+", template), path) and method.lower() in methods:
            place = template.replace("~", "~0").replace("/", "~1")
            return f"/paths/{place}/{method.lower()}", methods[method.lower()]
    return None


def check(method: str, path: str, status: int, headers: Mapping[str, str], body: Any) -> None:
    """Assert that this route may give this answer; `body` is decoded JSON, None if there is none."""
    found = operation("GET" if method == "HEAD" else method, path)
    if found is None or status == 405:
        if body is not None:  # else the answer to HEAD, or to a preflight
            judged(validator("/components/schemas/Refusal"), body, f"{method} {path} {status}")
        return
    pointer, described = found
    assert str(status) in described["responses"], f"{method} {path}: {status} is not described"
    pointer += f"/responses/{status}"
    answer = described["responses"][str(status)]
    if "$ref" in answer:
        pointer = answer["$ref"].removeprefix("#")
        answer = document()["components"]["responses"][pointer.rpartition("/")[2]]
    known = {name.lower() for name in answer["headers"]} | ALWAYS
    unknown = {name.lower() for name in headers} - known
    assert not {name for name in unknown if not name.startswith("access-control-")}, unknown
    if "application/json" in answer.get("content", {}) and method != "HEAD":
        where = f"{pointer}/content/application~1json/schema"
        judged(validator(where), body, f"{method} {path} {status}")
    else:
        assert body is None


def judged(by: jsonschema_rs.Draft202012Validator, value: Any, what: str) -> None:
    """Assert that `value` is valid."""
    faults = [
        f"{what} at {'/'.join(map(str, it.instance_path))}: {it.message}" for it in by.iter_errors(value)
    ]
    assert not faults, faults

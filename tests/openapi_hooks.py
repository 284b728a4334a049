"""What schemathesis has to know of llorch besides its description; loaded by it, in a process of its own."""

from typing import Any

import requests
import schemathesis

INTEGERS = ("max_tokens", "seed", "top_k", "repeat_last_n", "deadline_ms", "slots", "devices")


@schemathesis.hook
def map_body(context: schemathesis.HookContext, body: Any) -> Any:
    """7.0 is an integer to JSON Schema, and by contract none to llorch: write it 7."""
    return written(body)


def written(value: Any, *, integer: bool = False) -> Any:
    """`value` with each whole number as an integer where one is wanted."""
    if isinstance(value, dict):
        return {name: written(inner, integer=name in INTEGERS) for name, inner in value.items()}
    if isinstance(value, list):
        return [written(inner, integer=integer) for inner in value]
    return int(value) if integer and isinstance(value, float) and value.is_integer() else value


@schemathesis.hook
def after_call(context: schemathesis.HookContext, case: Any, response: Any) -> None:
    """A drain is ended again: what comes after it would be answered 503."""
    if case.operation.path.endswith("/drain") and response.status_code == 200:
        sent = {name: value for name, value in response.request.headers.items() if name == "Authorization"}
        requests.post(response.request.url, json={"cancel": True}, headers=sent, timeout=10)

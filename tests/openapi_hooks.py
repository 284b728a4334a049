"""What schemathesis has to know of llorch besides its description; loaded by it, in a process of its own."""

from typing import Any

import schemathesis

INTEGERS = ("max_tokens", "seed", "top_k", "repeat_last_n")


@schemathesis.hook
def map_body(context: schemathesis.HookContext, body: Any) -> Any:
    """7.0 is an integer to JSON Schema, and by contract none to llorch: write it 7."""
    if isinstance(body, dict):
        whole = {name: int(body[name]) for name in INTEGERS if isinstance(body.get(name), float)}
        return body | {name: value for name, value in whole.items() if value == body[name]}
    return body

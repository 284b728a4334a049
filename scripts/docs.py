"""The parts of docs/ that are made from the program, each between two comments; run by `scripts/docs`.

The types and defaults are the configuration's own, the words on each key those of config.example.toml, and
the arrows those of the transition table. A test holds the files equal to what this makes.
"""

import re
import sys
import tomllib
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from llorch.config import env_name
from llorch.schema import Config, PoolTable, ReplicaTable, Section
from llorch.task import TRANSITIONS, State

ROOT = Path(__file__).parent.parent
POOL, REPLICA = "pools.NAME", "pools.NAME.replicas"
NEEDED = {f"{REPLICA}.endpoint"}  # its default would be refused
BY_COMMAS = "in the environment with commas between"
STEPS = {  # the method of Task that leads into each state
    State.RUNNING: "start",
    State.COMPLETED: "complete",
    State.FAILED: "fail",
    State.CANCELLED: "cancel",
}


def configuration() -> str:
    """Every table of the configuration with its keys."""
    words = _words()
    parts = []
    top: list[str] = []
    for key, hint in typing.get_type_hints(Config, include_extras=True).items():
        if isinstance(hint, type) and issubclass(hint, Section):
            rows = [_row(f"{key}.{name}", kind, default, words) for name, kind, default in _keys(hint)]
            parts.append(f"## `[{key}]`\n\n{_about(hint)}\n\n{_table(rows)}")
        elif key == "pools":
            parts += [_of_many(f"[{POOL}]", POOL, PoolTable, words)]
            parts += [_of_many(f"[[{REPLICA}]]", REPLICA, ReplicaTable, words)]
        else:
            top.append(_row(key, hint, getattr(Config(), key), words))
    return "\n\n".join(["## At the top of the file\n\n" + _table(top), *parts])


def _of_many(heading: str, at: str, section: type[Section], words: dict[str, str]) -> str:
    """A table that may stand in the file more than once, under a name of the user's own."""
    keys = [row for row in _keys(section) if f"{at}.{row[0]}" != REPLICA]
    own = {f"{at}.{name}": words.get(f"{at}.{name}") or words[f"adapter.{name}"] for name, _, _ in keys}
    rows = [_row(f"{at}.{name}", kind, default, own) for name, kind, default in keys]
    return f"## `{heading}`\n\n{_about(section)}\n\n{_table(rows)}"


def states() -> str:
    """The states of a task and the ways between them, as Mermaid draws them."""
    lines = ["stateDiagram-v2", "    [*] --> queued: admit"]
    for state in State:
        ways = [target for target in State if target in TRANSITIONS[state]]
        lines += [f"    {state.value} --> {target.value}: {STEPS[target]}" for target in ways]
        lines += [f"    {state.value} --> [*]"] if state.final else []
    return "```mermaid\n" + "\n".join(lines) + "\n```"


PARTS: dict[str, tuple[str, Callable[[], str]]] = {
    "configuration": ("configuration.md", configuration),
    "states": ("design.md", states),
}


def renewed(part: str, text: str) -> str:
    """`text` with this part made anew."""
    pattern = rf"(<!-- {part}: made by scripts/docs -->\n).*?(<!-- {part}: end -->)"
    made, count = re.subn(pattern, lambda m: f"{m[1]}\n{PARTS[part][1]()}\n\n{m[2]}", text, flags=re.DOTALL)
    if count != 1:
        raise ValueError(f"{part} has {count} places in {PARTS[part][0]}")
    return made


def _keys(section: type[Section]) -> list[tuple[str, Any, Any]]:
    hints = typing.get_type_hints(section, include_extras=True)
    return [(name, hint, getattr(section(), name)) for name, hint in hints.items()]


def _words() -> dict[str, str]:
    """What config.example.toml says beside each key."""
    table, found = "", {}
    for line in (ROOT / "config.example.toml").read_text("utf-8").splitlines():
        if heading := re.fullmatch(r"(?:# )?\[+(\w+)(?:\.\w+)?(\.replicas)?\]+.*", line):
            table = f"{POOL if heading[1] == 'pools' else heading[1]}{heading[2] or ''}."
        elif key := re.fullmatch(r"(?:# )?(\w+) = .*?  # (.*)", line):
            found.setdefault(table + key[1], key[2])
    return found


def _about(section: type[Section]) -> str:
    return " ".join((section.__doc__ or "").split())


def _table(rows: list[str]) -> str:
    head = "| key | type | default | allowed | environment | what it is for |"
    return "\n".join([head, "| --- " * 6 + "|", *rows])


def _row(key: str, hint: Any, default: Any, words: dict[str, str]) -> str:
    kind, allowed = _kind(hint)
    shown = msgspec.json.encode(default).decode()
    assert tomllib.loads(f"x = {shown}")  # JSON and TOML agree on all that is used here
    shown = "none, it is needed" if key in NEEDED else f"`{shown}`"
    variable = f"`{env_name(key)}`"
    if key.startswith("pools."):
        variable, allowed = "none", allowed.removesuffix(BY_COMMAS).removesuffix("; ")
    return f"| `{key}` | {kind} | {shown} | {allowed} | {variable} | {words[key]} |"


def _kind(hint: Any) -> tuple[str, str]:
    """A type and what it allows, in words."""
    info = msgspec.inspect.type_info(hint)
    if isinstance(info, msgspec.inspect.UnionType):
        kinds = [_of(part) for part in info.types]
        return " or ".join(kind for kind, _ in kinds), " or ".join(allowed for _, allowed in kinds)
    return _of(info)


def _of(info: Any) -> tuple[str, str]:
    match info:
        case msgspec.inspect.LiteralType(values=values):
            return "string", " or ".join(f'`"{value}"`' for value in sorted(values))
        case msgspec.inspect.IntType(ge=low, le=high):
            return "integer", f"{low:,} … {high:,}"
        case msgspec.inspect.FloatType(gt=low, le=high):
            return "number", f"over {low:g}, up to {high:,}"
        case msgspec.inspect.BoolType():
            return "boolean", "`true` or `false`"
        case msgspec.inspect.VarTupleType(item_type=item):
            kind, allowed = _of(item)
            return f"list of {kind}s", f"each {allowed}; {BY_COMMAS}" if allowed else BY_COMMAS
        case msgspec.inspect.StrType():
            return "string", ""
    raise TypeError(f"no words for {info}")


def main() -> int:
    """Write each part anew; 1 if any was not as it should be."""
    changed = 0
    for part, (name, _) in PARTS.items():
        path = ROOT / "docs" / name
        before = path.read_text("utf-8")
        after = renewed(part, before)
        if after != before:
            path.write_text(after, "utf-8")
            print(f"wrote {part} in docs/{name}")
            changed = 1
    return changed


if __name__ == "__main__":
    sys.exit(main())

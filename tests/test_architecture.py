"""The order of the rooms: a module imports only what stands above it."""

import ast
from pathlib import Path

import pytest

import llorch

ROOT = Path(llorch.__file__).parent
ROOMS = """
    __init__ adapters.__init__ errors events eventlog task schema rules config engine admission plan
    estimate selftest agreement health capabilities placement replica replicaset execution pool orchestrator
    reload outlook adapters.sse adapters.spare adapters.llamacpp gpu telemetry logs sdnotify security wire
    control status measures series metrics examples glossary operations openapi streams page api journal
    blueprint server exits terminal answers client tables arguments prompts following top commands doctor
    completion cli __main__
"""  # from the core outwards
ORDER = ROOMS.split()
CORE = (
    "eventlog",
    "engine",
    "selftest",
    "replicaset",
    "execution",
    "pool",
    "orchestrator",
    "reload",
    "journal",
)
CORE += ("schema", "rules", "config")
MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in ROOT.rglob("*.py")}
BLIND = {  # what a module knows nothing of, though the order alone would allow it
    **{module: {"aiohttp"} for module in CORE},
    **{module: {"asyncio", "aiohttp"} for module in ("errors", "events", "task", "estimate", "placement")},
    "admission": {"aiohttp", "engine"},
    "replica": {"aiohttp", "admission"},
    "replicaset": {"aiohttp", "admission"},
    "adapters.llamacpp": {"pool", "replica", "admission", "orchestrator"},
    "security": {"aiohttp", "orchestrator", "pool", "task"},
    "streams": {"task", "orchestrator", "pool"},
    "outlook": {"aiohttp", "engine"},
    "metrics": {"aiohttp", "engine", "wire"},
    "api": {"admission", "engine", "pool", "replica"},
    "journal": {"aiohttp", "api", "orchestrator"},
}
ISLANDS = {
    "errors",
    "events",
    "schema",
    "estimate",
    "adapters.sse",
    "gpu",
    "telemetry",
    "logs",
    "measures",
    "sdnotify",
    "exits",
    "terminal",
    "completion",
}  # import none
CLIENT_SIDE = {"answers", "client", "tables", "arguments", "prompts", "following", "top", "commands"}
OF_BOTH_SIDES = {"events", "adapters.sse", "exits", "terminal"}


def imports(module: str) -> set[str]:
    """What a module imports, ours without the package's name."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            source = node.module or ""
            found |= {source, *(f"{source}.{name.name}" for name in node.names)}
    return {name.removeprefix("llorch.") for name in found}


def test_every_module_has_its_place() -> None:
    """A new module is put into the order before it is used."""
    assert not set(MODULES) - set(ORDER)


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_module_knows_only_what_is_above_it(module: str) -> None:
    """No import points down, and nobody but server and cli reads the configuration."""
    ours = imports(module) & set(ORDER)
    assert all(ORDER.index(name) < ORDER.index(module) for name in ours)
    assert not imports(module) & BLIND.get(module, set())
    configured = {"schema", "rules", "config"}
    assert not configured & ours or module in {"blueprint", "server", "cli", *configured}
    assert not ours or module not in ISLANDS


@pytest.mark.parametrize("module", sorted(CLIENT_SIDE))
def test_a_client_knows_nothing_of_a_servers_inside(module: str) -> None:
    """It has what goes over the wire, and what a terminal needs."""
    assert imports(module) & set(ORDER) <= CLIENT_SIDE | OF_BOTH_SIDES


@pytest.mark.parametrize("module", ["cli", "arguments", "completion", "exits", "config"])
def test_help_is_quick(module: str) -> None:
    """What stands at the top of a module that every command loads brings no HTTP library along."""
    tree = ast.parse(MODULES[module].read_text())
    at_the_top = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    named = {name.name for node in at_the_top for name in node.names}
    named |= {node.module or "" for node in at_the_top if isinstance(node, ast.ImportFrom)}
    slow = ("aiohttp", "llorch.server", "llorch.client", "llorch.commands", "llorch.doctor", "pynvml")
    assert not named & {*slow, *(name.removeprefix("llorch.") for name in slow)}

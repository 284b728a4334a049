"""What is written for people agrees with the program: example configuration, README, changelog, licence."""

import ast
import json
import re
import tomllib
from pathlib import Path

import pytest

from llorch import __version__, api, engine, errors
from llorch.arguments import URL_VARIABLE
from llorch.cli import CONFIG_VARIABLE
from llorch.config import defaults, env_name, load
from llorch.schema import pools_in_force

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")
EXAMPLE = (ROOT / "config.example.toml").read_text("utf-8")
TABLES = {name: keys for name, keys in defaults().items() if isinstance(keys, dict)}
KEYS = [name for name in defaults() if name not in TABLES]
KEYS += [f"{table}.{key}" for table, keys in TABLES.items() for key in keys]
CODE = [path for folder in ("llorch", "scripts", "tests") for path in (ROOT / folder).rglob("*")]
CODE = [path for path in CODE if path.is_file() and path.suffix != ".pyc"]


def sources() -> list[ast.Module]:
    """Every module of llorch."""
    return [ast.parse(path.read_text("utf-8")) for path in (ROOT / "llorch").rglob("*.py")]


def subclasses(kind: type) -> list[type]:
    """`kind` and all that come from it."""
    return [kind, *(found for child in kind.__subclasses__() for found in subclasses(child))]


# -- the example configuration ---------------------------------------------------------------------


def test_the_example_is_the_built_in_defaults() -> None:
    """Every key, in the same order, with exactly its default: 60.0 is not 60."""
    assert json.dumps(tomllib.loads(EXAMPLE)) == json.dumps(defaults())


def test_the_example_is_what_init_writes() -> None:
    """One text, not two that drift apart."""
    assert (ROOT / "llorch/config.template.toml").read_text("utf-8") == EXAMPLE


def test_the_pools_of_the_example_are_good_once_uncommented(tmp_path: Path) -> None:
    """Taking out the # is all that has to be done: two replicas, beside the shorthand."""
    start, _, rest = EXAMPLE.partition("[pools]")
    commented, _, end = rest.partition("\n[queue]")
    file = tmp_path / "config.toml"
    file.write_text(start + "[pools]" + commented.replace("\n# ", "\n") + "\n[queue]" + end)
    [(name, pool)] = pools_in_force(load(file)).items()
    assert (name, pool.default, [replica.id for replica in pool.replicas]) == ("big", True, ["gpu0", "gpu1"])


@pytest.mark.parametrize("key", KEYS)
def test_every_key_of_the_example_has_its_comment(key: str) -> None:
    """On its own line."""
    name = key.rpartition(".")[2]
    lines = [line for line in EXAMPLE.splitlines() if line.startswith(f"{name} = ")]
    assert lines
    assert all(re.search(r"  # \S.{8}", line) for line in lines)


# -- README ----------------------------------------------------------------------------------------


def test_every_table_of_the_configuration_can_be_found() -> None:
    """README names where all keys stand, and names no key and no variable that is none."""
    assert "config.example.toml" in README
    named = re.findall(rf"`({'|'.join(TABLES)})\.([a-z_]+)\b", README)
    assert named
    assert [f"{table}.{key}" for table, key in named if key not in TABLES[table]] == []
    variables = set(re.findall(r"\bLLORCH_[A-Z0-9_]+", README + (ROOT / "scripts/smoke").read_text("utf-8")))
    assert variables
    assert variables <= {CONFIG_VARIABLE, URL_VARIABLE, *map(env_name, KEYS)}


def test_every_flag_in_readme_is_one() -> None:
    """A flag of `llorch serve` is the key's name."""
    flags = {f"--{key.replace('.', '-').replace('_', '-')}" for key in KEYS}
    named = set(re.findall(r"`(--(?:bind|adapter|log|profile)[a-z-]*)`", README))
    assert named
    assert named <= flags


@pytest.mark.parametrize(("method", "path"), [route[:2] for route in api.ROUTES])
def test_every_route_is_in_readme(method: str, path: str) -> None:
    """With its method."""
    assert f"`{method} {path}`" in README


def test_readme_names_no_route_that_is_none() -> None:
    """What is only planned is not promised."""
    named = re.findall(r"`(GET|POST|PUT|DELETE) (/[^`?]*)`", README)
    assert set(named) <= {route[:2] for route in api.ROUTES}


REFUSALS = {kind.code for kind in subclasses(errors.LlorchError)}
FAILURES = {kind.code for kind in subclasses(engine.EngineFailure)}


def event_codes() -> set[str]:
    """The texts that begin an `Error(…)` anywhere in the code, and the codes of engine failures."""
    calls = [node for tree in sources() for node in ast.walk(tree) if isinstance(node, ast.Call)]
    firsts = [call.args[0] for call in calls if isinstance(call.func, ast.Name) and call.func.id == "Error"]
    return FAILURES | {arg.value for arg in firsts if isinstance(arg, ast.Constant)}


def test_the_codes_of_error_events_are_those_of_the_contract() -> None:
    """No code goes out that clients were not told of."""
    assert event_codes() == {
        "WORKER_RESET",
        "DECODE_TIMEOUT",
        "QUEUE_TIMEOUT",
        "POOL_UNAVAILABLE",
        "INVALID_PARAMS",
        "CONTEXT_OVERFLOW",
        "DETERMINISM_UNAVAILABLE",
        "INTERNAL",
    }


@pytest.mark.parametrize("code", sorted(REFUSALS | event_codes()))
def test_every_error_code_is_in_readme(code: str) -> None:
    """Those of refusals and those of a stream's `error`."""
    assert re.search(rf"`(?:error )?{code}`", README)


@pytest.mark.parametrize("kind", subclasses(errors.LlorchError), ids=lambda kind: kind.__name__)
def test_every_status_stands_by_its_code_in_readme(kind: type[errors.LlorchError]) -> None:
    """In one row of the table of errors."""
    rows = [line.split("|")[1:3] for line in README.splitlines() if line.startswith("| ")]
    assert any(f"{kind.status}" in status and f"`{kind.code}`" in codes for status, codes in rows)


@pytest.mark.parametrize("kind", subclasses(errors.LlorchError), ids=lambda kind: kind.__name__)
def test_every_code_has_one_status(kind: type[errors.LlorchError]) -> None:
    """Its own, and a code tells no two stories."""
    same = {other.status for other in subclasses(errors.LlorchError) if other.code == kind.code}
    assert same == {kind.status}


def test_every_path_in_readme_exists() -> None:
    """Links, and what is said of scripts, documents, modules and tests."""
    links = [link for link in re.findall(r"\]\(([^)#]+)", README) if "://" not in link]
    named = re.findall(r"(?<![\w/])(?:scripts|docs|llorch|tests)/[\w./@-]+\w", README)
    assert links
    assert named
    assert [path for path in links + named if not (ROOT / path).exists()] == []


def test_every_module_has_its_line_in_readme() -> None:
    """The table of modules is whole."""
    modules = {path.stem for path in (ROOT / "llorch").glob("[a-z]*.py")}
    table = "\n".join(re.findall(r"^\| `.*$", README.partition("| module |")[2], re.MULTILINE))
    named = set(re.findall(r"`([a-z]+)`", table))
    assert named == modules


# -- and the rest ----------------------------------------------------------------------------------


def test_the_changelog_has_this_version() -> None:
    """Under a heading that names it, with something in it."""
    changelog = (ROOT / "CHANGELOG.md").read_text("utf-8")
    sections = [text.partition("\n") for text in changelog.split("\n## ")[1:]]
    assert [heading for heading, _, text in sections if __version__ in heading and "\n- " in text]


def test_the_licence_is_apache_2() -> None:
    """The whole text, and the same in the package's metadata."""
    text = (ROOT / "LICENSE").read_text("utf-8")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert re.match(r"\s+Apache License\n\s+Version 2\.0, January 2004\n", text)
    assert "9. Accepting Warranty or Additional Liability." in text
    assert project["license"] == "Apache-2.0"


UNFINISHED = [  # in two parts, or this file would be found
    ("TO", "DO"),
    ("FIX", "ME"),
    ("XX", "X"),
    ("HA", "CK:"),
    ("NotImplemented", "Error"),
    ("break", "point("),
    ("import ", "pdb"),
]


@pytest.mark.parametrize("word", ["".join(parts) for parts in UNFINISHED])
def test_nothing_is_left_unfinished(word: str) -> None:
    """No file says that it is."""
    assert CODE
    assert [path for path in CODE if word in path.read_text("utf-8")] == []

"""The API's description: the same every time, valid, whole, and true of a live server."""

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import openapi_spec_validator
import pytest

from llorch import api, errors, events, openapi, wire
from llorch.capabilities import API_VERSION
from llorch.examples import REFUSALS
from llorch.glossary import FIELDS
from llorch.operations import EVENT_CODES, EVENT_TYPES, OPERATIONS
from llorch.outlook import Metrics
from llorch.task import State
from tests import described
from tests.fakes import Connection, FakeLlamaServer
from tests.live import TOKEN, Live
from tests.test_docs import event_codes, subclasses

ROUTES = [route[:2] for route in api.ROUTES]
DOCUMENT = openapi.document(ROUTES)
SCHEMAS = DOCUMENT["components"]["schemas"]


# -- the document ----------------------------------------------------------------------------------


def test_the_committed_document_is_what_the_code_says() -> None:
    """Byte for byte; `scripts/openapi` writes it anew."""
    assert described.FILE.read_bytes() == openapi.encoded(ROUTES), "run scripts/openapi"


@pytest.mark.parametrize("seed", ["1", "2"])
def test_the_same_code_gives_the_same_bytes(seed: str) -> None:
    """In another process, whatever the order of its sets."""
    code = (
        "import sys; from llorch import api, openapi;"
        "sys.stdout.buffer.write(openapi.encoded([route[:2] for route in api.ROUTES]))"
    )
    env = os.environ | {"PYTHONHASHSEED": seed}
    made = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, check=True, timeout=60)
    assert made.stdout == openapi.encoded(ROUTES)


def test_it_is_valid_openapi() -> None:
    """By the rules of OpenAPI 3.1, as others read them."""
    openapi_spec_validator.validate(DOCUMENT)
    assert (DOCUMENT["openapi"], DOCUMENT["info"]["version"]) == ("3.1.0", API_VERSION)


async def test_it_is_served_behind_the_token(fake_engine: FakeLlamaServer) -> None:
    """The committed bytes, to those who may ask."""
    async with Live(fake_engine, {"auth": {"token": TOKEN}}) as live:
        assert (await live.get("/openapi.json", headers={})).status == 401
        async with live.session.get("/openapi.json", headers=live.headers) as response:
            assert (response.status, response.content_type) == (200, "application/json")
            assert await response.read() == described.FILE.read_bytes()


# -- is it whole? ----------------------------------------------------------------------------------


def test_every_route_is_described_and_nothing_else() -> None:
    """A new route has its row in `operations`."""
    assert set(OPERATIONS) == set(ROUTES)
    assert len({operation.id for operation in OPERATIONS.values()}) == len(OPERATIONS)


def test_every_refusal_has_its_example_and_its_place() -> None:
    """Each error code stands in the document, with its status."""
    kinds = set(subclasses(errors.LlorchError)) - {errors.LlorchError}
    assert {type(error) for error in REFUSALS} == kinds
    responses = DOCUMENT["components"]["responses"]
    shown = {
        name
        for response in responses.values()
        for name in response["content"]["application/json"]["examples"]
    }
    assert shown == {kind.code for kind in kinds}
    for methods in DOCUMENT["paths"].values():
        for operation in methods.values():
            for status, answer in operation["responses"].items():
                codes = answer.get("$ref", "").rpartition("/")[2].split(".")
                assert all(kind.status == int(status) for kind in kinds if kind.code in codes)


def test_every_event_and_every_code_of_an_error_event_is_described() -> None:
    """What stands in `events` comes in streams."""
    structs = [kind for kind in vars(events).values() if isinstance(kind, type) and hasattr(kind, "event")]
    logged = {kind.event.decode(): kind for kind in structs}
    assert {**logged, "metrics": Metrics} == EVENT_TYPES
    assert set(EVENT_CODES) == event_codes()


def test_every_field_is_explained_and_nothing_else() -> None:
    """No field without its line in the glossary, and no line without its field."""
    used = {(name, field) for name, schema in SCHEMAS.items() for field in schema.get("properties", ())}
    assert all(SCHEMAS[name]["properties"][field]["description"] for name, field in used)
    own = {f"{name}.{field}" for name, field in used} & FIELDS.keys()
    shared = {field for name, field in used if f"{name}.{field}" not in FIELDS}
    assert set(FIELDS) == own | shared


def examples() -> list[tuple[str, Any]]:
    """The JSON pointer of the schema and the value, for each example in the document."""
    found = []

    def look(place: str, value: Any) -> None:
        if isinstance(value, dict):
            for name, example in value.get("examples", {}).items():
                if "event-stream" not in place:
                    found.append(
                        pytest.param(f"{place}/schema", example["value"], id=f"{place[-40:]}-{name}")
                    )
            for key, part in value.items():
                look(f"{place}/{key.replace('/', '~1')}", part)

    look("", {name: DOCUMENT[name] for name in ("paths", "components")})
    return found


@pytest.mark.parametrize(("place", "value"), examples())
def test_every_example_is_valid(place: str, value: Any) -> None:
    """By its own schema, with nothing in it that the schema does not name."""
    described.judged(described.validator(place), value, place)


# -- is it as strict as the code? ------------------------------------------------------------------

BODIES: list[tuple[bool, dict[str, Any]]] = [
    (True, {"prompt": "x"}),
    (True, {"messages": [{"role": "user", "content": ""}]}),
    (False, {}),
    (False, {"prompt": "x", "messages": [{"role": "user", "content": "x"}]}),
    (False, {"prompt": ""}),
    (False, {"prompt": None}),
    (False, {"messages": []}),
    (False, {"messages": [{"role": "user"}]}),
    (False, {"messages": [{"role": "user", "content": "x", "name": "x"}]}),
    (False, {"prompt": "x", "temperatur": 1}),
    (False, {"prompt": "x", "max_tokens": 0}),
    (True, {"prompt": "x", "max_tokens": 2**31}),
    (False, {"prompt": "x", "max_tokens": 2**31 + 1}),
    (True, {"prompt": "x", "seed": 2**32 - 2, "determinism": "strict"}),
    (True, {"prompt": "x", "seed": 0, "determinism": "best_effort"}),
    (False, {"prompt": "x", "seed": 2**32 - 1}),
    (False, {"prompt": "x", "determinism": "strict"}),
    (False, {"prompt": "x", "determinism": "maybe", "seed": 1}),
    (True, {"prompt": "x", "temperature": 5, "top_k": 1000, "top_p": 1, "min_p": 0, "typical_p": 0.5}),
    (False, {"prompt": "x", "temperature": 5.01}),
    (False, {"prompt": "x", "top_k": 1001}),
    (False, {"prompt": "x", "top_k": 1.5}),
    (False, {"prompt": "x", "top_p": 1.01}),
    (False, {"prompt": "x", "repeat_penalty": 0.49}),
    (False, {"prompt": "x", "repeat_last_n": 4097}),
    (False, {"prompt": "x", "presence_penalty": -2.1}),
    (True, {"prompt": "x", "stop": ["x" * 128] * 8}),
    (False, {"prompt": "x", "stop": ["x" * 129]}),
    (False, {"prompt": "x", "stop": [""]}),
    (False, {"prompt": "x", "stop": ["x"] * 9}),
    (False, {"prompt": "x", "stop": "x"}),
    (True, {"prompt": "x", "grammar": "x" * 65536}),
    (False, {"prompt": "x", "grammar": "x" * 65537}),
    (False, {"prompt": "x", "grammar": 'root ::= "x"', "json_schema": {}}),
    (False, {"prompt": "x", "json_schema": []}),
    (True, {"prompt": "x", "priority": "interactive"}),
    (True, {"prompt": "x", "priority": "batch"}),
    (True, {"prompt": "x", "session_id": "x" * 128}),
    (False, {"prompt": "x", "session_id": "x" * 129}),
    (False, {"prompt": "x", "session_id": ""}),
    (True, {"prompt": "x", "metadata": {"k" * 64: "v" * 512}}),
    (False, {"prompt": "x", "metadata": {"k" * 65: "v"}}),
    (False, {"prompt": "x", "metadata": {"k": "v" * 513}}),
    (False, {"prompt": "x", "metadata": {str(n): "" for n in range(17)}}),
    (False, {"prompt": "x", "metadata": {"k": 1}}),
]


@pytest.mark.parametrize(("good", "body"), BODIES, ids=lambda it: json.dumps(it)[:40])
def test_a_body_is_good_to_both_or_bad_to_both(good: bool, body: dict[str, Any]) -> None:
    """The schema of a task refuses exactly what the code refuses."""
    assert described.validator("/components/schemas/TaskBody").is_valid(body) is good
    try:
        wire.task_request(msgspec.json.encode(body), max_tokens=2**31)
    except errors.InvalidParams:
        assert not good
    else:
        assert good


def test_states_and_limits_are_those_of_the_code() -> None:
    """What the query takes."""
    state, limit = (
        parameter["schema"] for parameter in DOCUMENT["paths"]["/v1/tasks"]["get"]["parameters"][:2]
    )
    assert [wire.state_filter(name) for name in state["enum"]] == list(State)
    assert limit["default"] == wire.limit_filter(None)
    for number in (limit["minimum"], limit["maximum"]):
        assert wire.limit_filter(str(number)) == number
    for number in (limit["minimum"] - 1, limit["maximum"] + 1):
        with pytest.raises(errors.InvalidParams):
            wire.limit_filter(str(number))


# -- is it true? -----------------------------------------------------------------------------------


async def three_tokens(connection: Connection) -> None:
    """A short answer, however many tokens are asked for."""
    for _ in range(3):
        await connection.token()
    await connection.finish()


async def schemathesis(live: Live, document: dict[str, Any], folder: Path) -> None:
    """Play requests that the document allows and such as it forbids, and check every answer.

    All of schemathesis' checks are on: no 5xx; status, content type, headers and body as described (and each
    event of a stream); what the schemas allow is accepted and what they forbid is refused; methods that are
    not described get 405 with Allow; no answer without the token where one is needed. It plays the examples,
    the edges of each schema, random requests, and chains along the links; the same ones every time.
    """
    (folder / "openapi.json").write_text(json.dumps(document))
    hooks = Path(__file__).parent / "openapi_hooks.py"
    (folder / "schemathesis.toml").write_text(f"hooks = {json.dumps(str(hooks))}\n")
    command = [sys.executable, "-m", "schemathesis.cli", "--no-color", "--config-file", "schemathesis.toml"]
    command += ["run", "openapi.json", "--url", live.url, "--warnings", "off", "--continue-on-failure"]
    command += ["--checks", "all", "--phases", "examples,coverage,fuzzing,stateful", "--max-examples", "10"]
    command += [
        "--generation-deterministic",
        "--generation-codec",
        "ascii",
    ]  # sizes are bytes, see its description
    for name, value in live.headers.items():
        command += ["--header", f"{name}: {value}"]
    process = await asyncio.create_subprocess_exec(
        *command, cwd=folder, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    report = (await process.communicate())[0].decode()
    assert process.returncode == 0, report
    count = sum(len(methods) for methods in document["paths"].values())
    assert f"{count} selected / {count} total" in report
    assert len(live.engine.completions) > 20, "hardly a task was good"


LARGE = {"limits": {"max_tokens": 2**31}}  # what the schema allows, whatever one server is configured to


async def test_a_live_server_does_what_the_document_says(
    fake_engine: FakeLlamaServer, tmp_path: Path
) -> None:
    """No undocumented status, no violation of a schema, no 5xx, nothing accepted that is forbidden."""
    fake_engine.ctx = 2**40
    fake_engine.always(three_tokens)
    async with Live(fake_engine, LARGE) as live:
        await schemathesis(live, described.document(), tmp_path)


async def test_so_does_one_with_a_token(fake_engine: FakeLlamaServer, tmp_path: Path) -> None:
    """The home profile, which always has one: no route answers without it."""
    fake_engine.ctx = 2**40
    fake_engine.always(three_tokens)
    document = json.loads(json.dumps(described.document()))
    document["paths"] = {path: document["paths"][path] for _, path, _ in api.routes(home=True)}
    document["security"].remove({})
    document["paths"]["/v1/tasks/{task_id}/stream"]["get"]["security"].remove({})
    async with Live(fake_engine, LARGE, profile="home") as live:
        await schemathesis(live, document, tmp_path)

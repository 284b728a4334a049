"""A reload changes everything it was asked to, or nothing; a drain lets a pool run empty."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from llorch.errors import ReloadFailed
from tests.fakes import Connection, FakeLlamaServer, answers, error
from tests.live import Answer, Live, eventually, names

RELOAD, DRAIN = "/v1/pools/default/reload", "/v1/pools/default/drain"


def toml(*engines: FakeLlamaServer, more: str = "", self_test: bool = False, slots: int = 2) -> str:
    """A configuration with one pool of these engines, e0, e1 and so on."""
    tables = [
        f'[[pools.default.replicas]]\nid = "e{number}"\nendpoint = "{engine.url}"\nslots = {slots}\n'
        for number, engine in enumerate(engines)
    ]
    return f"{more}\n[pools.default]\nself_test = {str(self_test).lower()}\n" + "".join(tables)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Where the configuration is."""
    return tmp_path / "llorch.toml"


def write(file: Path, text: str) -> None:
    """Have the file say this."""
    file.write_text(text)


@contextlib.asynccontextmanager
async def engines(count: int = 2, **options: Any) -> AsyncIterator[list[FakeLlamaServer]]:
    """So many fake engines."""
    async with contextlib.AsyncExitStack() as stack:
        yield [await stack.enter_async_context(FakeLlamaServer(**options)) for _ in range(count)]


def refused(answer: Answer, status: int, code: str) -> str:
    """The message of this refusal."""
    assert (answer.status, answer.body["code"]) == (status, code)
    return str(answer.body["message"])


async def reload(live: Live, *replicas: dict[str, Any]) -> Answer:
    """Ask for these replicas, or, with none, for what the file says."""
    return await live.ask("POST", RELOAD, **({"json": {"replicas": replicas}} if replicas else {}))


async def ids(live: Live) -> list[str]:
    """The replicas that health tells of."""
    return [replica["replica_id"] for replica in (await live.health())["replicas"]]


# -- what goes well --------------------------------------------------------------------------------


async def test_the_file_is_read_again(file: Path) -> None:
    """Another replica and other limits are in force when the answer comes; the steps are told."""
    async with engines() as (first, second):
        write(file, toml(first))
        async with Live(first, file=file) as live:
            write(file, toml(first, second, more="[queue]\ncapacity = 7\nbatch_capacity = 9"))
            answer = await reload(live)
            assert answer.status == 200
            assert (answer.body["replicas"], answer.body.get("retired")) == (["e0", "e1"], [])
            steps = [(step["name"], step.get("replica_id"), step["ok"]) for step in answer.body["steps"]]
            assert steps == [
                ("validate", None, True),
                ("probe", "e0", True),
                ("probe", "e1", True),
                ("decode", "e1", True),
                ("agree", None, True),
                ("switch", None, True),
            ]
            health = await live.health()
            assert health["slots"]["total"] == 4
            assert (health["queue"]["interactive"]["capacity"], health["queue"]["batch"]["capacity"]) == (
                7,
                9,
            )


async def test_a_body_names_the_replicas(file: Path) -> None:
    """Ids are given or made; what was configured comes back with the next reading of the file."""
    async with engines() as (first, second):
        write(file, toml(first))
        async with Live(first, file=file) as live:
            answer = await reload(live, {"endpoint": second.url, "slots": "auto", "devices": [1]})
            assert (answer.status, answer.body["replicas"], answer.body["retired"]) == (
                200,
                ["default-0"],
                ["e0"],
            )
            [replica] = (await live.health())["replicas"]
            assert (replica["slots"], replica["devices"]) == (2, [1])
            assert (await reload(live)).body["replicas"] == ["e0"]


async def test_a_reload_under_load_loses_and_reorders_nothing(file: Path) -> None:
    """What runs is finished by the replica that goes; what waits starts on the new one, in its order."""
    async with engines(hold=True, slots=1) as (old, new):
        write(file, toml(old, slots=1))
        async with Live(old, file=file) as live:
            running = await live.submit_held(prompt="running")
            waiting = [await live.submit(prompt=f"waiting {number}") for number in range(3)]
            batch = await live.submit(prompt="batch", priority="batch")
            replica = live.replica
            write(file, toml(new, slots=1))
            new.hold = False
            assert (await reload(live)).body["retired"] == ["e0"]
            for task in [*waiting, batch]:
                assert names(await live.events(task))[-3:] == "end"
            prompts = [connection.request.body["prompt"] for connection in new.completions]
            assert prompts[1:] == ["waiting 0", "waiting 1", "waiting 2", "batch"]
            assert (await live.snapshot(running))["state"] == "running"
            await old.held[0].final()
            assert names(await live.events(running)) == "started end"
            await eventually(lambda: not replica.leases, "the old replica keeps its lease")
            await eventually(lambda: not old.open_connections, "the old replica is not let go")


async def test_a_kept_replica_keeps_what_it_runs(file: Path) -> None:
    """The same engine under another name, with more slots: its leases are counted as before."""
    async with engines(1, hold=True, slots=3) as (engine,):
        write(file, toml(engine, slots=1))
        async with Live(engine, file=file) as live:
            await live.submit_held()
            waiting = await live.submit()
            replica = live.replica
            answer = await reload(live, {"id": "renamed", "endpoint": engine.url, "slots": 3})
            assert (answer.status, answer.body["retired"]) == (200, [])
            assert list(live.pool.replicas) == [replica]
            await engine.started(2)
            assert (await live.snapshot(waiting))["replica_id"] == "renamed"
            assert (await live.health())["slots"] == {"total": 3, "busy": 2, "draining": 0}


async def test_an_engine_on_a_unix_socket(file: Path, tmp_path: Path) -> None:
    """It is an endpoint like any other; while nobody listens there, health says so."""
    async with FakeLlamaServer(socket_path=str(tmp_path / "engine.sock")) as engine:
        write(file, toml(engine))
        async with Live(engine, file=file) as live:
            assert names(await live.events(await live.submit())).startswith("started token")
            await engine.stop()
            (tmp_path / "engine.sock").unlink(missing_ok=True)
            await live.replica.probe()
            assert (
                f"nothing listens on unix:{tmp_path}/engine.sock (pools.default.replicas[0].endpoint)"
                in ((await live.health())["last_error"])
            )


async def test_a_new_replica_shows_its_determinism_before_it_works(file: Path) -> None:
    """With the self-test on, seeds are verified by the time of the answer."""
    async with engines() as (first, second):
        write(file, toml(first, self_test=True))
        async with Live(first, file=file) as live:
            write(file, toml(second, self_test=True))
            assert (await reload(live)).status == 200
            assert (await live.health())["determinism"] == "verified"


# -- what goes wrong -------------------------------------------------------------------------------


async def unchanged(live: Live, answer: Answer, step: str, *words: str) -> None:
    """A refusal that names the step and why, and a pool that is as it was and works."""
    assert (answer.status, answer.body["code"]) == (409, "RELOAD_FAILED")
    assert answer.body["message"].startswith("nothing was changed: ")
    last = answer.body["steps"][-1]
    assert (last["name"], last["ok"]) == (step, False)
    assert [word for word in words if word not in last["fault"]] == []
    assert await ids(live) == ["e0"]
    assert names(await live.events(await live.submit(max_tokens=1)))[-3:] == "end"


def nobody(engine: FakeLlamaServer) -> None:
    """It is not there."""


def loading(engine: FakeLlamaServer) -> None:
    """It is not up yet."""
    engine.health = "loading"


def mute(engine: FakeLlamaServer) -> None:
    """It is up, and breaks when it has to work."""
    engine.always(answers(500, error(500, "no", "server_error")))


def of_another_version(engine: FakeLlamaServer) -> None:
    """Another build."""
    engine.build = "b9999-other"


@pytest.mark.parametrize(
    ("state", "step", "words"),
    [
        (nobody, "probe", ["nothing listens on", "is llama-server running?"]),
        (loading, "probe", ["503"]),
        (mute, "decode", ["/completion answered 500"]),
        (of_another_version, "agree", ["e1 differs from e0", "b9999-other", "b4242-fake"]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
async def test_a_bad_replica_changes_nothing(state: Any, step: str, words: list[str], file: Path) -> None:
    """Whatever is wrong with it, and whenever that shows."""
    async with engines() as (first, second):
        write(file, toml(first))
        async with Live(first, file=file) as live:
            state(second)
            if state is nobody:
                await second.stop()
            write(file, toml(first, second))
            await unchanged(live, await reload(live), step, *words)
            await eventually(lambda: not second.open_connections, "what was built is not let go")


async def test_an_engine_with_two_texts_for_one_seed_changes_nothing(file: Path) -> None:
    """The test of seeds is part of the proof."""
    numbers = iter(range(10**6))

    async def fickle(connection: Connection) -> None:
        for _ in range(connection.request.body["n_predict"]):
            await connection.token(f"{next(numbers)} ")
        await connection.final()

    async with engines() as (first, second):
        write(file, toml(first, self_test=True))
        async with Live(first, file=file) as live:
            second.always(fickle)
            write(file, toml(second, self_test=True))
            await unchanged(live, await reload(live), "decode", "two different texts", "--no-kv-unified")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[queue]\ncapactiy = 1", ["queue.capactiy: unknown key, did you mean queue.capacity?"]),
        ("= 1", ["is not valid TOML"]),
        ("bind_addr = '127.0.0.1:1'", ["bind_addr: can't change while llorch runs"]),
        ("log.level = 'debug'\nstream.max_readers = 1", ["log.level: can't", "stream.max_readers: can't"]),
        (
            "[pools.other]\ndefault = true\n[[pools.other.replicas]]\nendpoint = 'http://127.0.0.1:1'\n",
            ["pools.other: can't be added while llorch runs"],
        ),
    ],
)
async def test_a_bad_file_changes_nothing(text: str, words: list[str], file: Path) -> None:
    """Faults are told with their keys, and so is what only a restart can change."""
    async with engines(1) as (engine,):
        write(file, toml(engine))
        async with Live(engine, file=file) as live:
            write(file, text + "\n" + toml(engine))
            if "bind_addr" in text:  # Live gives it as a flag, which would win
                live.flags.pop("bind_addr")
            await unchanged(live, await reload(live), "validate", *words)


async def test_a_bad_body_is_told_by_its_path(fake_engine: FakeLlamaServer) -> None:
    """Types are a 400; what only the rules of the configuration know is the failed first step."""
    async with Live(fake_engine) as live:
        answer = await live.ask("POST", RELOAD, json={"replicas": [{"endpont": "x"}]})
        assert (
            refused(answer, 400, "INVALID_PARAMS")
            == "$.replicas[0].endpont: unknown field, did you mean endpoint?"
        )
        for body in ([], {"replicas": []}, {"replicas": [{}]}, {"replicas": [{"endpoint": "", "slots": 0}]}):
            refused(await live.ask("POST", RELOAD, json=body), 400, "INVALID_PARAMS")
        twice = [{"endpoint": fake_engine.url}] * 2
        answer = await live.ask("POST", RELOAD, json={"replicas": twice})
        assert "$.replicas[1].endpoint: " in answer.body["steps"][0]["fault"]
        refused(await live.ask("POST", "/v1/pools/other/reload"), 404, "UNKNOWN_POOL")


async def test_a_key_goes_to_no_engine_that_was_not_given_it(file: Path) -> None:
    """One that the pool has keeps its key; another is asked without, whatever a client names."""
    async with engines(1, api_key="its-key-0123456789") as (first,), engines(1) as (second,):
        key = 'api_key = "its-key-0123456789"'
        write(file, toml(first) + key)
        async with Live(first, file=file) as live:
            answer = await reload(live, {"endpoint": first.url, "slots": 1}, {"endpoint": second.url})
            assert answer.status == 200, answer.body
            assert "authorization" in first.requests[-1].headers
            assert {request.headers.get("authorization") for request in second.requests} == {None}
            given = await reload(live, {"endpoint": second.url, "api_key": "another-0123456789"})
            assert given.status == 200
            assert second.requests[-1].headers["authorization"] == "Bearer another-0123456789"
            assert "another-0123456789" in live.secrets


async def test_the_second_of_two_reloads_is_refused(file: Path) -> None:
    """The first goes on, also when its client has gone."""
    async with engines() as (first, second):
        write(file, toml(first))
        async with Live(first, file=file) as live:
            second.health = "hang"
            write(file, toml(second))
            asked = asyncio.create_task(reload(live))
            await second.until(lambda: bool(second.requests))
            answer = await reload(live)
            assert "another reload is under way" in refused(answer, 409, "RELOAD_FAILED")
            asked.cancel()
            await asyncio.wait({asked})
            with pytest.raises(ReloadFailed, match="another reload"):
                await live.reloader.reload_all()
            second.health = "ok"
            await second.kill()
            await second.start()
            await eventually(lambda: not live.reloader.under_way, "the reload does not end")


# -- drain -----------------------------------------------------------------------------------------


async def test_a_drained_pool_finishes_what_it_has(fake_engine: FakeLlamaServer) -> None:
    """New tasks get 503; what waits still starts, what runs still ends; then the drain is cancelled."""
    fake_engine.hold, fake_engine.slots = True, 1
    async with Live(fake_engine) as live:
        running, waiting = await live.submit_held(), await live.submit()
        answer = await live.ask("POST", DRAIN, json={"deadline_ms": 60_000})
        assert answer.body == {"pool_id": "default", "draining": True, "deadline_ms": 60_000}
        refusal = await live.post()
        assert "is drained" in refused(refusal, 503, "POOL_UNAVAILABLE")
        health = await live.health()
        assert (health["ready"], 0 < health["drain"]["deadline_ms"] <= 60_000) == (False, True)
        await fake_engine.held[0].final()
        assert names(await live.events(running)) == "started end"
        await (await fake_engine.started(2)).final()
        assert names(await live.events(waiting)) == "started end"
        ended = await live.ask("POST", DRAIN, json={"cancel": True})
        assert ended.body == {"pool_id": "default", "draining": False}
        assert "drain" not in await live.health()
        assert (await live.post()).status == 202


async def test_at_the_deadline_of_a_drain_what_is_left_fails(fake_engine: FakeLlamaServer) -> None:
    """Running and waiting tasks get a retriable error; the pool stays drained until a reload."""
    fake_engine.hold, fake_engine.slots = True, 1
    async with Live(fake_engine) as live:
        tasks = [await live.submit_held(), await live.submit()]
        await live.ask("POST", DRAIN, json={"deadline_ms": 0})
        for task in tasks:
            events = await live.events(task)
            assert names(events) == "started error"
            assert (events[-1].data["code"], events[-1].data["retriable"]) == ("POOL_UNAVAILABLE", True)
        assert (await live.health())["drain"] == {"deadline_ms": 0}
        assert (await live.post()).status == 503
        assert (await reload(live)).status == 200
        fake_engine.hold = False
        assert (await live.post()).status == 202


@pytest.mark.parametrize(
    "body",
    [{}, {"cancel": False}, {"cancel": True, "deadline_ms": 1}, {"deadline_ms": -1}, {"deadline_ms": "1"}],
)
async def test_a_drain_is_told_exactly_one_thing(body: dict[str, Any], fake_engine: FakeLlamaServer) -> None:
    """And nothing is drained by anything else."""
    async with Live(fake_engine) as live:
        refused(await live.ask("POST", DRAIN, json=body), 400, "INVALID_PARAMS")
        assert (await live.health())["ready"]


async def test_at_home_there_is_no_drain(fake_engine: FakeLlamaServer) -> None:
    """The route does not exist; a reload does, and fails with the short envelope."""
    async with Live(fake_engine, profile="home") as live:
        async with live.session.post(DRAIN, json={"deadline_ms": 0}, headers=live.headers) as answered:
            assert (answered.status, (await answered.json())["code"]) == (404, "NOT_FOUND")
        assert "/v1/pools/{pool_id}/drain" not in (await live.get("/openapi.json")).body["paths"]
        answer = await live.ask("POST", RELOAD, json={"replicas": [{"endpoint": "http://127.0.0.1:1"}]})
        assert answer.status == 409
        assert set(answer.body) == {"code", "message", "engine"}

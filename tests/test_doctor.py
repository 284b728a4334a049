"""The doctor: each check finds what is good, what is bad, and how to mend it; with and without a llorch."""

import json
import os
import socket
from pathlib import Path
from typing import Any

import msgspec
import pynvml
import pytest

from llorch import cli, doctor
from llorch.doctor import EngineSetup, Setup, examine
from tests.fakes import FakeLlamaServer, answers, error
from tests.live import TOKEN, Live, eventually
from tests.pools import written
from tests.terminals import Command
from tests.test_gpu import FakeNvml


def setup(engine: FakeLlamaServer | None = None, **fields: Any) -> Setup:
    """What is to be examined: a free port, and this engine."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    its = {name: fields.pop(name) for name in ("api_key", "slots", "devices") if name in fields}
    one = EngineSetup(endpoint=engine.url if engine else f"http://127.0.0.1:{port}", **its)
    return Setup(**{"gpu_required": False, "port": port, "engines": (one,), **fields})


async def verdicts(examined: Setup) -> dict[str, str]:
    """The worst verdict of each check."""
    order = ["good", "note", "bad"]
    worst: dict[str, str] = {}
    for finding in await examine(examined):
        worst[finding.check] = max(worst.get(finding.check, "good"), finding.verdict, key=order.index)
    return worst


async def found(check: str, examined: Setup) -> doctor.Finding:
    """The one finding of a check."""
    (finding,) = [finding for finding in await examine(examined) if finding.check == check]
    return finding


async def test_a_good_machine_is_good(fake_engine: FakeLlamaServer) -> None:
    """No llorch runs; everything that it needs is there."""
    assert await verdicts(setup(fake_engine, slots=None)) == {
        "configuration": "good",
        "GPU": "note",
        "token": "good",
        "address": "good",
        "engine": "good",
        "seeds": "note",
    }


async def test_nothing_is_changed(fake_engine: FakeLlamaServer) -> None:
    """The engine is only asked, never put to work."""
    await examine(setup(fake_engine))
    assert [request.path for request in fake_engine.requests] == ["/health", "/props", "/slots"]


# -- configuration and token -----------------------------------------------------------------------


async def test_a_bad_configuration_comes_first() -> None:
    """Each fault, and the rest is not examined by values that are not in force."""
    findings = await examine(setup(faults=["x: wrong", "y: wrong"], slips=["LLORCH_TOKN: no such key"]))
    assert [(finding.check, finding.verdict) for finding in findings] == [
        ("configuration", "bad"),
        ("configuration", "bad"),
        ("environment", "note"),
        ("GPU", "note"),
        ("the rest", "note"),
    ]
    assert "check-config" in findings[0].mend


def test_a_token_is_its_owners_alone(tmp_path: Path) -> None:
    """The mode of the file that has it; the cure is the command."""
    file = tmp_path / "token"
    file.write_text(TOKEN)
    for named in ({"token_file": file}, {"config_file": file, "secret_in_config": True}):
        file.chmod(0o640)
        (bad,) = doctor.token(Setup(token=TOKEN, **named))
        assert (bad.verdict, bad.mend) == ("bad", f"chmod 600 {file}")
        assert "mode 0640" in bad.what
        file.chmod(0o600)
        (good,) = doctor.token(Setup(token=TOKEN, **named))
        assert good.verdict == "good"
    (gone,) = doctor.token(Setup(token=TOKEN, token_file=tmp_path / "none"))
    assert gone.verdict == "bad"
    (by_variable,) = doctor.token(Setup(token=TOKEN))
    assert by_variable.what == "from the environment"


# -- GPU -------------------------------------------------------------------------------------------


def test_the_gpu_is_told_by_name_and_driver() -> None:
    """As NVML has it."""
    [finding], _ = doctor.graphics(Setup(), FakeNvml("NVIDIA H200"))
    assert finding.verdict == "good"
    assert "driver" in finding.what


@pytest.mark.parametrize(("required", "verdict"), [(True, "bad"), (False, "note")])
def test_a_missing_gpu_is_bad_unless_it_may_be(
    required: bool, verdict: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the cure, or with what the carve-out means."""

    def no_library() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(pynvml, "nvmlInit", no_library)
    [finding], _ = doctor.graphics(Setup(gpu_required=required))
    assert (finding.verdict, "NVIDIA driver" in finding.what) == (verdict, True)
    assert ("nvidia-smi" in finding.mend) is required


# -- address ---------------------------------------------------------------------------------------


async def test_a_port_held_by_llorch_is_good(fake_engine: FakeLlamaServer) -> None:
    """With or without a token; and its own test of seeds is what counts."""
    for auth in ({}, {"auth": {"token": TOKEN}}):
        async with Live(fake_engine, auth) as live:
            token = live.config.auth.token
            examined = setup(fake_engine, port=live.port, token=token, slots=2)
            assert "held by a llorch that answers" in (await found("address", examined)).what
            for determinism, verdict in [("verified", "good"), ("failed", "bad"), ("unknown", "note")]:
                live.replica.determinism = determinism  # type: ignore[assignment]
                assert (await found("seeds", examined)).verdict == verdict
    async with Live(fake_engine, {"auth": {"token": TOKEN}}) as live:
        finding = await found("address", setup(fake_engine, port=live.port, token=TOKEN[::-1]))
        assert (finding.verdict, "refuses this token" in finding.what) == ("bad", True)


async def test_a_llorch_that_is_not_ready_is_told(fake_engine: FakeLlamaServer) -> None:
    """With its own reason."""
    fake_engine.health = "error"
    async with Live(fake_engine) as live:
        finding = await found("llorch", setup(fake_engine, port=live.port))
    assert finding.verdict == "bad"
    assert "not ready: " in finding.what


async def test_a_port_held_by_another_program_is_bad(fake_engine: FakeLlamaServer) -> None:
    """llama-server too, which answers /health just as llorch does; and a web page."""
    finding = await found("address", setup(port=fake_engine.port))
    assert (finding.verdict, "ss -ltnp" in finding.mend) == ("bad", True)
    finding = await found("address", setup(fake_engine, port=fake_engine.port))
    assert finding.mend == "the engine is at this very address: start llama-server with --port 8081"
    fake_engine.always(answers(200, b"<html>"), "/v1/pools/default/health")
    assert (await found("address", setup(port=fake_engine.port))).verdict == "bad"


async def test_an_address_of_another_machine_is_bad() -> None:
    """It is the configuration that must be mended."""
    finding = await found("address", setup(host="192.0.2.1"))
    assert (finding.verdict, "bind_addr" in finding.mend) == ("bad", True)


# -- engine ----------------------------------------------------------------------------------------


async def test_an_engine_that_is_not_there_is_bad() -> None:
    """With the command that starts it so that seeds hold."""
    finding = await found("engine", setup())
    assert finding.verdict == "bad"
    assert "is llama-server running?" in finding.what
    assert "--no-kv-unified --no-context-shift --cache-ram 0" in finding.mend


async def test_an_engine_that_loads_is_waited_for(fake_engine: FakeLlamaServer) -> None:
    """No fault of anybody's."""
    fake_engine.health = "loading"
    assert (await found("engine", setup(fake_engine))).verdict == "note"


async def test_an_engine_that_wants_a_key_is_told(fake_engine: FakeLlamaServer) -> None:
    """And the key of the configuration is used."""
    fake_engine.api_key = "k" * 20
    finding = await found("engine", setup(fake_engine))
    assert (finding.verdict, finding.mend) == ("bad", "it wants a key: set adapter.api_key_file")
    assert (await found("engine", setup(fake_engine, api_key="k" * 20))).verdict == "good"


async def test_an_engine_without_its_slots_page_is_told(fake_engine: FakeLlamaServer) -> None:
    """llorch looks there whether a slot is free."""
    fake_engine.always(answers(501, error(501, "no slots", "not_supported_error")), "/slots")
    finding = await found("engine", setup(fake_engine))
    assert (finding.verdict, "--slots" in finding.mend) == ("bad", True)


@pytest.mark.parametrize(
    ("slots", "ctx", "verdict"),
    [
        (1, 0, {"slots": "note", "seeds": "good"}),
        (2, 0, {"seeds": "note"}),
        (3, 0, {"slots": "note", "seeds": "note"}),
        (None, 4096, {"seeds": "note"}),
        (None, 4097, {"context": "bad", "seeds": "note"}),
    ],
)
async def test_what_the_engine_has_is_held_against_the_configuration(
    slots: int | None, ctx: int, verdict: dict[str, str], fake_engine: FakeLlamaServer
) -> None:
    """An engine with 2 slots of 4096 tokens; whether they share a cache can't be seen, so it is not said."""
    said = await verdicts(setup(fake_engine, slots=slots, ctx=ctx))
    assert {check: said[check] for check in ("slots", "context", "seeds") if check in said} == verdict


# -- several engines -------------------------------------------------------------------------------


def pair(first: FakeLlamaServer, second: str, **fields: Any) -> Setup:
    """Two replicas of the pool big: gpu0 is `first`, gpu1 at this endpoint with these fields."""
    given = {"pool_id": "big", "slots": None}
    one = EngineSetup(**given, replica_id="gpu0", endpoint=first.url, told_at="pools.big.replicas[0]")
    two = EngineSetup(**given, replica_id="gpu1", endpoint=second, told_at="pools.big.replicas[1]", **fields)
    return msgspec.structs.replace(setup(), engines=(one, two))


async def test_every_replica_is_examined(fake_engine: FakeLlamaServer, unused_tcp_port: int) -> None:
    """Each under its own name: one that works, one that is not there, with the command for its GPU."""
    gone = pair(fake_engine, f"http://127.0.0.1:{unused_tcp_port}", devices=(1,))
    assert (await found("engine gpu0", gone)).verdict == "good"
    finding = await found("engine gpu1", gone)
    assert finding.verdict == "bad"
    assert f"CUDA_VISIBLE_DEVICES=1 llama-server -m MODEL.gguf --port {unused_tcp_port} " in finding.mend
    other_pool = msgspec.structs.replace(gone.engines[1], pool_id="small", endpoint="unix:/none/x.sock")
    several = msgspec.structs.replace(gone, engines=(gone.engines[0], other_pool))
    assert "--host /none/x.sock" in (await found("engine small/gpu1", several)).mend
    async with FakeLlamaServer(api_key="k" * 20) as locked:
        finding = await found("engine gpu1", pair(fake_engine, locked.url))
        assert finding.mend == "it wants a key: set pools.big.replicas[1].api_key_file"


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"build": "other"}, "it runs engine other, the pool b4242-fake"),
        ({"model_path": "/models/x.gguf"}, "it has the model x.gguf, the pool fake-1b.gguf"),
        ({"slots": 3, "ctx": 8192}, None),
    ],
)
async def test_engines_of_a_pool_that_differ_are_told(
    fields: dict[str, Any], says: str | None, fake_engine: FakeLlamaServer
) -> None:
    """By version and model; slots and context may be what they like."""
    async with FakeLlamaServer(**fields) as other:
        told = [it for it in await examine(pair(fake_engine, other.url)) if it.check == "pool big"]
    assert [says in it.what and it.verdict == "bad" for it in told if says] == ([True] if says else [])
    assert bool(told) is bool(says)


async def test_gpus_that_are_not_there_are_told(fake_engine: FakeLlamaServer) -> None:
    """Where NVML can be read; where it can't, that is said and no more."""
    examined = setup(fake_engine, devices=(1, 4))
    told = [it for it in await examine(examined, FakeNvml("a", "b")) if it.check == "devices"]
    assert [(it.verdict, it.what) for it in told] == [
        ("bad", "adapter.devices names GPU 4; the driver shows 0, 1")
    ]
    assert doctor.devices(examined, None) == []


async def test_what_a_running_llorch_says_of_its_replicas_is_told(
    fake_engine: FakeLlamaServer, tmp_path: Path
) -> None:
    """Which is kept out and why, what each one's own test of seeds found, and that a pool is drained."""
    async with FakeLlamaServer(build="other") as other:
        file = written(tmp_path, {"big": {"gpu0": fake_engine, "gpu1": other}})
        async with Live(fake_engine, file=file) as live:
            examined = msgspec.structs.replace(pair(fake_engine, other.url), port=live.port)
            await eventually(lambda: live.pool.replicas[1].excluded, "nobody is kept out")
            live.replica.determinism = "failed"
            finding = await found("llorch", examined)
            assert (finding.verdict, "does without gpu1: it runs engine other" in finding.what) == (
                "bad",
                True,
            )
            assert [(await found(f"seeds gpu{n}", examined)).verdict for n in (0, 1)] == ["bad", "note"]
            live.pool.drain(60)
            assert "is drained" in (await found("llorch", examined)).what
            finding = await found("address", setup(fake_engine, port=live.port))
            assert (finding.verdict, "no pool 'default'" in finding.what) == ("bad", True)


# -- the command -----------------------------------------------------------------------------------


async def test_the_command_examines_what_serve_would_use(
    fake_engine: FakeLlamaServer, tmp_path: Path
) -> None:
    """By its configuration; exit 1 if anything is bad, each with its cure, and no llorch runs."""
    file = tmp_path / "c.toml"
    engine = f'adapter.endpoint = "{fake_engine.url}"\ngpu.required = false'
    file.write_text(f'bind_addr = "127.0.0.1:0"\n{engine}')
    async with Command("", "doctor", "--config", str(file)) as command:
        assert await command.exit_code() == 0, command.out
    assert f"good  configuration: {file}\n".encode() in command.out
    assert b"note  GPU: " in command.out
    file.write_text(f'auth.token = "{TOKEN}"\n{engine}')
    file.chmod(0o644)
    async with Command(
        "", "doctor", "--config", str(file), "--json", LLORCH_BIND_ADDR="127.0.0.1:0"
    ) as command:
        assert await command.exit_code() == 1
    told = json.loads(command.out)
    assert told["good"] is False
    assert [check["mend"] for check in told["checks"] if check["check"] == "token"] == [f"chmod 600 {file}"]
    assert TOKEN.encode() not in command.out + command.err
    file.write_text("qeue.capacity = 1")
    async with Command("", "doctor", "--config", str(file)) as command:
        assert await command.exit_code() == 1
    assert b"BAD   configuration: " in command.out
    assert b"\n      mend: " in command.out


def test_every_replica_of_every_pool_is_taken_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the place where the configuration has it."""
    engines = {"gpu0": "http://h:1", "gpu1": "http://h:2"}
    file = written(
        tmp_path, {"big": engines, "small": {"s": "unix:/x"}}, gpu1={"devices": [1], "slots": "auto"}
    )
    for name in [name for name in os.environ if name.startswith("LLORCH_")]:
        monkeypatch.delenv(name)
    examined = cli._examined(cli._parser().parse_args(["doctor", "--config", str(file)]))
    at = "pools.big.replicas"
    assert examined.engines == (
        EngineSetup(pool_id="big", replica_id="gpu0", told_at=f"{at}[0]", endpoint="http://h:1"),
        EngineSetup(
            pool_id="big",
            replica_id="gpu1",
            told_at=f"{at}[1]",
            endpoint="http://h:2",
            slots=None,
            devices=(1,),
        ),
        EngineSetup(pool_id="small", replica_id="s", told_at="pools.small.replicas[0]", endpoint="unix:/x"),
    )


def test_every_key_that_it_needs_is_taken_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the file, as `serve` reads it."""
    (tmp_path / "token").write_text(TOKEN)
    (tmp_path / "token").chmod(0o600)
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("LLORCH_")]:
        monkeypatch.delenv(name)
    (tmp_path / "config.toml").write_text(
        'bind_addr = "[::1]:9"\nauth.token_file = "token"\nlimits.ctx = 7\ngpu.required = false\n'
        '[adapter]\nendpoint = "http://h:1"\napi_key = "k"\nslots = "auto"\n'
        "[timeouts]\nconnect_s = 1\ncontrol_s = 2"
    )
    options = cli._parser().parse_args(["doctor"])
    assert cli._examined(options) == Setup(
        config_file=Path("config.toml"),
        host="::1",
        port=9,
        token=TOKEN,
        token_file=Path("token"),
        secret_in_config=True,
        engines=(EngineSetup(endpoint="http://h:1", api_key="k", slots=None),),
        ctx=7,
        connect_s=1,
        control_s=2,
        gpu_required=False,
    )

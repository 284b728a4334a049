"""The commands that ask a server and leave: what they show, as text and as JSON, and their exit codes."""

import asyncio
import datetime
import json
import os
import re
import signal
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest

from llorch import cli, commands
from llorch.answers import (
    Drain,
    Gpu,
    Lane,
    Percentiles,
    Pool,
    Queue,
    Replica,
    Slots,
    Snapshot,
    Status,
    Totals,
)
from llorch.client import STATUS
from llorch.events import Error
from llorch.exits import Exit
from llorch.tables import health_lines, pool_lines, task_lines
from llorch.terminal import Console
from llorch.top import Sample, bar, picture
from tests.fakes import FakeLlamaServer
from tests.live import TOKEN, Live, eventually
from tests.pools import written
from tests.terminals import Command
from tests.test_client import says, serving

WALL = datetime.datetime(2026, 11, 21, 12, 0, 0, tzinfo=datetime.UTC)
POOL = Pool(
    "default",
    live=True,
    ready=True,
    engine="llamacpp",
    model="m.gguf",
    slots=Slots(total=4, busy=1, draining=1),
    queue=Queue(depth=2, capacity=8),
    determinism="verified",
)
EVIL = "\x1b]0;evil\x07\x1b[2J\nx"


class Said(NamedTuple):
    """Exit code, stdout, and the lines on stderr without `llorch: `."""

    code: int
    out: str
    err: list[str]


def drained(pipe: int) -> str:
    """All that is in a pipe whose other end is closed."""
    with open(pipe, "rb") as file:
        return file.read().decode()


async def ask(url: str, *argv: str, token: str = "") -> Said:
    """A command in this process, its stdout and stderr pipes."""
    options = cli._parser().parse_args(list(argv))
    (out, out_end), (err, err_end) = os.pipe(), os.pipe()
    try:
        code = await commands.execute(options, Console(out_end, err_end), url, token, {})
    finally:
        os.close(out_end)
        os.close(err_end)
    complaints = [line.removeprefix("llorch: ") for line in drained(err).splitlines()]
    return Said(code, drained(out), complaints)


def snapshot(**fields: Any) -> Snapshot:
    """A task as it stands."""
    return msgspec.convert({"task_id": "t1", "state": "running", **fields}, Snapshot)


# -- ps and health ---------------------------------------------------------------------------------


async def test_ps_shows_the_pool_the_queue_and_recent_tasks(fake_engine: FakeLlamaServer) -> None:
    """Newest first, each with what matters in its state."""
    fake_engine.hold = True
    async with Live(fake_engine) as live:
        running = await live.submit_held()
        waiting = [await live.submit() for _ in range(2)]
        await live.cancel(waiting.pop())
        said = await ask(live.url, "ps")
        pool_head, pool, _, head, *tasks = said.out.splitlines()
        assert pool_head.split() == ["POOL", "STATE", "SLOTS", "QUEUE", "BATCH", "DETERMINISM", "MODEL"]
        assert pool.split() == ["default", "ready", "1/1", "1/64", "0/256", "unknown", "fake-1b.gguf"]
        assert head.split()[:4] == ["TASK", "STATE", "LANE", "AGE"]
        assert [line.split()[1] for line in tasks] == ["cancelled", "queued", "running"]
        assert [line.split()[0] for line in tasks[1:]] == [waiting[0]["task_id"], running["task_id"]]
        assert "0 ahead" in tasks[1]
        assert tasks[2].endswith("on default-0")
        only = await ask(live.url, "ps", "--state", "queued", "--limit", "1", "--json")
        (task,) = json.loads(only.out)["tasks"]
        assert task == (await live.get("/v1/tasks?state=queued&limit=1")).body["tasks"][0]


async def test_ps_without_tasks_says_so(fake_engine: FakeLlamaServer) -> None:
    """Rather than nothing."""
    async with Live(fake_engine) as live:
        assert (await ask(live.url, "ps")).out.endswith("\nno tasks\n")


async def test_health_says_why_and_by_its_exit_code(fake_engine: FakeLlamaServer) -> None:
    """0 for ready, 69 for what is not; 66 for a pool that is none."""
    async with Live(fake_engine) as live:
        ready = await ask(live.url, "health")
        assert (ready.code, ready.out.splitlines()[0]) == (Exit.DONE, "default: ready")
        assert "fake-1b.gguf" in ready.out
        named = await ask(live.url, "health", "default", "--json")
        assert json.loads(named.out)["pools"] == [await live.health()]
        nowhere = await ask(live.url, "health", "none")
        assert (nowhere.code, nowhere.out) == (Exit.NOT_FOUND, "")
        assert "(UNKNOWN_POOL)" in nowhere.err[0]
    await fake_engine.stop()
    async with Live(fake_engine) as live:
        away = await ask(live.url, "health")
        assert (away.code, away.out.splitlines()[0]) == (Exit.UNAVAILABLE, "default: no engine")
        assert re.search(r"\n  why +nothing listens on .*: is llama-server running\?\n", away.out)


async def test_every_pool_of_a_newer_server_is_shown() -> None:
    """Its status tells which there are."""
    pools = [{"pool_id": "a", "ready": True, "new": 1}, {"pool_id": "b", "ready": False}]
    routes = {STATUS: says(200, {"pools": pools}), "/v1/tasks": says(200, {"tasks": []})}
    async with serving(routes) as url:
        said = await ask(url, "health", "--json")
        assert (said.code, json.loads(said.out)) == (Exit.UNAVAILABLE, {"pools": pools})
        assert [line.split()[0] for line in (await ask(url, "ps")).out.splitlines()[1:3]] == ["a", "b"]


# -- cancel ----------------------------------------------------------------------------------------


async def test_reload_and_drain_say_what_they_did(fake_engine: FakeLlamaServer, tmp_path: Path) -> None:
    """Of the default pool unless one is named; a reload that changes nothing says why."""
    file = written(tmp_path, {"big": {"e0": fake_engine}})
    async with Live(fake_engine, file=file) as live:
        said = await ask(live.url, "reload")
        assert (said.code, said.err) == (Exit.DONE, [])
        assert said.out.splitlines()[0] == "pool big has e0"
        assert [line.split(":")[0] for line in said.out.splitlines()[1:]] == [
            "  validate",
            "  probe e0",
            "  agree",
            "  switch",
        ]
        said = await ask(live.url, "drain", "big", "--deadline-s", "60")
        assert (said.code, said.out) == (
            Exit.DONE,
            "pool big takes no new tasks; what it has is failed in 60 s\n",
        )
        assert (await live.post()).status == 503
        said = await ask(live.url, "drain", "--end", "--json")
        assert json.loads(said.out) == {"pool_id": "big", "draining": False}
        assert (await live.post()).status == 202
        await asyncio.to_thread(file.write_text, "queue.capactiy = 1")
        said = await ask(live.url, "reload", "big")
        assert said.code == Exit.REFUSED
        assert "nothing was changed: validate: queue.capactiy: unknown key" in said.err[0].replace(
            f"{file}: ", ""
        )
        assert (await ask(live.url, "drain", "small")).code == Exit.NOT_FOUND


async def test_a_home_server_has_no_drain(fake_engine: FakeLlamaServer) -> None:
    """It is said, rather than that it must be old alone."""
    async with Live(fake_engine, profile="home") as live:
        said = await ask(live.url, "drain", token=TOKEN)
        assert (said.code, "home profile" in said.err[0]) == (Exit.PROTOCOL, True)


async def test_cancel_says_what_became_of_the_task(fake_engine: FakeLlamaServer) -> None:
    """Harmless if asked again; 66 for a task that is none."""
    fake_engine.hold = True
    async with Live(fake_engine) as live:
        task = (await live.submit_held())["task_id"]
        for _ in range(2):
            said = await ask(live.url, "cancel", task)
            assert said == (Exit.DONE, f"cancelled task {task} on the server after 0 tokens\n", [])
        as_json = await ask(live.url, "cancel", task, "--json")
        assert json.loads(as_json.out) == {"task_id": task, "state": "cancelled", "tokens_out": 0}
        unknown = await ask(live.url, "cancel", "none", "--json")
        assert unknown.code == Exit.NOT_FOUND
        assert json.loads(unknown.out)["error"]["code"] == "TASK_NOT_FOUND"


# -- what goes wrong -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "code"),
    [(400, 65), (401, 77), (403, 77), (404, 66), (409, 65), (413, 65), (429, 75), (500, 70), (503, 69)],
)
async def test_each_refusal_has_its_exit_code(status: int, code: int) -> None:
    """A script tells by it what to do next."""
    envelope = {"code": "WHY", "message": "because", "hint": "mend it", "retriable": False}
    async with serving({"/v1/tasks": says(status, envelope)}) as url:
        said = await ask(url, "ps", "--json")
    assert (said.code, json.loads(said.out)) == (code, {"error": envelope})
    (line,) = said.err
    assert line.startswith("because (WHY)")


@pytest.mark.parametrize(("status", "body"), [(404, "<html>"), (200, "<html>"), (200, "{")])
async def test_what_is_not_llorch_has_an_exit_code(status: int, body: str) -> None:
    """76, in text and in JSON."""
    async with serving({"/v1/tasks": says(status, body)}) as url:
        said = await ask(url, "ps", "--json")
    assert (said.code, json.loads(said.out)["error"]["code"]) == (Exit.PROTOCOL, "NOT_LLORCH")


async def test_nobody_at_home_has_an_exit_code(unused_tcp_port: int) -> None:
    """69, and JSON says that it may be tried again."""
    said = await ask(f"http://127.0.0.1:{unused_tcp_port}", "health", "--json")
    error = json.loads(said.out)["error"]
    assert (said.code, error["code"], error["retriable"]) == (Exit.UNAVAILABLE, "UNREACHABLE", True)


async def test_escape_sequences_from_a_server_never_reach_the_terminal() -> None:
    """In names, models, errors, notes: none is trusted."""
    pool = {"pool_id": EVIL, "model": EVIL, "last_error": EVIL, "engine": EVIL, "accelerator": EVIL}
    task = {"task_id": EVIL, "state": EVIL, "finish_reason": EVIL, "created_at": EVIL}
    task |= {"error": {"code": EVIL, "retriable": True, "message": EVIL}}
    gpu = {"name": EVIL}
    status = {"version": EVIL, "pools": [pool], "tasks": [task], "gpus": [gpu], "gpu_fault": EVIL}
    refusal = says(400, {"code": EVIL, "message": EVIL, "hint": EVIL})
    routes = {STATUS: says(200, status), "/v1/tasks": says(200, {"tasks": [task]})}
    routes |= {"/v1/tasks/{id}/cancel": says(200, {"task_id": EVIL, "state": EVIL, "tokens_out": 1})}
    routes |= {"/v1/tasks/{id}": refusal}
    async with serving(routes) as url:
        for argv in (["ps"], ["health"], ["top"], ["cancel", "x"], ["stream", "x"]):
            said = await ask(url, *argv)
            assert "evil" in said.out + "".join(said.err)
            assert not set(said.out + "".join(said.err)) & set("\x1b\x07\r")
            assert "\nx" not in said.out


# -- which server ----------------------------------------------------------------------------------


async def test_the_configuration_here_names_the_server(fake_engine: FakeLlamaServer, tmp_path: Path) -> None:
    """What `llorch serve` would start in this folder is found with its token; flag and environment win."""
    async with Live(fake_engine, {"auth": {"token": TOKEN}}) as live:
        file = tmp_path / "config.toml"
        file.write_text(f'bind_addr = "127.0.0.1:{live.port}"\nauth.token = "{TOKEN}"')
        async with Command("", "health", LLORCH_CONFIG=str(file)) as command:
            assert await command.exit_code() == Exit.DONE, command.err
        async with Command(live.url, "health", LLORCH_CONFIG=str(file)) as command:
            assert await command.exit_code() == Exit.NOT_ALLOWED
        file.write_text(f'bind_addr = "10.9.8.7:{live.port}"\nauth.token = "{TOKEN}"')
        async with Command("", "health", "--url", live.url, LLORCH_CONFIG=str(file)) as command:
            assert await command.exit_code() == Exit.NOT_ALLOWED


@pytest.mark.parametrize("text", ["broken [", 'bind_addr = "10.9.8.7:80"\nauth.token = "0123456789abcdef"'])
def test_a_file_that_lies_about_sends_nothing_elsewhere(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only a server on this very machine is taken from it, and its faults are not this command's."""
    (tmp_path / "config.toml").write_text(text)
    monkeypatch.chdir(tmp_path)
    assert cli._server_here() == ("http://127.0.0.1:8080", "")


# -- tables ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "words"),
    [
        (snapshot(state="queued", queue_position=2), "queued - - - 0 - 2 ahead"),
        (
            snapshot(
                state="queued",
                queue_position=1,
                predicted_start_ms=90_000,
                created_at="2026-11-21T11:59:30Z",
            ),
            "queued - 30 s - 0 - 1 ahead, starts in about 60 s",
        ),
        (
            snapshot(
                state="queued", queue_position=0, predicted_start_ms=9, created_at="2026-11-21T11:59:30Z"
            ),
            "queued - 30 s - 0 - 0 ahead, starts any moment",
        ),
        (snapshot(created_at="2026-11-21T12:00:09Z", tokens_out=1), "running - 0 ms - 1 -"),
        (
            snapshot(
                state="completed",
                tokens_out=30,
                finish_reason="stop",
                timings={"first_token_ms": 250, "decode_time_ms": 1500},
            ),
            "completed - - 250 ms 30 20.0 stop",
        ),
        (snapshot(state="cancelled", finish_reason="cancelled"), "cancelled - - - 0 -"),
        (
            snapshot(state="failed", error=Error("WORKER_RESET", True, 1000, "gone")),
            "failed - - - 0 - WORKER_RESET: gone (it may succeed if tried again in 1.0 s)",
        ),
    ],
)
def test_a_task_is_one_line(task: Snapshot, words: str) -> None:
    """State, age, time to the first token, tokens, speed, and what there is to add."""
    _, line = task_lines([task], WALL, colour=False)
    assert " ".join(line.split()) == f"t1 {words}"


def test_a_pool_that_is_not_ready_says_why() -> None:
    """Below its line, and in red where there is colour."""
    pool = msgspec.structs.replace(POOL, ready=False, last_error="gone")
    assert pool_lines([pool], colour=False)[1:] == [
        "default  not ready  1/4    2/8    -      verified     m.gguf",
        "  gone",
    ]
    assert pool_lines([pool], colour=True)[1].startswith("\x1b[31mdefault")
    assert health_lines([], colour=False) == ["no pools"]
    assert "  slots   1 of 4 at work, 1 not let go of yet" in health_lines([POOL], colour=False)
    assert "  queue   2 waiting, room for 8" in health_lines([POOL], colour=False)


PAIR = msgspec.structs.replace(
    POOL,
    pool_id="big",
    queue=Queue(depth=5, capacity=8, interactive=Lane(2, 8), batch=Lane(3, 20)),
    replicas=[
        Replica("gpu0", ready=True, slots=4, busy=1, draining=1, determinism="verified", devices=[0]),
        Replica("gpu1", slots=4, devices=[2, 3], last_error="it differs"),
    ],
    last_error="gpu1: it differs",
)


def test_every_replica_and_both_lanes_are_told() -> None:
    """Each replica on a line, red with its reason if it can't take tasks."""
    assert pool_lines([PAIR], colour=False)[1] == "big   ready  1/4    2/8    3/20   verified     m.gguf"
    lines = health_lines([PAIR], colour=False)
    assert "  fault        gpu1: it differs" in lines
    assert "  interactive  2 waiting, room for 8" in lines
    assert "  batch        3 waiting, room for 20" in lines
    replicas = [
        "gpu0  ready      1 of 4 at work, 1 draining  seeds verified  GPU 0",
        "gpu1  not ready  0 of 4 at work              seeds unknown   GPU 2, 3  it differs",
    ]
    assert lines[-3:] == ["  replicas", *(f"    {line}" for line in replicas)]
    assert health_lines([PAIR], colour=True)[-1].startswith("\x1b[31m    gpu1")
    drawn = picture(None, sample(1, pools=[PAIR]), url="")
    assert drawn[5:9] == [
        "queue    [#####...............] 2 of 8 places taken",
        "batch    [###.................] 3 of 20 places taken",
        *(f"  {line}" for line in replicas),
    ]


@pytest.mark.parametrize(
    ("deadline_ms", "words"), [(90_000, "what it has is failed in 90 s"), (0, "what it had is over")]
)
def test_a_drained_pool_says_so(deadline_ms: int, words: str) -> None:
    """In every view: what it means, until when, and how it ends."""
    pool = msgspec.structs.replace(PAIR, ready=False, drain=Drain(deadline_ms))
    assert pool_lines([pool], colour=False)[1].startswith("big   drained  1/4")
    assert health_lines([pool], colour=False)[0] == "big: drained"
    for lines in (
        pool_lines([pool], colour=False),
        health_lines([pool], colour=False),
        picture(None, sample(1, pools=[pool]), url=""),
    ):
        (told,) = [line for line in lines if "takes no new tasks" in line]
        assert words in told
        assert "llorch drain --end big ends that" in told


async def test_two_replicas_and_the_batch_lane_in_a_live_server(
    fake_engine: FakeLlamaServer, tmp_path: Path
) -> None:
    """What runs where, what waits in which lane, and which replica is kept out, as the commands tell it."""
    fake_engine.hold = True
    async with FakeLlamaServer(build="other") as other:
        file = written(tmp_path, {"big": {"gpu0": fake_engine, "gpu1": other}}, gpu1={"devices": [1]})
        async with Live(fake_engine, file=file) as live:
            await eventually(lambda: live.pool.replicas[1].excluded, "nobody is kept out")
            await live.submit_held(priority="batch")
            await live.submit(priority="batch")
            await live.submit()
            said = await ask(live.url, "ps")
            assert [line.split()[2] for line in said.out.splitlines()[-3:]] == ["inter", "batch", "batch"]
            assert said.out.splitlines()[-2].endswith("1 ahead in big")
            assert said.out.splitlines()[-1].endswith("on gpu0")
            assert "  1/64   1/256  " in said.out
            told = await ask(live.url, "health")
            assert told.code == Exit.DONE
            assert re.search(
                r"\n    gpu1  not ready .* GPU 1  it runs engine other, the pool b4242-fake\n", told.out
            )
            live.pool.drain(60)
            told = await ask(live.url, "health", "big")
            assert (told.code, told.out.splitlines()[0]) == (Exit.UNAVAILABLE, "big: drained")


# -- top -------------------------------------------------------------------------------------------


def sample(at: float, **fields: Any) -> Sample:
    """A status of that second."""
    return Sample(Status(**{"version": "1", "uptime_s": at, "pools": [POOL], **fields}), at, WALL)


def test_the_picture_has_all_that_is_asked_of_top() -> None:
    """Slots, queue, speed, first token, GPU and VRAM, tasks in the order in which they run."""
    last = sample(
        20,
        readers=3,
        tokens_per_s=7.5,
        totals=Totals(completed=5, failed=1, cancelled=2, refused=3, tokens_out=900),
        first_token_ms=Percentiles(120, 950),
        gpus=[Gpu(0, "NVIDIA H200", 87, 2**35, 2**37, 61), Gpu(1, "old", None, 0, 2**30, None)],
        gpu_fault="one is lost",
        tasks=[
            snapshot(task_id="third", state="queued", queue_position=1, pool_id="big"),
            snapshot(task_id="done", state="completed", priority="interactive"),
            snapshot(task_id="second", state="queued", queue_position=0, priority="batch", pool_id="big"),
            snapshot(task_id="first"),
        ],
    )
    assert picture(None, last, url="http://h:1") == [
        "llorch 1 at http://h:1, up 20 s, 3 readers",
        "speed    7.5 tokens/s   first token: half within 120 ms, 95 % within 950 ms",
        "tasks    5 completed, 1 failed, 2 cancelled, 3 refused; 900 tokens",
        "",
        "slots    [##########..........] 1 of 4 at work, 1 draining   default: ready, m.gguf, seeds verified",
        "queue    [#####...............] 2 of 8 places taken",
        "VRAM 0   [#####...............] 32.0 of 128.0 GiB   NVIDIA H200: 87 % busy, 61 °C",
        "VRAM 1   [....................] 0.0 of 1.0 GiB   old: use not known",
        "GPU      one is lost",
        "",
        "TASK    STATE      LANE   AGE  FIRST  TOKENS  TOK/S  NOTE",
        "first   running    -        -      -       0      -",
        "second  queued     batch    -      -       0      -  0 ahead in big",
        "third   queued     -        -      -       0      -  1 ahead in big",
        "done    completed  inter    -      -       0      -",
    ]


def test_rates_are_those_between_two_pictures() -> None:
    """Unless it is another server's: one that was restarted has counted anew."""
    before = sample(10, tokens_per_s=1.0, totals=Totals(tokens_out=100, refused=1))
    last = sample(12, tokens_per_s=1.0, totals=Totals(tokens_out=150, refused=4))
    again = Sample(Status(version="1", uptime_s=1, tokens_per_s=2.0), 14, WALL)
    assert picture(before, last, url="")[1].startswith("speed    25.0 tokens/s")
    assert "4 refused (+3 now)" in picture(before, last, url="")[2]
    assert picture(last, again, url="")[1].startswith("speed    2.0 tokens/s")
    assert picture(last, last, url="")[1].startswith("speed    1.0 tokens/s")


@pytest.mark.parametrize(
    ("part", "whole", "filled"), [(0, 9, 0), (1, 999, 1), (998, 999, 19), (9, 9, 20), (99, 9, 20), (1, 0, 0)]
)
def test_a_bar_is_never_quite_wrong(part: int, whole: int, filled: int) -> None:
    """Something is never nothing, and only the whole is full."""
    assert bar(part, whole).count("#") == filled
    assert len(bar(part, whole)) == 22


async def test_without_a_terminal_top_is_one_picture() -> None:
    """Or as many as are asked for; as JSON, the very snapshot."""
    said = {"version": "9", "totals": {"tokens_out": 1}, "new": [1]}
    async with serving({STATUS: says(200, said)}) as url:
        once = await ask(url, "top")
        assert once.out.splitlines()[0].startswith(f"llorch 9 at {url}")
        twice = await ask(url, "top", "--count", "2", "--interval", "0.01")
        assert twice.out.count("llorch 9 at") == 2
        as_json = await ask(url, "top", "--json", "--count", "2", "--interval", "0.01")
        assert [json.loads(line) for line in as_json.out.splitlines()] == [said, said]


async def test_top_tells_a_server_that_is_too_old(fake_engine: FakeLlamaServer) -> None:
    """And what works with it."""
    async with serving({}) as url:
        said = await ask(url, "top")
    assert said.code == Exit.PROTOCOL
    assert said.err == [
        f"the llorch at {url} is too old: it has no /v1/status; llorch ps and llorch health do without"
    ]


@pytest.mark.parametrize("leaving", [b"q", b"\x03"])
async def test_top_gives_the_terminal_back_as_it_was(leaving: bytes) -> None:
    """Its own screen while it runs, no cursor, no echo; by q and by Ctrl-C it is gone without a trace."""
    async with serving({STATUS: says(200, {"version": "9"})}) as url:
        async with Command(url, "top", "-d", "0.05", stdin="tty", out="tty", err="tty") as command:
            await command.sees("llorch 9 at")
            assert command.screen.startswith(b"\x1b[?1049h\x1b[?25l")
            command.resize(12, 3)
            await command.sees("llorch 9 at…\x1b[K\r\n")
            command.press(leaving)
            assert await command.exit_code() == Exit.DONE
        assert command.screen.endswith(b"\x1b[?25h\x1b[?1049l")
        assert not command.screen.endswith(b"q")


async def test_top_says_when_nobody_answers_any_more() -> None:
    """Above the last picture, until there is a new one."""
    answers = [says(200, {"version": "9"}), says(503, "<html>")]

    async def status(request: Any) -> Any:
        return await (answers.pop(0) if len(answers) > 1 else answers[0])(request)

    watching = ["top", "-d", "0.05"]
    async with (
        serving({STATUS: status}) as url,
        Command(url, *watching, stdin="tty", out="tty", err="tty") as command,
    ):
        await command.sees("is llorch behind it running?; trying again")
        answers.append(says(200, {"version": "10"}))
        answers.pop(0)
        await command.sees("llorch 10 at")
        command.press(b"q")
        assert await command.exit_code() == Exit.DONE


async def test_ctrl_z_gives_the_shell_its_screen_back() -> None:
    """And going on brings the picture again."""
    async with (
        serving({STATUS: says(200, {"version": "9"})}) as url,
        Command(url, "top", "-d", "0.05", stdin="tty", out="tty", err="tty") as command,
    ):
        await command.sees("llorch 9 at")
        command.process.send_signal(signal.SIGTSTP)
        await command.sees("\x1b[?25h\x1b[?1049l")
        await command.stopped()  # a SIGCONT before that would be lost
        command.screen = b""
        command.process.send_signal(signal.SIGCONT)
        await command.sees("\x1b[?1049h\x1b[?25l\x1b[Hllorch 9 at")
        command.press(b"q")
        assert await command.exit_code() == Exit.DONE

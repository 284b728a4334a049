"""`llorch run`, `stream` and `submit` as a user has them: processes, pipes, terminals, signals."""

import asyncio
import contextlib
import json
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from llorch.exits import Exit
from tests.fakes import Connection, FakeLlamaServer
from tests.live import TOKEN, Live, text
from tests.proxy import Proxy
from tests.terminals import Command, shown
from tests.test_client import frame, serving

LONG = 200


@contextlib.asynccontextmanager
async def running(live: Live, *argv: str, **streams: Any) -> AsyncIterator[tuple[Command, Connection]]:
    """`llorch run` whose task the engine has and holds; it must `hold`."""
    count = len(live.engine.completions)
    async with Command(live.url, "run", "hello", *argv, **streams) as command:
        yield command, await live.engine.started(count + 1)


async def only_task(live: Live) -> dict[str, Any]:
    """The one task there is."""
    (task,) = (await live.get("/v1/tasks")).body["tasks"]
    found: dict[str, Any] = task
    return found


# -- the answer ------------------------------------------------------------------------------------


async def test_the_answer_is_streamed_to_stdout_byte_for_byte(fake_engine: FakeLlamaServer) -> None:
    """As it comes, and nothing else: no line break of ours, nothing on stderr [MVP-033]."""
    fake_engine.hold = True
    pieces = ["One", " é\u2028\U0001f600", "\x1b[31mred\x07", "\r\n", "\x00\x9b", " end"]
    async with Live(fake_engine) as live, running(live) as (command, engine):
        for piece in pieces:
            await engine.token(piece)
            await command.sees(piece, on="out")
        await engine.finish("eos")
        assert await command.exit_code() == Exit.DONE
        assert (command.out, command.err) == ("".join(pieces).encode(), b"")


async def test_a_connection_cut_half_way_leaves_stdout_as_if_it_had_not_been(
    fake_engine: FakeLlamaServer,
) -> None:
    """The first connections are reset after so many bytes; stdout has the bytes of the whole stream."""
    argv = ["run", "Once upon a time", "--seed", "7", "--max-tokens", str(LONG)]
    async with Live(fake_engine) as live:
        async with Command(live.url, *argv) as command:
            assert await command.exit_code() == Exit.DONE
            whole = command.out
        for cuts in ([700], [300, 1111, 0, 2222]):
            async with Proxy(live.port, cuts) as proxy, Command(proxy.url, *argv) as command:
                assert await command.exit_code() == Exit.DONE
                assert (command.out, command.err) == (whole, b"")
                assert proxy.count == len(cuts) + 1
    assert whole.count(b"-") == LONG


async def test_a_task_lost_in_a_restart_is_told(fake_engine: FakeLlamaServer) -> None:
    """What came of its text stays on stdout; the exit code says that it is not all."""
    fake_engine.hold = True
    async with Proxy(0, []) as proxy, contextlib.AsyncExitStack() as stack:
        async with Live(fake_engine) as live:
            proxy.point_to(live.port)
            command = await stack.enter_async_context(Command(proxy.url, "run", "hello"))
            await (await fake_engine.started()).token("half")
            await command.sees("half", on="out")
            proxy.down = True
            proxy.break_all()
        async with Live(fake_engine) as restarted:
            proxy.point_to(restarted.port)
            proxy.down = False
            assert await command.exit_code() == Exit.NOT_FOUND
    assert command.out == b"half"
    assert "is gone: llorch was restarted meanwhile" in command.complaints[-1]


async def test_on_a_terminal_an_answer_is_shown_and_not_obeyed(fake_engine: FakeLlamaServer) -> None:
    """Escape sequences become visible, and the shell's prompt begins a line of its own."""
    fake_engine.hold = True
    async with Live(fake_engine) as live, running(live, out="tty", err="tty") as (command, engine):
        await engine.token("a\x1b]0;title\x07\tb\nc\x9b")
        await engine.finish("eos")
        assert await command.exit_code() == Exit.DONE
        assert shown(command.screen) == "a^[]0;title^G\tb\nc\\x9b\n"


async def test_json_is_one_object_with_the_whole_answer(fake_engine: FakeLlamaServer) -> None:
    """For `jq -r .text`."""
    async with Live(fake_engine) as live:
        async with Command(live.url, "run", "hello", "--json", "--max-tokens", "3") as command:
            assert await command.exit_code() == Exit.DONE
        task = await only_task(live)
        answer = json.loads(command.out)
        stream = await live.events({"stream_url": f"/v1/tasks/{task['task_id']}/stream"})
        assert answer.pop("decode_time_ms") >= 0
        assert answer == {
            "task_id": task["task_id"],
            "text": text(stream),
            "state": "completed",
            "finish_reason": "length",
            "tokens_out": 3,
            "tokens_in": 1,
        }


async def test_a_failed_task_is_told(fake_engine: FakeLlamaServer) -> None:
    """By its code, whether to try again, and exit 1; what came stays."""

    async def breaks(connection: Connection) -> None:
        await connection.token("half")
        connection.rst()

    fake_engine.script(breaks, breaks)
    async with Live(fake_engine) as live:
        async with Command(live.url, "run", "hello") as command:
            assert await command.exit_code() == Exit.FAILED
        assert command.out == b"half"
        (line,) = command.complaints
        assert "failed: WORKER_RESET: " in line
        assert "may succeed if tried again" in line
        async with Command(live.url, "run", "hello", "--json") as command:
            assert await command.exit_code() == Exit.FAILED
        answer = json.loads(command.out)
        assert (answer["state"], answer["text"], answer["error"]["code"]) == (
            "failed",
            "half",
            "WORKER_RESET",
        )


async def test_a_task_that_somebody_else_cancels_is_told(fake_engine: FakeLlamaServer) -> None:
    """With an exit code of its own."""
    fake_engine.hold = True
    async with Live(fake_engine) as live, running(live) as (command, _):
        await live.cancel({"cancel_url": f"/v1/tasks/{(await only_task(live))['task_id']}/cancel"})
        assert await command.exit_code() == Exit.CANCELLED
        assert "was cancelled by somebody else, after 0 tokens" in command.complaints[0]


# -- the prompt ------------------------------------------------------------------------------------


async def submitted(engine: FakeLlamaServer, *argv: str, said: bytes | None = None, **env: str) -> Any:
    """The body that the engine got for `llorch run …`, its stdin a pipe with `said`, or no stdin."""
    count = len(engine.completions)
    async with (
        Live(engine) as live,
        Command(live.url, "run", *argv, stdin="null" if said is None else "pipe", **env) as command,
    ):
        if said is not None:
            command.say(said)
            command.no_more()
        assert await command.exit_code() == Exit.DONE, command.err
    (completion,) = engine.completions[count:]
    return completion.request.body


async def test_the_prompt_comes_from_wherever_it_is(fake_engine: FakeLlamaServer, tmp_path: Path) -> None:
    """An argument, a pipe, `-`, a file; the line break that `echo` adds is not part of it."""
    (tmp_path / "prompt").write_text("two\nlines\n\n")
    for argv, said, prompt in [
        (["as said\n"], b"not read", "as said\n"),
        ([], b"piped \xc3\xa9\n", "piped é"),
        (["-"], b"dashed\r\n", "dashed"),
        (["--file", str(tmp_path / "prompt")], None, "two\nlines\n"),
    ]:
        assert (await submitted(fake_engine, *argv, said=said))["prompt"] == prompt


async def test_a_prompt_can_be_typed(fake_engine: FakeLlamaServer) -> None:
    """`-` on a terminal, ended by Ctrl-D."""
    async with (
        Live(fake_engine) as live,
        Command(live.url, "run", "-", "--max-tokens", "1", stdin="tty") as command,
    ):
        command.press(b"typed\n\x04")
        assert await command.exit_code() == Exit.DONE
    assert fake_engine.completions[0].request.body["prompt"] == "typed"


async def test_every_option_reaches_the_engine(fake_engine: FakeLlamaServer, tmp_path: Path) -> None:
    """Under its own name, as a number where it is one."""
    (tmp_path / "g").write_text('root ::= "a"')
    sampling = {
        "seed": 5,
        "temperature": 0.5,
        "top_k": 3,
        "top_p": 0.25,
        "min_p": 0.125,
        "typical_p": 0.75,
        "repeat_penalty": 1.5,
        "repeat_last_n": 9,
        "presence_penalty": -0.5,
        "frequency_penalty": 0.5,
    }
    argv = [word for name, value in sampling.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    argv += ["--max-tokens", "2", "--stop", "X", "--stop", "Y", "--grammar", str(tmp_path / "g")]
    body = await submitted(fake_engine, "hello", *argv)
    wanted = {**sampling, "n_predict": 2, "stop": ["X", "Y"], "grammar": 'root ::= "a"'}
    assert {name: body[name] for name in wanted} == wanted


async def test_a_chat_is_rendered_by_the_engine(fake_engine: FakeLlamaServer, tmp_path: Path) -> None:
    """A user's message, with a system message, or all of them from a file."""
    (tmp_path / "m").write_text('[{"role": "user", "content": "from a file"}]')
    for argv, words in [
        (["hello", "--chat"], ["user\nhello"]),
        (["hello", "--system", "be brief"], ["system\nbe brief", "user\nhello"]),
        (["--messages", str(tmp_path / "m")], ["user\nfrom a file"]),
    ]:
        prompt = (await submitted(fake_engine, *argv))["prompt"]
        assert [word in prompt for word in words] == [True] * len(words)


async def test_what_describes_a_task_is_seen_in_its_snapshot(
    fake_engine: FakeLlamaServer, tmp_path: Path
) -> None:
    """Session, metadata, pool, determinism, schema; and submit prints the id alone."""
    (tmp_path / "s").write_text('{"type": "integer"}')
    argv = ["--session", "s1", "--metadata", "a=b=c", "--pool", "default", "--seed", "1", "--max-tokens", "1"]
    argv += [
        "--determinism",
        "best_effort",
        "--priority",
        "interactive",
        "--json-schema",
        str(tmp_path / "s"),
    ]
    async with Live(fake_engine) as live:
        async with Command(live.url, "submit", "hello", *argv) as command:
            assert await command.exit_code() == Exit.DONE
        task = await only_task(live)
        assert (command.out.decode(), command.err) == (f"{task['task_id']}\n", b"")
        assert (task["session_id"], task["metadata"], task["determinism"]) == (
            "s1",
            {"a": "b=c"},
            "best_effort",
        )
        async with Command(live.url, "submit", "hello", "--json") as command:
            assert await command.exit_code() == Exit.DONE
        assert json.loads(command.out)["stream_url"].startswith("/v1/tasks/")


@pytest.mark.parametrize(
    ("argv", "code", "told"),
    [
        (["a", "--file", "b"], 2, "give one of PROMPT, --file and --messages"),
        (["a", "--grammar", "b", "--json-schema", "c"], 2, "not both"),
        (["--messages", "a", "--chat"], 2, "go with a prompt"),
        (["a", "--metadata", "b"], 2, "expected KEY=VALUE"),
        (["a", "--temperature", "nan"], 2, "invalid"),
        (["a", "--temp", "1"], 2, "unrecognized"),
        (["a", "--reconnect-s", "0"], 2, "seconds over 0"),
        ([""], Exit.REFUSED, "the prompt is empty"),
        ([], Exit.REFUSED, "the prompt is empty"),
        (["--file", "/nowhere"], Exit.NOT_FOUND, "/nowhere can't be read: No such file or directory"),
        (["--file", "/"], Exit.NOT_FOUND, "/ can't be read: Is a directory"),
        (["--file", "/bin/sh"], Exit.REFUSED, "/bin/sh is not UTF-8 (at byte "),
        (["--messages", "/dev/null"], Exit.REFUSED, "/dev/null is not JSON: "),
        (["a", "--token-file", "/etc/passwd"], Exit.CONFIG, "others can read /etc/passwd"),
        (["a", "--token-file", "/nowhere"], Exit.CONFIG, "/nowhere can't be read"),
        (["a", "--url", "localhost"], Exit.CONFIG, "'localhost' is not the URL of a server"),
        (["a", "--url", "http://127.0.0.1:9"], Exit.UNAVAILABLE, "is `llorch serve` running?"),
    ],
)
async def test_what_can_not_be_sent_is_told(argv: list[str], code: int, told: str) -> None:
    """Before a server is asked, with a code for each kind."""
    async with Command("http://127.0.0.1:9", "run", *argv) as command:
        assert await command.exit_code() == code
    assert told in command.err.decode()
    assert command.out == b""


async def test_without_a_prompt_a_terminal_is_not_waited_for() -> None:
    """Whoever forgot it is told, and not left before a silent cursor."""
    async with Command("http://127.0.0.1:9", "run", stdin="tty") as command:
        assert await command.exit_code() == Exit.USAGE
    assert "no prompt: give one" in command.err.decode()


# -- refusals --------------------------------------------------------------------------------------


async def test_a_full_queue_is_told_with_the_wait(fake_engine: FakeLlamaServer) -> None:
    """Exit 75 by itself, and as JSON on stdout if asked for."""
    fake_engine.hold = True
    async with Live(fake_engine, {"queue": {"capacity": 1}}) as live:
        await live.submit_held()
        await live.submit()
        async with Command(live.url, "run", "hello", "--json") as command:
            assert await command.exit_code() == Exit.BUSY
        (line,) = command.complaints
        assert "(ADMISSION_REJECT): try again in 2.0 s; --wait does it by itself" in line
        error = json.loads(command.out)["error"]
        assert (error["code"], error["retry_after_ms"]) == ("ADMISSION_REJECT", 2000)


async def test_with_wait_it_is_tried_until_taken(fake_engine: FakeLlamaServer) -> None:
    """After the time the server says; what is waited for is said once."""
    fake_engine.hold = True
    settings = {"queue": {"capacity": 1, "default_retry_after_ms": 250}}
    async with Live(fake_engine, settings) as live:
        await live.submit_held()
        waiting = await live.submit()
        async with Command(live.url, "run", "hello", "--wait") as command:
            await command.sees("waiting, as --wait says\n", on="err")
            await live.cancel(waiting)
            fake_engine.hold = False
            await fake_engine.held[0].finish()
            assert await command.exit_code() == Exit.DONE
        assert len(command.complaints) == 1
        assert command.out.endswith(b"-511")


@pytest.mark.parametrize(
    ("argv", "code", "told"),
    [
        (["--temperature", "9"], Exit.REFUSED, "$.temperature: expected float <= 5.0 (INVALID_PARAMS)"),
        (["--max-tokens", "4096"], Exit.REFUSED, "(CONTEXT_OVERFLOW)"),
        (["--pool", "none"], Exit.NOT_FOUND, "(UNKNOWN_POOL)"),
        (["--determinism", "strict"], Exit.REFUSED, "strict needs a seed"),
    ],
)
async def test_what_the_server_refuses_is_told_in_its_words(
    argv: list[str], code: int, told: str, fake_engine: FakeLlamaServer
) -> None:
    """With the code of the envelope, for whoever looks it up."""
    async with Live(fake_engine) as live, Command(live.url, "run", "hello world", *argv) as command:
        assert await command.exit_code() == code
    assert told in command.err.decode()


async def test_an_engine_that_loads_is_unavailable(fake_engine: FakeLlamaServer) -> None:
    """Exit 69, with when to try again."""
    fake_engine.health = "loading"
    async with Live(fake_engine) as live, Command(live.url, "run", "hello") as command:
        assert await command.exit_code() == Exit.UNAVAILABLE
    assert "(POOL_UNREADY): try again in " in command.err.decode()


async def test_a_token_is_asked_for_and_taken(fake_engine: FakeLlamaServer, tmp_path: Path) -> None:
    """From a file that is its owner's alone, or the environment; never from what it is refused for."""
    file = tmp_path / "token"
    file.write_text(f"{TOKEN}\n")
    file.chmod(0o600)
    argv = ["run", "hello", "--max-tokens", "1"]
    async with Live(fake_engine, {"auth": {"token": TOKEN}}) as live:
        async with Command(live.url, *argv) as command:
            assert await command.exit_code() == Exit.NOT_ALLOWED
        assert "(MISSING_TOKEN): give it by LLORCH_AUTH_TOKEN or --token-file FILE" in command.err.decode()
        async with Command(live.url, *argv, LLORCH_AUTH_TOKEN="wrong-token-0123456789") as command:
            assert await command.exit_code() == Exit.NOT_ALLOWED
        assert "wrong-token" not in command.err.decode()
        for more, env in [
            (["--token-file", str(file)], {"LLORCH_AUTH_TOKEN": "wrong"}),
            ([], {"LLORCH_AUTH_TOKEN": TOKEN}),
            ([], {"LLORCH_AUTH_TOKEN_FILE": str(file)}),
        ]:
            async with Command(live.url, *argv, *more, **env) as command:
                assert await command.exit_code() == Exit.DONE, command.err


# -- signals ---------------------------------------------------------------------------------------


async def test_ctrl_c_cancels_the_task_on_the_server(fake_engine: FakeLlamaServer) -> None:
    """On a terminal, in mid-answer; it is said, on a line of its own, and the exit code is 130."""
    fake_engine.hold = True
    async with (
        Live(fake_engine) as live,
        running(live, stdin="tty", out="tty", err="tty") as (command, engine),
    ):
        await engine.token("half a sent")
        await command.sees("half a sent")
        command.press(b"\x03")
        assert await command.exit_code() == Exit.INTERRUPTED
        task = await only_task(live)
        assert (task["state"], task["tokens_out"]) == ("cancelled", 1)
        *_, before, last = shown(command.screen).rstrip("\n").split("\n")
        assert before.replace("^C", "") == "half a sent"
        assert last == f"llorch: cancelled task {task['task_id']} on the server after 1 token"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
async def test_a_task_that_waits_is_cancelled_by_a_signal(
    number: signal.Signals, fake_engine: FakeLlamaServer
) -> None:
    """`timeout 10 llorch run …` leaves no work behind; the code is the shell's for that signal."""
    fake_engine.hold = True
    async with Live(fake_engine) as live:
        await live.submit_held()
        async with Command(live.url, "run", "hello", "--json", err="tty") as command:
            await command.sees("waiting for the first token")
            command.process.send_signal(number)
            assert await command.exit_code() == 128 + number
        newest = (await live.get("/v1/tasks")).body["tasks"][0]
        assert newest["state"] == "cancelled"
        assert shown(command.screen).startswith("llorch: cancelled task ")


async def test_an_ignored_ctrl_c_stays_ignored(fake_engine: FakeLlamaServer) -> None:
    """As a shell's background job and nohup have it."""
    fake_engine.hold = True
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        async with Live(fake_engine) as live, running(live) as (command, engine):
            await engine.token("a")
            await command.sees("a", on="out")
            command.process.send_signal(signal.SIGINT)
            await engine.token("b")
            await command.sees("ab", on="out")
            await engine.finish()
            assert await command.exit_code() == Exit.DONE
    finally:
        signal.signal(signal.SIGINT, before)


async def test_a_second_ctrl_c_leaves_at_once(fake_engine: FakeLlamaServer) -> None:
    """Where the cancel can't be delivered, the task runs on, and it is said how to end it."""
    fake_engine.hold = True
    async with (
        Live(fake_engine) as live,
        Proxy(live.port, []) as proxy,
        Command(proxy.url, "run", "hello", stdin="tty", out="tty", err="tty") as command,
    ):
        await (await fake_engine.started()).token("half")
        await command.sees("half")
        proxy.down = True
        proxy.break_all()
        command.press(b"\x03")
        await command.sees("Ctrl-C again leaves it running")
        command.press(b"\x03")
        assert await command.exit_code() == Exit.INTERRUPTED
        task = await only_task(live)
        assert task["state"] == "running"
        assert f"may still run: llorch cancel {task['task_id']}" in shown(command.screen)


async def test_ctrl_c_while_submitting_leaves_no_task_behind(fake_engine: FakeLlamaServer) -> None:
    """The answer to the POST is waited for, and what it admitted is cancelled."""
    rendering, may_go = asyncio.Event(), asyncio.Event()

    async def slowly(connection: Connection) -> None:
        rendering.set()
        await may_go.wait()
        await connection.answer(200, {"prompt": "rendered"})

    fake_engine.hold = True
    fake_engine.script(slowly, path="/apply-template")
    async with Live(fake_engine) as live, Command(live.url, "run", "hello", "--chat", err="tty") as command:
        await rendering.wait()
        command.process.send_signal(signal.SIGINT)
        await command.sees("cancelling")
        may_go.set()
        assert await command.exit_code() == Exit.INTERRUPTED
        assert (await only_task(live))["state"] == "cancelled"


async def test_ctrl_c_while_refused_just_leaves(fake_engine: FakeLlamaServer) -> None:
    """Nothing was admitted, so nothing is cancelled."""
    fake_engine.hold = True
    settings = {"queue": {"capacity": 1, "default_retry_after_ms": 300_000}}
    async with Live(fake_engine, settings) as live:
        await live.submit_held()
        await live.submit()
        async with Command(live.url, "run", "hello", "--wait", err="tty") as command:
            await command.sees("next try in 5 min")
            command.process.send_signal(signal.SIGINT)
            assert await command.exit_code() == Exit.INTERRUPTED
        assert shown(command.screen) == ""


# -- where stdout goes -----------------------------------------------------------------------------


async def test_a_reader_that_has_left_ends_it_quietly(fake_engine: FakeLlamaServer) -> None:
    """`llorch run … | head -c 1`: nobody is there to read the rest, so the engine is not kept at it."""
    fake_engine.hold = True
    async with Live(fake_engine) as live, running(live) as (command, engine):
        await engine.token("a")
        await command.sees("a", on="out")
        command.hang_up()
        await engine.token("b")
        assert await command.exit_code() == Exit.DONE
        assert command.err == b""
        assert (await only_task(live))["state"] == "cancelled"


async def test_ctrl_c_works_while_a_pager_stands_still(fake_engine: FakeLlamaServer) -> None:
    """A full pipe blocks the text, not the person."""
    fake_engine.hold = True
    async with Live(fake_engine) as live, running(live) as (command, engine):
        await engine.token("a")
        await command.sees("a", on="out")
        command.stop_reading()
        for _ in range(4):
            await engine.token("x" * 60_000)
        command.process.send_signal(signal.SIGINT)
        await engine.gone.wait()
        assert await command.exit_code() == Exit.INTERRUPTED
        assert (await only_task(live))["state"] == "cancelled"
        assert "cancelled task" in command.complaints[0]


async def test_a_full_disk_is_told(fake_engine: FakeLlamaServer) -> None:
    """Exit 74, and the task is cancelled: half an answer helps nobody."""
    fake_engine.hold = True
    async with Live(fake_engine) as live:
        async with running(live, out="full") as (command, engine):
            await engine.token("a")
            assert await command.exit_code() == Exit.IO
        assert command.complaints[-1] == "stdout can't be written: No space left on device"
        assert (await only_task(live))["state"] == "cancelled"


async def test_no_stdout_at_all_is_no_fault(fake_engine: FakeLlamaServer) -> None:
    """`llorch run … >&-`: nothing is written into whatever has its number now."""
    async with Live(fake_engine) as live, Command(live.url, "run", "hello", out="closed") as command:
        assert await command.exit_code() == Exit.DONE
        assert command.err == b""


# -- progress --------------------------------------------------------------------------------------


async def test_while_it_waits_a_line_tells_how_long(fake_engine: FakeLlamaServer) -> None:
    """On stderr, on a terminal only; it erases itself before the answer begins."""
    fake_engine.hold = True
    async with Live(fake_engine) as live:
        await live.submit_held()
        await live.submit()
        async with Command(live.url, "run", "hello", "--max-tokens", "1", out="tty", err="tty") as command:
            await command.sees("waiting: 1 ahead")
            fake_engine.hold = False
            await fake_engine.held[0].finish()
            assert await command.exit_code() == Exit.DONE
        last = shown(command.screen).rstrip("\n").split("\n")
        assert len(last) == 2
        assert last[0].endswith("-0")
        assert last[1] == "llorch: cut off after 1 tokens; --max-tokens allows more"


async def test_a_dumb_terminal_gets_no_line_that_it_could_not_erase(fake_engine: FakeLlamaServer) -> None:
    """And no escape sequence at all."""
    async with Live(fake_engine) as live:
        argv = ["run", "hello", "--max-tokens", "1"]
        async with Command(live.url, *argv, out="tty", err="tty", TERM="dumb") as command:
            assert await command.exit_code() == Exit.DONE
        assert b"\x1b" not in command.screen


async def test_metrics_make_the_line_live() -> None:
    """Position, predicted start, then the prompt being read; cut to the width of the terminal."""
    steps = [
        {"queue_position": 3, "predicted_start_ms": 90_000, "queue_depth": 5},
        {"queue_position": 0, "predicted_start_ms": 0, "queue_depth": 1},
        {"queue_position": None, "predicted_start_ms": None, "queue_depth": 0}
        | {"prompt_tokens": 4096, "prompt_tokens_done": 1024},
    ]
    seen = [asyncio.Event() for _ in steps]

    async def create(request: web.Request) -> web.Response:
        return web.json_response({"task_id": "t\x1b[2J", "queue_position": 4}, status=202)

    async def stream(request: web.Request) -> web.StreamResponse:
        assert request.query["metrics"] == "1"
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await response.write(frame(0, "started", {"queue_position": 4}))
        for step, shown_now in zip(steps, seen, strict=True):
            await response.write(frame(None, "metrics", step))
            await shown_now.wait()
        await response.write(frame(1, "token", {"t": "done", "i": 0}))
        await response.write(frame(2, "end", {"tokens_out": 1, "finish_reason": "stop"}))
        return response

    async with serving({"/v1/tasks": create, "/v1/tasks/{id}/stream": stream}) as url:
        async with Command(url, "run", "hello", out="pipe", err="tty", size=(44, 24)) as command:
            for words, shown_now in zip(
                ["waiting: 3 ahead, starts in about ", "next in line, starts any moment", "reading the "],
                seen,
                strict=True,
            ):
                await command.sees(words)
                shown_now.set()
            assert await command.exit_code() == Exit.DONE
        assert "reading the prompt: 1,024 of 4,096 tokens …" in command.screen.decode()
        assert command.out == b"done"
        assert shown(command.screen) == ""


# -- stream ----------------------------------------------------------------------------------------


async def test_a_stream_can_be_watched_and_left(fake_engine: FakeLlamaServer) -> None:
    """Ctrl-C leaves the task alone, and says how to end it."""
    fake_engine.hold = True
    async with Live(fake_engine) as live:
        task = await live.submit_held()
        async with Command(live.url, "stream", task["task_id"]) as command:
            await fake_engine.held[0].token("a")
            await command.sees("a", on="out")
            command.process.send_signal(signal.SIGINT)
            assert await command.exit_code() == Exit.INTERRUPTED
        assert command.complaints == [
            f"left; task {task['task_id']} goes on: llorch cancel {task['task_id']} ends it"
        ]
        assert (await live.snapshot(task))["state"] == "running"


async def test_a_finished_stream_is_replayed(fake_engine: FakeLlamaServer) -> None:
    """As text, as JSON Lines, and after any event."""
    async with Live(fake_engine) as live:
        task = await live.submit(max_tokens=3)
        events = await live.events(task)
        async with Command(live.url, "stream", task["task_id"]) as command:
            assert await command.exit_code() == Exit.DONE
        assert command.out.decode() == text(events)
        async with Command(live.url, "stream", task["task_id"], "--json", "--last-event-id", "1") as command:
            assert await command.exit_code() == Exit.DONE
        lines = [json.loads(line) for line in command.out.splitlines()]
        assert lines == [{"event": event.name, **event.data} for event in events[2:]]


async def test_a_stream_whose_reader_leaves_ends_quietly(fake_engine: FakeLlamaServer) -> None:
    """The task is not its own: it goes on."""
    fake_engine.hold = True
    async with Live(fake_engine) as live:
        task = await live.submit_held()
        async with Command(live.url, "stream", task["task_id"]) as command:
            await fake_engine.held[0].token("a")
            await command.sees("a", on="out")
            command.hang_up()
            await fake_engine.held[0].token("b")
            assert await command.exit_code() == Exit.DONE
        assert command.err == b""
        assert (await live.snapshot(task))["state"] == "running"


async def test_a_task_that_is_not_there_is_told(fake_engine: FakeLlamaServer) -> None:
    """Exit 66."""
    async with Live(fake_engine) as live, Command(live.url, "stream", "0" * 32) as command:
        assert await command.exit_code() == Exit.NOT_FOUND
    assert "(TASK_NOT_FOUND)" in command.err.decode()

"""The commands that talk to a server: ask, show, and an exit code that a script can use.

The one rule: whatever happens is said in a line on stderr, for a person, and by the exit code, for a script;
with `--json` what a server answers, a refusal too, is JSON on stdout.
"""

import argparse
import asyncio
import os
from typing import Any

import msgspec

from llorch import client as paths
from llorch import following, prompts, top
from llorch.answers import (
    BadAnswer,
    BadUrl,
    Busy,
    ClientError,
    NotAllowed,
    NotFound,
    Pool,
    Refused,
    Reloaded,
    ServerBug,
    TaskList,
    TooOld,
    Unavailable,
    Unreachable,
)
from llorch.arguments import DEFAULT_URL, where
from llorch.client import Client
from llorch.exits import Exit
from llorch.tables import health_lines, now, pool_lines, task_lines
from llorch.terminal import Console, StdoutBroken, StdoutGone, clean, duration

DEFAULT_POOL = "default"
_EXITS: list[tuple[type[ClientError], Exit]] = [  # the first that fits
    (Busy, Exit.BUSY),
    (Unavailable, Exit.UNAVAILABLE),
    (NotAllowed, Exit.NOT_ALLOWED),
    (NotFound, Exit.NOT_FOUND),
    (ServerBug, Exit.BUG),
    (Refused, Exit.REFUSED),
    (Unreachable, Exit.UNAVAILABLE),
    (BadAnswer, Exit.PROTOCOL),
    (TooOld, Exit.PROTOCOL),
    (BadUrl, Exit.CONFIG),
]


def main(options: argparse.Namespace, server: tuple[str, str] = (DEFAULT_URL, "")) -> int:
    """Run one command; the exit code. `server`: URL and token, where neither flag nor environment says."""
    console = Console.standard()
    try:
        body = prompts.task_body(options) if options.command in ("run", "submit") else {}
        url = where(options, os.environ, server[0])
        token = prompts.token(options, dict(os.environ), server[1] if url == server[0] else "")
        return asyncio.run(execute(options, console, url, token, body))
    except prompts.InputFault as fault:
        console.complain(str(fault))
        return fault.exit_code


async def execute(
    options: argparse.Namespace, console: Console, url: str, token: str, body: dict[str, Any]
) -> int:
    """The command against the server at `url`; `body` is the task of `run` and `submit`. The exit code."""
    try:
        try:
            async with Client(url, token) as client:
                return await _command(client, console, options, body)
        except ClientError as error:
            return await _failed(console, options, error)
    except StdoutGone:
        return Exit.DONE
    except StdoutBroken as error:
        console.complain(str(error))
        return Exit.IO


async def _command(
    client: Client, console: Console, options: argparse.Namespace, body: dict[str, Any]
) -> int:
    match options.command:
        case "run":
            return await following.run(client, console, options, body)
        case "submit":
            return await submit(client, console, options, body)
        case "stream":
            return await following.stream(client, console, options)
        case "cancel":
            return await cancel(client, console, options)
        case "ps":
            return await ps(client, console, options)
        case "top":
            return await top.watch(client, console, options)
        case "reload":
            return await reload(client, console, options)
        case "drain":
            return await drain(client, console, options)
        case _:
            return await health(client, console, options)


# -- what went wrong -------------------------------------------------------------------------------


async def _failed(console: Console, options: argparse.Namespace, error: ClientError) -> int:
    exit_code = next(code for kind, code in _EXITS if isinstance(error, kind))
    if options.json:
        await _json(console, {"error": _as_json(error)})
    await console.end_line()
    console.complain(explain(error))
    return exit_code


def _as_json(error: ClientError) -> dict[str, Any]:
    if isinstance(error, Refused):
        said: dict[str, Any] = msgspec.to_builtins(error.answer)
        return {key: value for key, value in said.items() if value is not None}
    code = "UNREACHABLE" if isinstance(error, Unreachable) else "NOT_LLORCH"
    if isinstance(error, BadUrl):
        code = "BAD_URL"
    return {"code": code, "message": str(error), "retriable": isinstance(error, Unreachable)}


def explain(error: ClientError) -> str:
    """What went wrong and the cure, in a line."""
    if isinstance(error, NotAllowed) and error.status == 401:
        return (
            f"{error} ({error.answer.code}): give it by LLORCH_AUTH_TOKEN or --token-file FILE; it is "
            "auth.token in the server's configuration"
        )
    if isinstance(error, TooOld):
        return f"{error}; llorch ps and llorch health do without"
    if not isinstance(error, Refused):
        return str(error)
    line = f"{error} ({error.answer.code})"
    if isinstance(error, Busy | Unavailable):
        return f"{line}: try again in {duration(1000 * error.retry_after_s)}; --wait does it by itself"
    return f"{line}: {error.answer.hint}" if error.answer.hint else line


# -- commands --------------------------------------------------------------------------------------


async def submit(client: Client, console: Console, options: argparse.Namespace, body: dict[str, Any]) -> int:
    """Hand in a task and print its id."""
    with following.Signals(console) as signals:
        progress = following.Progress()
        try:
            async with following.ticking(console, progress):
                created = await following.admitted(client, console, options, body, signals, progress)
        except following.Interrupted:
            return signals.exit_code
    if options.json:
        await _json(console, created)
    else:
        await console.lines([clean(created.task_id)])
        if console.err_is_terminal:
            start = duration(created.predicted_start_ms)
            told = "" if created.predicted_start_ms is None else f", starts in about {start}"
            console.complain(f"{created.queue_position} ahead{told}; llorch stream {created.task_id}")
    return Exit.DONE


async def cancel(client: Client, console: Console, options: argparse.Namespace) -> int:
    """End a task."""
    cancelled = await client.cancel(options.task_id)
    if options.json:
        await _json(console, cancelled)
    else:
        await console.lines([clean(following.fate(cancelled))])
    return Exit.DONE


async def ps(client: Client, console: Console, options: argparse.Namespace) -> int:
    """Pools, queue and recent tasks."""
    tasks = await client.ask("GET", paths.list_path(options.state, options.limit), msgspec.Raw)
    pools = await _pools(client)
    if options.json:
        listed = msgspec.json.decode(tasks, type=dict[str, msgspec.Raw])
        await _json(console, {"pools": pools, "tasks": listed.get("tasks", [])})
        return Exit.DONE
    lines = pool_lines([msgspec.json.decode(pool, type=Pool) for pool in pools], colour=console.colour)
    shown = msgspec.json.decode(tasks, type=TaskList).tasks
    await console.lines([*lines, "", *task_lines(shown, now(), colour=console.colour)])
    return Exit.DONE


async def health(client: Client, console: Console, options: argparse.Namespace) -> int:
    """How each pool is; Exit.UNAVAILABLE if one is not ready."""
    if options.pool:
        raw = [await client.ask("GET", paths.pool_path(options.pool), msgspec.Raw)]
    else:
        raw = await _pools(client)
    pools = [msgspec.json.decode(pool, type=Pool) for pool in raw]
    if options.json:
        await _json(console, {"pools": raw})
    else:
        await console.lines(health_lines(pools, colour=console.colour))
    return Exit.DONE if all(pool.ready for pool in pools) else Exit.UNAVAILABLE


async def reload(client: Client, console: Console, options: argparse.Namespace) -> int:
    """Have the configuration of a pool read again, and tell what was done."""
    path = paths.pool_path(await _pool_id(client, options), "reload")
    answer = await client.ask("POST", path, msgspec.Raw)
    if options.json:
        await _json(console, answer)
        return Exit.DONE
    done = msgspec.json.decode(answer, type=Reloaded)
    let_go = f"; let go: {', '.join(done.retired)}" if done.retired else ""
    steps = (
        f"{step.name} {step.replica_id or ''}".rstrip() + f": {duration(step.ms)}" for step in done.steps
    )
    said = clean(f"pool {done.pool_id} has {', '.join(done.replicas)}{let_go}")
    await console.lines([said, *(f"  {clean(step)}" for step in steps)])
    return Exit.DONE


async def drain(client: Client, console: Console, options: argparse.Namespace) -> int:
    """Have a pool take no new tasks, or take them again."""
    pool_id = await _pool_id(client, options)
    told = {"cancel": True} if options.end else {"deadline_ms": round(options.deadline_s * 1000)}
    path = paths.pool_path(pool_id, "drain")
    try:
        answer = await client.ask("POST", path, msgspec.Raw, msgspec.json.encode(told))
    except TooOld as error:
        raise TooOld(f"{error}; one of the home profile has none either") from None
    if options.json:
        await _json(console, answer)
    elif options.end:
        await console.lines([clean(f"pool {pool_id} takes tasks again")])
    else:
        left = duration(1000 * options.deadline_s)
        await console.lines([clean(f"pool {pool_id} takes no new tasks; what it has is failed in {left}")])
    return Exit.DONE


async def _pool_id(client: Client, options: argparse.Namespace) -> str:
    """The pool that is meant; the server tells its default one first."""
    if options.pool:
        return str(options.pool)
    pools = [msgspec.json.decode(pool, type=Pool) for pool in await _pools(client)]
    return pools[0].pool_id if pools else DEFAULT_POOL


async def _pools(client: Client) -> list[msgspec.Raw]:
    """Every pool; the default one where the server is too old to say which there are."""

    class Pools(msgspec.Struct):
        pools: list[msgspec.Raw]

    try:
        return (await client.ask("GET", paths.STATUS, Pools)).pools
    except TooOld:
        return [await client.ask("GET", paths.pool_path(DEFAULT_POOL), msgspec.Raw)]


async def _json(console: Console, value: Any) -> None:
    await console.write(f"{msgspec.json.encode(value).decode()}\n", trusted=True)

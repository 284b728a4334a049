"""What the client commands take on their command lines; argparse and nothing else, so that help is quick."""

import argparse
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from llorch.exits import table

DEFAULT_URL = "http://127.0.0.1:8080"
URL_VARIABLE = "LLORCH_URL"
TOKEN_VARIABLE = "LLORCH_AUTH_TOKEN"
TOKEN_FILE_VARIABLE = "LLORCH_AUTH_TOKEN_FILE"
SHELLS = ("bash", "zsh", "fish")
STATES = ("queued", "running", "completed", "failed", "cancelled")
EPILOG = f"exit codes:\n{table()}"

_SAMPLING: list[tuple[str, Callable[[str], Any], str]] = [
    ("temperature", float, "0 is greedy; llorch's own is 0.8"),
    ("top_k", int, "the K likeliest tokens only"),
    ("top_p", float, "the likeliest tokens up to this sum of probability"),
    ("min_p", float, "tokens at least so likely as this share of the likeliest"),
    ("typical_p", float, "locally typical sampling"),
    ("repeat_penalty", float, "1 is none"),
    ("repeat_last_n", int, "how many tokens back the repeat penalty looks"),
    ("presence_penalty", float, "-2 to 2"),
    ("frequency_penalty", float, "-2 to 2"),
]
TASK_FIELDS = ("max_tokens", "seed", *(name for name, _, _ in _SAMPLING))  # as they are called on the wire


class Parser(argparse.ArgumentParser):
    """argparse's, without abbreviated options; a text that has line breaks keeps them."""

    def __init__(self, *args: Any, **options: Any) -> None:
        options["allow_abbrev"] = False
        options.setdefault("formatter_class", _Formatter)
        super().__init__(*args, **options)


class _Formatter(argparse.HelpFormatter):
    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if "\n" not in text:
            return super()._fill_text(text, width, indent)
        return "\n".join(f"{indent}{line}" for line in text.splitlines())


def add_commands(commands: Any, run: Callable[[argparse.Namespace], int]) -> None:
    """Register the commands that talk to a server: each sets `run`, and `command` to its own name."""
    shared = _shared()

    def command(name: str, text: str, more: str = "") -> argparse.ArgumentParser:
        description = f"{text[:1].upper()}{text[1:]}.{more and f' {more}'}"
        parser: argparse.ArgumentParser = commands.add_parser(
            name, help=text, description=description, epilog=EPILOG, parents=[shared]
        )
        parser.set_defaults(run=run, command=name, refuse=_refusing(parser))
        return parser

    parser = command(
        "run",
        "run a prompt and stream its answer to stdout",
        "Ctrl-C cancels the task on the server; a second one leaves at once, and the task running if the "
        "server could not be told. A lost connection is taken up again where it broke. On a terminal, "
        "control characters of the answer are shown and not obeyed; in a pipe every byte is as it came.",
    )
    _add_task(parser)
    _add_patience(parser)

    parser = command("submit", "hand in a prompt, print the task's id and leave")
    _add_task(parser)

    parser = command("stream", "stream a task's answer from its beginning, running or finished")
    _add_id(parser)
    parser.add_argument(
        "--last-event-id",
        type=_whole,
        metavar="N",
        help="begin after the event with this id (token i has id i + 1)",
    )
    _add_patience(parser)

    _add_id(command("cancel", "end a task; harmless if it has ended"))

    parser = command("ps", "show the pools, the queue and recent tasks")
    parser.add_argument("-n", "--limit", type=_count, default=20, metavar="N", help="tasks (default: 20)")
    parser.add_argument("--state", choices=STATES, help="tasks in this state only")

    parser = command("top", "watch slots, queue, speed, GPU and VRAM; q leaves")
    parser.add_argument("-d", "--interval", type=_seconds, default=1.0, metavar="S", help="default: 1 s")
    parser.add_argument(
        "-n", "--count", type=_count, metavar="N", help="so many pictures (without a terminal: 1)"
    )

    parser = command("health", "say how each pool is; exit 0 if all are ready")
    parser.add_argument("pool", nargs="?", metavar="POOL", help="this pool only")

    parser = command(
        "reload",
        "have the server read its configuration of a pool again",
        "What is new is tried out first; if anything is wrong, nothing changes.",
    )
    parser.add_argument("pool", nargs="?", metavar="POOL", help="default: the server's default pool")

    parser = command("drain", "have a pool take no new tasks, until a reload or --end")
    parser.add_argument("pool", nargs="?", metavar="POOL", help="default: the server's default pool")
    how = parser.add_mutually_exclusive_group()
    text = "what it has may go on for so long, and is failed then (default: 300)"
    how.add_argument("--deadline-s", type=_deadline_s, default=300.0, metavar="S", help=text)
    how.add_argument("--end", action="store_true", help="take tasks again")


def add_doctor(commands: Any, run: Callable[[argparse.Namespace], int]) -> argparse.ArgumentParser:
    """Register `doctor`; where the configuration is found is added by whoever knows."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "doctor",
        help="examine configuration, GPU, port and engine, and say how to mend what is bad",
        description="Examine what llorch needs on this machine. It need not be running.",
        epilog=EPILOG,
    )
    _add_json(parser)
    parser.set_defaults(run=run, command="doctor")
    return parser


def add_completion(commands: Any, run: Callable[[argparse.Namespace], int]) -> None:
    """Register `completion`."""
    parser = commands.add_parser(
        "completion",
        help="print a script that completes llorch's commands in a shell",
        description="Print a completion script. Try it: source <(llorch completion bash)\n"
        "Keep it:\n"
        "  bash  llorch completion bash > ~/.local/share/bash-completion/completions/llorch\n"
        "  zsh   llorch completion zsh > DIR/_llorch, with DIR in $fpath, before compinit\n"
        "  fish  llorch completion fish > ~/.config/fish/completions/llorch.fish",
    )
    parser.add_argument("shell", choices=SHELLS)
    parser.set_defaults(run=run)


# -- parts -----------------------------------------------------------------------------------------


def _shared() -> argparse.ArgumentParser:
    parser = Parser(add_help=False)
    group = parser.add_argument_group("server")
    group.add_argument("--url", metavar="URL", help=f"default: ${URL_VARIABLE}, else {DEFAULT_URL}")
    group.add_argument(
        "--token-file",
        type=Path,
        metavar="FILE",
        help=f"has the token and nothing else (default: ${TOKEN_VARIABLE}, else ${TOKEN_FILE_VARIABLE})",
    )
    _add_json(parser)
    return parser


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON, for scripts")


def _add_id(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("task_id", metavar="ID", help="the task's id, from submit or ps")


def _add_patience(parser: argparse.ArgumentParser) -> None:
    text = "how long to try to get a lost connection back (default: 60)"
    parser.add_argument("--reconnect-s", type=_seconds, default=60.0, metavar="S", help=text)


def _add_task(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "prompt",
        nargs="?",
        metavar="PROMPT",
        help="`-` is stdin, which is read too if it is no terminal and no prompt is given; the last line "
        "break of a file or stdin is not part of the prompt",
    )
    parser.add_argument("-f", "--file", type=Path, metavar="FILE", help="the prompt is this file")
    parser.add_argument("--wait", action="store_true", help="if refused for now (429, 503), try until taken")

    chat = parser.add_argument_group("as a chat, by the model's own template")
    chat.add_argument("--chat", action="store_true", help="send the prompt as a user's message")
    chat.add_argument("--system", metavar="TEXT", help="with this system message; implies --chat")
    chat.add_argument(
        "--messages", type=Path, metavar="FILE", help="JSON: [{role, content}, …], in place of a prompt"
    )

    task = parser.add_argument_group("task")
    task.add_argument("--max-tokens", type=int, metavar="N", help="the longest answer")
    task.add_argument("--seed", type=int, metavar="N", help="the same seed gives the same bytes")
    for name, kind, text in _SAMPLING:
        metavar = "N" if kind is int else "X"
        task.add_argument(_flag(name), type=_number if kind is float else int, metavar=metavar, help=text)
    task.add_argument("--stop", action="append", metavar="TEXT", help="end before this text; up to 8 times")
    task.add_argument("--grammar", type=Path, metavar="FILE", help="the answer obeys this GBNF grammar")
    task.add_argument("--json-schema", type=Path, metavar="FILE", help="the answer obeys this JSON schema")
    task.add_argument("--determinism", choices=("strict", "best_effort"), help="strict needs a seed")
    task.add_argument(
        "--priority", choices=("interactive", "batch"), help="batch waits until nothing interactive does"
    )
    task.add_argument("--pool", metavar="POOL", help="which engine (default: the server's)")
    task.add_argument("--session", metavar="ID", help="a name that belongs to one conversation")
    task.add_argument(
        "--metadata", action="append", metavar="KEY=VALUE", help="comes back in the task's snapshots"
    )


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _refusing(parser: argparse.ArgumentParser) -> Callable[[str], NoReturn]:
    def refuse(message: str) -> NoReturn:
        parser.error(message)

    return refuse


def _number(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError
    return number


def _seconds(text: str) -> float:
    if not 0 < (number := float(text)) < 1e7:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds over 0")
    return number


def _deadline_s(text: str) -> float:
    if not 0 <= (number := float(text)) <= 86_400:
        raise argparse.ArgumentTypeError(f"expected seconds from 0 to 86400, got {text!r}")
    return number


def _count(text: str) -> int:
    if not 1 <= (number := int(text)) <= 1000:
        raise argparse.ArgumentTypeError(f"expected 1 to 1000, got {text!r}")
    return number


def _whole(text: str) -> int:
    if not 0 <= (number := int(text)) < 10**9:
        raise argparse.ArgumentTypeError(f"expected an event's id, got {text!r}")
    return number


# -- read ------------------------------------------------------------------------------------------


def where(options: argparse.Namespace, env: Mapping[str, str], otherwise: str = DEFAULT_URL) -> str:
    """The server's URL: the flag, the environment, else `otherwise`."""
    return str(options.url or env.get(URL_VARIABLE) or otherwise)


def given(options: argparse.Namespace, names: Iterable[str]) -> dict[str, Any]:
    """Those of the options that were given."""
    return {name: value for name in names if (value := getattr(options, name)) is not None}

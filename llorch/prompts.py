"""The body of a task from a command line: the prompt from wherever it is, and the options as fields.

The one rule: ranges are the server's to judge; here is only found out what can't be sent at all.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from llorch.arguments import TASK_FIELDS, TOKEN_FILE_VARIABLE, TOKEN_VARIABLE, given
from llorch.exits import Exit


class InputFault(Exception):
    """What was named can't be read or is not what it should be; `exit_code` says which."""

    def __init__(self, message: str, exit_code: Exit) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def task_body(options: argparse.Namespace) -> dict[str, Any]:
    """What to POST. Reads stdin if the prompt is there. Raises InputFault; a wrong command line ends it."""
    body = _prompt(options) | given(options, TASK_FIELDS)
    body |= {key: value for key in ("stop", "determinism", "priority") if (value := getattr(options, key))}
    if options.pool:
        body["pool_id"] = options.pool
    if options.session:
        body["session_id"] = options.session
    if options.grammar and options.json_schema:
        options.refuse("give --grammar or --json-schema, not both")
    if options.grammar:
        body["grammar"] = _text(options.grammar)
    if options.json_schema:
        body["json_schema"] = _json(options.json_schema)
    if options.metadata:
        body["metadata"] = dict(_pair(options, pair) for pair in options.metadata)
    try:
        json.dumps(body, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # bytes of the command line that are no text
        raise InputFault("the command line is not UTF-8", Exit.REFUSED) from None
    return body


def _prompt(options: argparse.Namespace) -> dict[str, Any]:
    sources = [options.prompt is not None, options.file is not None, options.messages is not None]
    if sum(sources) > 1:
        options.refuse("give one of PROMPT, --file and --messages")
    if options.messages is not None:
        if options.chat or options.system is not None:
            options.refuse("--messages has all messages: --chat and --system go with a prompt")
        return {"messages": _json(options.messages)}
    text = _prompt_text(options)
    if not text:
        raise InputFault("the prompt is empty", Exit.REFUSED)
    if not options.chat and options.system is None:
        return {"prompt": text}
    system = [] if options.system is None else [{"role": "system", "content": options.system}]
    return {"messages": [*system, {"role": "user", "content": text}]}


def _prompt_text(options: argparse.Namespace) -> str:
    if options.file is not None:
        return _without_last_break(_text(options.file))
    if options.prompt is not None and options.prompt != "-":
        return str(options.prompt)
    if options.prompt is None and (sys.stdin is None or sys.stdin.isatty()):
        options.refuse('no prompt: give one ("…"), --file FILE, or - to type it, ended by Ctrl-D')
    if sys.stdin is None:
        raise InputFault("there is no stdin to read the prompt from", Exit.NOT_FOUND)
    try:
        return _without_last_break(_decoded("stdin", sys.stdin.buffer.read()))
    except OSError as error:
        raise InputFault(f"stdin can't be read: {error.strerror}", Exit.NOT_FOUND) from None


def _text(path: Path) -> str:
    try:
        return _decoded(str(path), sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes())
    except OSError as error:
        raise InputFault(f"{path} can't be read: {error.strerror}", Exit.NOT_FOUND) from None
    except ValueError:
        raise InputFault(f"{str(path)!r} is not the name of a file", Exit.NOT_FOUND) from None


def _decoded(source: str, data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise InputFault(f"{source} is not UTF-8 (at byte {error.start})", Exit.REFUSED) from None


def _without_last_break(text: str) -> str:
    """An editor and `echo` end the last line; the model should go on in it."""
    return text.removesuffix("\n").removesuffix("\r")


def _json(path: Path) -> Any:
    try:
        return json.loads(_text(path))
    except (ValueError, RecursionError) as error:
        raise InputFault(f"{path} is not JSON: {error}", Exit.REFUSED) from None


def _pair(options: argparse.Namespace, text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        options.refuse(f"--metadata: expected KEY=VALUE, got {text!r}")
    return key, value


def token(options: argparse.Namespace, env: dict[str, str], otherwise: str) -> str:
    """The token: that of `--token-file`, of the environment, else `otherwise`. Raises InputFault."""
    if options.token_file is not None:
        return _private(options.token_file)
    if inline := env.get(TOKEN_VARIABLE):
        return inline
    if named := env.get(TOKEN_FILE_VARIABLE):
        return _private(Path(named))
    return otherwise


def _private(path: Path) -> str:
    """The secret in a file that nobody else may read, as the server demands of its own."""
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode & 0o777
            secret = file.read(4096).decode("ascii").strip()
    except OSError as error:
        raise InputFault(f"{path} can't be read: {error.strerror}", Exit.CONFIG) from None
    except ValueError:
        raise InputFault(f"{path}: a token has visible ASCII characters only", Exit.CONFIG) from None
    if mode & 0o077:
        message = f"others can read {path} and the token in it (mode {mode:04o}): chmod 600 {path}"
        raise InputFault(message, Exit.CONFIG)
    if not secret:
        raise InputFault(f"{path} is empty", Exit.CONFIG)
    return secret

"""The command line. What a user can cause is answered in a line or two on stderr, never by a traceback."""

import argparse
import contextlib
import io
import os
import secrets
import sys
from importlib import resources
from pathlib import Path
from typing import Any

import msgspec
import tomli_w

from llorch import __version__
from llorch.config import SECRET_KEYS, Config, ConfigError, env_name, load, unknown_variables
from llorch.server import EXIT_CONFIG, StartError, serve

DEFAULT_CONFIG = Path("config.toml")
CONFIG_VARIABLE = "LLORCH_CONFIG"
EXIT_INTERRUPTED = 130
_FLAGS = {
    "bind_addr": "where to listen, as IP:port",
    "profile": "mvp or home",
    "adapter.endpoint": "URL of llama-server",
    "adapter.slots": "concurrent decodes, or auto",
    "log.format": "json or text",
    "log.level": "debug, info, warning or error",
}


class UsageError(Exception):
    """Something on the command line can't be done; the message says why and what to do."""


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 1 (a bug), 69 (port taken), 78 (configuration, no GPU)."""
    options = _parser().parse_args(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # the name of a file may be no text
    try:
        exit_code: int = options.run(options)
    except ConfigError as error:
        _complain(*error.faults)
        exit_code = EXIT_CONFIG
    except StartError as error:
        _complain(str(error))
        exit_code = error.exit_code
    except UsageError as error:
        _complain(str(error))
        exit_code = EXIT_CONFIG
    except KeyboardInterrupt:
        exit_code = EXIT_INTERRUPTED
    _flush()
    return exit_code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="llorch", description="An LLM orchestrator for one GPU workstation.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"llorch {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    command = commands.add_parser("serve", help="run the server until SIGTERM or Ctrl-C")
    _add_config(command)
    for key, text in _FLAGS.items():
        flag = f"--{key.replace('.', '-').replace('_', '-')}"
        command.add_argument(flag, dest=key, help=f"{text} ({key}; {env_name(key)})", metavar="VALUE")
    command.set_defaults(run=_serve)

    command = commands.add_parser(
        "check-config", help="say whether the configuration is good, and every fault"
    )
    _add_config(command)
    command.add_argument(
        "--print", action="store_true", help="print what is in force, as TOML, secrets hidden"
    )
    command.set_defaults(run=_check_config)

    command = commands.add_parser("init", help="write a commented config file with a fresh token")
    command.add_argument("path", nargs="?", type=Path, default=DEFAULT_CONFIG, help="default: config.toml")
    command.add_argument("--force", action="store_true", help="overwrite a file that is there")
    command.set_defaults(run=_init)
    return parser


def _add_config(command: argparse.ArgumentParser) -> None:
    text = f"TOML file (default: ${CONFIG_VARIABLE}, else ./{DEFAULT_CONFIG} if there is one, else built-in)"
    command.add_argument("--config", type=Path, metavar="PATH", help=text)


def _config_file(options: argparse.Namespace) -> Path | None:
    if options.config is not None:
        return Path(options.config)
    if named := os.environ.get(CONFIG_VARIABLE):
        return Path(named)
    return DEFAULT_CONFIG if os.path.exists(DEFAULT_CONFIG) else None  # Path.exists raises for some places


def _serve(options: argparse.Namespace) -> int:
    path = _config_file(options)
    flags = {key: value for key in _FLAGS if (value := getattr(options, key)) is not None}
    return serve(load(path, os.environ, flags), path)


def _check_config(options: argparse.Namespace) -> int:
    path = _config_file(options)
    config = load(path, os.environ)
    _complain(*unknown_variables(os.environ))
    if options.print:
        _say(tomli_w.dumps(_shown(config)).rstrip("\n"))
    else:
        _say(f"{path or 'the built-in configuration'}: good")
    return 0


def _shown(config: Config) -> dict[str, Any]:
    values: dict[str, Any] = msgspec.to_builtins(config)
    for key in SECRET_KEYS:
        table, _, name = key.partition(".")
        values[table][name] = "(hidden)" if values[table][name] else ""
    return values


def _init(options: argparse.Namespace) -> int:
    template = resources.files("llorch").joinpath("config.template.toml").read_text("utf-8")
    text = template.replace('token = ""', f'token = "{secrets.token_urlsafe(32)}"', 1)
    _write_private(options.path, text, overwrite=options.force)
    _say(f"wrote {options.path}, readable by you alone, with a fresh token in it")
    _say(f"next: look through it, then: llorch serve --config {options.path}")
    return 0


def _write_private(path: Path, text: str, *, overwrite: bool) -> None:
    """Write a file that only its owner may read, whole or not at all."""
    draft = path.parent / f".{path.name}.{secrets.token_hex(4)}" if overwrite else path
    try:
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with open(descriptor, "w", encoding="utf-8") as file:
                file.write(text)
            os.replace(draft, path)
        except OSError:
            draft.unlink(missing_ok=True)
            raise
    except FileExistsError:
        raise UsageError(f"{path} is there already: choose another path, or say --force") from None
    except OSError as error:
        raise UsageError(f"{path} can't be written: {error.strerror}") from None


def _say(text: str) -> None:
    """Print `text`; a reader that has left is no fault. Raises UsageError where stdout is full."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        pass
    except OSError as error:
        raise UsageError(f"stdout can't be written: {error.strerror}") from None


def _complain(*lines: str) -> None:
    for line in lines:
        print(f"llorch: {line}", file=sys.stderr)


def _flush() -> None:
    """Write out what is buffered; where stdout is gone there is nobody to tell, at exit either."""
    if sys.stdout is None:
        return
    with contextlib.suppress(OSError, ValueError):
        try:
            sys.stdout.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

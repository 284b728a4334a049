"""The command line. What a user can cause is answered in a line or two on stderr, never by a traceback."""

import argparse
import contextlib
import io
import os
import secrets
import sys
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import tomli_w

from llorch import __version__, arguments
from llorch.config import env_name, load, unknown_variables
from llorch.exits import Exit
from llorch.schema import Config, ConfigError, hide_secrets, parse_address, pools_in_force

if TYPE_CHECKING:
    from llorch import doctor

DEFAULT_CONFIG = Path("config.toml")
CONFIG_VARIABLE = "LLORCH_CONFIG"
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

    def __init__(self, message: str, exit_code: int = Exit.CONFIG) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns its exit code, see `exits`."""
    options = _parser().parse_args(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # the name of a file may be no text
    try:
        exit_code: int = options.run(options)
    except ConfigError as error:
        _complain(*error.faults)
        exit_code = Exit.CONFIG
    except UsageError as error:
        _complain(str(error))
        exit_code = error.exit_code
    except KeyboardInterrupt:
        exit_code = Exit.INTERRUPTED
    _flush()
    return exit_code


def _parser() -> argparse.ArgumentParser:
    parser = arguments.Parser(
        prog="llorch",
        description="An LLM orchestrator for one GPU workstation.",
        epilog=f"`llorch COMMAND --help` says more.\n\n{arguments.EPILOG}",
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

    arguments.add_commands(commands, _client)
    _add_config(arguments.add_doctor(commands, _doctor))
    arguments.add_completion(commands, _completion)
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


def serve(config: Config, config_file: Path | None, reread: Callable[[], Config]) -> int:
    """Run the server; its modules take a while to load, so only here. Raises UsageError."""
    from llorch import server

    try:
        return server.serve(config, config_file, reread)
    except server.StartError as error:
        raise UsageError(str(error), error.exit_code) from error


def _serve(options: argparse.Namespace) -> int:
    path = _config_file(options)
    flags = {key: value for key in _FLAGS if (value := getattr(options, key)) is not None}

    def read() -> Config:
        return load(path, os.environ, flags)

    return serve(read(), path, read)


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
    values: dict[str, Any] = hide_secrets(msgspec.to_builtins(config))
    return values


def _init(options: argparse.Namespace) -> int:
    template = resources.files("llorch").joinpath("config.template.toml").read_text("utf-8")
    text = template.replace('token = ""', f'token = "{secrets.token_urlsafe(32)}"', 1)
    _write_private(options.path, text, overwrite=options.force)
    _say(f"wrote {options.path}, readable by you alone, with a fresh token in it")
    _say(f"next: look through it, then: llorch serve --config {options.path}")
    return 0


# -- a server's clients ----------------------------------------------------------------------------


def _client(options: argparse.Namespace) -> int:
    from llorch import commands

    named = options.url or os.environ.get(arguments.URL_VARIABLE)
    return commands.main(options, (named, "") if named else _server_here())


def _server_here() -> tuple[str, str]:
    """URL and token of the server that `llorch serve` would start here, so that a first try just works.

    Only one on this very machine: a file that lies about must not send a prompt elsewhere.
    """
    try:
        path = DEFAULT_CONFIG if os.path.exists(DEFAULT_CONFIG) else None
        named = os.environ.get(CONFIG_VARIABLE)
        config = load(Path(named) if named else path, os.environ)
    except ConfigError:  # its own faults; `check-config` tells them
        return arguments.DEFAULT_URL, ""
    address = parse_address(config.bind_addr)
    if not address.is_loopback:
        return arguments.DEFAULT_URL, ""
    return f"http://{address}", config.auth.token


def _doctor(options: argparse.Namespace) -> int:
    import asyncio

    from llorch import doctor
    from llorch.terminal import Console

    return asyncio.run(doctor.main(Console.standard(), _examined(options), as_json=options.json))


def _examined(options: argparse.Namespace) -> "doctor.Setup":
    """What the doctor has to look at: the configuration that `llorch serve` would have here."""
    from llorch import doctor

    path, slips = _config_file(options), unknown_variables(os.environ)
    try:
        config = load(path, os.environ)
    except ConfigError as error:
        return doctor.Setup(config_file=path, faults=error.faults, slips=slips)
    address = parse_address(config.bind_addr)
    engines = (
        doctor.EngineSetup(
            pool_id=name,
            replica_id=replica.id,
            told_at=f"pools.{name}.replicas[{number}]" if config.pools else "adapter",
            endpoint=replica.endpoint,
            api_key=replica.api_key,
            slots=None if replica.slots == "auto" else replica.slots,
            devices=replica.devices,
        )
        for name, pool in pools_in_force(config).items()
        for number, replica in enumerate(pool.replicas)
    )
    return doctor.Setup(
        config_file=path,
        slips=slips,
        host=address.host,
        port=address.port,
        token=config.auth.token,
        token_file=Path(config.auth.token_file) if config.auth.token_file else None,
        secret_in_config=not os.environ.get(env_name("auth.token")),
        engines=tuple(engines),
        ctx=config.limits.ctx,
        connect_s=config.timeouts.connect_s,
        control_s=config.timeouts.control_s,
        gpu_required=config.gpu.required,
    )


def _completion(options: argparse.Namespace) -> int:
    from llorch import completion

    _say(completion.script(_parser(), options.shell).rstrip("\n"))
    return Exit.DONE


# -- files, stdout and stderr ----------------------------------------------------------------------


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

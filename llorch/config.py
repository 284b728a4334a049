"""The configuration: one strict TOML file, the environment, the command line; all faults at once.

The one rule: a key's type is its rule and its default stands beside it. What leaves `load` is checked; the
code behind it does not check again.
"""

import difflib
import ipaddress
import os
import stat
import tomllib
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

import msgspec
from msgspec import Meta
from yarl import URL

ENV_PREFIX = "LLORCH_"
NOT_KEYS = {"LLORCH_CONFIG", "LLORCH_URL"}
MIN_TOKEN_CHARS = 16

Seconds = Annotated[float, Meta(gt=0, le=365 * 24 * 3600)]
Count = Annotated[int, Meta(ge=1, le=2**31)]
Bytes = Annotated[int, Meta(ge=1, le=2**50)]
Tokens = Annotated[int, Meta(ge=1, le=2**31)]


class Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A table of the file."""


class Auth(Section, frozen=True):
    """Who may ask; at most one of `token` and `token_file`."""

    token: str = ""
    token_file: str = ""
    optional: bool = False
    trust_proxy_auth: bool = False


class Adapter(Section, frozen=True):
    """The engine of the pool named "default"; at most one of `api_key` and `api_key_file`."""

    engine: Literal["llamacpp"] = "llamacpp"
    endpoint: str = "http://127.0.0.1:8081"
    api_key: str = ""
    api_key_file: str = ""
    slots: Annotated[int, Meta(ge=1, le=1024)] | Literal["auto"] = 1
    retries: Annotated[int, Meta(ge=0, le=100)] = 2
    drain_s: Seconds = 60.0
    self_test: bool = True


class Queue(Section, frozen=True):
    """How much may wait, and for how long."""

    capacity: Count = 64
    max_bytes: Bytes = 64 * 1024 * 1024
    max_wait_s: Seconds = 3600.0
    default_retry_after_ms: Annotated[int, Meta(ge=250, le=300_000)] = 2000


class Limits(Section, frozen=True):
    """Tokens per task; `ctx` 0 is the engine's own."""

    ctx: Annotated[int, Meta(ge=0, le=2**31)] = 0
    max_tokens_default: Tokens = 512
    max_tokens: Tokens = 4096


class Timeouts(Section, frozen=True):
    """How long the engine may take."""

    connect_s: Seconds = 5.0
    control_s: Seconds = 5.0
    first_token_s: Seconds = 300.0
    idle_s: Seconds = 60.0
    wall_s: Seconds = 3600.0


class Http(Section, frozen=True):
    """What a client may send and from where."""

    max_body_bytes: Bytes = 4 * 1024 * 1024
    body_timeout_s: Seconds = 10.0
    idle_timeout_s: Seconds = 10.0
    allowed_hosts: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()


class Stream(Section, frozen=True):
    """Readers and retention."""

    heartbeat_s: Seconds = 10.0
    max_readers: Count = 4096
    retain_s: Seconds = 300.0
    retain_bytes: Bytes = 256 * 1024 * 1024
    on_disconnect: Literal["continue", "cancel"] = "continue"
    disconnect_grace_s: Seconds = 10.0


class Gpu(Section, frozen=True):
    """`required = false` is the carve-out for CI and the demo."""

    required: bool = True


class Log(Section, frozen=True):
    """Format and level of the log on stdout."""

    format: Literal["json", "text"] = "json"
    level: Literal["debug", "info", "warning", "error"] = "info"


class Shutdown(Section, frozen=True):
    """How long running tasks may go on after SIGTERM."""

    grace_s: Seconds = 30.0


class Config(Section, frozen=True):
    """The whole configuration; `Config()` is the built-in defaults."""

    bind_addr: str = "127.0.0.1:8080"
    profile: Literal["mvp", "home"] = "mvp"
    auth: Auth = Auth()
    adapter: Adapter = Adapter()
    queue: Queue = Queue()
    limits: Limits = Limits()
    timeouts: Timeouts = Timeouts()
    http: Http = Http()
    stream: Stream = Stream()
    gpu: Gpu = Gpu()
    log: Log = Log()
    shutdown: Shutdown = Shutdown()


class Address(NamedTuple):
    """Where to listen."""

    host: str
    port: int

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach it."""
        return self.host == "localhost" or ipaddress.ip_address(self.host).is_loopback

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class ConfigError(Exception):
    """Every fault found, each a line that says where and how to mend it."""

    def __init__(self, faults: list[str]) -> None:
        super().__init__("\n".join(faults))
        self.faults = faults


SECRET_KEYS = frozenset({"auth.token", "adapter.api_key"})
_FILE_PAIRS = (("auth", "token", "token_file"), ("adapter", "api_key", "api_key_file"))

S = TypeVar("S", bound=Section)


def load(
    path: Path | None = None, env: Mapping[str, str] | None = None, flags: Mapping[str, Any] | None = None
) -> Config:
    """Built-in defaults, then the file, then `LLORCH_…`, then `flags` by dotted key; token files are read.

    Raises ConfigError with all faults, not the first alone.
    """
    faults: list[str] = []
    values = _read_file(path, faults) if path else {}
    config = _section(Config, values, f"{path}: ", "", faults)
    faults += _told_twice(env or {})
    for source, key, raw in _overrides(env or {}, flags or {}):
        config = _override(config, source, key, raw, faults)
    if not faults:
        config = _with_secrets_read(config, env or {}, faults)
        _check(config, faults)
    if faults:
        raise ConfigError(faults)
    return config


def defaults() -> dict[str, Any]:
    """Every key with its built-in default, as nested tables."""
    return typing.cast(dict[str, Any], msgspec.to_builtins(Config()))


def parse_address(text: str) -> Address:
    """`IP:port`, `[v6]:port` or `localhost:port`; raises ValueError that says what is wrong."""
    host, colon, port = text.rpartition(":")
    if not colon or not port.isascii() or not port.isdigit() or len(port) > 5 or int(port) > 65535:
        raise ValueError("expected IP:port, [v6]:port or localhost:port")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
        if ":" not in host:
            raise ValueError("brackets are for IPv6 addresses")
    elif ":" in host:
        raise ValueError("an IPv6 address needs brackets: [::1]:8080")
    if host != "localhost":
        try:
            ipaddress.ip_address(host)
        except ValueError:
            raise ValueError(f"{host!r} is neither an IP address nor localhost") from None
    return Address(host, int(port))


# -- the file -----------------------------------------------------------------------------------


def _read_file(path: Path, faults: list[str]) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_bytes().decode())
    except FileNotFoundError:
        faults.append(f"{path}: there is no such file: llorch init {path} writes one")
    except OSError as error:
        faults.append(f"{path}: can't be read: {error.strerror}")
    except UnicodeDecodeError as error:
        faults.append(f"{path}: is not UTF-8 (byte {error.start})")
    except (ValueError, RecursionError) as error:  # more than TOMLDecodeError: 5,000 digits, 5,000 brackets
        faults.append(f"{path}: is not valid TOML: {error}; a text needs quotes, a table [brackets]")
    return {}


def _section(kind: type[S], table: dict[str, Any], source: str, at: str, faults: list[str]) -> S:
    hints = typing.get_type_hints(kind, include_extras=True)
    values: dict[str, Any] = {}
    for key, value in table.items():
        name = f"{at}{key}"
        hint = hints.get(key)
        if hint is None:
            faults.append(f"{source}{name}: unknown key{_did_you_mean(name)}")
        elif isinstance(hint, type) and issubclass(hint, Section):
            if isinstance(value, dict):
                values[key] = _section(hint, value, source, f"{name}.", faults)
            else:
                faults.append(f"{source}{name}: expected a table [{name}], got {_show(name, value)}")
        else:
            try:
                values[key] = msgspec.convert(value, hint)
            except msgspec.ValidationError as error:
                faults.append(f"{source}{name}: {_explain(error, hint)}, got {_show(name, value)}")
    return kind(**values)


def _keys(kind: type[Section] = Config, at: str = "") -> dict[str, Any]:
    """Every dotted key with its type."""
    found: dict[str, Any] = {}
    for key, hint in typing.get_type_hints(kind, include_extras=True).items():
        if isinstance(hint, type) and issubclass(hint, Section):
            found |= _keys(hint, f"{at}{key}.")
        else:
            found[f"{at}{key}"] = hint
    return found


def _did_you_mean(name: str) -> str:
    known = list(_keys()) + [f.name for f in msgspec.structs.fields(Config)]
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if not near:  # the right key in the wrong table
        near = [key for key in known if key.rpartition(".")[2] == name.rpartition(".")[2]][:1]
    return f", did you mean {near[0]}?" if near else ""


def _explain(error: msgspec.ValidationError, hint: Any) -> str:
    if choices := _choices(hint):
        return f"expected {' or '.join(choices)}"
    text = str(error).partition(" - at ")[0].replace("`", "")
    return text[:1].lower() + text[1:].partition(", got ")[0]


def _choices(hint: Any) -> list[str]:
    """What a key that has texts to choose from allows; empty for any other."""
    info = msgspec.inspect.type_info(hint)
    kinds = info.types if isinstance(info, msgspec.inspect.UnionType) else (info,)
    texts = [kind.values for kind in kinds if isinstance(kind, msgspec.inspect.LiteralType)]
    numbers = [f"{kind.ge} to {kind.le}" for kind in kinds if isinstance(kind, msgspec.inspect.IntType)]
    return [*numbers, *(f'"{text}"' for values in texts for text in values)] if texts else []


def _show(name: str, value: Any) -> str:
    if any(f"{key}.".startswith(f"{name}.") for key in SECRET_KEYS):  # or a table that has one
        return "(hidden)"
    try:
        return repr(value)[:60]
    except ValueError:
        return "an integer of over 4300 digits"


# -- environment and command line -----------------------------------------------------------------


def env_name(key: str) -> str:
    """The environment variable of a dotted key."""
    return ENV_PREFIX + key.replace(".", "_").upper()


def _told_twice(env: Mapping[str, str]) -> list[str]:
    """A secret may come from one variable, or from the file that another names."""
    pairs = (
        (env_name(f"{table}.{inline}"), env_name(f"{table}.{file}")) for table, inline, file in _FILE_PAIRS
    )
    return [
        f"{file}: give it or {inline}, not both"
        for inline, file in pairs
        if env.get(inline) and env.get(file)
    ]


def unknown_variables(env: Mapping[str, str]) -> list[str]:
    """A line for each `LLORCH_…` variable that names no key, with the nearest that does."""
    known = {env_name(key) for key in _keys()} | NOT_KEYS
    lines = []
    for name in sorted(env):
        if name.startswith(ENV_PREFIX) and name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            lines.append(f"{name[:80]}: no such key" + (f", did you mean {near[0]}?" if near else ""))
    return lines


def _overrides(env: Mapping[str, str], flags: Mapping[str, Any]) -> list[tuple[str, str, Any]]:
    found = [(env_name(key), key, env[env_name(key)]) for key in _keys() if env_name(key) in env]
    return found + [
        (f"--{key.replace('.', '-').replace('_', '-')}", key, value) for key, value in flags.items()
    ]


def _override(config: Config, source: str, key: str, raw: Any, faults: list[str]) -> Config:
    hint = _keys()[key]
    if typing.get_origin(hint) is tuple and isinstance(raw, str):
        raw = [part.strip() for part in raw.split(",") if part.strip()]
    try:
        value = msgspec.convert(raw, hint, strict=False)
    except msgspec.ValidationError as error:
        faults.append(f"{source}: {_explain(error, hint)}, got {_show(key, raw)}")
        return config
    except UnicodeEncodeError:  # bytes of the environment that are not UTF-8
        faults.append(f"{source}: is not text, got {_show(key, raw)}")
        return config
    table, _, name = key.rpartition(".")
    if not table:
        return msgspec.structs.replace(config, **{name: value})
    section = msgspec.structs.replace(getattr(config, table), **{name: value})
    for pair_table, inline, file in _FILE_PAIRS:
        if table == pair_table and name in (inline, file) and value:  # the later source of a secret wins
            section = msgspec.structs.replace(section, **{file if name == inline else inline: ""})
    return msgspec.structs.replace(config, **{table: section})


# -- what no type can say -------------------------------------------------------------------------


def _with_secrets_read(config: Config, env: Mapping[str, str], faults: list[str]) -> Config:
    credentials = env.get(
        "CREDENTIALS_DIRECTORY"
    )  # systemd's, closed to others; its ACL reads as a group's mode
    for table, inline, file in _FILE_PAIRS:
        section = getattr(config, table)
        path = getattr(section, file)
        if path and getattr(section, inline):
            faults.append(f"{table}.{file}: give it or {table}.{inline}, not both")
            continue
        forbidden = 0o007 if credentials and Path(path).parent == Path(credentials) else 0o077
        if path and (secret := _read_secret(f"{table}.{file}", Path(path), forbidden, faults)) is not None:
            config = msgspec.structs.replace(
                config, **{table: msgspec.structs.replace(section, **{inline: secret})}
            )
    return config


def _read_secret(key: str, path: Path, forbidden_mode: int, faults: list[str]) -> str | None:
    try:
        with path.open("rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            secret = file.read(4096).decode().strip()
    except OSError as error:
        faults.append(f"{key}: {path} can't be read: {error.strerror}")
    except UnicodeDecodeError:
        faults.append(f"{key}: {path} is not text")
    except ValueError:
        faults.append(f"{key}: not the name of a file, got {str(path)!r}")
    else:
        if mode & forbidden_mode:
            faults.append(f"{key}: others can read {path} (mode {mode:04o}): chmod 600 {path}")
        elif not secret:
            faults.append(f"{key}: {path} is empty")
        else:
            return secret
    return None


def _check(config: Config, faults: list[str]) -> None:
    address: Address | None = None
    try:
        address = parse_address(config.bind_addr)
    except ValueError as error:
        faults.append(f"bind_addr: {error}, got {config.bind_addr!r}")
    _check_auth(config, address, faults)
    _check_endpoint(config.adapter.endpoint, address, faults)
    if not _printable(config.adapter.api_key):
        faults.append("adapter.api_key: only visible ASCII characters, without spaces")
    if config.limits.max_tokens_default > config.limits.max_tokens:
        default, most = config.limits.max_tokens_default, config.limits.max_tokens
        faults.append(f"limits.max_tokens_default: {default} is over limits.max_tokens ({most})")
    faults.extend(
        f"http.allowed_hosts: expected a bare host name, got {host!r}"
        for host in config.http.allowed_hosts
        if not _is_host_name(host)
    )
    faults.extend(
        f"http.cors_origins: expected scheme://host[:port] and nothing more, got {origin!r}"
        for origin in config.http.cors_origins
        if not _is_origin(origin)
    )


def _check_auth(config: Config, address: Address | None, faults: list[str]) -> None:
    auth = config.auth
    cure = "set auth.token_file or LLORCH_AUTH_TOKEN (llorch init writes a config with a fresh token)"
    if auth.token and len(auth.token) < MIN_TOKEN_CHARS:
        faults.append(f"auth.token: under {MIN_TOKEN_CHARS} characters: {cure}")
    elif not _printable(auth.token):
        faults.append("auth.token: only visible ASCII characters, without spaces")
    if not auth.token and address is not None and not address.is_loopback:
        faults.append(
            f"bind_addr: NON_LOOPBACK_WITHOUT_TOKEN: {address} can be reached from other machines: {cure}, "
            "or bind 127.0.0.1"
        )
    if config.profile == "home":
        if not auth.token:
            faults.append(f'auth.token: HOME_WITHOUT_TOKEN: profile = "home" always needs a token: {cure}')
        if auth.optional:
            faults.append('auth.optional: must be false with profile = "home"')


def _check_endpoint(endpoint: str, address: Address | None, faults: list[str]) -> None:
    try:
        url = URL(endpoint)
        good = url.scheme in ("http", "https") and url.host and url.path in ("", "/") and url.port != 0
        good = good and not (url.query_string or url.fragment or url.user or url.password)
    except ValueError:
        good = False
    if not good:
        shown = "(hidden)" if "@" in endpoint else repr(endpoint)  # it may have a password
        faults.append(f"adapter.endpoint: expected http://host:port and nothing more, got {shown}")
    elif address is not None and url.port == address.port and _is_at(url.host or "", address):
        faults.append(
            f"adapter.endpoint: {endpoint} is llorch's own address (bind_addr): start llama-server on "
            "another port, as with --port 8081, and name that"
        )


def _is_at(host: str, address: Address) -> bool:
    """Whether a connection to `host` comes to what listens on `address`."""
    if address.host in ("0.0.0.0", "::"):
        return host in ("localhost", "127.0.0.1", "::1")
    return host == address.host or {host, address.host} == {"localhost", "127.0.0.1"}


def _is_host_name(text: str) -> bool:
    return bool(text) and _printable(text) and not set(text) & set("/:@*[]") and not text.endswith(".")


def _is_origin(text: str) -> bool:
    try:
        url = URL(text)
    except ValueError:
        return False
    return (
        url.scheme in ("http", "https")
        and bool(url.host)
        and f"{url.scheme}://{url.authority}" == text.lower()
    )


def _printable(text: str) -> bool:
    return all("!" <= character <= "~" for character in text)

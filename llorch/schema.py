"""The configuration's tables: every key, its type, its default.

The one rule: a key's type is its rule and its default stands beside it.
"""

import ipaddress
import json
import re
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
from msgspec import Meta

DEFAULT_POOL = "default"
_PLAIN_KEY = re.compile(r"[A-Za-z0-9_-]{1,80}", re.ASCII)
_SECRETS = frozenset({"token", "api_key"})

Seconds = Annotated[float, Meta(gt=0, le=365 * 24 * 3600)]
Count = Annotated[int, Meta(ge=1, le=2**31)]
Bytes = Annotated[int, Meta(ge=1, le=2**50)]
Tokens = Annotated[int, Meta(ge=1, le=2**31)]
Slots = Annotated[int, Meta(ge=1, le=1024)] | Literal["auto"]
Retries = Annotated[int, Meta(ge=0, le=100)]
Devices = tuple[Annotated[int, Meta(ge=0, le=255)], ...]


class Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A table of the file."""


class Auth(Section, frozen=True):
    """Who may ask; at most one of `token` and `token_file`."""

    token: str = ""
    token_file: str = ""
    optional: bool = False
    trust_proxy_auth: bool = False


class Adapter(Section, frozen=True):
    """The one engine of the pool "default", where there are no `[pools]`; `api_key` or its file, not both."""

    engine: Literal["llamacpp"] = "llamacpp"
    endpoint: str = "http://127.0.0.1:8081"
    api_key: str = ""
    api_key_file: str = ""
    slots: Slots = 1
    devices: Devices = ()
    retries: Retries = 2
    drain_s: Seconds = 60.0
    self_test: bool = True


class ReplicaTable(Section, frozen=True):
    """One engine of a pool; `devices` are the indices of the GPUs that it computes on, none: not known."""

    id: str = ""
    endpoint: str = ""
    api_key: str = ""
    api_key_file: str = ""
    slots: Slots = 1
    devices: Devices = ()


class PoolTable(Section, frozen=True):
    """One engine and model, under a name; what `[adapter]` says of its one replica is said of each here."""

    engine: Literal["llamacpp"] = "llamacpp"
    default: bool = False
    retries: Retries = 2
    drain_s: Seconds = 60.0
    self_test: bool = True
    replicas: tuple[ReplicaTable, ...] = ()


class Queue(Section, frozen=True):
    """How much may wait, and for how long: `capacity` interactive tasks, and so many of batch work."""

    capacity: Count = 64
    batch_capacity: Count = 256
    batch_promote_s: Seconds = 300.0
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
    pools: dict[str, PoolTable] = {}
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


def pools_in_force(config: Config) -> dict[str, PoolTable]:
    """Every pool by name, the default one first; `[adapter]` makes one of one replica if there are none.

    The key of `[adapter]`, which a service has from its environment, is that of each replica without its own.
    """
    if not config.pools:
        adapter = config.adapter
        replica = ReplicaTable(
            id=f"{DEFAULT_POOL}-0",
            endpoint=adapter.endpoint,
            api_key=adapter.api_key,
            api_key_file=adapter.api_key_file,
            slots=adapter.slots,
            devices=adapter.devices,
        )
        return {
            DEFAULT_POOL: PoolTable(
                engine=adapter.engine,
                default=True,
                retries=adapter.retries,
                drain_s=adapter.drain_s,
                self_test=adapter.self_test,
                replicas=(replica,),
            )
        }
    by_default_first = sorted(config.pools.items(), key=lambda item: not item[1].default)
    key = config.adapter.api_key
    return {name: _completed(name, pool, key) for name, pool in by_default_first}


def _completed(name: str, pool: PoolTable, key: str) -> PoolTable:
    replicas = tuple(
        msgspec.structs.replace(replica, id=replica.id or f"{name}-{number}", api_key=replica.api_key or key)
        for number, replica in enumerate(pool.replicas)
    )
    return msgspec.structs.replace(pool, replicas=replicas)


def as_key(name: str) -> str:
    """A key as TOML has it: in quotes unless it is plain, and on one line."""
    return name if _PLAIN_KEY.fullmatch(name) else json.dumps(name[:80])


def secrets_of(values: Any) -> list[str]:
    """Every secret that is written in `values`, tables within tables."""
    if isinstance(values, list | tuple):
        return [secret for value in values for secret in secrets_of(value)]
    if not isinstance(values, dict):
        return []
    told = [value for key, value in values.items() if key in _SECRETS and isinstance(value, str) and value]
    return told + [secret for value in values.values() for secret in secrets_of(value)]


def hide_secrets(values: Any) -> Any:
    """The same tables with "(hidden)" for every secret."""
    if isinstance(values, list | tuple):
        return [hide_secrets(value) for value in values]
    if not isinstance(values, dict):
        return values
    return {
        key: "(hidden)" if key in _SECRETS and value else hide_secrets(value) for key, value in values.items()
    }


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

"""What no type can say of the configuration: addresses, tokens, names, and what does not go together.

The one rule: each fault is a line that says where it is and how to mend it; all of them are told at once.
"""

import re

import msgspec
from yarl import URL

from llorch.schema import Adapter, Address, Config, ReplicaTable, as_key, parse_address

MIN_TOKEN_CHARS = 16
MAX_SOCKET_PATH_BYTES = 107  # what sockaddr_un holds on Linux, less its end
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", re.ASCII)
_NAME_IS = "1 to 64 letters, digits, - or _, a letter or digit first"


def check(config: Config, faults: list[str]) -> None:
    """Append a line to `faults` for whatever is wrong with `config`."""
    address: Address | None = None
    try:
        address = parse_address(config.bind_addr)
    except ValueError as error:
        faults.append(f"bind_addr: {error}, got {config.bind_addr!r}")
    _check_auth(config, address, faults)
    if not config.pools:
        _check_endpoint("adapter", config.adapter, address, faults)
    _check_pools(config, address, faults)
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


def _check_pools(config: Config, address: Address | None, faults: list[str]) -> None:
    pools = config.pools
    without_key = msgspec.structs.replace(config.adapter, api_key="", api_key_file="")
    if pools and without_key != Adapter():
        faults.append("adapter: give it or [pools], not both: its keys belong in [[pools.NAME.replicas]]")
    defaults = sum(pool.default for pool in pools.values())
    if len(pools) > 1 and defaults != 1:
        faults.append(f"pools: expected default = true in one of them, found it in {defaults}")
    taken: dict[str, str] = {}
    for name, pool in pools.items():
        if not _NAME.fullmatch(name):
            faults.append(f"pools: expected names of {_NAME_IS}, got {name[:80]!r}")
        key = f"pools.{as_key(name)}"
        if not pool.replicas:
            faults.append(f"{key}: expected at least one [[{key}.replicas]] with an endpoint")
        ids: set[str] = set()
        for number, replica in enumerate(pool.replicas):
            at = f"{key}.replicas[{number}]"
            _check_endpoint(at, replica, address, faults)
            if replica.id and not _NAME.fullmatch(replica.id):
                faults.append(f"{at}.id: expected {_NAME_IS}, got {replica.id[:80]!r}")
            replica_id = replica.id or f"{name}-{number}"
            if replica_id in ids:
                faults.append(f"{at}.id: {replica_id!r} is another replica's of this pool")
            ids.add(replica_id)
            other = taken.setdefault(_normal(replica.endpoint), at)
            if replica.endpoint and other != at:
                faults.append(f"{at}.endpoint: {other} has the same: an engine belongs to one replica")


def _normal(endpoint: str) -> str:
    """The same for two ways to write one place."""
    try:
        url = URL(endpoint)
        host = "127.0.0.1" if url.host in ("localhost", "::1") else url.host
        return f"{host}:{url.port}" if host and url.scheme in ("http", "https") else endpoint
    except ValueError:
        return endpoint


def _check_endpoint(
    at: str, engine: Adapter | ReplicaTable, address: Address | None, faults: list[str]
) -> None:
    endpoint = engine.endpoint
    if not _printable(engine.api_key):
        faults.append(f"{at}.api_key: only visible ASCII characters, without spaces")
    if len(set(engine.devices)) < len(engine.devices):
        faults.append(f"{at}.devices: each GPU once, got {list(engine.devices)}")
    if endpoint.startswith("unix:"):
        path = endpoint.removeprefix("unix:")
        if not path.startswith("/") or len(path.encode()) > MAX_SOCKET_PATH_BYTES or "\0" in path:
            limit = f"unix:/path of at most {MAX_SOCKET_PATH_BYTES} bytes"
            faults.append(f"{at}.endpoint: expected {limit}, got {endpoint[:120]!r}")
        return
    try:
        url = URL(endpoint)
        good = url.scheme in ("http", "https") and url.host and url.path in ("", "/") and url.port != 0
        good = good and not (url.query_string or url.fragment or url.user or url.password)
    except ValueError:
        good = False
    if not good:
        shown = "(hidden)" if "@" in endpoint else repr(endpoint)  # it may have a password
        what = "http://host:port and nothing more, or unix:/path"
        faults.append(f"{at}.endpoint: expected {what}, got {shown}")
    elif address is not None and url.port == address.port and _is_at(url.host or "", address):
        faults.append(
            f"{at}.endpoint: {endpoint} is llorch's own address (bind_addr): start llama-server on "
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

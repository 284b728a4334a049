"""The configuration: one strict TOML file, the environment, the command line; all faults at once.

The one rule: what leaves `load` is checked; the code behind it does not check again. The keys, their types
and defaults stand in `schema`, what no type can say in `rules`.
"""

import difflib
import os
import stat
import tomllib
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from llorch import rules
from llorch.schema import Config, ConfigError, PoolTable, ReplicaTable, Section, as_key

ENV_PREFIX = "LLORCH_"
NOT_KEYS = {"LLORCH_CONFIG", "LLORCH_URL"}

_FILE_PAIRS = (("auth", "token", "token_file"), ("adapter", "api_key", "api_key_file"))
_HIDDEN_TABLES = frozenset({"auth", "adapter", "token", "api_key"})

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
        rules.check(config, faults)
    if faults:
        raise ConfigError(faults)
    return config


def defaults() -> dict[str, Any]:
    """Every key with its built-in default, as nested tables."""
    return typing.cast(dict[str, Any], msgspec.to_builtins(Config()))


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
        name = f"{at}{as_key(key)}"
        hint = hints.get(key)
        if hint is None:
            faults.append(f"{source}{name}: unknown key{_did_you_mean(name)}")
        elif isinstance(hint, type) and issubclass(hint, Section):
            if isinstance(value, dict):
                values[key] = _section(hint, value, source, f"{name}.", faults)
            else:
                faults.append(f"{source}{name}: expected a table [{name}], got {_show(name, value)}")
        elif (inner := _section_within(hint)) is not None:
            values[key] = _sections(hint, inner, value, source, name, faults)
        else:
            try:
                values[key] = msgspec.convert(value, hint)
            except msgspec.ValidationError as error:
                faults.append(f"{source}{name}: {_explain(error, hint)}, got {_show(name, value)}")
    return kind(**values)


def _section_within(hint: Any) -> type[Section] | None:
    """The kind of table that `hint` has many of, if it has."""
    kinds = [arg for arg in typing.get_args(hint) if isinstance(arg, type) and issubclass(arg, Section)]
    return kinds[0] if kinds else None


def _sections(
    hint: Any, kind: type[S], value: Any, source: str, name: str, faults: list[str]
) -> dict[str, S] | tuple[S, ...]:
    """Tables under names of the user's own, or one after the other, as `hint` has them."""
    named = typing.get_origin(hint) is dict
    parts: Iterable[tuple[Any, Any]] = ()
    if named and isinstance(value, dict):
        parts = value.items()
    elif not named and isinstance(value, list):
        parts = enumerate(value)
    else:
        faults.append(f"{source}{name}: expected tables {f'[{name}.NAME]' if named else f'[[{name}]]'}")
    found: dict[Any, S] = {}
    for key, table in parts:
        at = f"{name}.{as_key(key)}" if named else f"{name}[{key}]"
        if isinstance(table, dict):
            found[key] = _section(kind, table, source, f"{at}.", faults)
        else:
            faults.append(f"{source}{at}: expected a table {f'[{at}]' if named else f'[[{name}]]'}")
    return found if named else tuple(found.values())


def _keys(kind: type[Section] = Config, at: str = "") -> dict[str, Any]:
    """Every dotted key with its type."""
    found: dict[str, Any] = {}
    for key, hint in typing.get_type_hints(kind, include_extras=True).items():
        if isinstance(hint, type) and issubclass(hint, Section):
            found |= _keys(hint, f"{at}{key}.")
        elif _section_within(hint) is None:  # else it is told by tables, under names of the user's own
            found[f"{at}{key}"] = hint
    return found


def _did_you_mean(name: str) -> str:
    if name.startswith("pools."):
        return _did_you_mean_of_a_pool(*name.rpartition(".")[::2])
    known = list(_keys()) + [f.name for f in msgspec.structs.fields(Config)]
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if not near:  # the right key in the wrong table
        near = [key for key in known if key.rpartition(".")[2] == name.rpartition(".")[2]][:1]
    return f", did you mean {near[0]}?" if near else ""


def _did_you_mean_of_a_pool(table: str, key: str) -> str:
    """Keys alone are compared: all paths of one pool look alike."""
    pool, of_replica, _ = table.rpartition(".replicas[")
    here, there = (ReplicaTable, PoolTable) if of_replica else (PoolTable, ReplicaTable)
    elsewhere = f"{pool}." if of_replica else f"{table}.replicas[0]."
    known = {f.name: f"{elsewhere}{f.name}" for f in msgspec.structs.fields(there)}
    if key not in known:
        known |= {f.name: f"{table}.{f.name}" for f in msgspec.structs.fields(here)}
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    near = [known[match] for match in near] or [each for each in _keys() if each.rpartition(".")[2] == key]
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
    if name.rpartition(".")[2] in _HIDDEN_TABLES:
        return "(hidden)"
    try:
        text = repr(value)
        return "(hidden)" if "@" in text else text[:60]  # an URL may have a password
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


# -- secrets in files of their own ---------------------------------------------------------------


def _with_secrets_read(config: Config, env: Mapping[str, str], faults: list[str]) -> Config:
    config = msgspec.structs.replace(
        config,
        auth=_told_by_file(config.auth, "auth", "token", env, faults),
        adapter=_told_by_file(config.adapter, "adapter", "api_key", env, faults),
    )
    pools = {}
    for name, pool in config.pools.items():
        replicas = (
            _told_by_file(replica, f"pools.{name}.replicas[{number}]", "api_key", env, faults)
            for number, replica in enumerate(pool.replicas)
        )
        pools[name] = msgspec.structs.replace(pool, replicas=tuple(replicas))
    return msgspec.structs.replace(config, pools=pools)


def _told_by_file(section: S, at: str, key: str, env: Mapping[str, str], faults: list[str]) -> S:
    """The table with its secret `key`, from the file that `key`_file names if it does."""
    path = getattr(section, f"{key}_file")
    if not path:
        return section
    if getattr(section, key):
        faults.append(f"{at}.{key}_file: give it or {at}.{key}, not both")
        return section
    credentials = env.get("CREDENTIALS_DIRECTORY")  # systemd's; its ACL reads as a group's mode
    forbidden = 0o007 if credentials and Path(path).parent == Path(credentials) else 0o077
    secret = _read_secret(f"{at}.{key}_file", Path(path), forbidden, faults)
    return section if secret is None else msgspec.structs.replace(section, **{key: secret})


def _read_secret(key: str, path: Path, forbidden_mode: int, faults: list[str]) -> str | None:
    shown = str(path) if str(path).isprintable() else repr(str(path))
    try:
        with path.open("rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            secret = file.read(4096).decode().strip()
    except OSError as error:
        faults.append(f"{key}: {shown} can't be read: {error.strerror}")
    except UnicodeDecodeError:
        faults.append(f"{key}: {shown} is not text")
    except ValueError:
        faults.append(f"{key}: not the name of a file, got {str(path)!r}")
    else:
        if mode & forbidden_mode:
            faults.append(f"{key}: others can read {shown} (mode {mode:04o}): chmod 600 {shown}")
        elif not secret:
            faults.append(f"{key}: {shown} is empty")
        else:
            return secret
    return None

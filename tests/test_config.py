"""The configuration: what is refused and in which words, what overrides what, and where secrets come from."""

import contextlib
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest
import tomli_w
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llorch.config import defaults, env_name, load, unknown_variables
from llorch.schema import (
    Address,
    Config,
    ConfigError,
    PoolTable,
    ReplicaTable,
    hide_secrets,
    parse_address,
    pools_in_force,
    secrets_of,
)

TOKEN = "canary-token-0123456789"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Where the configuration is."""
    return tmp_path / "llorch.toml"


def faults(path: Path | None = None, env: dict[str, str] | None = None, **flags: object) -> list[str]:
    """What `load` says is wrong, without the path of the file; keys of flags are written a__b."""
    with pytest.raises(ConfigError) as error:
        load(path, env, {key.replace("__", "."): value for key, value in flags.items()})
    assert str(error.value) == "\n".join(error.value.faults)
    return [fault.removeprefix(f"{path}: ") for fault in error.value.faults]


def secret_file(tmp_path: Path, content: bytes = f"{TOKEN}\n".encode(), mode: int = 0o600) -> Path:
    """A file with a token."""
    path = tmp_path / "token"
    path.write_bytes(content)
    path.chmod(mode)
    return path


# -- defaults and the file -------------------------------------------------------------------------


def test_nothing_at_all_is_a_valid_configuration() -> None:
    """No file, no environment, no flags: the built-in defaults, on loopback [MVP-011]."""
    config = load()
    assert config == Config()
    assert (config.bind_addr, config.profile, config.gpu.required) == ("127.0.0.1:8080", "mvp", True)


def test_an_empty_file_changes_nothing(file: Path) -> None:
    """Every key can be left out."""
    file.write_text("")
    assert load(file) == Config()


def test_the_defaults_written_to_a_file_read_back_as_themselves(file: Path) -> None:
    """`defaults()` has every key, in the form that the file has."""
    file.write_text(tomli_w.dumps(defaults()))
    assert load(file) == Config()
    assert msgspec.convert(defaults(), Config) == Config()


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("capacity = 1", "capacity: unknown key, did you mean queue.capacity?"),
        ("qeue.capacity = 1", "qeue: unknown key, did you mean queue?"),
        ("queue.capactiy = 1", "queue.capactiy: unknown key, did you mean queue.capacity?"),
        ("zzz = 1", "zzz: unknown key"),
        ("queue = 3", "queue: expected a table [queue], got 3"),
        ("[[queue]]\ncapacity = 1", "queue: expected a table [queue], got [{'capacity': 1}]"),
        ("queue.capacity = '8'", "queue.capacity: expected int, got '8'"),
        ("queue.capacity = 0", "queue.capacity: expected int >= 1, got 0"),
        ("queue.capacity = true", "queue.capacity: expected int, got True"),
        ("queue.max_wait_s = 0", "queue.max_wait_s: expected float > 0.0, got 0"),
        ("timeouts.idle_s = nan", "timeouts.idle_s: expected float > 0.0, got nan"),
        ("timeouts.idle_s = inf", "timeouts.idle_s: expected float <= 31536000.0, got inf"),
        ("queue.default_retry_after_ms = 249", "queue.default_retry_after_ms: expected int >= 250, got 249"),
        ("adapter.slots = 0", 'adapter.slots: expected 1 to 1024 or "auto", got 0'),
        ("adapter.slots = 'many'", "adapter.slots: expected 1 to 1024 or \"auto\", got 'many'"),
        ("adapter.engine = 'vllm'", "adapter.engine: expected \"llamacpp\", got 'vllm'"),
        ("gpu.required = 1", "gpu.required: expected bool, got 1"),
        ("http.allowed_hosts = 'a'", "http.allowed_hosts: expected array, got 'a'"),
        (
            "log.level = 'trace'",
            'log.level: expected "debug" or "error" or "info" or "warning", got \'trace\'',
        ),
        ("profile = 'work'", 'profile: expected "home" or "mvp", got \'work\''),
    ],
)
def test_a_fault_in_the_file_names_file_key_and_cure(file: Path, text: str, fault: str) -> None:
    """Unknown keys, wrong types and impossible values are refused, each in one line."""
    file.write_text(text)
    with pytest.raises(ConfigError) as error:
        load(file)
    assert error.value.faults == [f"{file}: {fault}"]


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (
            b"a = = 1",
            r"is not valid TOML: Invalid value \(at line 1, column 5\); a text needs quotes, .*",
        ),
        (b"a = 1\na = 2", r"is not valid TOML: Cannot overwrite a value .*"),
        (b"a = '\xff'", r"is not UTF-8 \(byte 5\)"),
        (b"a = " + b"[" * 100_000, r"is not valid TOML: .*"),
        (b"a = " + b"9" * 5000, r"is not valid TOML: .*"),
    ],
)
def test_a_file_that_is_no_toml_is_refused(file: Path, content: bytes, fault: str) -> None:
    """Whatever is in the file, it is a fault and never a crash."""
    file.write_bytes(content)
    assert [re.fullmatch(fault, line) for line in faults(file)] != [None]


def test_a_file_that_is_not_there_is_a_fault(tmp_path: Path) -> None:
    """A file that was named must be readable; a folder is none."""
    none = tmp_path / "none.toml"
    assert faults(none) == [f"there is no such file: llorch init {none} writes one"]
    assert faults(tmp_path) == ["can't be read: Is a directory"]


def test_an_integer_too_long_to_print_is_a_fault(file: Path) -> None:
    """Python refuses to print it in decimal; the fault is told all the same."""
    file.write_text(f"queue.capacity = 0x{'f' * 5000}")
    [fault] = faults(file)
    assert fault.startswith("queue.capacity: ")


def test_all_faults_are_told_at_once(file: Path) -> None:
    """Those of the file, of the environment and of the flags together."""
    file.write_text("colour = 1\nqueue.capacity = 0\nqueue.max_bytes = 'x'\n")
    assert faults(file, {"LLORCH_PROFILE": "x", "LLORCH_LOG_FORMAT": "xml"}, stream__retain_s=-1) == [
        "colour: unknown key",
        "queue.capacity: expected int >= 1, got 0",
        "queue.max_bytes: expected int, got 'x'",
        'LLORCH_PROFILE: expected "home" or "mvp", got \'x\'',
        'LLORCH_LOG_FORMAT: expected "json" or "text", got \'xml\'',
        "--stream-retain-s: expected float > 0.0, got -1",
    ]


def test_all_faults_that_no_type_can_say_are_told_at_once() -> None:
    """Addresses, origins, limits and tokens are looked at together."""
    found = faults(
        bind_addr="example.org:80", auth__token="short", adapter__endpoint="http://h/path",
        limits__max_tokens=5, http__allowed_hosts=["http://h"], http__cors_origins=["*"],
    )  # fmt: skip
    keys = [fault.partition(":")[0] for fault in found]
    assert keys == [
        "bind_addr", "auth.token", "adapter.endpoint", "limits.max_tokens_default", "http.allowed_hosts",
        "http.cors_origins",
    ]  # fmt: skip


# -- what overrides what ---------------------------------------------------------------------------


def test_a_flag_beats_the_environment_beats_the_file_beats_the_default(file: Path) -> None:
    """Each level overrides the one before it, key by key."""
    file.write_text('bind_addr = "127.0.0.1:1"\nprofile = "mvp"\nqueue = {capacity = 1, max_bytes = 11}\n')
    env = {"LLORCH_BIND_ADDR": "127.0.0.1:2", "LLORCH_QUEUE_CAPACITY": "2"}
    config = load(file, env, {"bind_addr": "127.0.0.1:3"})
    assert config.bind_addr == "127.0.0.1:3"
    assert config.queue == msgspec.structs.replace(Config().queue, capacity=2, max_bytes=11)
    assert config.limits == Config().limits


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("queue.capacity", "7", 7),
        ("timeouts.idle_s", "1.5", 1.5),
        ("gpu.required", "false", False),
        ("adapter.slots", "auto", "auto"),
        ("adapter.slots", "3", 3),
        ("http.allowed_hosts", "a, b,,c ", ("a", "b", "c")),
        ("http.cors_origins", "", ()),
        ("log.format", "text", "text"),
    ],
)
def test_the_environment_has_every_key_as_text(key: str, text: str, value: object) -> None:
    """`LLORCH_TABLE_KEY`; lists are comma-separated."""
    table, _, name = key.partition(".")
    assert getattr(getattr(load(env={env_name(key): text}), table), name) == value


def test_environment_names_are_unambiguous() -> None:
    """No two keys share a variable."""
    tables = {
        f"{table}.{key}" for table, keys in defaults().items() if isinstance(keys, dict) for key in keys
    }
    variables = {env_name(key) for key in tables | set(defaults())}
    assert len(variables) == len(tables | set(defaults()))
    assert "LLORCH_AUTH_TOKEN_FILE" in variables


def test_other_variables_are_nobodys_business() -> None:
    """Only known names are looked at; the process has many others."""
    assert load(env={"PATH": "/bin", "LLORCH_": "x", "XLLORCH_PROFILE": "home"}) == Config()


@pytest.mark.parametrize("value", ["\udcff", "interactive\udc80"])
@pytest.mark.parametrize("key", ["bind_addr", "profile", "adapter.slots", "log.level", "queue.capacity"])
def test_bytes_in_the_environment_that_are_no_text_are_a_fault(key: str, value: str) -> None:
    """Python hands them over as lone surrogates."""
    [fault] = faults(env={env_name(key): value})
    assert fault.startswith((env_name(key), key))


# -- tokens ----------------------------------------------------------------------------------------


def test_a_token_file_is_read(tmp_path: Path) -> None:
    """Its content without the newline becomes the token, of both pairs."""
    path = str(secret_file(tmp_path))
    config = load(flags={"auth.token_file": path, "adapter.api_key_file": path})
    assert (config.auth.token, config.adapter.api_key) == (TOKEN, TOKEN)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o602, 0o644, 0o666, 0o610])
def test_a_token_file_that_others_can_read_is_refused(tmp_path: Path, mode: int) -> None:
    """Any right of group or others; the message has the cure."""
    path = secret_file(tmp_path, mode=mode)
    assert faults(auth__token_file=str(path)) == [
        f"auth.token_file: others can read {path} (mode {mode:04o}): chmod 600 {path}"
    ]


def test_a_systemd_credential_is_accepted(tmp_path: Path) -> None:
    """Its folder is closed to others, and the ACL that lets the service read it shows as a group's mode."""
    path = secret_file(tmp_path, mode=0o440)
    flags = {"auth.token_file": str(path)}
    assert load(env={"CREDENTIALS_DIRECTORY": str(tmp_path)}, flags=flags).auth.token == TOKEN
    with pytest.raises(ConfigError, match="others can read"):
        load(env={"CREDENTIALS_DIRECTORY": str(tmp_path / "another")}, flags=flags)
    path.chmod(0o444)
    with pytest.raises(ConfigError, match="others can read"):
        load(env={"CREDENTIALS_DIRECTORY": str(tmp_path)}, flags=flags)


@pytest.mark.parametrize("mode", [0o600, 0o400])
def test_a_token_file_of_ones_own_is_accepted(tmp_path: Path, mode: int) -> None:
    """Owner rights alone, with or without writing."""
    assert load(flags={"auth.token_file": str(secret_file(tmp_path, mode=mode))}).auth.token == TOKEN


@pytest.mark.parametrize(
    ("content", "fault"),
    [(b"", "is empty"), (b" \n", "is empty"), (b"\xff\xfe", "is not text")],
)
def test_a_token_file_without_a_token_is_refused(tmp_path: Path, content: bytes, fault: str) -> None:
    """It must hold text."""
    path = secret_file(tmp_path, content)
    assert faults(auth__token_file=str(path)) == [f"auth.token_file: {path} {fault}"]


def test_a_token_file_that_can_not_be_opened_is_refused(tmp_path: Path) -> None:
    """Missing, a folder, or a name that no file can have."""
    missing = tmp_path / "missing"
    assert faults(auth__token_file=str(missing)) == [
        f"auth.token_file: {missing} can't be read: No such file or directory"
    ]
    assert faults(auth__token_file=str(tmp_path)) == [
        f"auth.token_file: {tmp_path} can't be read: Is a directory"
    ]
    [fault] = faults(auth__token_file="a\0b")
    assert fault.startswith("auth.token_file: ")


def test_a_token_and_a_token_file_from_one_source_are_refused(file: Path, tmp_path: Path) -> None:
    """It would not be plain which one counts."""
    file.write_text(tomli_w.dumps({"auth": {"token": TOKEN, "token_file": str(secret_file(tmp_path))}}))
    assert faults(file) == ["auth.token_file: give it or auth.token, not both"]


def test_a_later_source_of_a_secret_replaces_the_earlier_one(file: Path, tmp_path: Path) -> None:
    """A token of the environment beats the file's token_file, a flag's token_file beats both."""
    other = "another-token-0123456789"
    file.write_text(tomli_w.dumps({"auth": {"token_file": str(secret_file(tmp_path, b"x" * 20))}}))
    env = {"LLORCH_AUTH_TOKEN": other}
    assert load(file, env).auth.token == other
    path = str(secret_file(tmp_path))
    assert load(file, env, {"auth.token_file": path}).auth.token == TOKEN


@pytest.mark.parametrize("token", ["canary-key-0-15", "canary"])
def test_a_short_token_is_refused(token: str) -> None:
    """Under 16 characters; the token itself is not told."""
    [fault] = faults(auth__token=token)
    assert fault.startswith("auth.token: under 16 characters: ")
    assert "canary" not in fault


@pytest.mark.parametrize("token", ["token with blanks 123", "tökén-0123456789abc", "token-0123456789\0abc"])
def test_a_token_that_no_header_can_carry_is_refused(token: str) -> None:
    """Only visible ASCII."""
    assert faults(auth__token=token) == ["auth.token: only visible ASCII characters, without spaces"]


def test_an_api_key_that_no_header_can_carry_is_refused() -> None:
    """It goes into a header too."""
    assert faults(adapter__api_key="a\nb") == [
        "adapter.api_key: only visible ASCII characters, without spaces"
    ]


@pytest.mark.parametrize("address", ["0.0.0.0:8080", "192.168.1.2:80", "[::]:8080", "[2001:db8::1]:1"])
def test_beyond_loopback_a_token_is_needed(address: str) -> None:
    """NON_LOOPBACK_WITHOUT_TOKEN, with the cure; with a token it is fine [MVP-011]."""
    [fault] = faults(bind_addr=address)
    assert fault.startswith("bind_addr: NON_LOOPBACK_WITHOUT_TOKEN: ")
    assert "LLORCH_AUTH_TOKEN" in fault
    assert load(flags={"bind_addr": address, "auth.token": TOKEN}).bind_addr == address


@pytest.mark.parametrize("address", ["127.0.0.1:0", "127.9.9.9:1", "[::1]:8080", "localhost:8080"])
def test_on_loopback_no_token_is_needed(address: str) -> None:
    """Open, as long as only this machine can reach it."""
    assert load(flags={"bind_addr": address}).auth.token == ""


def test_the_home_profile_always_needs_a_token() -> None:
    """HOME_WITHOUT_TOKEN on loopback too, and no exemption for loopback clients."""
    [fault] = faults(profile="home")
    assert fault.startswith("auth.token: HOME_WITHOUT_TOKEN: ")
    assert faults(profile="home", auth__token=TOKEN, auth__optional=True) == [
        'auth.optional: must be false with profile = "home"'
    ]
    assert load(flags={"profile": "home", "auth.token": TOKEN}).profile == "home"


@pytest.mark.parametrize(
    "text",
    [
        "auth.token = ['canary-secret']",
        "auth = 'canary-secret'",
        "auth = ['canary-secret']",
        "[[auth]]\ntoken = 'canary-secret'",
        "[[adapter]]\napi_key = 'canary-secret'",
        "adapter = 'canary-secret'",
        "auth.token = 'canary-secret'",
        "auth.tokn = 'canary-secret'",
        "adapter.api_key = {a = 'canary-secret'}",
        "adapter.api_key = 'canary secret'",
        "adapter.endpoint = 'http://user:canary-secret@host:1'",
        "auth.token = 'canary-secret",
        "pools = 'canary-secret'",
        "[[pools]]\napi_key = 'canary-secret'",
        "pools.a = 'canary-secret'",
        "pools.a.api_key = 'canary-secret'",
        "pools.a.replicas = 'canary-secret'",
        "pools.a.replicas = ['canary-secret']",
        "pools.a.replicas = {api_key = 'canary-secret'}",
        "[[pools.a.replicas]]\napi_key = ['canary-secret']",
        "[[pools.a.replicas]]\napi_kye = 'canary-secret'",
        "[[pools.a.replicas]]\napi_key = 'canary secret'",
        "[[pools.a.replicas]]\napi_key = 'canary-secret'\napi_key_file = 'x'",
        "[[pools.a.replicas]]\nendpoint = 'http://user:canary-secret@host:1'",
        "[[pools.a.replicas]]\nendpoint = ['http://user:canary-secret@host:1']",
        "[[pools.a.replicas]]\nendpoint = 'http://u:canary@h:1'\n[[pools.a.replicas]]\nendpoint = 'http://u:canary@h:1'",
    ],
)
def test_a_fault_never_shows_a_secret(file: Path, text: str) -> None:
    """T18: neither the value of a secret's key nor that of the table it stands in."""
    file.write_text(text)
    assert "canary" not in str(faults(file))


# -- pools -----------------------------------------------------------------------------------------

TWO_POOLS = """
[pools.small]
[[pools.small.replicas]]
endpoint = "http://h1:1"

[pools.big]
default = true
retries = 5
[[pools.big.replicas]]
endpoint = "unix:/run/a.sock"
devices = [0, 1]
slots = "auto"
[[pools.big.replicas]]
id = "left"
endpoint = "http://h2:1"
api_key = "k"
"""


def test_pools_and_their_replicas_are_read(file: Path) -> None:
    """Every key of theirs; what is left out has the default of [adapter]."""
    file.write_text(TWO_POOLS)
    config = load(file)
    assert config.pools == {
        "small": PoolTable(replicas=(ReplicaTable(endpoint="http://h1:1"),)),
        "big": PoolTable(
            default=True,
            retries=5,
            replicas=(
                ReplicaTable(endpoint="unix:/run/a.sock", devices=(0, 1), slots="auto"),
                ReplicaTable(id="left", endpoint="http://h2:1", api_key="k"),
            ),
        ),
    }
    for key in ("slots", "devices", "api_key", "api_key_file"):
        assert getattr(ReplicaTable(), key) == getattr(config.adapter, key)
    for key in ("engine", "retries", "drain_s", "self_test"):
        assert getattr(PoolTable(), key) == getattr(config.adapter, key)


def test_the_pools_in_force_have_names_and_the_default_first(file: Path) -> None:
    """The others as they stand; a replica without a name has its pool's with a number."""
    file.write_text(TWO_POOLS + "\n[[pools.another.replicas]]\nendpoint = 'http://h3:1'\n")
    pools = pools_in_force(load(file))
    assert list(pools) == ["big", "small", "another"]
    assert [[replica.id for replica in pool.replicas] for pool in pools.values()] == [
        ["big-0", "left"], ["small-0"], ["another-0"]
    ]  # fmt: skip


def test_without_pools_the_adapter_is_one(file: Path) -> None:
    """Named "default", with one replica that has all it says; an empty [pools] is none."""
    file.write_text(
        'pools = {}\n[adapter]\nendpoint = "http://h:1"\nslots = 3\ndevices = [1]\nretries = 7\n'
        'api_key = "k"\ndrain_s = 5\nself_test = false'
    )
    replica = ReplicaTable(id="default-0", endpoint="http://h:1", slots=3, devices=(1,), api_key="k")
    assert pools_in_force(load(file)) == {
        "default": PoolTable(default=True, retries=7, drain_s=5, self_test=False, replicas=(replica,))
    }


def test_one_pool_need_not_be_called_the_default() -> None:
    """There is no other."""
    pool = PoolTable(replicas=(ReplicaTable(endpoint="http://h:1"),))
    assert list(pools_in_force(Config(pools={"only": pool}))) == ["only"]


def pools_toml(*lines: str, name: str = "a") -> str:
    """One pool with one replica, after which come `lines`."""
    return "\n".join([f"[[pools.{name}.replicas]]", 'endpoint = "http://h:1"', *lines])


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("pools = 3", "pools: expected tables [pools.NAME]"),
        ("[[pools]]\nx = 1", "pools: expected tables [pools.NAME]"),
        ("pools.a = 3", "pools.a: expected a table [pools.a]"),
        ("[[pools.a]]\nx = 1", "pools.a: expected a table [pools.a]"),
        ("pools.a.replicas = 3", "pools.a.replicas: expected tables [[pools.a.replicas]]"),
        ("[pools.a.replicas]\nid = 'x'", "pools.a.replicas: expected tables [[pools.a.replicas]]"),
        ("pools.a.replicas = [3]", "pools.a.replicas[0]: expected a table [[pools.a.replicas]]"),
        (
            pools_toml("id = 5"),
            "pools.a.replicas[0].id: expected str, got 5",
        ),
        (
            pools_toml("slots = 0"),
            'pools.a.replicas[0].slots: expected 1 to 1024 or "auto", got 0',
        ),
        (pools_toml("devices = 0"), "pools.a.replicas[0].devices: expected array, got 0"),
        (pools_toml("devices = [-1]"), "pools.a.replicas[0].devices: expected int >= 0, got [-1]"),
        (pools_toml("[pools.a]", "default = 1"), "pools.a.default: expected bool, got 1"),
        (
            pools_toml("[pools.a]", "engine = 'vllm'"),
            "pools.a.engine: expected \"llamacpp\", got 'vllm'",
        ),
        (pools_toml("zzz = 1"), "pools.a.replicas[0].zzz: unknown key"),
        (
            pools_toml("endpiont = 1"),
            "pools.a.replicas[0].endpiont: unknown key, did you mean pools.a.replicas[0].endpoint?",
        ),
        (
            pools_toml("retries = 1"),
            "pools.a.replicas[0].retries: unknown key, did you mean pools.a.retries?",
        ),
        (pools_toml("[pools.a]", "zzz = 1"), "pools.a.zzz: unknown key"),
        (
            pools_toml("[pools.a]", "retrys = 1"),
            "pools.a.retrys: unknown key, did you mean pools.a.retries?",
        ),
        (
            pools_toml("[pools.a]", "slots = 1"),
            "pools.a.slots: unknown key, did you mean pools.a.replicas[0].slots?",
        ),
        (
            pools_toml("[pools.a]", "capacity = 1"),
            "pools.a.capacity: unknown key, did you mean queue.capacity?",
        ),
        (
            pools_toml("[pools.a.replica]", "id = 'x'"),
            "pools.a.replica: unknown key, did you mean pools.a.replicas?",
        ),
        (
            '[pools."a b\\nc"]\nzzz = 1',
            'pools."a b\\nc".zzz: unknown key',
        ),
        ('"a\\nb" = 1', '"a\\nb": unknown key'),
        ("[pool.a]", "pool: unknown key, did you mean pools?"),
    ],
)
def test_a_fault_in_a_pool_names_its_path_and_cure(file: Path, text: str, fault: str) -> None:
    """Each in one line, whatever stands where a table or a list of them belongs."""
    file.write_text(text)
    assert faults(file) == [fault]


def pool(*endpoints: str, **fields: Any) -> dict[str, Any]:
    """A pool's table."""
    return {"replicas": [{"endpoint": endpoint} for endpoint in endpoints]} | fields


@pytest.mark.parametrize(
    ("config", "fault"),
    [
        ({"pools": {"a": pool()}}, "pools.a: expected at least one [[pools.a.replicas]] with an endpoint"),
        (
            {"pools": {"a": pool("http://h:1"), "b": pool("http://h:2")}},
            "pools: expected default = true in one of them, found it in 0",
        ),
        (
            {"pools": {"a": pool("http://h:1", default=True), "b": pool("http://h:2", default=True)}},
            "pools: expected default = true in one of them, found it in 2",
        ),
        (
            {"adapter": {"slots": 2}, "pools": {"a": pool("http://h:1")}},
            "adapter: give it or [pools], not both: its keys belong in [[pools.NAME.replicas]]",
        ),
        (
            {"pools": {"a": {"replicas": [{"id": "x", "endpoint": f"http://h:{n}"} for n in (1, 2)]}}},
            "pools.a.replicas[1].id: 'x' is another replica's of this pool",
        ),
        (
            {
                "pools": {
                    "a": {"replicas": [{"endpoint": "http://h:1"}, {"id": "a-0", "endpoint": "http://h:2"}]}
                }
            },
            "pools.a.replicas[1].id: 'a-0' is another replica's of this pool",
        ),
        (
            {"pools": {"a": {"replicas": [{"id": "x y", "endpoint": "http://h:1"}]}}},
            "pools.a.replicas[0].id: expected 1 to 64 letters, digits, - or _, a letter or digit first, "
            "got 'x y'",
        ),
        (
            {"pools": {"a": {"replicas": [{}]}}},
            "pools.a.replicas[0].endpoint: expected http://host:port and nothing more, or unix:/path, got ''",
        ),
        (
            {"pools": {"a": {"replicas": [{"endpoint": "http://h:1", "devices": [1, 1]}]}}},
            "pools.a.replicas[0].devices: each GPU once, got [1, 1]",
        ),
        (
            {"pools": {"a": {"replicas": [{"endpoint": "http://h:1", "api_key": "a b"}]}}},
            "pools.a.replicas[0].api_key: only visible ASCII characters, without spaces",
        ),
        (
            {"pools": {"a": pool("unix:run/x")}},
            "pools.a.replicas[0].endpoint: expected unix:/path of at most 107 bytes, got 'unix:run/x'",
        ),
        (
            {"pools": {"a": pool("http://127.0.0.1:8080")}},
            "pools.a.replicas[0].endpoint: http://127.0.0.1:8080 is llorch's own address (bind_addr): start "
            "llama-server on another port, as with --port 8081, and name that",
        ),
    ],
)
def test_what_no_type_can_say_of_pools_is_refused(file: Path, config: dict[str, Any], fault: str) -> None:
    """With the path of the key."""
    file.write_text(tomli_w.dumps(config))
    assert faults(file) == [fault]


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("http://h:1", "http://h:1", True),
        ("http://h:1", "http://H:1/", True),
        ("http://h", "http://h:80", True),
        ("http://localhost:1", "http://127.0.0.1:1", True),
        ("http://localhost:1", "http://[::1]:1", True),
        ("unix:/a", "unix:/a", True),
        ("unix:/a", "unix:/A", False),
        ("http://h:1", "http://h:2", False),
        ("http://h1:1", "http://h2:1", False),
    ],
)
@pytest.mark.parametrize("in_one_pool", [True, False])
def test_an_engine_belongs_to_one_replica(
    file: Path, one: str, other: str, same: bool, in_one_pool: bool
) -> None:
    """However the two write it, in one pool or in two."""
    pools = {"a": pool(one, other)} if in_one_pool else {"a": pool(one, default=True), "b": pool(other)}
    file.write_text(tomli_w.dumps({"pools": pools}))
    if not same:
        assert load(file).pools
        return
    second = "pools.a.replicas[1]" if in_one_pool else "pools.b.replicas[0]"
    assert faults(file) == [
        f"{second}.endpoint: pools.a.replicas[0] has the same: an engine belongs to one replica"
    ]


@pytest.mark.parametrize("name", ["", "-a", "a b", "a.b", "é", "a\nb", "x" * 65])
def test_a_pool_has_a_plain_name(file: Path, name: str) -> None:
    """It stands in URLs, logs and metrics; a fault stays on its line."""
    file.write_text(tomli_w.dumps({"pools": {name: pool("http://h:1")}}))
    [fault] = faults(file)
    assert fault.startswith("pools: expected names of 1 to 64 letters, digits, - or _, ")
    assert "\n" not in fault


@pytest.mark.parametrize("name", ["a", "0", "A_b-c", "x" * 64, "token", "default"])
def test_any_plain_name_will_do(file: Path, name: str) -> None:
    """Words of ours too."""
    file.write_text(tomli_w.dumps({"pools": {name: pool("http://h:1")}}))
    assert list(load(file).pools) == [name]


def test_pools_leave_the_adapter_aside(file: Path) -> None:
    """Its default endpoint is nobody's then: llorch may listen there."""
    file.write_text(tomli_w.dumps({"bind_addr": "127.0.0.1:8081", "pools": {"a": pool("http://h:1")}}))
    assert load(file).bind_addr == "127.0.0.1:8081"


def test_all_faults_of_all_pools_are_told_at_once(file: Path) -> None:
    """Each with its own path."""
    file.write_text(tomli_w.dumps({"pools": {"a": pool("x", "y"), "b c": pool()}}))
    assert [fault.partition(": ")[0] for fault in faults(file)] == [
        "pools", "pools.a.replicas[0].endpoint", "pools.a.replicas[1].endpoint", "pools", 'pools."b c"'
    ]  # fmt: skip


def test_each_replica_may_have_its_key_in_a_file(file: Path, tmp_path: Path) -> None:
    """Read like the others; a fault names the replica."""
    path = str(secret_file(tmp_path))
    replicas = [{"endpoint": "http://h:1", "api_key_file": path}, {"endpoint": "http://h:2"}]
    file.write_text(tomli_w.dumps({"pools": {"a": {"replicas": replicas}}}))
    assert [replica.api_key for replica in load(file).pools["a"].replicas] == [TOKEN, ""]
    replicas[1] |= {"api_key": "k", "api_key_file": path}
    replicas.append({"endpoint": "http://h:3", "api_key_file": str(tmp_path / "none")})
    file.write_text(tomli_w.dumps({"pools": {"a": {"replicas": replicas}}}))
    assert faults(file) == [
        "pools.a.replicas[1].api_key_file: give it or pools.a.replicas[1].api_key, not both",
        f"pools.a.replicas[2].api_key_file: {tmp_path / 'none'} can't be read: No such file or directory",
    ]


def test_secrets_of_pools_are_found_and_hidden(file: Path) -> None:
    """Those of every replica, for the log and for `check-config --print`."""
    replicas = [{"endpoint": f"http://h:{n}", "api_key": f"canary-{n}"} for n in (1, 2)]
    file.write_text(tomli_w.dumps({"auth": {"token": TOKEN}, "pools": {"a": {"replicas": replicas}}}))
    values = msgspec.to_builtins(load(file))
    assert sorted(secrets_of(values)) == ["canary-1", "canary-2", TOKEN]
    shown = tomli_w.dumps(hide_secrets(values))
    assert "canary" not in shown
    assert shown.count("(hidden)") == 3
    assert secrets_of(hide_secrets(msgspec.to_builtins(Config()))) == []


# -- addresses -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "host", "port", "loopback"),
    [
        ("127.0.0.1:8080", "127.0.0.1", 8080, True),
        ("127.1.2.3:0", "127.1.2.3", 0, True),
        ("localhost:65535", "localhost", 65535, True),
        ("[::1]:80", "::1", 80, True),
        ("0.0.0.0:80", "0.0.0.0", 80, False),
        ("[::]:80", "::", 80, False),
        ("10.0.0.1:80", "10.0.0.1", 80, False),
    ],
)
def test_an_address_is_read(text: str, host: str, port: int, loopback: bool) -> None:
    """`IP:port`, `[v6]:port` or `localhost:port`, and written the same way."""
    address = parse_address(text)
    assert (address.host, address.port, address.is_loopback, str(address)) == (host, port, loopback, text)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "expected IP:port"),
        ("8080", "expected IP:port"),
        ("127.0.0.1", "expected IP:port"),
        ("127.0.0.1:", "expected IP:port"),
        ("127.0.0.1:-1", "expected IP:port"),
        ("127.0.0.1:65536", "expected IP:port"),
        ("127.0.0.1:8o8o", "expected IP:port"),
        ("127.0.0.1:٣", "expected IP:port"),
        ("127.0.0.1:" + "9" * 5000, "expected IP:port"),
        ("::1:8080", "an IPv6 address needs brackets"),
        ("[127.0.0.1]:80", "brackets are for IPv6"),
        (":8080", "'' is neither an IP address nor localhost"),
        ("*:8080", "neither an IP address nor localhost"),
        ("example.org:80", "neither an IP address nor localhost"),
        ("LOCALHOST:80", "neither an IP address nor localhost"),
        ("127.1:80", "neither an IP address nor localhost"),
        ("0177.0.0.1:80", "neither an IP address nor localhost"),
        ("[::g]:80", "neither an IP address nor localhost"),
    ],
)
def test_a_bad_address_is_explained(text: str, why: str) -> None:
    """ValueError says what was expected."""
    with pytest.raises(ValueError, match=re.escape(why)):
        parse_address(text)


@pytest.mark.parametrize("endpoint", ["http://h", "http://127.0.0.1:8081/", "https://[::1]:1"])
def test_an_endpoint_is_a_plain_http_url(endpoint: str) -> None:
    """Scheme, host and port, and no more."""
    assert load(flags={"adapter.endpoint": endpoint}).adapter.endpoint == endpoint


@pytest.mark.parametrize(
    "endpoint",
    ["", "h:1", "//h:1", "ftp://h", "http://", "http://h/v1", "http://h?a=1", "http://h#a", "http://u@h",
     "http://h:0", "http://h:99999", "http://[::1", "http://h:x"],
)  # fmt: skip
def test_any_other_endpoint_is_refused(endpoint: str) -> None:
    """The paths are llorch's."""
    [fault] = faults(adapter__endpoint=endpoint)
    assert fault.startswith("adapter.endpoint: expected http://host:port and nothing more")


@pytest.mark.parametrize("origin", ["*", "null", "h", "http://h/", "http://h/p", "ftp://h", "http://u@h"])
def test_an_origin_is_scheme_host_and_port(origin: str) -> None:
    """As browsers send it; a star is not possible."""
    assert faults(http__cors_origins=["https://ok:1", origin]) == [
        f"http.cors_origins: expected scheme://host[:port] and nothing more, got {origin!r}"
    ]


@pytest.mark.parametrize("host", ["", "h:80", "http://h", "*.h", "h.", "a b", "[::1]"])
def test_an_allowed_host_is_a_bare_name(host: str) -> None:
    """Any port is allowed anyway."""
    assert faults(http__allowed_hosts=["ok.example", host]) == [
        f"http.allowed_hosts: expected a bare host name, got {host!r}"
    ]


def test_the_default_of_max_tokens_is_under_its_ceiling() -> None:
    """Otherwise no task could leave it out."""
    assert faults(limits__max_tokens=10) == ["limits.max_tokens_default: 512 is over limits.max_tokens (10)"]


def test_an_address_of_v6_has_its_brackets() -> None:
    """In messages and URLs."""
    assert str(Address("::1", 80)) == "[::1]:80"


# -- anything at all -------------------------------------------------------------------------------

KEYS = [f"{table}.{key}" for table, keys in defaults().items() if isinstance(keys, dict) for key in keys]
VALUES: st.SearchStrategy[Any] = st.recursive(
    st.booleans() | st.integers() | st.floats() | st.text() | st.datetimes() | st.dates() | st.times()
    | st.sampled_from(["127.0.0.1:1", "http://[", "http://h:1", "https://é\u2488.example", "auto", "home"]),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(max_size=8), values, max_size=3),
    max_leaves=5,
)  # fmt: skip
FIELDS = {kind: [field.name for field in msgspec.structs.fields(kind)] for kind in (PoolTable, ReplicaTable)}
GOOD: dict[str, Any] = {"endpoint": "http://h:1", "slots": 2, "devices": [0], "id": "x", "default": True}
REPLICAS = st.lists(
    st.dictionaries(st.sampled_from([*FIELDS[ReplicaTable], "zzz"]), VALUES, max_size=3)
    | st.sets(st.sampled_from(["endpoint", "slots", "devices", "id"])).map(
        lambda keys: {k: GOOD[k] for k in keys}
    ),
    max_size=3,
)
POOLS = st.dictionaries(
    st.sampled_from(["a", "b", "", "a b", "a.b", "x" * 70]) | st.text(max_size=4),
    st.builds(
        lambda fields, replicas: fields | {"replicas": replicas},
        st.dictionaries(st.sampled_from([*FIELDS[PoolTable], "zzz"]), VALUES, max_size=2),
        REPLICAS,
    ),
    max_size=3,
).map(lambda pools: {"pools": pools})  # fmt: skip
TABLES = st.dictionaries(st.sampled_from([*defaults(), "qeue", "a\nb"]), VALUES, max_size=3)
SETTINGS = st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=6)


def nested(keys: dict[str, Any]) -> dict[str, Any]:
    """Dotted keys as tables."""
    tables: dict[str, Any] = {}
    for key, value in keys.items():
        table, _, name = key.partition(".")
        tables.setdefault(table, {})[name] = value
    return tables


@given(
    TABLES | SETTINGS.map(nested) | POOLS,
    st.dictionaries(st.sampled_from(KEYS).map(env_name), st.text(st.characters())),
)
@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_load_gives_a_configuration_or_says_what_is_wrong(
    file: Path, tables: dict[str, Any], env: dict[str, str]
) -> None:
    """Of any table and any environment: a Config or a ConfigError, and never another exception."""
    file.write_bytes(tomli_w.dumps(tables).encode())
    found: list[str] = []
    try:
        config = load(file, env)
    except ConfigError as error:
        config, found = Config(), error.faults
    assert all(fault.isprintable() for fault in found), "a fault is not one line of text"
    pools = pools_in_force(config)
    assert all(replica.id and replica.endpoint for pool in pools.values() for replica in pool.replicas)
    assert [pool.default for pool in pools.values()].count(True) <= 1


@given(st.dictionaries(st.sampled_from([*KEYS, "bind_addr", "profile"]), VALUES, max_size=4))
@settings(deadline=None, max_examples=200)
def test_flags_give_a_configuration_or_a_fault(flags: dict[str, Any]) -> None:
    """The same of whatever comes by the command line."""
    with contextlib.suppress(ConfigError):
        assert isinstance(load(flags=flags), Config)


@given(st.text(st.characters() | st.sampled_from("0123456789.:[]localhost%")))
@settings(deadline=None)
def test_an_address_is_read_or_refused(text: str) -> None:
    """parse_address lets out nothing but ValueError, and what it reads it writes the same way."""
    try:
        address = parse_address(text)
    except ValueError:
        return
    assert 0 <= address.port <= 65535
    assert parse_address(str(address)) == address


def test_a_variable_that_names_no_key_is_told() -> None:
    """A slip in the environment is found, with the name that was meant; what is not ours is left alone."""
    env = {
        "LLORCH_QUEUE_CAPACTIY": "1",
        "LLORCH_BIND_ADDR": "x",
        "LLORCH_CONFIG": "x",
        "LLORCH_URL": "x",
        "HOME": "x",
    }
    assert unknown_variables(env) == [
        "LLORCH_QUEUE_CAPACTIY: no such key, did you mean LLORCH_QUEUE_CAPACITY?"
    ]


# -- pools -----------------------------------------------------------------------------------------

TWO = """
[pools.big]
[[pools.big.replicas]]
id = "gpu0"
endpoint = "http://h:1"
[[pools.big.replicas]]
endpoint = "http://h:2"
api_key = "its-own"
"""


def test_the_key_of_the_adapter_is_that_of_replicas_without_one(file: Path, tmp_path: Path) -> None:
    """So that the file which the service's unit names by the environment holds for several engines too."""
    file.write_text(TWO)
    config = load(file, {"LLORCH_ADAPTER_API_KEY_FILE": str(secret_file(tmp_path, b"of-the-unit"))})
    replicas = pools_in_force(config)["big"].replicas
    assert [(it.id, it.api_key) for it in replicas] == [("gpu0", "of-the-unit"), ("big-1", "its-own")]


def test_the_rest_of_the_adapter_does_not_go_with_pools(file: Path) -> None:
    """Whichever of the two was meant, the other would be passed over without a word."""
    file.write_text(f"{TWO}[adapter]\nslots = 2")
    assert faults(file) == [
        "adapter: give it or [pools], not both: its keys belong in [[pools.NAME.replicas]]"
    ]

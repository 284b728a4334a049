"""`llorch doctor`: does this machine have what llorch needs? Each check is one function, with its cure.

The one rule: a check changes nothing, needs no running llorch, and never calls good what it could not see:
what can't be told from outside is a `note` that says where to look.
"""

import asyncio
import errno
import os
import socket
import stat
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

import msgspec
import pynvml

from llorch.adapters.llamacpp import LlamaCpp
from llorch.agreement import Made, disagreement
from llorch.answers import BadAnswer, ClientError, NotAllowed, NotFound, Pool, Refused, TooOld, Unreachable
from llorch.client import Client
from llorch.engine import EngineFailure, EngineLoading, EngineMisconfigured, Props
from llorch.exits import Exit
from llorch.gpu import GpuSnapshot, GpuUnavailable, preflight
from llorch.terminal import Console, clean, style

FLAGS = "-np N --no-kv-unified --no-context-shift --cache-ram 0"
_STYLES = {"good": "green", "bad": "red", "note": "yellow"}
_INDENT = " " * 6


class EngineSetup(msgspec.Struct, frozen=True, kw_only=True):
    """One engine of a pool; `told_at` is where the configuration has it, `devices` are its GPUs' numbers."""

    pool_id: str = "default"
    replica_id: str = "default-0"
    told_at: str = "adapter"
    endpoint: str = "http://127.0.0.1:8081"
    api_key: str = ""
    slots: int | None = 1  # None: all the engine has
    devices: tuple[int, ...] = ()


class Setup(msgspec.Struct, frozen=True, kw_only=True):
    """What is to be examined, as plain values; seconds. `faults` not empty: the rest is not in force."""

    config_file: Path | None = None
    faults: list[str] = []
    slips: list[str] = []
    host: str = "127.0.0.1"
    port: int = 8080
    token: str = ""
    token_file: Path | None = None
    secret_in_config: bool = False
    engines: tuple[EngineSetup, ...] = (EngineSetup(),)
    ctx: int = 0
    connect_s: float = 5.0
    control_s: float = 5.0
    gpu_required: bool = True


class Finding(msgspec.Struct, frozen=True, omit_defaults=True):
    """What one check found; `mend` is the cure, where there is something to mend or to know."""

    check: str
    verdict: Literal["good", "bad", "note"]
    what: str
    mend: str = ""


async def main(console: Console, setup: Setup, *, as_json: bool) -> int:
    """Examine and tell; Exit.FAILED if anything is bad."""
    findings = await examine(setup)
    healthy = all(finding.verdict != "bad" for finding in findings)
    if as_json:
        told = msgspec.json.encode({"good": healthy, "checks": findings}).decode()
        await console.write(f"{told}\n", trusted=True)
    else:
        await console.lines(lines(findings, colour=console.colour))
    return Exit.DONE if healthy else Exit.FAILED


async def examine(setup: Setup, nvml: Any = pynvml) -> list[Finding]:
    """Every check that can be made, in the order in which to mend."""
    on_gpus, gpus = graphics(setup, nvml)
    findings = [*configuration(setup), *on_gpus]
    if setup.faults:
        skipped = "address, engine and seeds: not examined, for want of a good configuration"
        return [*findings, Finding("the rest", "note", skipped, "mend it, then run llorch doctor again")]
    findings += [*devices(setup, gpus), *token(setup)]
    on_port, pools = await address(setup)
    findings += on_port
    seen = await asyncio.gather(*(engine(setup, one) for one in setup.engines))
    for one, (props, on_engine) in zip(setup.engines, seen, strict=True):
        findings += on_engine
        if props is not None:
            pool = pools.get(one.pool_id)
            findings += [*context(setup, one, props), *seeds(setup, one, props, pool)]
    told = [(one, props) for one, (props, _) in zip(setup.engines, seen, strict=True) if props is not None]
    return findings + agreement(told)


def lines(findings: Iterable[Finding], *, colour: bool) -> list[str]:
    """For a person: the verdict, the check, what was found, and on a line of its own how to mend it."""
    shown: list[str] = []
    for finding in findings:
        word = finding.verdict.upper() if finding.verdict == "bad" else finding.verdict
        verdict = style(f"{word:<4}", _STYLES[finding.verdict], colour=colour)
        shown.append(f"{verdict}  {finding.check}: {clean(finding.what)}")
        if finding.mend:
            shown.append(f"{_INDENT}{'mend' if finding.verdict == 'bad' else 'know'}: {clean(finding.mend)}")
    return shown


# -- what is on this machine -----------------------------------------------------------------------


def configuration(setup: Setup) -> list[Finding]:
    """The file and the environment, as `check-config` has them."""
    named = str(setup.config_file or "the built-in values")
    found = [
        Finding("configuration", "bad", fault, "change that; llorch check-config looks again")
        for fault in setup.faults
    ]
    found = found or [Finding("configuration", "good", named)]
    return found + [
        Finding("environment", "note", slip, "nothing reads it: rename it or take it out")
        for slip in setup.slips
    ]


def token(setup: Setup) -> list[Finding]:
    """Who may ask, and who may read the secret."""
    if not setup.token:
        open_to = f"none is set, so every program on this machine may ask ({setup.host} is loopback)"
        return [Finding("token", "good", open_to)]
    file = setup.token_file or (setup.config_file if setup.secret_in_config else None)
    if file is None:
        return [Finding("token", "good", "from the environment")]
    try:
        mode = stat.S_IMODE(os.stat(file).st_mode)
    except OSError as error:
        return [Finding("token", "bad", f"{file} can't be looked at: {error.strerror}", "check its path")]
    if mode & 0o077:
        what = f"others on this machine can read {file} (mode {mode:04o})"
        return [Finding("token", "bad", what, f"chmod 600 {file}")]
    return [Finding("token", "good", f"in {file}, readable by its owner alone (mode {mode:04o})")]


def graphics(setup: Setup, nvml: Any = pynvml) -> tuple[list[Finding], GpuSnapshot | None]:
    """GPU and driver, through NVML."""
    try:
        gpus = preflight(nvml)
    except GpuUnavailable as fault:
        what, _, cure = str(fault).partition(": ")
        if setup.gpu_required:
            return [Finding("GPU", "bad", what, cure)], None
        know = "gpu.required = false: llorch starts, and inference may run on the CPU; for CI and demos only"
        return [Finding("GPU", "note", what, know)], None
    return [Finding("GPU", "good", str(gpus))], gpus


def devices(setup: Setup, gpus: GpuSnapshot | None) -> list[Finding]:
    """Whether the GPUs that engines are said to compute on are there, if that can be told."""
    if gpus is None:
        return []
    there = {gpu.index for gpu in gpus.gpus}
    known = ", ".join(str(index) for index in sorted(there))
    found = []
    for one in setup.engines:
        if missing := [str(index) for index in one.devices if index not in there]:
            what = f"{one.told_at}.devices names GPU {', '.join(missing)}; the driver shows {known}"
            mend = "`nvidia-smi -L` lists them: correct devices, or leave it out where there is no choice"
            found.append(Finding("devices", "bad", what, mend))
    return found


# -- where llorch listens --------------------------------------------------------------------------


async def address(setup: Setup) -> tuple[list[Finding], dict[str, Pool]]:
    """Whether the port is free, or held by llorch; and how its pools are, by name, if it says."""
    where = f"[{setup.host}]:{setup.port}" if ":" in setup.host else f"{setup.host}:{setup.port}"
    fault = _bind_fault(setup)
    if fault is None:
        return [Finding("address", "good", f"{where} is free; no llorch runs there yet")], {}
    if fault.errno != errno.EADDRINUSE:
        what = f"llorch can't listen on {where}: {fault.strerror}"
        return [Finding("address", "bad", what, "set bind_addr to an address of this machine")], {}
    return await _holder(setup, where)


def _bind_fault(setup: Setup) -> OSError | None:
    host = "127.0.0.1" if setup.host == "localhost" else setup.host
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((host, setup.port))
            sock.listen(1)
    except OSError as error:
        return error
    return None


async def _holder(setup: Setup, where: str) -> tuple[list[Finding], dict[str, Pool]]:
    """Who has the port, by how it answers."""
    reach = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(setup.host, setup.host)
    host = f"[{reach}]" if ":" in reach else reach
    pools: dict[str, Pool] = {}
    try:
        async with Client(f"http://{host}:{setup.port}", setup.token) as client:
            for name in _pool_ids(setup):
                pools[name] = await client.pool(name)
    except NotAllowed as error:
        what = f"{where} is held by a llorch that refuses this token ({error.answer.code})"
        mend = "it was started with another configuration: name that with --config, or restart it"
        return [Finding("address", "bad", what, mend)], {}
    except NotFound as error:
        mend = "it was started with another configuration: name that with --config, or restart it"
        return [Finding("address", "bad", f"{where} is held by a llorch that says: {error}", mend)], {}
    except (Refused, TooOld) as error:
        return [Finding("address", "note", f"{where} is held by a llorch that says: {error}")], {}
    except (BadAnswer, Unreachable, ClientError):
        who = f"`ss -ltnp 'sport = :{setup.port}'` shows who has it"
        if any(str(setup.port) == _port(one.endpoint) for one in setup.engines):
            mend = "the engine is at this very address: start llama-server with --port 8081"
        else:
            mend = f"stop it, or choose another bind_addr; {who} (llama-server's own default is 8080)"
        return [Finding("address", "bad", f"{where} is taken by a program that is not llorch", mend)], {}
    found = [Finding("address", "good", f"{where} is held by a llorch that answers")]
    return found + [finding for pool in pools.values() for finding in _working(pool)], pools


def _pool_ids(setup: Setup) -> list[str]:
    return list(dict.fromkeys(one.pool_id for one in setup.engines))


def _port(endpoint: str) -> str:
    return endpoint.rpartition(":")[2].rstrip("/")


def _working(pool: Pool) -> list[Finding]:
    """What keeps a pool of a running llorch, or one of its replicas, from its work."""
    if pool.drain is not None:
        what = f"pool {pool.pool_id} is drained: it takes no new tasks"
        return [Finding("llorch", "note", what, f"llorch drain --end {pool.pool_id} ends that, a reload too")]
    if not pool.ready:
        why = pool.last_error or "the model is loading"
        return [Finding("llorch", "bad", f"pool {pool.pool_id} is not ready: {why}", "see the engine below")]
    return [
        Finding(
            "llorch",
            "bad",
            f"pool {pool.pool_id} does without {replica.replica_id}: {replica.last_error or 'it is loading'}",
            "see the engine below",
        )
        for replica in pool.replicas
        if not replica.ready
    ]


# -- the engine ------------------------------------------------------------------------------------


async def engine(setup: Setup, one: EngineSetup) -> tuple[Props | None, list[Finding]]:
    """Whether it answers what llorch asks of it, in llorch's own way."""
    check = _named("engine", setup, one)
    llama = LlamaCpp(one.endpoint, api_key=one.api_key, connect_s=setup.connect_s, control_s=setup.control_s)
    try:
        await llama.health()
        props = await llama.props()
        await llama.busy_slots()
    except EngineLoading:
        what = f"{one.endpoint} is loading its model"
        return None, [Finding(check, "note", what, "wait until it has; llorch does the same")]
    except EngineMisconfigured as failure:
        mend = (
            f"it wants a key: set {one.told_at}.api_key_file"
            if "401" in str(failure)
            else "start llama-server with --slots and without --no-slots, and nothing else on that port"
        )
        return None, [Finding(check, "bad", f"{one.endpoint}: {failure}", mend)]
    except EngineFailure as failure:
        return None, [Finding(check, "bad", f"{one.endpoint}: {failure}", _start(one))]
    finally:
        await llama.close()
    told = f"{one.endpoint}: {props.model or 'a model'}, {props.slots} slots of {props.ctx} tokens"
    version = f", {props.engine_version}" if props.engine_version else ""
    return props, [Finding(check, "good", f"{told}{version}"), *_slots(setup, one, props)]


def _named(check: str, setup: Setup, one: EngineSetup) -> str:
    """The check's name, with the engine that is meant where there are several."""
    if len(setup.engines) == 1:
        return check
    named = one.replica_id if len(_pool_ids(setup)) == 1 else f"{one.pool_id}/{one.replica_id}"
    return f"{check} {named}"


def _start(one: EngineSetup) -> str:
    where = f"--port {_port(one.endpoint)}"
    if one.endpoint.startswith("unix:"):
        where = f"--host {one.endpoint.removeprefix('unix:')}"
    on = ",".join(str(index) for index in one.devices)
    gpus = f"CUDA_DEVICE_ORDER=PCI_BUS_ID CUDA_VISIBLE_DEVICES={on} " if on else ""
    return f"start it: {gpus}llama-server -m MODEL.gguf {where} {FLAGS}"


def agreement(told: list[tuple[EngineSetup, Props]]) -> list[Finding]:
    """Whether the engines of each pool have one version and one model, as far as they say."""
    found, first = [], dict[str, tuple[EngineSetup, Props]]()
    for one, props in told:
        against, its = first.setdefault(one.pool_id, (one, props))
        why = disagreement(Made.of(props, None), Made.of(its, None))
        if why is not None:
            what = f"{one.replica_id} is not as {against.replica_id} is: {why}; one of them is kept out"
            mend = "start both from one llama-server and one model file, or give it a pool of its own"
            found.append(Finding(f"pool {one.pool_id}", "bad", what, mend))
    return found


def _slots(setup: Setup, one: EngineSetup, props: Props) -> list[Finding]:
    check = _named("slots", setup, one)
    if one.slots is None or one.slots == props.slots:
        return []
    if one.slots > props.slots:
        what = f"{one.told_at}.slots is {one.slots}, the engine has {props.slots}: so many are used"
        return [Finding(check, "note", what, f"start llama-server with -np {one.slots}")]
    what = f"llorch uses {one.slots} of the engine's {props.slots} slots"
    return [Finding(check, "note", what, f'{one.told_at}.slots = "auto" uses all of them')]


def context(setup: Setup, one: EngineSetup, props: Props) -> list[Finding]:
    """Whether a slot holds what the configuration promises."""
    if setup.ctx > props.ctx:
        what = f"limits.ctx is {setup.ctx}, a slot of the engine holds {props.ctx} tokens"
        mend = f"start llama-server with -c {setup.ctx * props.slots}, or lower limits.ctx"
        return [Finding(_named("context", setup, one), "bad", what, mend)]
    return []


def seeds(setup: Setup, one: EngineSetup, props: Props, pool: Pool | None) -> list[Finding]:
    """Whether the same seed can give the same bytes: by llorch's own test, else as far as can be told."""
    check = _named("seeds", setup, one)
    verdicts: dict[str, Callable[[], Finding]] = {
        "verified": lambda: Finding(check, "good", "llorch's test found the same bytes twice"),
        "failed": lambda: Finding(
            check, "bad", "llorch's test got two texts from one seed", f"restart llama-server with {FLAGS}"
        ),
    }
    if (verdict := _verdict(one, pool)) in verdicts:
        return [verdicts[verdict]()]
    used = props.slots if one.slots is None else min(one.slots, props.slots)
    if used == 1:
        return [Finding(check, "good", "llorch uses one slot, without its cache for seeded tasks")]
    what = f"{used} slots are used, and whether they share one cache can't be seen from outside"
    know = (
        f"llama-server needs {FLAGS}, and no draft model; llorch tests it when it starts, see llorch health"
    )
    return [Finding(check, "note", what, know)]


def _verdict(one: EngineSetup, pool: Pool | None) -> str:
    """What a running llorch says of the replica, or, if it is too old for that, of the pool."""
    if pool is None:
        return "unknown"
    own = (replica.determinism for replica in pool.replicas if replica.replica_id == one.replica_id)
    return next(own, pool.determinism if not pool.replicas else "unknown")

"""The contract of the metrics, docs/observability/metrics.json, and a lint of a scrape against it.

The one rule: this knows the contract, not the code; whatever the contract does not allow is a fault.
"""

import asyncio
import json
import re
import subprocess
from collections import defaultdict
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

OBSERVABILITY = Path(__file__).parent.parent / "docs" / "observability"
CONTRACT: dict[str, dict[str, Any]] = {
    metric["name"]: metric for metric in json.loads((OBSERVABILITY / "metrics.json").read_text())["metrics"]
}
SUFFIXES = {"histogram": ("_bucket", "_sum", "_count"), "counter": ("",), "gauge": ("",)}
MISSING = "promtool is not installed: run scripts/system-packages as root"
Samples = dict[str, float]


def of_profile(profile: str) -> dict[str, dict[str, Any]]:
    """The part of the contract that a profile has."""
    return {name: metric for name, metric in CONTRACT.items() if profile in metric["profiles"]}


def samples(text: str) -> Samples:
    """Every sample of a scrape, by `name{label="value",…}` with its labels in order of the alphabet."""
    found: Samples = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = ",".join(f'{name}="{value}"' for name, value in sorted(sample.labels.items()))
            key = f"{sample.name}{{{labels}}}" if labels else sample.name
            assert key not in found, f"{key} twice"
            found[key] = sample.value
    return found


def lint(text: str, profile: str, *, absent: frozenset[str] = frozenset()) -> list[str]:
    """What is wrong with a scrape; `absent`: names of which nothing can have happened yet."""
    contract = of_profile(profile)
    faults = [] if text.endswith("\n") else ["it does not end with a line's end"]
    declared = re.findall(r"^# TYPE (\S+) (\S+)$", text, re.MULTILINE)
    helps = dict(re.findall(r"^# HELP (\S+) (.+)$", text, re.MULTILINE))
    faults += [f"{name} is declared twice" for name in helps if [it for it, _ in declared].count(name) > 1]
    if dict(declared) != (expected := {name: metric["type"] for name, metric in contract.items()}):
        faults.append(f"types: {set(dict(declared).items()) ^ set(expected.items())}")
    if helps != (expected := {name: metric["help"] for name, metric in contract.items()}):
        faults.append(f"help: {set(helps.items()) ^ set(expected.items())}")
    sets: defaultdict[str, dict[tuple[str, ...], list[str]]] = defaultdict(dict)
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            name = next((it for it in contract if _is_of(sample.name, contract[it])), None)
            if name is None:
                faults.append(f"{sample.name} is not in the contract")
                continue
            labels = {label: value for label, value in sample.labels.items() if label != "le"}
            if sorted(labels) != sorted(contract[name]["labels"]):
                faults.append(f"{sample.name} has the labels {sorted(labels)}")
            bounds = sets[name].setdefault(tuple(sorted(labels.items())), [])
            bounds += [sample.labels["le"]] if "le" in sample.labels else []
    for name, metric in contract.items():
        if not sets[name] and "optional" not in metric and name not in absent:
            faults.append(f"{name} has no series")
        if len(sets[name]) > metric["budget"]:
            faults.append(f"{name} has {len(sets[name])} series, its budget is {metric['budget']}")
        wanted = [*map(float, metric["buckets"]), float("inf")] if "buckets" in metric else []
        if any([*map(float, bounds)] != wanted for bounds in sets[name].values()):
            faults.append(f"{name} has other buckets")
    return faults


def _is_of(sample_name: str, metric: dict[str, Any]) -> bool:
    return sample_name in {metric["name"] + suffix for suffix in SUFFIXES[metric["type"]]}


async def promtool(*arguments: str, given: str = "") -> subprocess.CompletedProcess[str]:
    """Run promtool in the folder of the dashboards and rules."""
    return await asyncio.to_thread(
        subprocess.run,
        ["promtool", *arguments],
        input=given,
        capture_output=True,
        text=True,
        timeout=60,
        cwd=OBSERVABILITY,
    )

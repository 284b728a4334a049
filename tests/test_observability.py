"""docs/observability: dashboard and alerts ask for what there is, and their programs can take them."""

import copy
import itertools
import json
import re
import shutil
from collections.abc import Iterator
from typing import Any

import promql_parser
import pytest
import yaml
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models import dashboard

from tests.contract import CONTRACT, MISSING, OBSERVABILITY, SUFFIXES, promtool

DASHBOARD = json.loads((OBSERVABILITY / "dashboard.json").read_text("utf-8"))
RULES = yaml.safe_load((OBSERVABILITY / "rules.yml").read_text("utf-8"))["groups"]
README = " ".join((OBSERVABILITY / "README.md").read_text("utf-8").split())
ALERTS = {rule["alert"]: rule for group in RULES for rule in group["rules"]}
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
QUERIES = [
    (f"{panel['title']} {target['refId']}", target["expr"]) for panel in PANELS for target in panel["targets"]
]
QUERIES += [(name, rule["expr"]) for name, rule in ALERTS.items()]
VARIABLES = {"$__rate_interval": "1m", "$__range": "1h", "$pool": "default"}
OF_PROMETHEUS = {"up": {"job", "instance"}}  # what every target has, and its labels everywhere
SERIES = OF_PROMETHEUS | {
    name + suffix: {*metric["labels"], *OF_PROMETHEUS["up"], *(["le"] if suffix == "_bucket" else [])}
    for name, metric in CONTRACT.items()
    for suffix in SUFFIXES[metric["type"]]
}
needs_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason=MISSING)


def filled_in(query: str) -> str:
    """A query as Grafana sends it."""
    for variable, value in VARIABLES.items():
        query = query.replace(variable, value)
    return query


def parts(expression: Any) -> Iterator[Any]:
    """The expression and all that is in it."""
    yield expression
    for name in ("lhs", "rhs", "expr", "param", "vector_selector", "vs"):
        inner = getattr(expression, name, None)
        if inner is not None and not isinstance(inner, str | int | float):
            yield from parts(inner)
    for argument in getattr(expression, "args", ()):
        yield from parts(argument)


def selectors(query: str) -> list[promql_parser.VectorSelector]:
    """Every metric that a query reads."""
    found = parts(promql_parser.parse(filled_in(query)))
    return [part for part in found if isinstance(part, promql_parser.VectorSelector)]


def faults(query: str) -> list[str]:
    """What a query asks for that there is not."""
    wrong: list[str] = []
    known = set().union(*(SERIES.get(it.name, set()) for it in selectors(query)))
    for part in parts(promql_parser.parse(filled_in(query))):
        if isinstance(part, promql_parser.VectorSelector):
            if part.name not in SERIES:
                wrong.append(f"no metric {part.name}")
            labels = {matcher.name for matcher in part.matchers.matchers}
            wrong += [f"{part.name} has no label {label}" for label in labels - SERIES.get(part.name, set())]
        elif isinstance(part, promql_parser.AggregateExpr | promql_parser.BinaryExpr) and part.modifier:
            modifier = (
                part.modifier if isinstance(part, promql_parser.AggregateExpr) else part.modifier.matching
            )
            wrong += [f"no label {label}" for label in {*(modifier.labels if modifier else ())} - known]
        elif isinstance(part, promql_parser.Call) and part.func.name == "histogram_quantile":
            inner = [*parts(part.args[1])]
            names = [it.name for it in inner if isinstance(it, promql_parser.VectorSelector)]
            wrong += [f"{name} is no _bucket" for name in names if not name.endswith("_bucket")]
            sums = [it for it in inner if isinstance(it, promql_parser.AggregateExpr)]
            wrong += ["le is gone" for it in sums if "le" not in it.modifier.labels]
        elif isinstance(part, promql_parser.Call) and part.func.name in ("rate", "increase"):
            [name] = [it.name for it in selectors(part.prettify())]
            kind = CONTRACT.get(re.sub("_(bucket|sum|count)$", "", name), {}).get("type")
            wrong += [] if kind in ("counter", "histogram") else [f"{part.func.name} of the {kind} {name}"]
    return wrong


# -- expressions -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("where", "query"), QUERIES, ids=[where for where, _ in QUERIES])
def test_every_expression_asks_for_what_there_is(where: str, query: str) -> None:
    """Metrics, labels and buckets are as the contract has them; rates are of what only grows."""
    assert selectors(query), where
    assert faults(query) == []


@pytest.mark.parametrize(
    "query",
    [
        "queue_dept",
        'queue_depth{lane="batch"}',
        "sum by (lane) (queue_depth)",
        "queue_depth / on (lane) llorch_queue_capacity",
        "rate(queue_depth[5m])",
        "tokens_in",
        "latency_decode_ms",
        "llorch_slots_bucket",
        "histogram_quantile(0.5, sum by (le) (rate(latency_decode_ms_count[5m])))",
        "histogram_quantile(0.5, sum by (pool_id) (rate(latency_decode_ms_bucket[5m])))",
    ],
)
def test_an_expression_that_asks_for_more_is_found(query: str) -> None:
    """So that the test above means something."""
    assert faults(query)


def test_every_label_of_a_legend_is_left_by_its_expression() -> None:
    """Else the legend is empty there."""
    for panel in PANELS:
        for target in panel["targets"]:
            for label in re.findall(r"{{(\w+)}}", target["legendFormat"]):
                grouped = re.findall(r"by \(([^)]*)\)", target["expr"])
                assert any(label in re.split(r", ", labels) for labels in grouped), (panel["title"], label)


def test_what_an_alert_says_it_knows() -> None:
    """Each has severity, summary and description, and names no label that its expression does not leave."""
    for name, rule in ALERTS.items():
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert rule["annotations"].keys() == {"summary", "description"}
        said = " ".join(rule["annotations"].values())
        grouped = re.findall(r"by \(([^)]*)\)", rule["expr"])
        known = SERIES[selectors(rule["expr"])[0].name] if not grouped else {*grouped[0].split(", ")}
        assert set(re.findall(r"\$labels\.(\w+)", said)) <= known, name


# -- the dashboard ---------------------------------------------------------------------------------


def test_grafana_can_import_the_dashboard() -> None:
    """A schema it knows, no id of another installation, its data source a variable, in every panel."""
    assert DASHBOARD["schemaVersion"] == 39
    assert "id" not in DASHBOARD
    assert re.fullmatch(r"[a-zA-Z0-9_-]{1,40}", DASHBOARD["uid"])
    variables = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    assert variables["datasource"]["query"] == "prometheus"
    source = {"type": "prometheus", "uid": "${datasource}"}
    for panel in PANELS:
        assert panel["datasource"] == source
        assert all(target["datasource"] == source for target in panel["targets"])
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
        assert panel["title"]
        assert len(panel["description"]) > 5
        assert panel["fieldConfig"]["defaults"]["unit"]
    label_values = re.fullmatch(r"label_values\((\w+), (\w+)\)", variables["pool"]["definition"])
    assert label_values is not None
    assert label_values[2] in SERIES[label_values[1]]
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(PANELS)))
    assert used == {*variables, "__rate_interval", "__range"}


def lost(given: Any, read: Any, path: str = "") -> list[str]:
    """What of `given` is not in `read`, by its path."""
    if isinstance(given, dict) and isinstance(read, dict):
        missing = [f"{path}/{key}" for key in given if key not in read]
        pairs = [(given[key], read[key], f"{path}/{key}") for key in given if key in read]
    elif isinstance(given, list) and isinstance(read, list) and len(given) == len(read):
        missing = []
        pairs = [(*pair, f"{path}/{number}") for number, pair in enumerate(zip(given, read, strict=True))]
    else:
        return [] if given == read else [path]
    return missing + [it for pair in pairs for it in lost(*pair)]


def test_grafanas_own_models_know_every_field() -> None:
    """Nothing is misspelt: what they read of it is all of it, but for a field that Grafana adds by itself."""
    register_default_plugins()
    read = json.loads(JSONEncoder().encode(dashboard.Dashboard.from_json(DASHBOARD)))
    assert lost(DASHBOARD, read) == ["/templating/list/1/definition"]
    misspelt = copy.deepcopy(DASHBOARD)
    misspelt["panels"][1]["fieldConfig"]["defaults"]["unitt"] = "s"
    read = json.loads(JSONEncoder().encode(dashboard.Dashboard.from_json(misspelt)))
    assert "/panels/1/fieldConfig/defaults/unitt" in lost(misspelt, read)


def test_no_panel_lies_on_another() -> None:
    """Each has its id and its own place on a grid that is 24 wide, without a gap between rows."""
    everything = DASHBOARD["panels"]
    assert len({panel["id"] for panel in everything}) == len(everything)
    taken: set[tuple[int, int]] = set()
    for panel in everything:
        at = panel["gridPos"]
        assert 0 <= at["x"] < at["x"] + at["w"] <= 24
        place = set(itertools.product(range(at["x"], at["x"] + at["w"]), range(at["y"], at["y"] + at["h"])))
        assert not place & taken, panel["title"]
        taken |= place
    assert {y for _, y in taken} == set(range(max(y for _, y in taken) + 1))


def metrics_of(query: str) -> set[str]:
    """The names of the contract that a query needs."""
    names = {re.sub("_(bucket|sum|count)$", "", it.name) for it in selectors(query)}
    return names - OF_PROMETHEUS.keys()


def test_everything_worth_a_look_has_a_panel() -> None:
    """Every metric but the contract's own few."""
    shown = set().union(*(metrics_of(target["expr"]) for panel in PANELS for target in panel["targets"]))
    hidden = {
        "kv_cache_usage_ratio",
        "model_state",
        "llorch_build_info",
        "admission_backpressure_events_total",
    }
    assert CONTRACT.keys() - shown == hidden


def test_readme_says_which_panels_the_home_profile_leaves_empty() -> None:
    """Exactly those of which every expression needs a metric that it has not."""
    home = {name for name, metric in CONTRACT.items() if "home" in metric["profiles"]}
    empty = [
        panel["title"]
        for panel in PANELS
        if not any(metrics_of(target["expr"]) <= home for target in panel["targets"])
    ]
    sentence = README.partition("these panels stay empty")[2].partition(". ")[0]
    assert re.findall(r"\*([^*]+)\*", sentence) == empty


def test_readme_has_every_alert_and_whether_it_works_in_the_home_profile() -> None:
    """In the order of the file."""
    home = {name for name, metric in CONTRACT.items() if "home" in metric["profiles"]}
    rows = re.findall(r"\| `(Llorch\w+)` \| [^|]+ \| (yes|no) \|", README)
    works = {name: "yes" if metrics_of(rule["expr"]) <= home else "no" for name, rule in ALERTS.items()}
    assert dict(rows) == works
    assert [name for name, _ in rows] == [*works]


# -- Prometheus ------------------------------------------------------------------------------------


@needs_promtool
@pytest.mark.parametrize(
    "arguments",
    [
        ("check", "rules", "--lint=all", "--lint-fatal", "rules.yml"),
        ("test", "rules", "rules.test.yml"),
        ("check", "config", "--syntax-only", "prometheus.example.yml"),
    ],
    ids=["rules", "alerts", "config"],
)
async def test_promtool_accepts_it(arguments: tuple[str, ...]) -> None:
    """The rules, what they do when, and the example."""
    done = await promtool(*arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "SUCCESS" in done.stdout


@needs_promtool
async def test_prometheus_itself_accepts_the_dashboards_queries(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """As promtool does, which has Prometheus' own parser."""
    rules = [
        {"record": f"panel_{number}", "expr": filled_in(query)} for number, (_, query) in enumerate(QUERIES)
    ]
    file = tmp_path_factory.mktemp("rules") / "queries.yml"
    file.write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}))
    done = await promtool("check", "rules", "--lint=none", str(file))
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_is_tested_both_ways() -> None:
    """rules.test.yml lets each fire, and lets it be silent."""
    tests = yaml.safe_load((OBSERVABILITY / "rules.test.yml").read_text("utf-8"))["tests"]
    cases = [case for test in tests for case in test["alert_rule_test"]]
    for name in ALERTS:
        fires = {bool(case["exp_alerts"]) for case in cases if case["alertname"] == name}
        assert fires == {True, False}, name
    inputs = [series["series"] for test in tests for series in test["input_series"]]
    assert [fault for text in inputs for fault in faults(text)] == []


def test_the_example_scrapes_with_the_token_from_a_file() -> None:
    """Under the name that the alert goes by, and never with the token itself in it."""
    example = yaml.safe_load((OBSERVABILITY / "prometheus.example.yml").read_text("utf-8"))
    [job] = example["scrape_configs"]
    assert f'up{{job="{job["job_name"]}"}}' in ALERTS["LlorchDown"]["expr"]
    assert job["authorization"].keys() == {"type", "credentials_file"}
    assert job["authorization"]["type"] == "Bearer"
    assert "metrics_path" not in job
    assert example["rule_files"] == ["rules.yml"]

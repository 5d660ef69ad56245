"""The chart's alerts and dashboard use only metrics that the operator has, and each alert fires in the situations that it must report, and in no other
situation.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from finetune_api.names import Phase
from finetune_operator.metrics import Metrics
from finetune_operator.plan import Outcome

from tests.support.tool_programs import ensure_promtool

NAMESPACE = "ops"
SELECTOR = f'namespace="{NAMESPACE}"'


@pytest.fixture(scope="module")
def chart(root: Path) -> Path:
    return root / "helm/finetune-operator"


@pytest.fixture(scope="module")
def alerts(chart: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load((chart / "files/alerts.yaml").read_text("utf-8"))["rules"])


@pytest.fixture(scope="module")
def dashboard(chart: Path) -> dict[str, Any]:
    return dict(json.loads((chart / "files/dashboard.json").read_text("utf-8")))


def list_dashboard_queries(dashboard: dict[str, Any]) -> list[str]:
    return [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]


def find_labels_by_series() -> dict[str, set[str]]:
    """Return the labels of each series that the operator writes, by series name."""
    suffixes = {"counter": ("",), "gauge": ("",), "histogram": ("_bucket", "_count", "_sum")}
    labels_by_series: dict[str, set[str]] = {}
    for collector in vars(Metrics()).values():
        for family in collector.describe() if hasattr(collector, "describe") else ():
            name = f"{family.name}_total" if family.type == "counter" else family.name
            for suffix in suffixes.get(family.type, ()):
                labels_by_series[name + suffix] = {*collector._labelnames, *(["le"] if suffix == "_bucket" else [])}
    return labels_by_series


def find_series(expression: str) -> Iterator[tuple[str, str]]:
    """Yield the name and the matchers of each series in a PromQL expression."""
    return ((name, matchers) for name, matchers in re.findall(r"(finetune_operator_\w+)(?:\{([^}]*)\})?", expression))


def test_alerts_and_dashboard_use_only_metrics_and_labels_that_the_operator_has(
    alerts: list[dict[str, Any]], dashboard: dict[str, Any]
) -> None:
    labels_by_series = find_labels_by_series()
    values_by_label = {"phase": {phase.value for phase in Phase}, "outcome": {outcome.value for outcome in Outcome}, "result": {"error"}}
    expressions = [alert["expr"] for alert in alerts] + list_dashboard_queries(dashboard)
    assert len(expressions) > 25
    for expression in expressions:
        assert list(find_series(expression)), expression
        for name, matchers in find_series(expression):
            assert name in labels_by_series, expression
            for label, value in re.findall(r'(\w+)=~?"([^"]*)"', matchers):
                assert label in labels_by_series[name] | {"namespace"}, expression
                assert set(value.split("|")) <= values_by_label.get(label, set(value.split("|"))), expression
    unused_names = {name for name in labels_by_series if not name.endswith(("_sum", "_count", "_bucket"))}
    unused_names -= {name for expression in expressions for name, _ in find_series(expression)}
    assert unused_names == set(), "the dashboard shows every metric"


def test_finished_jobs_are_counted_from_zero() -> None:
    """`increase()` of Prometheus does not count the first value of a series. If the series did not start at zero, an alert would miss the first failures."""
    (family,) = Metrics().jobs_finished.collect()
    samples = {sample.labels["outcome"]: sample.value for sample in family.samples if sample.name.endswith("_total")}
    assert samples == {outcome.value: 0 for outcome in Outcome}


def test_alerts_have_a_severity_and_texts(alerts: list[dict[str, Any]]) -> None:
    for alert in alerts:
        assert alert["labels"]["severity"] in ("critical", "warning", "info"), alert["alert"]
        assert set(alert["annotations"]) == {"summary", "description"}, alert["alert"]
    assert len({alert["alert"] for alert in alerts}) == len(alerts) == 11


def test_dashboard_panels_do_not_overlap(dashboard: dict[str, Any]) -> None:
    taken_cells: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        position = panel["gridPos"]
        cells = {(x, y) for x in range(position["x"], position["x"] + position["w"]) for y in range(position["y"], position["y"] + position["h"])}
        assert not cells & taken_cells, panel["title"]
        taken_cells |= cells
        assert position["x"] + position["w"] <= 24
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    assert {variable["name"] for variable in dashboard["templating"]["list"]} == {"datasource", "namespace"}


def render_rules(helm: Path, chart: Path, **rule_values: Any) -> dict[str, Any]:
    values = {
        "imageRegistry": "r", "crds": {"enabled": False},
        "metrics": {"prometheusRule": {"enabled": True, **rule_values}, "grafanaDashboard": {"enabled": True}},
    }  # fmt: skip
    command = [helm, "template", "rel", chart, "-n", NAMESPACE, "-f", "-"]
    text = subprocess.run(command, input=json.dumps(values), capture_output=True, text=True, check=True).stdout
    objects = [item for item in yaml.load_all(text, yaml.CSafeLoader) if item]
    (dashboard_map,) = [item for item in objects if item["metadata"]["name"].endswith("-dashboard")]
    assert json.loads(dashboard_map["data"]["finetune-operator.json"]) == json.loads((chart / "files/dashboard.json").read_text("utf-8"))
    return dict(next(item for item in objects if item["kind"] == "PrometheusRule"))


def test_alert_rules_can_be_left_out_added_and_labelled(helm: Path, chart: Path, alerts: list[dict[str, Any]]) -> None:
    own_rule = {"record": "a:b", "expr": "vector(1)"}
    rule = render_rules(
        helm, chart, disabledAlerts=["FineTuneJobsWait"], extraRules=[own_rule], alertLabels={"team": "ml", "severity": "page"}, labels={"release": "prom"}
    )
    (group,) = rule["spec"]["groups"]
    *rules, last_rule = group["rules"]
    assert last_rule == own_rule
    assert [item["alert"] for item in rules] == [alert["alert"] for alert in alerts if alert["alert"] != "FineTuneJobsWait"]
    assert {json.dumps(item["labels"], sort_keys=True) for item in rules} == {'{"severity": "page", "team": "ml"}'}
    assert "RELEASE_NAMESPACE" not in json.dumps(rule)
    assert rule["metadata"]["labels"]["release"] == "prom"


def make_series(name: str, values: str, **labels: str) -> dict[str, str]:
    matchers = ", ".join(f'{key}="{value}"' for key, value in {"namespace": NAMESPACE, **labels}.items())
    return {"series": f"finetune_operator_{name}{{{matchers}}}", "values": values}


ONE_LEADER = [make_series("leader", "1x1000", pod="a"), make_series("leader", "0x1000", pod="b")]
CASES: list[tuple[str, list[dict[str, str]], str, list[str]]] = [
    # (situation, series with one value per minute, time at which the alerts are read, alerts that must fire then)
    ("a healthy operator", ONE_LEADER, "60m", []),
    ("no metrics for 9 minutes", [], "9m", []),
    ("no metrics for 10 minutes", [], "10m", ["FineTuneOperatorAbsent"]),
    ("metrics of another release only", [make_series("leader", "1x100", namespace="other")], "10m", ["FineTuneOperatorAbsent"]),
    ("a change of the leader", [make_series("leader", "1x10 0x100", pod="a"), make_series("leader", "0x13 1x100", pod="b")], "20m", []),
    ("no leader", [make_series("leader", "1x10 0x100", pod="a"), make_series("leader", "0x110", pod="b")], "20m", ["FineTuneOperatorHasNoLeader"]),
    ("two leaders", [make_series("leader", "1x20", pod="a"), make_series("leader", "1x20", pod="b")], "5m", ["FineTuneOperatorHasTwoLeaders"]),
    ("403 again and again", [*ONE_LEADER, make_series("api_requests_total", "0+1x60", verb="list", resource="pods", code="403"),
                             make_series("api_requests_total", "0+100x60", verb="list", resource="pods", code="200")], "30m",
     ["FineTuneOperatorLacksPermission"]),
    ("one 403", [*ONE_LEADER, make_series("api_requests_total", "0x5 1x60", verb="list", resource="pods", code="403")], "25m", []),
    ("11 % errors", [*ONE_LEADER, make_series("api_requests_total", "0+11x60", verb="get", resource="jobs", code="503"),
                     make_series("api_requests_total", "0+89x60", verb="get", resource="jobs", code="200")], "30m", ["FineTuneOperatorApiErrors"]),
    ("9 % without an answer", [*ONE_LEADER, make_series("api_requests_total", "0+9x60", verb="get", resource="jobs", code="0"),
                               make_series("api_requests_total", "0+91x60", verb="get", resource="jobs", code="200")], "30m", []),
    ("conflicts", [*ONE_LEADER, make_series("api_requests_total", "0+50x60", verb="update", resource="finetunejobs", code="409"),
                   make_series("api_requests_total", "0+50x60", verb="update", resource="finetunejobs", code="200")], "30m", []),
    ("reconciles with errors", [*ONE_LEADER, make_series("reconcile_seconds_count", "0+2x60", result="error")], "45m", ["FineTuneOperatorReconcileErrors"]),
    ("stale reconciles", [*ONE_LEADER, make_series("reconcile_seconds_count", "0+60x60", result="stale")], "45m", []),
    ("a slow queue", [*ONE_LEADER, make_series("queue_wait_seconds_bucket", "0+1x60", le="5"), make_series("queue_wait_seconds_bucket", "0+10x60", le="30"),
                      make_series("queue_wait_seconds_bucket", "0+10x60", le="+Inf")], "45m", ["FineTuneOperatorQueueIsSlow"]),
    ("a blocked event loop", [*ONE_LEADER, make_series("event_loop_lag_seconds", "6x60")], "20m", ["FineTuneOperatorIsBlocked"]),
    ("three of four jobs fail", [*ONE_LEADER, make_series("jobs_finished_total", "0x9 3x300", outcome="Failed"),
                                 make_series("jobs_finished_total", "0x9 1x300", outcome="Succeeded")], "60m", ["FineTuneJobsFail"]),
    ("two jobs fail", [*ONE_LEADER, make_series("jobs_finished_total", "0x9 2x300", outcome="Failed"),
                       make_series("jobs_finished_total", "0x309", outcome="Succeeded")], "60m", []),
    ("30 % repeated steps", [*ONE_LEADER, make_series("steps_total", "0+100x200"), make_series("steps_lost_total", "0+30x200")], "120m",
     ["FineTuneStepsAreLost"]),
    ("10 % repeated steps", [*ONE_LEADER, make_series("steps_total", "0+100x200"), make_series("steps_lost_total", "0+10x200")], "120m", []),
    ("a pending job for 7 hours", [*ONE_LEADER, make_series("jobs", "1x900", phase="Pending"), make_series("jobs", "3x900", phase="Running")], "420m",
     ["FineTuneJobsWait"]),
    ("running jobs for 7 hours", [*ONE_LEADER, make_series("jobs", "0x900", phase="Pending"), make_series("jobs", "3x900", phase="Running")], "420m", []),
]  # fmt: skip


@pytest.mark.slow
def test_promtool_sees_each_alert_fire_only_in_its_situation(helm: Path, chart: Path, alerts: list[dict[str, Any]], tmp_path: Path) -> None:
    promtool = ensure_promtool()
    if promtool is None:
        pytest.skip("needs promtool on the PATH, or apt-get")
    rules = render_rules(helm, chart)["spec"]
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(rules))
    alerts_by_name = {alert["alert"]: alert for alert in alerts}
    tests = []
    for situation, input_series, time, firing_names in CASES:
        checks = [{"alertname": name, "eval_time": time, "exp_alerts": None} for name in alerts_by_name if name not in firing_names]
        assertions = [{"expr": f'count by (alertname) (ALERTS{{alertstate="firing", alertname="{name}"}})', "eval_time": time,
                       "exp_samples": [{"labels": f'{{alertname="{name}"}}', "value": 1}]} for name in firing_names]  # fmt: skip
        tests.append({"name": situation, "interval": "1m", "input_series": input_series, "alert_rule_test": checks, "promql_expr_test": assertions})
    (tmp_path / "tests.yaml").write_text(yaml.safe_dump({"rule_files": ["rules.yaml"], "evaluation_interval": "1m", "tests": tests}))
    assert {name for *_, firing_names in CASES for name in firing_names} == set(alerts_by_name), "each alert fires in one situation"
    for command in (["check", "rules", "rules.yaml"], ["test", "rules", "tests.yaml"]):
        completed_process = subprocess.run([promtool, *command], cwd=tmp_path, capture_output=True, text=True)
        assert completed_process.returncode == 0, completed_process.stdout + completed_process.stderr


@pytest.mark.slow
def test_promtool_parses_the_queries_of_the_dashboard(dashboard: dict[str, Any], tmp_path: Path) -> None:
    promtool = ensure_promtool()
    if promtool is None:
        pytest.skip("needs promtool on the PATH, or apt-get")
    variables = {"$namespace": NAMESPACE, "$__range": "6h", "$__rate_interval": "5m"}
    queries = list_dashboard_queries(dashboard)
    for name, value in variables.items():
        queries = [query.replace(name, value) for query in queries]
    assert not [query for query in queries if "$" in query]
    rules = [{"record": f"panel:query{number}", "expr": query} for number, query in enumerate(queries)]
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
    completed_process = subprocess.run([promtool, "check", "rules", "rules.yaml"], cwd=tmp_path, capture_output=True, text=True)
    assert completed_process.returncode == 0, completed_process.stdout + completed_process.stderr

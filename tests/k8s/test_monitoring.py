"""Dashboard and alert rules: every query parses and names metrics that the processes export."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import promql_parser
import pytest
import yaml

from tests.k8s.chart import CHART, REPOSITORY, named, rendered

DASHBOARD = json.loads((CHART / "files" / "dashboard.json").read_text())
ALERTS = yaml.safe_load((CHART / "files" / "alerts.yaml").read_text())
RULES = {rule["alert"]: rule for group in ALERTS["groups"] for rule in group["rules"]}
# Of Prometheus' own client, in every process.
PROCESS_METRICS = {"process_cpu_seconds_total", "process_resident_memory_bytes", "afd_build_info"}
VARIABLES = {"$__rate_interval": "1m", "$job": "afd", "$namespace": "llm", "$release": "afd"}


def panels() -> list[dict[str, Any]]:
    return [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]


def queries() -> list[tuple[str, str]]:
    found = [(f"alert {name}", rule["expr"]) for name, rule in RULES.items()]
    return found + [(panel["title"], target["expr"]) for panel in panels() for target in panel["targets"]]


def selectors(node: object) -> Iterator[promql_parser.VectorSelector]:
    """Every series selector of a parsed query."""
    match node:
        case promql_parser.VectorSelector():
            yield node
        case promql_parser.MatrixSelector():
            yield from selectors(node.vector_selector)
        case promql_parser.BinaryExpr():
            yield from selectors(node.lhs)
            yield from selectors(node.rhs)
        case promql_parser.AggregateExpr() | promql_parser.ParenExpr() | promql_parser.UnaryExpr():
            yield from selectors(node.expr)
        case promql_parser.SubqueryExpr():
            yield from selectors(node.expr)
        case promql_parser.Call():
            for argument in node.args:
                yield from selectors(argument)


def parse(query: str) -> promql_parser.Expr:
    for variable, value in VARIABLES.items():
        query = query.replace(variable, value)
    return promql_parser.parse(query)


def test_every_query_names_metrics_that_exist(live_metric_names: set[str]) -> None:
    unknown = {}
    for where, query in queries():
        names = [selector.name for selector in selectors(parse(query))]
        assert names, f"{where}: {query} selects nothing"
        missing = set(names) - live_metric_names - PROCESS_METRICS
        if missing:
            unknown[where] = missing
    assert not unknown


def test_the_dashboard_covers_what_an_operator_asks_first() -> None:
    used = {selector.name for _, query in queries() for selector in selectors(parse(query))}
    assert used >= {
        "afd_sla_tpot_attainment",
        "afd_sla_tpot_p99_seconds",
        "vllm:generation_tokens_total",
        "afd_stage_seconds_total",
        "afd_gang_members_total",
        "afd_mesh_answers_waited_ns_total",
        "afd_kv_blocks_free",
        "afd_gateway_queued_sequences",
        "afd_coordinator_formed",
        "afd_autoscale_recommended_instances",
    }


def test_panels_have_their_own_place_and_the_chosen_source() -> None:
    cells = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        own = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not own & cells, panel["title"]
        cells |= own
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    assert all(panel["datasource"]["uid"] == "${datasource}" for panel in panels())
    chosen = 'namespace=~"$namespace",app_kubernetes_io_instance=~"$release",job=~"$job"'
    for panel in panels():
        for target in panel["targets"]:
            num_selectors = len(list(selectors(parse(target["expr"]))))
            assert target["expr"].count(chosen) == num_selectors, f"{panel['title']} mixes releases"
    assert [one["name"] for one in DASHBOARD["templating"]["list"]] == ["datasource", "namespace", "release", "job"]


@pytest.mark.parametrize("name", RULES)
def test_every_alert_says_what_it_means_and_what_to_do(name: str) -> None:
    rule = RULES[name]
    assert rule["labels"]["severity"] in ("info", "warning", "critical")
    assert rule["annotations"]["summary"] and rule["annotations"]["action"]
    assert name in (REPOSITORY / "docs" / "operations.md").read_text()


def test_the_chart_ships_both_files() -> None:
    objects = rendered("everything")
    own = 'namespace="demo",app_kubernetes_io_instance="afd"'
    text = (CHART / "files" / "alerts.yaml").read_text().replace('namespace=~".*"', own)
    assert named(objects, "PrometheusRule", "afd")["spec"] == yaml.safe_load(text)
    assert json.loads(named(objects, "ConfigMap", "afd-dashboard")["data"]["afd.json"]) == DASHBOARD

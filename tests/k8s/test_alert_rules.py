"""Alert rules against series of several releases, evaluated by Prometheus' own promtool where there is one."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import promql_parser
import pytest
import yaml

from tests.k8s.chart import CHART, named, render_values
from tests.k8s.test_monitoring import parse, selectors
from tests.k8s.value_sets import SECRET

Series = dict[str, str]

PROMTOOL = shutil.which("promtool")
needs_promtool = pytest.mark.skipif(PROMTOOL is None, reason="promtool is not installed (Debian: package prometheus)")
RULES = (CHART / "files" / "alerts.yaml").read_text()
ONE, OTHER = ('namespace="one",app_kubernetes_io_instance="afd"', 'namespace="other",app_kubernetes_io_instance="afd"')


def chart_rules(namespace: str) -> str:
    """The rules of a release, as its PrometheusRule has them."""
    objects = tuple(render_values({**SECRET, "monitoring": {"prometheusRule": True}}, namespace=namespace))
    return yaml.safe_dump(named(objects, "PrometheusRule", "afd")["spec"])


def firing(rules: str, series: Series, alert: str, folder: Path) -> set[str]:
    """Namespaces ("" = none) for which the alert fires after the series have run for 40 minutes."""
    (folder / "rules.yaml").write_text(rules)
    found = set()
    for namespace in ("one", "other", ""):
        chosen = f'alertname="{alert}",alertstate="firing",namespace="{namespace}"'
        quiet = {
            "expr": f"count(ALERTS{{{chosen}}}) or vector(0)",
            "eval_time": "40m",
            "exp_samples": [{"labels": "{}", "value": 0}],
        }
        test = {
            "interval": "1m",
            "input_series": [{"series": name, "values": values} for name, values in series.items()],
            "promql_expr_test": [quiet],
        }
        whole = {"rule_files": ["rules.yaml"], "evaluation_interval": "1m", "tests": [test]}
        (folder / "test.yaml").write_text(yaml.safe_dump(whole))
        command = [str(PROMTOOL), "test", "rules", "test.yaml"]
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60, check=False)
        if result.returncode != 0:
            assert "exp:" in result.stdout + result.stderr, result.stdout + result.stderr
            found.add(namespace)
    return found


@needs_promtool
def test_the_rules_are_promtools_too(tmp_path: Path) -> None:
    for name, text in (("file", RULES), ("chart", chart_rules("one"))):
        (tmp_path / f"{name}.yaml").write_text(text)
        command = [str(PROMTOOL), "check", "rules", f"{name}.yaml"]
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
        assert result.returncode == 0, result.stderr


def healthy(labels: str) -> Series:
    return {
        f"afd_coordinator_formed{{{labels}}}": "1x60",
        f'afd_build_info{{{labels},role="gateway"}}': "1x60",
        f'afd_kv_blocks_free{{{labels},pod="a"}}': "50x60",
        f'afd_kv_blocks_total{{{labels},pod="a"}}': "100x60",
    }


CASES: dict[str, tuple[str, Series, str]] = {
    "not formed": ("AfdNotFormed", {f"afd_coordinator_formed{{{ONE}}}": "0x60"}, "one"),
    "coordinator gone": ("AfdCoordinatorGone", {f"afd_coordinator_formed{{{ONE}}}": "1x5 stale"}, "one"),
    "recovery": (
        "AfdRecoveryTakesLong",
        {f"afd_coordinator_formed{{{ONE}}}": "0x60", f"afd_gateway_running_sequences{{{ONE}}}": "3x60"},
        "one",
    ),
    "kv": ("AfdKvCacheFull", {f'afd_kv_blocks_free{{{ONE},pod="a"}}': "1x60"}, "one"),
    "kv of somebody else's vLLM": ("AfdKvCacheFull", {f'vllm:kv_cache_usage_perc{{{ONE},pod="x"}}': "1x60"}, ""),
    "refusing": ("AfdRefusing", {f"afd_gateway_rejections_total{{{ONE}}}": "0+60x60"}, "one"),
    "failing": ("AfdRequestsFail", {f"afd_gateway_request_failures_total{{{ONE}}}": "0+60x60"}, "one"),
    "tpot": (
        "AfdTpotTargetMissed",
        {f"afd_sla_tpot_attainment{{{ONE}}}": "0.5x60", f"afd_sla_window_requests{{{ONE}}}": "50x60"},
        "one",
    ),
    "ratio": (
        "AfdWrongRatio",
        {
            f'afd_autoscale_recommended_instances{{{ONE},role="ffn"}}': "2x60",
            f'afd_autoscale_instances{{{ONE},role="ffn"}}': "1x60",
            f'afd_autoscale_recommended_instances{{{OTHER},role="ffn"}}': "1x60",
            f'afd_autoscale_instances{{{OTHER},role="ffn"}}': "1x60",
        },
        "one",
    ),
    "all is well": ("AfdNotFormed", {}, ""),
}


@needs_promtool
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("rules", ["file", "one", "other"])
def test_an_alert_is_of_the_release_that_it_concerns(case: str, rules: str, tmp_path: Path) -> None:
    """`rules`: the file for all releases, or those that the chart makes for the release in a namespace."""
    alert, changed, namespace = CASES[case]
    series = {**healthy(ONE), **healthy(OTHER), **changed}
    text = RULES if rules == "file" else chart_rules(rules)
    wanted = {namespace} if namespace and rules in ("file", namespace) else set()
    assert firing(text, series, alert, tmp_path) == wanted


@needs_promtool
def test_a_release_that_is_gone_altogether_is_noticed(tmp_path: Path) -> None:
    assert firing(chart_rules("one"), healthy(OTHER), "AfdCoordinatorGone", tmp_path) == {"one"}
    assert firing(RULES, {"up": "1x60"}, "AfdCoordinatorGone", tmp_path) == {""}


def test_every_selector_of_a_releases_rules_is_its_own() -> None:
    for group in yaml.safe_load(chart_rules("one"))["groups"]:
        for rule in group["rules"]:
            for selector in selectors(parse(rule["expr"])):
                equal = [one for one in selector.matchers.matchers if one.op == promql_parser.MatchOp.Equal]
                found = {(one.name, one.value) for one in equal}
                assert found == {("namespace", "one"), ("app_kubernetes_io_instance", "afd")}, rule["alert"]
                assert str(selector.name).startswith("afd_")

"""What an upgrade restarts, what it leaves alone, and what it refuses; two releases beside each other."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from afd.cluster.chart import find_helm
from afd.worker.data_plane import config_hash
from tests.k8s.api_server import Cluster, api_server, path_of
from tests.k8s.chart import CHART, NAMESPACE, Object, config_text, of_kind, pod_templates, render_values
from tests.k8s.value_sets import SECRET, VALUE_SETS, Values

BASE: Values = {**SECRET, "topology": "2A2F", "autoscale": {"enabled": True}}
ALL = {"gateway", "coordinator", "attention", "ffn", "autoscale"}


def merged(base: Any, change: Any) -> Any:
    if isinstance(base, dict) and isinstance(change, dict):
        return {key: merged(base.get(key), change[key]) if key in change else base[key] for key in {**base, **change}}
    return change


def templates(objects: list[Object]) -> dict[str, Object]:
    return dict(pod_templates(tuple(objects)))


def restarted(change: Values) -> set[str]:
    """Roles whose pods an upgrade from BASE replaces."""
    before, after = templates(render_values(BASE)), templates(render_values(merged(BASE, change)))
    return {role for role in before if before[role] != after[role]}


@pytest.mark.parametrize(
    ("change", "roles"),
    [
        ({"log": {"level": "debug"}}, set()),
        ({"log": {"format": "text"}}, ALL),
        ({"sla": {"tpotMs": 20}}, ALL - {"ffn"}),
        ({"sla": {"policy": "enforce"}}, {"gateway", "coordinator", "attention"}),
        ({"config": {"gateway": {"max_queue": 64}}}, {"gateway"}),
        ({"config": {"attention": {"max_waiting": 64}}}, {"attention"}),
        ({"config": {"attention": {"block_size": 16}}}, {"attention", "gateway"}),
        ({"config": {"ffn": {"gang_window_ms": 5.0}}}, {"ffn", "coordinator"}),
        ({"attention": {"kvCacheGiB": 3}}, {"attention"}),
        ({"topology": "3A2F"}, {"gateway", "coordinator"}),
        ({"ffn": {"standby": 1}}, {"coordinator"}),
        ({"gateway": {"drainSeconds": 900}}, {"gateway"}),
        ({"drainSeconds": 60}, {"attention"}),
        ({"recoveryTimeoutSeconds": 900}, {"gateway", "attention"}),
        ({"apiKeys": True}, {"gateway"}),
        ({"model": {"servedName": "m"}}, {"gateway", "coordinator"}),
        ({"ffn": {"resources": {"limits": {"memory": "9Gi"}}}}, {"ffn"}),
        ({"gateway": {"podLabels": {"a": "b"}}}, {"gateway"}),
        ({"autoscale": {"max": "9A4F"}}, {"autoscale"}),
        ({"monitoring": {"dashboard": True, "prometheusRule": True, "serviceMonitor": True}}, set()),
        ({"networkPolicy": {"enabled": False}, "podDisruptionBudgets": False}, set()),
        ({"coordinator": {"env": [{"name": "A", "value": "b"}]}}, {"coordinator"}),
    ],
    ids=lambda value: json.dumps(value)[:50] if isinstance(value, dict) else None,
)
def test_a_change_restarts_only_whom_it_concerns(change: Values, roles: set[str]) -> None:
    assert restarted(change) == roles


@pytest.mark.parametrize("shape", ["statefulsets", "disaggregatedset"])
def test_a_new_version_of_the_chart_restarts_nobody(shape: str, tmp_path: Path) -> None:
    """What a new version is: another number, and perhaps another dashboard. The image is the values' business."""
    chart = tmp_path / "afd"
    subprocess.run(["cp", "-r", str(CHART), str(chart)], check=True)
    values = {**BASE, "shape": shape, "image": {"tag": "0.1.0"}}
    found = []
    for version in ("0.1.0", "0.2.0"):
        metadata = (CHART / "Chart.yaml").read_text().replace("0.1.0", version)
        (chart / "Chart.yaml").write_text(metadata)
        (tmp_path / "values.json").write_text(json.dumps(values))
        command = [find_helm(), "template", "afd", str(chart), "--values", str(tmp_path / "values.json")]
        text = subprocess.run(command, capture_output=True, check=True, text=True, timeout=60).stdout
        assert f'"afd-{version}"' in text
        found.append(templates([one for one in yaml.load_all(text, Loader=yaml.CSafeLoader) if one]))
    assert found[0] == found[1]


# --- what running workers would refuse ------------------------------------------------------------------------------


def present(values: Values, *, running: int | None = None) -> dict[str, Object]:
    """What a release of these values has in the cluster, by API path. running: replicas of its workers."""
    found = {}
    for one in render_values(values):
        if one["kind"] in ("ConfigMap", "StatefulSet", "Deployment"):
            if one["kind"] == "StatefulSet" and running is not None:
                one["spec"]["replicas"] = running
            owner = {"meta.helm.sh/release-name": "afd", "meta.helm.sh/release-namespace": NAMESPACE}
            one["metadata"]["annotations"] = {**one["metadata"].get("annotations", {}), **owner}
            found[path_of(one, NAMESPACE)] = one
    return found


def upgraded(before: dict[str, Object], values: Values, folder: Path) -> subprocess.CompletedProcess[str]:
    (folder / "values.json").write_text(json.dumps(values))
    with api_server(Cluster(before)) as url:
        command = [find_helm(), "template", "afd", str(CHART), f"--namespace={NAMESPACE}", "--dry-run=server"]
        command += ["--values", str(folder / "values.json"), "--kube-apiserver", url]
        environment = {"PATH": "/usr/bin:/bin", "HOME": str(folder), "KUBECONFIG": "/dev/null"}
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=environment)


@pytest.mark.parametrize(
    "change",
    [
        {"topology": "2A3F"},
        {"attention": {"maxStepTokens": 128}},
        {"model": {"dtype": "float32"}},
        {"model": {"name": "dummy:step3-tiny"}},
        {"ffnParallel": "tp"},
        {"config": {"cluster": {"wire": "fp8"}}},
        {"config": {"model": {"weights": "int8"}}},
    ],
    ids=json.dumps,
)
def test_what_running_workers_would_refuse_is_refused_first(change: Values, tmp_path: Path) -> None:
    result = upgraded(present(BASE), merged(BASE, change), tmp_path)
    assert result.returncode != 0
    assert "would refuse new ones: install a second release beside this one" in result.stderr
    stopped = upgraded(present(BASE, running=0), merged(BASE, change), tmp_path)
    assert stopped.returncode == 0, stopped.stderr


def test_every_setting_that_workers_must_agree_on_is_guarded() -> None:
    """The coordinator's refusal covers the keys of `config_hash`; so does the chart's."""
    read = set(re.findall(r"config\.([a-z]+\.[a-z_]+)", inspect.getsource(config_hash)))
    guarded = {"model.dtype", "model.weights", "cluster.wire", "cluster.ffn_parallel"}
    assert read == guarded | {"attention.max_step_tokens", "topology.num_ffn"}


@pytest.mark.parametrize(
    "change", [{"topology": "3A2F"}, {"sla": {"tpotMs": 20}}, {"attention": {"kvCacheGiB": 3}}], ids=json.dumps
)
def test_any_other_upgrade_goes_through(change: Values, tmp_path: Path) -> None:
    result = upgraded(present(BASE), merged(BASE, change), tmp_path)
    assert result.returncode == 0, result.stderr


def test_an_upgrade_leaves_the_size_that_a_scaler_has_chosen(tmp_path: Path) -> None:
    values = merged(
        BASE, {"attention": {"hpa": {"enabled": True, "maxReplicas": 8}}, "gateway": {"hpa": {"enabled": True}}}
    )
    before = present(values, running=6)
    before[f"/apis/apps/v1/namespaces/{NAMESPACE}/deployments/afd-gateway"]["spec"]["replicas"] = 5
    result = upgraded(before, values, tmp_path)
    objects = [one for one in yaml.load_all(result.stdout, Loader=yaml.CSafeLoader) if one]
    sizes = {one["metadata"]["name"]: one["spec"]["replicas"] for one in objects if "replicas" in one.get("spec", {})}
    assert (sizes["afd-attention"], sizes["afd-ffn"], sizes["afd-gateway"]) == (6, 2, 5)


def test_an_image_volume_needs_a_kubernetes_that_has_them(tmp_path: Path) -> None:
    (tmp_path / "values.json").write_text(json.dumps(VALUE_SETS["model-image"]))
    for version, code in (("1.32.0", 1), ("1.33.0", 0)):
        command = [find_helm(), "template", "afd", str(CHART), "--values", str(tmp_path / "values.json")]
        result = subprocess.run(
            [*command, "--kube-version", version], capture_output=True, text=True, timeout=60, check=False
        )
        assert result.returncode == code, result.stderr
        assert ("model.volume.image needs Kubernetes 1.33" in result.stderr) == bool(code)


# --- two releases -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VALUE_SETS)
def test_every_object_says_its_namespace(name: str) -> None:
    """`afd k8s render | kubectl apply -f -` puts objects where they say, and the coordinator is looked for there."""
    objects = render_values(VALUE_SETS[name], namespace="llm")
    assert {one["metadata"].get("namespace") for one in objects} == {"llm"}
    for role in ("gateway", "attention", "ffn", "coordinator"):
        assert 'address = "afd-coordinator.llm.svc:7070"' in config_text(tuple(objects), role)


def test_two_releases_share_no_name_and_no_pod() -> None:
    first, second = (render_values(VALUE_SETS["everything"], release=name) for name in ("afd", "other"))
    names = [{(one["kind"], one["metadata"]["name"]) for one in objects} for objects in (first, second)]
    assert not names[0] & names[1]
    for objects, release in ((first, "afd"), (second, "other")):
        for one in of_kind(tuple(objects), "Service") + of_kind(tuple(objects), "PodDisruptionBudget"):
            selector = one["spec"]["selector"]
            assert selector.get("matchLabels", selector)["app.kubernetes.io/instance"] == release

"""The chart renders for every value set, to objects that Kubernetes' own schemas accept, and refuses bad values."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
import subprocess
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from afd.cli.main import main
from afd.cluster.chart import SECRET_KEY, find_helm
from afd.errors import ConfigError
from tests.k8s.chart import (
    CHART,
    REPOSITORY,
    Object,
    config_text,
    named,
    of_kind,
    pod_templates,
    render_text,
    render_values,
    rendered,
)
from tests.k8s.value_sets import RDMA_RACK, REFUSED, VALUE_SETS, Values

CRD_SCHEMA = json.loads((REPOSITORY / "tests/fixtures/k8s/disaggregatedset.v1.schema.json").read_text())
# Of operators, whose schemas are not at hand; checked field by field below.
UNKNOWN_KINDS = {"ServiceMonitor", "PrometheusRule", "HTTPRoute", "InferencePool", "ScaledObject"}
OLDEST, NEWEST = "1.30", "1.36"
GOLDEN = {"2a2f": VALUE_SETS["2a2f"], "disaggregatedset-rack": {**RDMA_RACK, "shape": "disaggregatedset"}}


def test_lint() -> None:
    result = subprocess.run([find_helm(), "lint", "--strict", str(CHART)], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0 and "[WARNING]" not in result.stdout, result.stdout + result.stderr


def check(one: Object, version: str) -> None:
    """Against the schemas of a Kubernetes version; unknown fields are errors."""
    if one["kind"] == "DisaggregatedSet":
        jsonschema.validate(one, CRD_SCHEMA)
        for _, template in pod_templates((one,)):
            pod_template = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "t"}, "template": template}
            kubernetes_validate.validate(pod_template, version, strict=True)
    elif one["kind"] not in UNKNOWN_KINDS:
        kubernetes_validate.validate(one, version, strict=True)


@pytest.mark.parametrize("name", VALUE_SETS)
def test_every_object_is_valid(name: str) -> None:
    for one in rendered(name):
        check(one, NEWEST)


@pytest.mark.parametrize("name", ["everything", "autoscale-apply", "disaggregatedset-rack"])
def test_the_oldest_kubernetes_takes_it_too(name: str) -> None:
    for one in rendered(name):
        check(one, OLDEST)


@pytest.mark.parametrize(
    ("kind", "path", "value"),
    [
        ("StatefulSet", ["spec", "replica"], 1),
        ("StatefulSet", ["spec", "template", "spec", "containers", 0, "readinesProbe"], {}),
        ("Service", ["spec", "ports", 0, "port"], "http"),
        ("DisaggregatedSet", ["spec", "roles", 0, "replicas"], 1),
        ("DisaggregatedSet", ["spec", "roles", 0, "scaling"], {"mode": "external"}),
    ],
)
def test_the_check_finds_what_is_wrong(kind: str, path: list[str | int], value: object) -> None:
    one = copy.deepcopy(of_kind(rendered("1a1f") + rendered("disaggregatedset"), kind)[0])
    place: Any = one
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        check(one, NEWEST)


@pytest.mark.parametrize("name", VALUE_SETS)
def test_names_are_unique_and_references_lead_somewhere(name: str) -> None:
    objects = rendered(name)
    ids = [(one["kind"], one["metadata"]["name"]) for one in objects]
    assert len(set(ids)) == len(ids)
    names = {kind: {name for other, name in ids if other == kind} for kind, _ in ids}
    given = {"Secret": {"afd-secret", "afd-tls"} | names.get("Secret", set()), "ConfigMap": names["ConfigMap"]}
    for _, template in pod_templates(objects):
        spec = template["spec"]
        assert spec["serviceAccountName"] in names["ServiceAccount"]
        volumes = {volume["name"]: volume for volume in spec["volumes"]}
        mounts = spec["containers"][0]["volumeMounts"]
        assert {mount["name"] for mount in mounts} == set(volumes), "a volume nobody mounts, or a mount of nothing"
        assert len({mount["mountPath"] for mount in mounts}) == len(mounts)
        for volume in volumes.values():
            if "secret" in volume:
                assert volume["secret"]["secretName"] in given["Secret"]
            if "configMap" in volume:
                assert volume["configMap"]["name"] in given["ConfigMap"]


@pytest.mark.parametrize("name", VALUE_SETS)
def test_every_selector_finds_its_pods(name: str) -> None:
    objects = rendered(name)
    pods = [template["metadata"]["labels"] for _, template in pod_templates(objects)]
    for one in objects:
        spec = one.get("spec", {})
        if one["kind"] == "Service":
            selector = spec["selector"]
        elif one["kind"] == "NetworkPolicy":
            selector = spec["podSelector"]["matchLabels"]
        elif one["kind"] in ("PodDisruptionBudget", "Deployment", "StatefulSet"):
            selector = spec["selector"]["matchLabels"]
        else:
            continue
        assert sum(selector.items() <= labels.items() for labels in pods) == 1, one["metadata"]["name"]


@pytest.mark.parametrize("shape", ["statefulsets", "disaggregatedset"])
@pytest.mark.parametrize(
    ("topology", "num_attention", "num_ffn"), [("1A1F", 1, 1), ("16A2F", 16, 2), ("128A99F", 128, 99)]
)
def test_the_topology_is_the_number_of_pods(shape: str, topology: str, num_attention: int, num_ffn: int) -> None:
    text = render_text({"shape": shape, "topology": topology, "secret": {"existingSecret": "s"}})
    objects = tuple(one for one in yaml.load_all(text, Loader=yaml.CSafeLoader) if one)
    if shape == "statefulsets":
        sizes = {one["metadata"]["name"]: one["spec"]["replicas"] for one in of_kind(objects, "StatefulSet")}
    else:
        roles = named(objects, "DisaggregatedSet", "afd")["spec"]["roles"]
        sizes = {f"afd-{role['name']}": role["spec"]["replicas"] for role in roles}
    assert sizes == {"afd-attention": num_attention, "afd-ffn": num_ffn}


@pytest.mark.parametrize("shape", ["statefulsets", "disaggregatedset"])
def test_ffn_workers_on_standby_are_pods_beside_the_shards(shape: str) -> None:
    values = {"shape": shape, "topology": "1A2F", "ffn": {"standby": 1}, "secret": {"existingSecret": "s"}}
    objects = tuple(render_values(values))
    if shape == "statefulsets":
        assert named(objects, "StatefulSet", "afd-ffn")["spec"]["replicas"] == 3
    else:
        assert named(objects, "DisaggregatedSet", "afd")["spec"]["roles"][1]["spec"]["replicas"] == 3
    assert "standby_ffn = 1" in config_text(objects, "coordinator")
    assert 'topology = "1A2F"' in config_text(objects, "ffn")


def test_an_outside_scaler_owns_the_number_of_attention_workers() -> None:
    hpa = named(rendered("everything"), "HorizontalPodAutoscaler", "afd-attention")["spec"]
    assert hpa["scaleTargetRef"] == {"apiVersion": "apps/v1", "kind": "StatefulSet", "name": "afd-attention"}
    assert (hpa["minReplicas"], hpa["maxReplicas"]) == (3, 8)
    for name, x in (("everything", 3), ("pod-extras", 2), ("autoscale-apply", 1)):
        # Without a number Kubernetes would take one pod until the scaler acts.
        assert named(rendered(name), "StatefulSet", "afd-attention")["spec"]["replicas"] == x
    assert named(rendered("everything"), "StatefulSet", "afd-ffn")["spec"]["replicas"] == 2
    for name in ("disaggregatedset-everything", "disaggregatedset-apply"):
        attention, ffn = named(rendered(name), "DisaggregatedSet", "afd")["spec"]["roles"]
        assert attention["scaling"] == {"mode": "External"} and "replicas" not in attention["spec"]
        assert "scaling" not in ffn and ffn["spec"]["replicas"] > 0
    hpa = named(rendered("disaggregatedset-everything"), "HorizontalPodAutoscaler", "afd-attention")["spec"]
    assert hpa["scaleTargetRef"]["kind"] == "DisaggregatedSetRoleScaler"


def test_the_autoscaler_may_only_scale_its_own_target() -> None:
    for name, group, resource in (
        ("autoscale-apply", "apps", "statefulsets/scale"),
        ("disaggregatedset-apply", "disaggregatedset.x-k8s.io", "disaggregatedsetrolescalers/scale"),
    ):
        role = named(rendered(name), "Role", "afd-autoscale")
        assert role["rules"] == [
            {
                "apiGroups": [group],
                "resources": [resource],
                "resourceNames": ["afd-attention"],
                "verbs": ["get", "patch"],
            }
        ]
    assert not of_kind(rendered("everything"), "Role"), "recommending needs no rights"


def test_rdma_and_gpus_reach_the_workers_only() -> None:
    for role, template in pod_templates(rendered("rdma-rack")):
        container = template["spec"]["containers"][0]
        worker = role in ("attention", "ffn")
        devices = {"nvidia.com/gpu": 1, "rdma/ib": 1} if worker else {}
        for which in ("requests", "limits"):
            found = {key: value for key, value in container["resources"][which].items() if "/" in key}
            assert found == devices
        assert ("NCCL_IB_HCA" in {entry["name"] for entry in container["env"]}) == worker
        assert template["spec"].get("hostNetwork", False) == worker


def test_a_release_stays_under_one_switch() -> None:
    for _, template in pod_templates(tuple(of_kind(rendered("rdma-rack"), "StatefulSet"))):
        (term,) = template["spec"]["affinity"]["podAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
        assert term["topologyKey"] == "topology.kubernetes.io/rack"
        assert term["labelSelector"]["matchLabels"] == {"app.kubernetes.io/instance": "afd"}
    placed = named(rendered("disaggregatedset-rack"), "DisaggregatedSet", "afd")["spec"]["placementPolicy"]
    assert placed == {"type": "ExclusiveSlice", "topology": "topology.kubernetes.io/rack"}


def test_operators_objects() -> None:
    objects = rendered("everything")
    monitor = named(objects, "ServiceMonitor", "afd")
    ports = {port["name"] for one in of_kind(objects, "Service") for port in one["spec"]["ports"]}
    assert {endpoint["port"] for endpoint in monitor["spec"]["endpoints"]} <= ports
    assert monitor["metadata"]["labels"]["release"] == "prom"
    assert named(objects, "PrometheusRule", "afd")["spec"]["groups"][0]["rules"]
    (route,) = named(objects, "HTTPRoute", "afd-gateway")["spec"]["rules"]
    (backend,) = route["backendRefs"]
    service = named(objects, "Service", backend["name"])
    assert backend["port"] in {port["port"] for port in service["spec"]["ports"]}


def test_what_platform_teams_ask_of_pods() -> None:
    """Maps and lists of `pods` and of the role are joined; of single values the role's own counts."""
    specs = dict(pod_templates(rendered("pod-extras")))
    attention, ffn = specs["attention"]["spec"], specs["ffn"]["spec"]
    assert (attention["priorityClassName"], ffn["priorityClassName"]) == ("highest", "high")
    for spec in (attention, ffn, specs["gateway"]["spec"]):
        assert (spec["schedulerName"], spec["runtimeClassName"]) == ("gang", "nvidia")
    assert specs["attention"]["metadata"]["labels"].items() >= {"team": "serving", "tier": "attention"}.items()
    assert specs["ffn"]["metadata"]["labels"]["team"] == "serving"
    assert {one["key"] for one in attention["tolerations"]} >= {"pool", "gpu", "node.kubernetes.io/unreachable"}
    assert {one["key"] for one in ffn["tolerations"]} == {"pool"}
    container, logs = attention["containers"]
    assert logs["name"] == "logs"
    assert {mount["mountPath"] for mount in container["volumeMounts"]} >= {"/hugepages", "/cache"}
    assert {"hugepages", "jit"} <= {volume["name"] for volume in attention["volumes"]}
    assert container["lifecycle"] == {"postStart": {"exec": {"command": ["/bin/true"]}}}
    assert attention["terminationGracePeriodSeconds"] == 90
    assert attention["topologySpreadConstraints"][0]["whenUnsatisfiable"] == "DoNotSchedule"
    assert container["startupProbe"]["failureThreshold"] == 720 and container["livenessProbe"]["failureThreshold"] == 9
    assert attention["resourceClaims"] == [{"name": "gpu", "resourceClaimTemplateName": "one-gpu"}]
    assert container["resources"]["claims"] == [{"name": "gpu"}]
    for stateful_set in of_kind(rendered("pod-extras"), "StatefulSet"):
        assert stateful_set["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "gpus"
    assert named(rendered("pod-extras"), "StatefulSet", "afd-attention")["spec"]["updateStrategy"] == {
        "type": "OnDelete"
    }
    account = named(rendered("pod-extras"), "ServiceAccount", "afd")
    assert account["metadata"]["annotations"] == {"example.com/role": "reader"}


def test_what_a_role_says_again_is_the_roles_own() -> None:
    """Kubernetes takes no two items of a name, and a Pod no two handlers of an event."""
    specs = {role: template["spec"] for role, template in pod_templates(rendered("platform"))}
    for role, level, skew in (("ffn", "ffn", 2), ("attention", "all", 1)):
        spec = specs[role]
        added = [(one["name"], one.get("value")) for one in spec["containers"][0]["env"]]
        assert sorted(one for one in added if one[0] in ("LEVEL", "ZONE")) == [("LEVEL", level), ("ZONE", "a")]
        assert [one["maxSkew"] for one in spec["topologySpreadConstraints"]] == [skew]
    stop = specs["gateway"]["containers"][0]["lifecycle"]["preStop"]
    assert stop == {"exec": {"command": ["/bin/sleep", "9"]}}


def test_a_cluster_has_its_own_ways() -> None:
    objects = rendered("platform")
    service = named(objects, "Service", "afd-gateway")["spec"]
    assert (service["type"], service["loadBalancerClass"]) == ("LoadBalancer", "example.com/lb")
    assert service["ports"] == [{"name": "http", "port": 80, "targetPort": "http", "nodePort": 30080}]
    for role, template in pod_templates(objects):
        spec = template["spec"]
        assert not {"runAsUser", "runAsGroup", "fsGroup"} & spec["securityContext"].keys()
        assert spec["containers"][0]["image"] == "registry.corp.example:5000/llm/afd:0.1.0@sha256:" + 64 * "a"
        assert template["metadata"]["annotations"]["sidecar.istio.io/inject"] == "false"
        volumes = [one["csi"] for one in spec["volumes"] if "csi" in one]
        bucket = {"driver": "bucket.example", "volumeAttributes": {"b": "m"}, "readOnly": True}
        assert volumes == ([bucket] if role in ("gateway", "attention", "ffn") else [])


def test_a_roles_own_affinity_is_beside_the_placement() -> None:
    for role, template in pod_templates(rendered("pod-extras")):
        terms = template["spec"]["affinity"]["podAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
        assert {term["topologyKey"] for term in terms} == (
            {"zone", "rack"} if role in ("attention", "ffn") else {"zone"}
        )


def test_each_kind_of_worker_has_its_own_device_and_image() -> None:
    specs = {role: template["spec"] for role, template in pod_templates(rendered("attention-on-gpus"))}
    images = {role: spec["containers"][0]["image"] for role, spec in specs.items()}
    assert images == {**dict.fromkeys(("gateway", "coordinator", "ffn"), "afd:0.1.0"), "attention": "afd:0.1.0-cuda"}
    gpus = {role: spec["containers"][0]["resources"]["limits"].get("nvidia.com/gpu") for role, spec in specs.items()}
    assert gpus == {"attention": 1, "ffn": None, "gateway": None, "coordinator": None}
    extras = {role: template["spec"] for role, template in pod_templates(rendered("pod-extras"))}
    assert extras["attention"]["containers"][0]["image"] == "afd:0.1.0-cuda-special"
    assert "nvidia.com/gpu" not in extras["attention"]["containers"][0]["resources"]["limits"], "it is claimed"
    shm = {role: [v["emptyDir"]["sizeLimit"] for v in extras[role]["volumes"] if v["name"] == "shm"] for role in extras}
    assert (shm["attention"], shm["ffn"]) == (["4Gi"], ["1Gi"])


def test_the_model_is_downloaded_before_anybody_reads_it() -> None:
    for role, template in pod_templates(rendered("download")):
        spec = template["spec"]
        if role == "coordinator":
            assert "initContainers" not in spec
            continue
        (download,) = spec["initContainers"]
        mount = {"name": "model", "mountPath": "/models"}
        assert (
            mount in download["volumeMounts"] and {**mount, "readOnly": True} in spec["containers"][0]["volumeMounts"]
        )
        (volume,) = [one for one in spec["volumes"] if one["name"] == "model"]
        assert volume["persistentVolumeClaim"] == {"claimName": "models", "readOnly": False}
        assert {"name": "AFD_ROLE", "value": role} in download["env"]
    for policy in of_kind(rendered("download"), "NetworkPolicy"):
        assert {"ports": [{"protocol": "TCP", "port": 443}]} in policy["spec"]["egress"]


def test_only_the_api_is_let_in() -> None:
    """/metrics, / and /version are on the same port."""
    (rule,) = named(rendered("everything"), "Ingress", "afd-gateway")["spec"]["rules"]
    assert [path["path"] for path in rule["http"]["paths"]] == ["/v1"]
    (route,) = named(rendered("everything"), "HTTPRoute", "afd-gateway")["spec"]["rules"]
    assert route["matches"] == [{"path": {"type": "PathPrefix", "value": "/v1"}}]


def test_an_inference_gateway_sees_the_gateways_as_a_pool() -> None:
    pool = named(rendered("pod-extras"), "InferencePool", "afd-gateway")["spec"]
    assert pool["targetPorts"] == [{"number": 8000}]
    assert pool["endpointPickerRef"] == {"name": "afd-epp", "port": {"number": 9002}}
    for role, template in pod_templates(rendered("pod-extras")):
        labels = template["metadata"]["labels"]
        assert (pool["selector"]["matchLabels"].items() <= labels.items()) == (role == "gateway")
        assert ("llm-d.ai/role" in labels) == (role == "gateway")
    (rule,) = named(rendered("pod-extras"), "HTTPRoute", "afd-gateway")["spec"]["rules"]
    assert rule["backendRefs"][0]["kind"] == "InferencePool"


def test_a_query_scales_attention_workers() -> None:
    keda = named(rendered("pod-extras"), "ScaledObject", "afd-attention")["spec"]
    assert (keda["minReplicaCount"], keda["maxReplicaCount"]) == (2, 8)
    assert keda["scaleTargetRef"]["kind"] == "StatefulSet"
    (trigger,) = keda["triggers"]
    assert trigger["metadata"]["query"].count('namespace="demo",app_kubernetes_io_instance="afd"') == 2


def test_a_roll_out_of_a_disaggregatedset_replaces_in_place() -> None:
    """A new FFN worker beside all old ones finds no free rank."""
    for role in named(rendered("disaggregatedset"), "DisaggregatedSet", "afd")["spec"]["roles"]:
        update = role["spec"]["rolloutStrategy"]["rollingUpdateConfiguration"]
        assert update == {"maxUnavailable": 1, "maxSurge": 0}


def test_a_node_may_go_without_a_gap() -> None:
    gateway = named(rendered("2a2f"), "Deployment", "afd-gateway")["spec"]
    assert gateway["replicas"] >= 2
    (spread,) = gateway["template"]["spec"]["topologySpreadConstraints"]
    assert spread["topologyKey"] == "kubernetes.io/hostname"
    assert spread["labelSelector"]["matchLabels"].items() <= gateway["template"]["metadata"]["labels"].items()


@pytest.mark.parametrize("case", REFUSED)
def test_bad_values_are_refused_with_a_reason(case: str) -> None:
    values, reason = REFUSED[case]
    with pytest.raises(ConfigError) as caught:
        render_text(values)
    assert reason in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", GOLDEN)
def test_golden(name: str) -> None:
    """Reviewed renders: AFD_UPDATE_GOLDEN=1 writes them anew."""
    path = REPOSITORY / "tests" / "k8s" / "golden" / f"{name}.yaml"
    text = render_text(GOLDEN[name])
    if os.environ.get("AFD_UPDATE_GOLDEN"):
        path.write_text(text)
    assert text == path.read_text(), f"{path} differs: review, then AFD_UPDATE_GOLDEN=1 pytest {__file__}"


# --- afd k8s render -------------------------------------------------------------------------------------------


def objects_printed(capsys: pytest.CaptureFixture[str]) -> tuple[Object, ...]:
    return tuple(one for one in yaml.load_all(capsys.readouterr().out, Loader=yaml.CSafeLoader) if one)


def test_the_command_prints_what_helm_renders(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["k8s", "render", "--topology", "2A2F", "--namespace", "demo", "--set", "streams=2"]) == 0
    captured = capsys.readouterr()
    values: Values = {"topology": "2A2F", "streams": 2, "secret": {"existingSecret": "afd-secret"}}
    assert captured.out == render_text(values)
    assert f"--from-literal={SECRET_KEY}=" in captured.err


@cache
def plan_text(*arguments: str) -> str:
    """What `afd plan --json` prints: a search of seconds, made once for all tests that ask alike."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert main(["plan", "--model", "step3", "--context", "4096", "--json", *arguments]) == 0
    return printed.getvalue()


def planned(folder: Path, *arguments: str) -> tuple[dict[str, Any], str]:
    """What `afd plan` finds, and the file with it."""
    text = plan_text(*arguments)
    (folder / "plan.json").write_text(text)
    return json.loads(text), str(folder / "plan.json")


RUNS_TODAY = ("--ranks-per-instance", "1", "--attention-dtype", "bf16")


def test_a_plan_becomes_a_release_and_a_cluster(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Chips, sizes and counts of the plan are the pods'; the two roles have chips of their own."""
    chips = ("--attention", "h20", "--ffn", "h800", "--max-gpus", "48")
    plan, file = planned(tmp_path, *RUNS_TODAY, *chips)
    best = plan["plans"][0]
    (tmp_path / "more.yaml").write_text("secret: {existingSecret: ours}\nmodel: {volume: {pvc: {claimName: models}}}\n")
    arguments = ["--plan", file, "--values", str(tmp_path / "more.yaml"), "--model", "/models/step3"]
    assert main(["k8s", "render", *arguments]) == 0
    captured = capsys.readouterr()
    assert "afd/chip=h20, afd/chip=h800" in captured.err
    objects = tuple(one for one in yaml.load_all(captured.out, Loader=yaml.CSafeLoader) if one)
    num_attention, num_ffn = (int(number) for number in best["topology"].strip("F").split("A"))
    sizes = {one["metadata"]["name"]: one["spec"]["replicas"] for one in of_kind(objects, "StatefulSet")}
    assert sizes == {"afd-attention": num_attention, "afd-ffn": num_ffn}
    for role, template in pod_templates(objects):
        spec = template["spec"]
        container = spec["containers"][0]
        if role in ("attention", "ffn"):
            assert spec["nodeSelector"] == {"afd/chip": best[f"{role}_chip"]}
            assert container["resources"]["limits"]["nvidia.com/gpu"] == 1
            assert container["image"].endswith("-cuda")
        else:
            assert "nodeSelector" not in spec and "nvidia.com/gpu" not in container["resources"]["limits"]
    config = tomllib.loads(config_text(objects, "attention"))
    assert config["model"]["name"] == "/models/step3" and config["model"]["weights"] == "int8-all"
    kv_gib = best["memory"]["attention"]["kv_bytes"] / 2**30
    assert config["attention"]["kv_cache_gib"] == pytest.approx(kv_gib, abs=0.01)
    assert config["attention"]["max_num_seqs"] == best["requests_per_attention_chip"]
    assert config["attention"]["device"] == "cuda" and config["attention"]["streams"] == best["streams"]
    assert main(["up", "--dry-run", "--plan", file, "--model", "dummy:step3-tiny"]) == 0
    printed = capsys.readouterr().out
    assert (
        f'topology = "{best["topology"]}"' in printed
        and f"max_num_seqs = {best['requests_per_attention_chip']}" in printed
    )


@pytest.mark.parametrize("command", [["k8s", "render"], ["up", "--dry-run"]], ids=" ".join)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "a worker of AFD has one: plan with --ranks-per-instance 1"),
        (("--ranks-per-instance", "1"), "AFD's has 16: plan with --attention-dtype bf16"),
        (RUNS_TODAY, "step3 is a shape of the planner's catalogue, not a model's files: name those with --model"),
        ((*RUNS_TODAY, "--attention", "910b", "--ffn", "910b"), "what AFD runs on Ascend 910B"),
    ],
    ids=["servers", "KV", "model", "chip"],
)
def test_a_plan_that_cannot_run_is_refused_with_what_to_plan_instead(
    command: list[str], arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    _, file = planned(tmp_path, "--max-gpus", "48", *arguments)
    assert main([*command, "--plan", file]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1 and not captured.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--topology", "2A"], "does not match pattern"),
        (["--chart", "/nowhere"], "/nowhere holds no Chart.yaml"),
        (["--plan", "/nowhere.json"], "cannot read plan /nowhere.json"),
        (["--plan", str(CHART / "Chart.yaml")], "is not what `afd plan --json` prints"),
    ],
)
def test_what_is_wrong_is_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["k8s", "render", *arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1 and not captured.out


def test_without_helm_the_command_says_where_to_get_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr("sys.executable", "/nowhere/python")
    assert main(["k8s", "render"]) == 2
    assert "helm is needed to render the chart" in capsys.readouterr().err

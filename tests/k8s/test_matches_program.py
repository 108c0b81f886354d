"""Everything the chart says of the program is true: flags, configuration keys, ports, probe paths, metrics, files."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml

from afd.cli.flags import config_from_args
from afd.cli.main import build_parser
from afd.config import ClusterConfig, resolve_config
from afd.types import Topology, host_port
from tests.k8s import config_schema
from tests.k8s.chart import (
    CHART,
    NAMESPACE,
    RELEASE,
    REPOSITORY,
    Object,
    config_text,
    named,
    of_kind,
    pod_templates,
    rendered,
)
from tests.k8s.value_sets import VALUE_SETS

CONFIG_FILE = "/etc/afd/config/afd.toml"


def resolved(name: str, role: str) -> ClusterConfig:
    """The configuration file of a role in a value set, as the program reads it."""
    path = Path(f"{role}.toml")
    path.write_text(config_text(rendered(name), role))
    return resolve_config(str(path), {})


def arguments(container: Object, path: Path, pod_ip: str = "10.1.2.3", rank: str = "1") -> list[str]:
    """What the kubelet would pass, with the mounted configuration file at another place."""
    return [
        text.replace("$(POD_IP)", pod_ip).replace("$(AFD_RANK)", rank).replace(CONFIG_FILE, str(path))
        for text in container["args"]
    ]


@pytest.fixture(autouse=True)
def in_tmp(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


def parsed(name: str, tmp_path: Path) -> dict[str, tuple[Object, argparse.Namespace]]:
    """role -> (container, its parsed command line); the parser exits where a flag does not exist."""
    parser = build_parser()
    found = {}
    for role, template in pod_templates(rendered(name)):
        resolved(name, role)
        container = template["spec"]["containers"][0]
        assert container["command"] == ["afd"]
        found[role] = (container, parser.parse_args(arguments(container, tmp_path / f"{role}.toml")))
    return found


@pytest.mark.parametrize("name", VALUE_SETS)
def test_the_configuration_file_is_the_programs(name: str) -> None:
    values = VALUE_SETS[name]
    topology = Topology.parse(values.get("topology", "1A1F"))
    attention, ffn, gateway = (resolved(name, role) for role in ("attention", "ffn", "gateway"))
    assert resolved(name, "coordinator").topology == gateway.topology == topology
    assert attention.topology.num_ffn == ffn.topology.num_ffn == topology.num_ffn
    assert attention.attention.streams == values.get("streams", 0)
    for role, config in (("attention", attention), ("ffn", ffn)):
        wanted = values.get(role, {}).get("device", values.get("device", "cpu"))
        assert getattr(config, role).device == wanted
    assert attention.cluster.recovery_timeout_s == gateway.cluster.recovery_timeout_s == 600
    assert (attention.gateway.drain_s, gateway.gateway.drain_s) == (30, 300)
    for section, keys in values.get("config", {}).items():
        for key, value in keys.items():
            assert getattr(getattr(attention if section == "attention" else gateway, section), key) == value


@pytest.mark.parametrize("name", VALUE_SETS)
def test_every_command_line_parses_and_says_where_to_listen(name: str, tmp_path: Path) -> None:
    everywhere = "::" if name == "platform" else "0.0.0.0"
    for role, (container, args) in parsed(name, tmp_path).items():
        assert args.command == role
        ports = {entry["name"]: entry["containerPort"] for entry in container["ports"]}
        if role == "autoscale":
            assert (args.host, args.metrics_port) == (everywhere, ports["metrics"])
            assert isinstance(args.min, Topology) and isinstance(args.max, Topology)
            continue
        config = config_from_args(args)
        if role == "coordinator":
            assert config.coordinator.address == host_port(everywhere, ports["grpc"])
            assert config.coordinator.metrics_port == ports["metrics"]
            continue
        section: Any = getattr(config, role)
        assert (section.host, section.advertise_host) == (everywhere, "10.1.2.3")
        if role == "gateway":
            assert ports == {"http": section.port}
        else:
            assert args.rank == (1 if "disaggregatedset" not in name else -1)
            assert ports["metrics"] == section.metrics_port
            listening = {"attention": ("serving", "port"), "ffn": ("mesh", "mesh_port")}[role]
            assert ports == {"metrics": section.metrics_port, listening[0]: getattr(section, listening[1])}


@pytest.mark.parametrize("name", ["2a2f", "everything"])
def test_the_coordinators_address_is_a_service(name: str) -> None:
    host, _, port = resolved(name, "ffn").coordinator.address.rpartition(":")
    service = named(rendered(name), "Service", host.split(".")[0])
    assert host == f"{service['metadata']['name']}.{NAMESPACE}.svc"
    assert int(port) in {entry["port"] for entry in service["spec"]["ports"]}


@pytest.mark.parametrize("name", VALUE_SETS)
def test_every_file_that_is_named_is_mounted(name: str) -> None:
    for role, template in pod_templates(rendered(name)):
        config = resolved(name, role)
        own = config.coordinator
        files = {config.cluster.secret_file, own.tls_ca_file, own.tls_cert_file, own.tls_key_file} - {""}
        assert bool(own.tls_cert_file) == ("tls" in VALUE_SETS[name] and role == "coordinator")
        volumes = {volume["name"]: volume for volume in template["spec"]["volumes"]}
        container = template["spec"]["containers"][0]
        mounted = set()
        folders = {mount["mountPath"] for mount in container["volumeMounts"]}
        for mount in container["volumeMounts"]:
            volume = volumes[mount["name"]]
            if "secret" in volume:
                mounted |= {f"{mount['mountPath']}/{item['path']}" for item in volume["secret"]["items"]}
            elif "configMap" in volume:
                keys = named(rendered(name), "ConfigMap", volume["configMap"]["name"])["data"]
                mounted |= {f"{mount['mountPath']}/{key}" for key in keys}
        assert CONFIG_FILE in mounted
        assert mounted >= files
        if role == "gateway" and config.gateway.api_keys_file:
            assert config.gateway.api_keys_file in mounted
        if role in ("gateway", "attention", "ffn") and config.model.name.startswith("/"):
            assert any(config.model.name.startswith(f"{folder}/") for folder in folders)


# Which code runs in a role's process and knows the configuration.
FRAME = "afd/cluster/role_process.py"
ROLE_CODE = {
    "gateway": ["afd/gateway", FRAME],
    "coordinator": ["afd/coordinator", FRAME],
    "attention": ["afd/attention", "afd/worker", FRAME],
    "ffn": ["afd/ffn", "afd/worker", FRAME],
    "autoscale": ["afd/cli/autoscale.py", "afd/cli/locate.py"],
}
# Keys that the code names and the role's process does not use, with the reason why the default will do.
NOT_USED = {
    ("coordinator", "gateway.drain_s"): "how long `afd stop` waits for all: in Kubernetes nobody stops so",
    ("ffn", "gateway.drain_s"): "an FFN worker has nothing to finish",
}


@pytest.mark.parametrize("role", ROLE_CODE)
def test_a_roles_file_has_every_key_that_its_code_reads(role: str) -> None:
    """One that is left out has its default there, whatever the values say."""
    sections = {field.name: field.type for field in msgspec.structs.fields(ClusterConfig)}
    listed = yaml.safe_load((CHART / "files" / "config-keys.yaml").read_text())[role]
    for section, keys in listed.items():
        assert set(keys) == {"*"} or set(keys) <= set(sections[section].__struct_fields__), section
    read = set()
    for place in map(REPOSITORY.joinpath, ROLE_CODE[role]):
        for path in [place] if place.is_file() else place.rglob("*.py"):
            read |= set(re.findall(r"\bconfig\.([a-z]+)\.([a-z_]+)", path.read_text()))
    assert read
    missing = {
        f"{section}.{key}"
        for section, key in read
        if section in sections
        and key in sections[section].__struct_fields__
        and (role, f"{section}.{key}") not in NOT_USED
        if not {"*", key} & set(listed.get(section, []))
    }
    assert not missing


@pytest.mark.parametrize("name", VALUE_SETS)
def test_the_environment_is_what_the_arguments_quote_and_what_the_values_add(name: str) -> None:
    values = VALUE_SETS[name]
    for role, template in pod_templates(rendered(name)):
        container = template["spec"]["containers"][0]
        quoted = {match for text in container["args"] for match in re.findall(r"\$\((\w+)\)", text)}
        added = {entry["name"] for part in (role, "pods") for entry in values.get(part, {}).get("env", [])}
        if role in ("attention", "ffn"):
            added |= {entry["name"] for entry in values.get("rdma", {}).get("env", [])}
        names = [entry["name"] for entry in container["env"]]
        assert len(set(names)) == len(names)
        assert quoted <= set(names)
        assert set(names) - quoted - added <= {"HOME", "POD_IP"}


def test_the_doctor_is_called_as_it_is() -> None:
    from stepmesh.cli.main import main as stepmesh

    for role, template in pod_templates(rendered("rdma-rack")):
        spec = template["spec"]
        if role in ("attention", "ffn"):
            (doctor,) = spec["initContainers"]
            assert doctor["command"] == ["python"] and doctor["args"][:2] == ["-m", "stepmesh"]
            assert doctor["resources"] == spec["containers"][0]["resources"], "it must see the devices"
            assert stepmesh([*doctor["args"][2:], "--json"]) in (0, 1)
        else:
            assert "initContainers" not in spec


def test_a_pods_rank_is_its_ordinal() -> None:
    for stateful_set in of_kind(rendered("2a2f"), "StatefulSet"):
        (container,) = stateful_set["spec"]["template"]["spec"]["containers"]
        (rank,) = [entry for entry in container["env"] if entry["name"] == "AFD_RANK"]
        assert rank["valueFrom"]["fieldRef"]["fieldPath"] == "metadata.labels['apps.kubernetes.io/pod-index']"
        assert stateful_set["spec"]["podManagementPolicy"] == "Parallel"


@pytest.mark.parametrize("name", ["2a2f", "everything", "disaggregatedset"])
def test_probes_ask_routes_that_exist(name: str) -> None:
    routes = {"gateway": gateway_routes(), "worker": metrics_server_routes()}
    for role, template in pod_templates(rendered(name)):
        (container,) = template["spec"]["containers"]
        ports = {entry["name"] for entry in container["ports"]}
        for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
            probe = container[kind]["httpGet"]
            assert probe["port"] in ports
            assert probe["path"] in routes["gateway" if role == "gateway" else "worker"]


def gateway_routes() -> set[str]:
    from fastapi import FastAPI

    from afd.gateway.api.admin import AdminRoutes

    app = FastAPI()
    AdminRoutes(service=None).install(app)  # type: ignore[arg-type]
    return {getattr(route, "path", "") for route in app.routes}


def metrics_server_routes() -> set[str]:
    import httpx

    from afd.telemetry.exposition import MetricsServer, process_registry

    server = MetricsServer("127.0.0.1", 0, process_registry("ffn"), lambda: (True, ""))
    try:
        paths = ("/livez", "/readyz", "/metrics")
        return {path for path in paths if httpx.get(f"http://{server.address}{path}").status_code == 200}
    finally:
        server.close()


def test_the_scaled_object_and_the_scaled_metric_exist(live_metric_names: set[str]) -> None:
    from afd.cluster.autoscale.scale_target import API_PATHS

    for name in ("autoscale-apply", "disaggregatedset-apply"):
        deployment = named(rendered(name), "Deployment", "afd-autoscale")
        (container,) = deployment["spec"]["template"]["spec"]["containers"]
        (target,) = [text.removeprefix("--apply=") for text in container["args"] if text.startswith("--apply=")]
        resource, _, scaled = target.partition("/")
        assert resource in API_PATHS and scaled == f"{RELEASE}-attention"
    hpa = named(rendered("everything"), "HorizontalPodAutoscaler", "afd-attention")
    assert hpa["spec"]["metrics"][0]["pods"]["metric"]["name"] in live_metric_names


# --- choices and defaults: said once in afd.config, repeated by the chart's schema --------------------------------


def schema_enum(*path: str) -> list[str]:
    node = json.loads((CHART / "values.schema.json").read_text())
    definitions = node["definitions"]
    for step in path:
        node = node["properties"][step]
        node = definitions[node["$ref"].rpartition("/")[2]] if "$ref" in node else node
    enum: list[str] = node["enum"]
    return enum


@pytest.mark.parametrize(
    ("path", "key"),
    [
        (("model", "dtype"), "model.dtype"),
        (("transport",), "cluster.transport"),
        (("ffnParallel",), "cluster.ffn_parallel"),
        (("dispatch",), "cluster.dispatch"),
        (("device",), "attention.device"),
        (("sla", "policy"), "sla.policy"),
        (("log", "level"), "log.level"),
        (("log", "format"), "log.format"),
    ],
)
def test_every_choice_of_the_schema_is_one_of_the_program(path: tuple[str, ...], key: str) -> None:
    choices = schema_enum(*path)
    assert choices
    for choice in choices:
        resolve_config(None, {key: choice})


def test_keys_and_models_of_the_schema_are_the_programs() -> None:
    found = json.loads(config_schema.PATH.read_text())
    wanted = config_schema.updated(json.loads(config_schema.PATH.read_text()))
    assert found == wanted, "run python -m tests.k8s.config_schema"


def test_defaults_agree_where_the_chart_has_no_reason_of_its_own() -> None:
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    config = ClusterConfig()
    assert values["model"]["name"] == config.model.name and values["model"]["dtype"] == config.model.dtype
    assert values["sla"] == {"tpotMs": config.sla.tpot_ms, "ttftMs": config.sla.ttft_ms, "policy": config.sla.policy}
    assert values["attention"]["kvCacheGiB"] == config.attention.kv_cache_gib
    assert values["attention"]["maxNumSeqs"] == config.attention.max_num_seqs
    assert values["attention"]["maxStepTokens"] == config.attention.max_step_tokens
    assert values["ffnParallel"] == str(config.cluster.ffn_parallel)
    assert values["dispatch"] == str(config.cluster.dispatch)


def test_versions_agree() -> None:
    from afd import __version__

    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["appVersion"] == chart["version"] == __version__

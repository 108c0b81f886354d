"""What every pod of every value set must and must not have, and who may talk to whom."""

from __future__ import annotations

import copy
import tomllib
from ipaddress import ip_network

import pytest

from afd.config import GatewayConfig
from tests.k8s.chart import Object, config_text, named, of_kind, pod_templates, render_values, rendered
from tests.k8s.pod_security import against_baseline, against_restricted
from tests.k8s.value_sets import RDMA_RACK, VALUE_SETS, Values

STOP_MARGIN_S = 8  # a process that does not end within drain_s and this ends itself


def all_pods(name: str) -> list[tuple[str, Object, Object]]:
    """(role, pod spec, container) of every pod: the role's container is the first."""
    pods: list[tuple[str, Object, Object]] = []
    for role, template in pod_templates(rendered(name)):
        pods.append((role, template["spec"], template["spec"]["containers"][0]))
    assert {role for role, _, _ in pods} >= {"gateway", "coordinator", "attention", "ffn"}
    return pods


def all_containers(name: str) -> list[tuple[str, Object, Object]]:
    """The same with the init containers."""
    pods = all_pods(name)
    return pods + [(role, spec, one) for role, spec, _ in pods for one in spec.get("initContainers", [])]


@pytest.mark.parametrize("name", VALUE_SETS)
def test_rights(name: str) -> None:
    for role, spec, container in all_containers(name):
        assert spec["securityContext"]["runAsNonRoot"] is True
        if name != "platform":  # where the cluster chooses
            assert spec["securityContext"]["runAsUser"] >= 10000
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        rights = container["securityContext"]
        assert rights["allowPrivilegeEscalation"] is False and rights["readOnlyRootFilesystem"] is True
        assert rights["capabilities"]["drop"] == ["ALL"]
        applies = role == "autoscale" and name.endswith("apply")
        assert spec["automountServiceAccountToken"] is applies
    for account in of_kind(rendered(name), "ServiceAccount"):
        assert account["automountServiceAccountToken"] is False


@pytest.mark.parametrize("name", VALUE_SETS)
def test_images_and_resources(name: str) -> None:
    for _, _, container in all_containers(name):
        repository, _, tag = container["image"].rpartition(":")
        assert repository and tag and tag != "latest"
        assert container["resources"]["requests"].keys() >= {"cpu", "memory"}
        assert "memory" in container["resources"]["limits"]


@pytest.mark.parametrize("name", VALUE_SETS)
def test_probes_leave_time_to_load_and_to_drain(name: str) -> None:
    for role, spec, container in all_pods(name):
        startup, readiness, liveness = (container[f"{kind}Probe"] for kind in ("startup", "readiness", "liveness"))
        assert startup["periodSeconds"] * startup["failureThreshold"] >= (1800 if role in ("attention", "ffn") else 60)
        assert liveness["httpGet"]["path"] == "/livez" and readiness["httpGet"]["path"] == "/readyz"
        assert liveness["periodSeconds"] * liveness["failureThreshold"] >= 30, (
            "a long step must not be a death sentence"
        )
        grace_s = spec["terminationGracePeriodSeconds"]
        if role != "autoscale":
            before_s = container.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
            drain_s = tomllib.loads(config_text(rendered(name), role)).get("gateway", {}).get("drain_s")
            assert (drain_s is not None) == (role in ("gateway", "attention"))
            assert grace_s > before_s + (drain_s or GatewayConfig().drain_s) + STOP_MARGIN_S


def test_the_margin_is_the_programs() -> None:
    from afd.cluster import role_process

    assert STOP_MARGIN_S == role_process.STOP_MARGIN_S


@pytest.mark.parametrize("name", ["tls", "everything"])
def test_each_role_sees_only_the_keys_that_it_needs(name: str) -> None:
    seen = {}
    for role, spec, _ in all_pods(name):
        secrets = [volume["secret"] for volume in spec["volumes"] if "secret" in volume]
        assert all(secret["defaultMode"] == 0o440 for secret in secrets)
        seen[role] = {item["key"] for secret in secrets for item in secret["items"]}
    worker = {"cluster-secret", "ca.crt"}
    assert seen["attention"] == seen["ffn"] == worker
    assert seen["coordinator"] == worker | {"tls.crt", "tls.key"}
    assert seen["gateway"] == (worker | {"api-keys"} if name == "everything" else worker)


@pytest.mark.parametrize("name", VALUE_SETS)
def test_disruption_budgets_cover_the_roles(name: str) -> None:
    budgets = of_kind(rendered(name), "PodDisruptionBudget")
    covered = {budget["spec"]["selector"]["matchLabels"]["app.kubernetes.io/component"] for budget in budgets}
    wanted = set() if name == "closed-in" else {"gateway", "coordinator", "attention", "ffn"}
    assert covered == wanted


# --- who may talk to whom -------------------------------------------------------------------------------------


def allowed(policies: dict[str, Object], source: str, target: str, port: int) -> bool:
    """Whether NetworkPolicies let a pod of role `source` open a TCP connection to a pod of role `target`."""

    def matches(rule: Object, peers: str, other: str) -> bool:
        if port not in {entry["port"] for entry in rule.get("ports", []) if entry["protocol"] == "TCP"}:
            return False
        if peers not in rule:
            return True
        for peer in rule[peers]:
            for expression in peer.get("podSelector", {}).get("matchExpressions", []):
                if other in expression["values"]:
                    return True
        return False

    incoming = any(matches(rule, "from", source) for rule in policies[target]["spec"]["ingress"])
    own = policies[source]["spec"]
    outgoing = "Egress" not in own["policyTypes"] or any(matches(rule, "to", target) for rule in own["egress"])
    return incoming and outgoing


@pytest.mark.parametrize("name", ["2a2f", "everything", "closed-in", "disaggregatedset-everything"])
def test_only_the_right_roles_talk(name: str) -> None:
    policies = {
        policy["spec"]["podSelector"]["matchLabels"]["app.kubernetes.io/component"]: policy
        for policy in of_kind(rendered(name), "NetworkPolicy")
    }
    roles = {role for role, _ in pod_templates(rendered(name))}
    assert set(policies) == roles
    lines = {
        ("gateway", "coordinator", 7070),
        ("attention", "coordinator", 7070),
        ("ffn", "coordinator", 7070),
        ("autoscale", "coordinator", 7070),
        ("gateway", "attention", 7071),
        ("attention", "ffn", 7072),
    }
    for source in roles:
        for target in roles:
            for port in (7070, 7071, 7072):
                wanted = (source, target, port) in lines
                assert allowed(policies, source, target, port) == wanted, f"{source} -> {target}:{port}"


@pytest.mark.parametrize("name", VALUE_SETS)
def test_every_listening_port_is_covered_by_a_policy(name: str) -> None:
    policies = of_kind(rendered(name), "NetworkPolicy")
    if not VALUE_SETS[name].get("networkPolicy", {}).get("enabled", True):
        assert not policies, "NetworkPolicies do not reach pods in the host's network"
        return
    for role, _, container in all_pods(name):
        (policy,) = [one for one in policies if one["metadata"]["name"] == f"afd-{role}"]
        named_ports = {entry["port"] for rule in policy["spec"]["ingress"] for entry in rule["ports"]}
        assert {entry["containerPort"] for entry in container["ports"]} == named_ports


def test_clients_and_scrapers_can_be_named() -> None:
    policies = {policy["metadata"]["name"]: policy for policy in of_kind(rendered("everything"), "NetworkPolicy")}
    (clients,) = policies["afd-gateway"]["spec"]["ingress"]
    assert [peer["namespaceSelector"]["matchLabels"]["name"] for peer in clients["from"]] == ["apps", "monitoring"]
    scrapers = policies["afd-ffn"]["spec"]["ingress"][-1]
    assert [peer["namespaceSelector"]["matchLabels"]["name"] for peer in scrapers["from"]] == ["monitoring"]


def test_the_secret_made_at_install_is_long_enough_and_stays() -> None:
    import base64

    secret = named(rendered("defaults"), "Secret", "afd-secret")
    assert len(base64.b64decode(secret["data"]["cluster-secret"])) >= 32
    assert secret["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"
    assert not of_kind(rendered("1a1f"), "Secret")


def test_a_drained_node_waits_for_nobody_who_serves_nobody() -> None:
    for budget in of_kind(rendered("2a2f"), "PodDisruptionBudget"):
        assert budget["spec"]["unhealthyPodEvictionPolicy"] == "AlwaysAllow"
    (own,) = [
        one["spec"]
        for one in of_kind(rendered("pod-extras"), "PodDisruptionBudget")
        if "attention" in one["metadata"]["name"]
    ]
    assert own["minAvailable"] == 1 and "maxUnavailable" not in own


def test_who_can_run_elsewhere_leaves_a_dead_node_soon() -> None:
    """A StatefulSet's pod stays bound to its node whatever its tolerations say: that needs the operator."""
    for role, spec, _ in all_pods("autoscale-apply"):
        seconds = {one["key"]: one["tolerationSeconds"] for one in spec.get("tolerations", [])}
        soon = {"node.kubernetes.io/not-ready": 30, "node.kubernetes.io/unreachable": 30}
        assert seconds == ({} if role in ("attention", "ffn") else soon)


def test_dns_and_the_api_server_can_be_pinned_down() -> None:
    def to(values: Values, role: str, port: int) -> list[Object] | None:
        policy = named(tuple(render_values(values)), "NetworkPolicy", f"afd-{role}")
        (rule,) = [rule for rule in policy["spec"]["egress"] if port in {one["port"] for one in rule["ports"]}]
        found: list[Object] | None = rule.get("to")
        return found

    dns = to(VALUE_SETS["2a2f"], "ffn", 53)
    assert dns is not None and {"namespaceSelector", "ipBlock"} == {key for peer in dns for key in peer}
    private = to(VALUE_SETS["autoscale-apply"], "autoscale", 6443)
    assert private and not [one for one in private if ip_network(one["ipBlock"]["cidr"]).is_global]
    api = [{"ipBlock": {"cidr": "10.0.0.1/32"}}]
    pinned = {**VALUE_SETS["autoscale-apply"], "networkPolicy": {"apiServerTo": api, "dnsTo": []}}
    assert to(pinned, "autoscale", 6443) == api and to(pinned, "ffn", 53) is None


# --- Pod Security Standards -----------------------------------------------------------------------------------------


def without_the_users_own(name: str) -> list[Object]:
    """Pod specs of a value set, without containers that the values bring along."""
    return [{**spec, "containers": [container]} for _, spec, container in all_pods(name)]


OUTSIDE = {
    "shared-memory": "hostNetwork",
    "rdma-rack": "hostNetwork",
    "disaggregatedset-rack": "hostNetwork",
    "everything": "hostPath volume model",
    "disaggregatedset-everything": "hostPath volume model",
}
"""Value sets that ask for what a baseline namespace forbids, and what that is."""


@pytest.mark.parametrize("name", VALUE_SETS)
def test_pods_are_restricted_unless_the_values_ask_for_more(name: str) -> None:
    found = {reason for spec in without_the_users_own(name) for reason in against_baseline(spec)}
    assert found == ({OUTSIDE[name]} if name in OUTSIDE else set())
    if not found:
        assert not [reason for spec in without_the_users_own(name) for reason in against_restricted(spec)]


def test_gpus_and_rdma_alone_need_no_more_than_baseline() -> None:
    values: Values = {**RDMA_RACK, "hostNetwork": False, "networkPolicy": {}}
    templates = list(pod_templates(tuple(render_values(values))))
    assert len(templates) == 4
    for _, template in templates:
        assert not list(against_baseline(template["spec"])) and not list(against_restricted(template["spec"]))


@pytest.mark.parametrize(
    ("change", "level"),
    [
        ({"hostNetwork": True}, "baseline"),
        ({"securityContext": {"capabilities": {"add": ["IPC_LOCK"]}}}, "baseline"),
        ({"volumes": [{"name": "v", "hostPath": {"path": "/"}}]}, "baseline"),
        ({"securityContext": {}}, "restricted"),
    ],
)
def test_the_check_of_security_finds_what_is_wrong(change: Object, level: str) -> None:
    _, template = next(iter(pod_templates(rendered("2a2f"))))
    spec = copy.deepcopy(template["spec"])
    (spec["containers"][0] if "securityContext" in change else spec).update(change)
    assert list(against_baseline(spec) if level == "baseline" else against_restricted(spec))

"""A rendered 2A2F release as it is, every pod in its own network namespace: serves, survives losses, scales, drains.

Command lines, configuration files, Secret, ports and probes are the chart's, unchanged; Services are lines of
/etc/hosts. One release serves all tests of this file, in their order; a second one of the same name, in another
namespace of the same cluster, stands beside it, with IPv6 addresses.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import httpx
import pytest

from tests.k8s.chart import NAMESPACE, RELEASE, config_text, of_kind, pod_templates, render_values
from tests.k8s.pods import Network, Pod, unavailable
from tests.k8s.value_sets import SECRET, Values

T = TypeVar("T")

VALUES: Values = {
    **SECRET,
    "topology": "2A2F",
    "model": {"dtype": "float32"},  # a text recomputed at another worker is then the same to the letter
    "apiKeys": True,
    "drainSeconds": 5,
    "gateway": {"drainSeconds": 5},
    "recoveryTimeoutSeconds": 40,
    "attention": {"kvCacheGiB": 0.2},
    # A machine that is busy with something else for seconds is no stall here.
    "config": {"attention": {"threads": 1}, "ffn": {"threads": 1}, "coordinator": {"stall_timeout_s": 60.0}},
    "autoscale": {"enabled": True, "intervalSeconds": 1},
}
NEIGHBOUR: Values = {
    **SECRET,
    "ipFamily": "IPv6",
    "model": {"name": "dummy:step3-tiny", "dtype": "float32"},
    "drainSeconds": 5,
    "gateway": {"drainSeconds": 5},
    "attention": {"kvCacheGiB": 0.1, "maxNumSeqs": 8},
    # A machine that is busy with something else for seconds is no stall here.
    "config": {"attention": {"threads": 1}, "ffn": {"threads": 1}, "coordinator": {"stall_timeout_s": 60.0}},
}
START_S = 240.0
KEY = "k-8s"
CONFIG = "/etc/afd/config/afd.toml"
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]

pytestmark = [pytest.mark.timeout(480)]


def within(seconds: float, condition: Callable[[], T | None], what: str) -> T:
    """Poll until the condition gives something; its value."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        value = condition()
        if value:
            return value
        time.sleep(0.05)
    raise AssertionError(f"not within {seconds:.0f} s: {what}")


class Release:
    """The pods of one `helm template` (one of each Deployment's), and a client beside them."""

    def __init__(self, folder: Path, network: Network, values: Values, namespace: str, secret: bytes):
        self.objects = tuple(render_values(values, namespace=namespace))
        self._namespace = namespace
        self._family = values.get("ipFamily", "IPv4")
        self._folder = folder
        self._network = network
        self._templates = dict(pod_templates(self.objects))
        self._secret = secret
        self.pods: dict[str, Pod] = {}
        for one in self.objects:
            if one["kind"] in ("Deployment", "StatefulSet"):
                role = one["spec"]["template"]["metadata"]["labels"]["app.kubernetes.io/component"]
                for ordinal in range(one["spec"]["replicas"] if one["kind"] == "StatefulSet" else 1):
                    self.add(role, ordinal)

    def add(self, role: str, ordinal: int) -> Pod:
        tag = "" if self._namespace == NAMESPACE else f"{self._namespace}-"
        name = f"{tag}{role}-{ordinal}"
        pod = Pod(self._network, role, ordinal, self._templates[role], self._folder, name, self._family)
        self.pods[f"{role}-{ordinal}"] = pod
        return pod

    def _hosts(self) -> bytes:
        """Services by name, as the cluster's DNS would give the address of their pod."""
        lines = ["127.0.0.1 localhost"]
        for service in of_kind(self.objects, "Service"):
            for pod in self.pods.values():
                if service["spec"]["selector"].items() <= pod.labels.items():
                    name = service["metadata"]["name"]
                    lines.append(f"{pod.address} {name}.{self._namespace}.svc {name}")
        return "\n".join(lines).encode() + b"\n"

    def start(self, pod: Pod) -> None:
        files = {
            "/etc/hosts": self._hosts(),
            CONFIG: config_text(self.objects, pod.role).encode(),
            "/etc/afd/secret/cluster-secret": self._secret,
        }
        if pod.role == "gateway":
            files["/etc/afd/secret/api-keys"] = KEY.encode()
        pod.mount(files)
        pod.start()

    def start_all(self) -> None:
        for pod in self.pods.values():
            self.start(pod)
        within(START_S, lambda: self.ready(*self.pods.values()), "every pod is ready")

    def upgrade(self, values: Values) -> set[str]:
        """What `helm upgrade` brings about: mounted files change; the names of pods whose template did are replaced."""
        before, self.objects = self._templates, tuple(render_values(values, namespace=self._namespace))
        self._templates = dict(pod_templates(self.objects))
        replaced = {name for name, pod in self.pods.items() if before[pod.role] != self._templates[pod.role]}
        for name, pod in self.pods.items():
            if name in replaced:
                pod.terminate()
                assert pod.process is not None and pod.process.wait(30) == 0, pod.log()[-2000:]
                self.start(pod)
            else:
                pod.remount(CONFIG, config_text(self.objects, pod.role).encode())
        within(START_S, lambda: self.ready(*self.pods.values()), "every pod is ready")
        return replaced

    def pids(self) -> dict[str, int]:
        return {name: pod.process.pid for name, pod in self.pods.items() if pod.process is not None}

    def beside(self, values: Values, namespace: str) -> Release:
        """Another release of the same name, in another namespace, on the same network."""
        return Release(self._folder, self._network, values, namespace, b"another-secret-of-32-characters!\n")

    def probe(self, pod: Pod, kind: str) -> int:
        """Status of the container's probe, asked as the kubelet asks; 0 = no answer."""
        request = pod.container[f"{kind}Probe"]["httpGet"]
        try:
            return httpx.get(f"{pod.url(request['port'])}{request['path']}", timeout=2).status_code
        except httpx.TransportError:
            return 0

    def ready(self, *pods: Pod) -> bool:
        for pod in pods:
            assert pod.process is not None
            assert pod.process.poll() is None, f"{pod.name} ended:\n{pod.log()[-3000:]}"
        return all(self.probe(pod, "readiness") == 200 for pod in pods)

    def metrics(self, pod: Pod) -> dict[str, float]:
        text = httpx.get(f"{pod.url('metrics' if 'metrics' in pod.ports else 'http')}/metrics", timeout=5).text
        samples = (line.rsplit(" ", 1) for line in text.splitlines() if line and not line.startswith("#"))
        return {name: float(value) for name, value in samples}

    @property
    def url(self) -> str:
        return self.pods["gateway-0"].url("http")

    def chat(self, **body: Any) -> httpx.Response:
        return httpx.post(
            f"{self.url}/v1/chat/completions",
            json={"messages": QUESTION, "temperature": 0, "max_tokens": 24, **body},
            headers={"authorization": f"Bearer {KEY}"},
            timeout=60,
        )

    def stream(self, max_tokens: int) -> Iterator[str]:
        """Pieces of one streamed completion."""
        body = {
            "prompt": "Once upon a time",
            "temperature": 0,
            "max_tokens": max_tokens,
            "ignore_eos": True,
            "stream": True,
        }
        headers = {"authorization": f"Bearer {KEY}"}
        with httpx.stream("POST", f"{self.url}/v1/completions", json=body, headers=headers, timeout=60) as answer:
            assert answer.status_code == 200, answer.read()
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    event = json.loads(line.removeprefix("data: "))
                    assert "error" not in event, event
                    yield event["choices"][0]["text"]

    def running_at(self) -> Pod:
        """The attention pod that has a request now."""
        for pod in self.pods.values():
            if pod.role == "attention" and self.metrics(pod)["afd_requests_running"] > 0:
                return pod
        raise AssertionError("no attention worker runs anything")

    def close(self) -> None:
        for pod in self.pods.values():
            pod.close()


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Release]:
    reason = unavailable()
    if reason:
        pytest.skip(reason)
    network = Network()
    release = None
    try:
        with network.inside():
            release = Release(
                tmp_path_factory.mktemp("release"), network, VALUES, NAMESPACE, b"0123456789abcdef0123456789abcdef\n"
            )
            release.start_all()
            yield release
    finally:
        if release is not None:
            release.close()
        network.close()


def test_a_chat_completion_is_answered(release: Release) -> None:
    answer = release.chat()
    assert answer.status_code == 200, answer.text
    assert "Paris" in answer.json()["choices"][0]["message"]["content"]
    keyless = httpx.post(f"{release.url}/v1/chat/completions", json={"messages": QUESTION})
    assert keyless.status_code == 401


def test_every_probe_answers_and_every_port_is_open_beyond_the_pod(release: Release) -> None:
    for pod in release.pods.values():
        for kind in ("startup", "readiness", "liveness"):
            assert release.probe(pod, kind) == 200, f"{pod.name} {kind}"


def test_status_is_told_in_a_pod(release: Release) -> None:
    """`kubectl exec deploy/afd-coordinator -- afd status --config ...`, as docs/operations.md has it."""
    text = release.pods["coordinator-0"].execute("status", f"--config={CONFIG}")
    assert text.startswith("2A2F  smollm2-135m-instruct  formed")


def test_no_two_pods_share_a_host(release: Release) -> None:
    """All links are TCP: shared memory would need one network namespace."""
    links = [key for key in release.metrics(release.pods["attention-0"]) if key.startswith("afd_mesh_peer{")]
    assert len(links) == 2 and all('transport="tcp"' in key for key in links)


def test_a_release_of_the_same_name_in_another_namespace_is_another_cluster(release: Release) -> None:
    """Same object names, same ports: only the namespaces differ, and no pod of one finds the other."""
    neighbour = release.beside(NEIGHBOUR, "other")
    try:
        neighbour.start_all()
        assert release.ready(*release.pods.values())
        found = {}
        for name, one in (("first", release), ("second", neighbour)):
            answer = httpx.get(f"{one.url}/v1/models", headers={"authorization": f"Bearer {KEY}"}, timeout=10)
            found[name] = answer.json()["data"][0]["id"]
        assert found == {"first": "smollm2-135m-instruct", "second": "dummy:step3-tiny"}
        body = {"prompt": [1, 2, 3], "max_tokens": 4, "temperature": 0}
        served = httpx.post(f"{neighbour.url}/v1/completions", json=body, timeout=60)
        assert served.status_code == 200, served.text
        assert release.chat(max_tokens=4).status_code == 200
        members = neighbour.metrics(neighbour.pods["coordinator-0"])
        assert {role: members[f'afd_coordinator_members{{role="{role}"}}'] for role in ("attention", "ffn")} == {
            "attention": 1,
            "ffn": 1,
        }
    finally:
        neighbour.close()
        for name in list(neighbour.pods):
            del neighbour.pods[name]


def test_a_changed_log_level_restarts_nobody(release: Release) -> None:
    """`helm upgrade --set log.level=debug`: no pod template changes, the mounted files do."""
    before = release.pids()
    assert release.upgrade({**VALUES, "log": {"level": "debug"}}) == set()
    for pod in release.pods.values():
        within(30.0, lambda pod=pod: "the log level is debug now" in pod.log(), f"{pod.name} logs more")  # type: ignore[misc]
    assert release.upgrade(VALUES) == set()
    assert release.pids() == before


def test_a_gateways_setting_restarts_gateways_only(release: Release) -> None:
    before = release.pids()
    config = {**VALUES["config"], "gateway": {"max_n": 1}}
    assert release.upgrade({**VALUES, "config": config}) == {"gateway-0"}
    after = release.pids()
    assert {name for name in before if before[name] != after[name]} == {"gateway-0"}
    assert release.chat(n=2).status_code == 400 and release.chat(max_tokens=4).status_code == 200


def test_the_autoscaler_watches(release: Release) -> None:
    pod = release.pods["autoscale-0"]
    sizes = within(
        10.0,
        lambda: {
            role: value
            for role in ("attention", "ffn")
            if (value := release.metrics(pod).get(f'afd_autoscale_instances{{role="{role}"}}')) is not None
        },
        "the autoscaler sees the cluster",
    )
    assert sizes == {"attention": 2, "ffn": 2}


@pytest.fixture(scope="module")
def story(release: Release) -> str:
    """What an undisturbed run says."""
    return "".join(release.stream(48))


def test_a_lost_attention_worker_is_not_noticed(release: Release, story: str) -> None:
    text = ""
    victim = None
    for piece in release.stream(48):
        text += piece
        if victim is None:
            victim = release.running_at()
            victim.kill()
    assert text == story
    assert victim is not None
    release.start(victim)
    within(START_S, lambda: release.ready(victim), "the restarted attention worker is ready")
    assert release.metrics(release.pods["gateway-0"])["afd_gateway_migrations_total"] == 1


def test_a_lost_ffn_worker_is_a_pause(release: Release, story: str) -> None:
    victim = release.pods["ffn-1"]
    text = ""
    for count, piece in enumerate(release.stream(48)):
        text += piece
        if count == 2:
            victim.kill()
            release.start(victim)
    assert text == story
    within(START_S, lambda: release.ready(*release.pods.values()), "everything is ready again")


def test_a_lost_coordinator_stops_nothing(release: Release, story: str) -> None:
    coordinator = release.pods["coordinator-0"]
    text = ""
    for count, piece in enumerate(release.stream(48)):
        text += piece
        if count == 2:
            coordinator.kill()
    assert text == story
    release.start(coordinator)
    within(START_S, lambda: release.ready(*release.pods.values()), "everything is ready again")
    within(15.0, lambda: release.chat(max_tokens=4).status_code == 200, "new requests are taken again")


def test_another_attention_worker_joins_and_drains_away(release: Release) -> None:
    """What `kubectl scale statefulset/afd-attention` does: the ordinal after the last, and away again."""
    third = release.add("attention", 2)
    release.start(third)
    within(START_S, lambda: release.ready(third), "the third attention worker is ready")
    gateway = release.pods["gateway-0"]
    serving = 'afd_gateway_worker_up{rank="2"}'
    within(10.0, lambda: release.metrics(gateway).get(serving) == 1.0, "the gateway uses it")
    third.terminate()
    assert third.process is not None and third.process.wait(20) == 0, third.log()[-2000:]
    within(10.0, lambda: serving not in release.metrics(gateway), "the gateway has let it go")
    assert release.chat(max_tokens=4).status_code == 200
    del release.pods["attention-2"]
    third.close()


def test_every_pod_ends_within_its_grace_period(release: Release) -> None:
    for pod in release.pods.values():
        pod.terminate()
    deadline = time.monotonic() + VALUES["drainSeconds"] + 15
    for pod in release.pods.values():
        assert pod.process is not None
        assert pod.process.wait(max(1.0, deadline - time.monotonic())) == 0, f"{pod.name}:\n{pod.log()[-2000:]}"
    assert RELEASE in config_text(release.objects, "ffn")

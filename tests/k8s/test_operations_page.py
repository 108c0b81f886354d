"""docs/operations.md followed by somebody new: its commands in their order, and what they should bring about.

helm and kubectl are real and talk to an API of the tests' own (api_server.py); the hosts of "by hand" are this one. A
frame that cannot run here says so on the page, with the reason.
"""

from __future__ import annotations

import base64
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import httpx
import kubernetes_validate
import pytest
import yaml

from afd.cli.main import build_parser, main
from afd.plan.catalog import load_models
from tests.fakes.warm_process import WarmProcess
from tests.k8s.api_server import Cluster, api_server
from tests.k8s.chart import REPOSITORY, Object, of_kind, render_values
from tests.k8s.pod_security import against_restricted

PAGE = (REPOSITORY / "docs" / "operations.md").read_text()
FRAME = re.compile(r"(?:<!-- not run: (?P<reason>[^\n]+) -->\n)?```(?P<language>\w*)\n(?P<text>.*?)^```$", re.M | re.S)
NAMES = {
    "REGISTRY": "registry.example",
    "NODE": "node-a",
    "ORGANISATION/MODEL": "org/model",
    "OWN_ADDRESS": "127.0.0.1",
}
TOOLS = Path(sys.executable).parent
START_S = 120.0
LISTENS = re.compile(r"coordinator listens on \S+:(\d+) ")


@dataclass(frozen=True)
class Frame:
    """One frame of the page. reason: why it does not run here, "" where it does."""

    language: str
    text: str
    reason: str

    @property
    def title(self) -> str:
        return self.text.split("\n")[0][:60]


FRAMES = [Frame(one["language"], one["text"], one["reason"] or "") for one in FRAME.finditer(PAGE)]


class User:
    """Somebody with a shell in the sources, a node, and a cluster of that API."""

    def __init__(self, folder: Path, cluster: Cluster, url: str):
        self.folder, self.cluster = folder, cluster
        self.processes: list[WarmProcess] = []
        self.coordinator = ""
        shutil.copytree(REPOSITORY / "deploy", folder / "deploy")
        (folder / "k8s").symlink_to(REPOSITORY / "k8s")
        access = {"clusters": {"cluster": {"server": url}}, "users": {"user": {}}}
        context = {"cluster": "one", "user": "one"}
        kubeconfig = {key: [{"name": "one", **value}] for key, value in access.items()}
        kubeconfig |= {"contexts": [{"name": "one", "context": context}]}
        (folder / "kubeconfig").write_text(json.dumps({**kubeconfig, "current-context": "one"}))
        (folder / "bin").mkdir()
        (folder / "bin" / "sudo").write_text('#!/bin/sh\nexec "$@"\n')  # who runs the tests is root already
        (folder / "bin" / "sudo").chmod(0o755)
        self.env = {**os.environ, "HOME": str(folder), "KUBECONFIG": str(folder / "kubeconfig")}
        self.env["PATH"] = os.pathsep.join([str(folder / "bin"), str(TOOLS), self.env["PATH"]])

    def run(self, script: str, *, fails: bool = False) -> str:
        """Output of shell commands; each must succeed, or, if `fails`, one not."""
        command = ["bash", "-e", "-o", "pipefail", "-c", script]
        result = subprocess.run(command, cwd=self.folder, env=self.env, capture_output=True, text=True, timeout=120)
        assert (result.returncode != 0) == fails, result.stdout + result.stderr
        return result.stdout + result.stderr

    def afd(self, line: str) -> WarmProcess:
        """An afd command in the background."""
        arguments = [str(self.folder / one) if (self.folder / one).is_file() else one for one in shlex.split(line)[1:]]
        self.processes.append(WarmProcess(main, arguments, self.env))
        return self.processes[-1]

    def get(self, kind: str, name: str) -> Object:
        return self.cluster.get(kind, name, "llm")

    def template(self, kind: str, name: str) -> Object:
        found: Object = self.get(kind, name)["spec"]["template"]
        return found

    def sizes(self, release: str) -> tuple[int, int]:
        """Attention and FFN workers that a release asks for."""
        attention, ffn = (
            self.get("StatefulSet", f"{release}-{role}")["spec"]["replicas"] for role in ("attention", "ffn")
        )
        return attention, ffn

    def pods(self, prefix: str) -> dict[str, str]:
        """uid by name."""
        found = [one["metadata"] for one in self.cluster.objects.values() if one["kind"] == "Pod"]
        return {one["name"]: one["uid"] for one in found if one["name"].startswith(prefix)}

    def close(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()
                process.wait(10)
            process.stdout.close()


@pytest.fixture(scope="module")
def user(tmp_path_factory: pytest.TempPathFactory) -> Iterator[User]:
    for tool in ("helm", "kubectl"):
        if shutil.which(tool, path=f"{TOOLS}{os.pathsep}{os.environ['PATH']}") is None:
            pytest.skip(f"{tool} is not installed (`make setup` brings it for Linux on x86-64)")
    node = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": "node-a"}, "spec": {}}
    cluster = Cluster({"/api/v1/nodes/node-a": node})
    with ExitStack() as life:
        url = life.enter_context(api_server(cluster))
        user = User(tmp_path_factory.mktemp("user"), cluster, url)
        life.callback(user.close)
        yield user


# --- what each frame brings about, by what it begins with -----------------------------------------------------------


def a_secret_file(user: User, script: str) -> None:
    if os.geteuid() != 0:
        pytest.skip("giving a file to another user needs root")
    user.run(script)
    secret = user.folder / "deploy" / "cluster.secret"
    assert (secret.stat().st_mode & 0o777, secret.stat().st_uid) == (0o400, 10001)
    assert len(base64.b64decode(secret.read_text())) == 32


def hosts_by_hand(user: User, script: str) -> None:
    """Each line is one host's. The files that the page takes for granted, with a small model and any free port."""
    (user.folder / "afd.secret").write_text("a secret of more than sixteen bytes\n")
    (user.folder / "afd.secret").chmod(0o400)
    config = '[model]\nname = "dummy:step3-tiny"\n[attention]\nkv_cache_gib = 0.1\nthreads = 1\n'
    (user.folder / "afd.toml").write_text(f"{config}[ffn]\nthreads = 1\n[gateway]\nport = 0\n")
    first, *others = script.splitlines()
    assert first.startswith("afd coordinator")
    output = user.afd(first.replace(":7070", ":0")).stdout
    port = next(found[1] for line in iter(output.readline, "") if (found := LISTENS.search(line)))
    user.coordinator = f"127.0.0.1:{port}"
    for line in others:
        user.afd(line.replace("HOST:7070", user.coordinator))


def a_status(user: User, script: str) -> None:
    hosts = list(user.processes)
    until = time.monotonic() + START_S
    code, text = 1, ""
    while code != 0 or "gateway/0" not in text:
        assert time.monotonic() < until and all(process.poll() is None for process in hosts), text
        asked = user.afd(script.replace("HOST:7070", user.coordinator))
        text, code = asked.stdout.read(), asked.wait(30)
        assert code in (0, 1) or "cannot be reached" in text, text
    assert text.startswith("1A1F  dummy:step3-tiny  formed, epoch 1")
    (gateway,) = re.findall(r"^gateway/0 .* (\S+:\d+)$", text, re.M)
    body = {"prompt": [1, 2, 3], "max_tokens": 4}
    answer = httpx.post(f"http://{gateway}/v1/completions", json=body, timeout=60)
    assert answer.status_code == 200 and len(answer.json()["choices"][0]["token_ids"]) == 4
    for process in reversed(hosts):
        process.send_signal(signal.SIGTERM)
    assert [process.wait(60) for process in hosts] == [0, 0, 0, 0]


def a_release(user: User, script: str) -> None:
    user.run(script)
    assert user.cluster.get("Namespace", "llm")
    secret = user.get("Secret", "afd-secret")["data"]["cluster-secret"]
    assert len(base64.b64decode(base64.b64decode(secret))) == 32
    assert user.sizes("afd") == (2, 2)
    spec = user.template("StatefulSet", "afd-ffn")["spec"]
    assert spec["containers"][0]["image"].startswith("registry.example/afd:")
    assert any(one.get("persistentVolumeClaim", {}).get("claimName") == "models" for one in spec["volumes"])
    assert user.get("Service", "afd-gateway")["spec"]["ports"][0]["targetPort"] == "http"


def a_planned_release(user: User, script: str) -> None:
    user.run(script)
    best = json.loads((user.folder / "plan.json").read_text())["plans"][0]
    attention, ffn = user.sizes("planned")
    assert f"{attention}A{ffn}F" == best["topology"]
    label = user.cluster.get("Node", "node-a")["metadata"]["labels"]["afd/chip"]
    for role in ("attention", "ffn"):
        assert user.template("StatefulSet", f"planned-{role}")["spec"]["nodeSelector"] == {"afd/chip": label}


def an_upgrade(user: User, script: str) -> None:
    workloads = [("Deployment", "afd-gateway"), ("Deployment", "afd-coordinator")]
    workloads += [("StatefulSet", "afd-attention"), ("StatefulSet", "afd-ffn")]
    louder, limit, rollout = script.splitlines()
    before = [user.template(*one) for one in workloads]
    user.run(louder)
    assert 'level = "debug"' in user.get("ConfigMap", "afd-config-ffn")["data"]["afd.toml"]
    assert [user.template(*one) for one in workloads] == before
    user.run(f"{limit}\n{rollout}")
    after = [user.template(*one) for one in workloads]
    assert [old != new for old, new in zip(before, after, strict=True)] == [True, False, False, False]


def a_green_release(user: User, script: str) -> None:
    refused = user.run("helm upgrade afd k8s/afd --namespace llm --reuse-values --set topology=4A4F", fails=True)
    assert "would refuse new ones: install a second release beside this one" in refused
    user.run(script)
    assert (user.sizes("afd"), user.sizes("green")) == ((2, 2), (4, 4))


def moved_traffic(user: User, script: str) -> None:
    user.run(script)
    service = user.get("Service", "llm")["spec"]
    labels = {name: user.template("Deployment", f"{name}-gateway")["metadata"]["labels"] for name in ("afd", "green")}
    assert service["selector"].items() <= labels["green"].items()
    assert not service["selector"].items() <= labels["afd"].items()
    (port,) = service["ports"]
    container = user.template("Deployment", "green-gateway")["spec"]["containers"][0]
    assert port["targetPort"] in {one["containerPort"] for one in container["ports"]}


def no_blue_release(user: User, script: str) -> None:
    """Who goes on reading has chosen the other way: the release is there again."""
    before = dict(user.cluster.objects)
    user.run(script)
    assert not user.pods("afd-") and user.pods("green-")
    assert user.get("Secret", "afd-secret"), "the green release has it, too"
    user.cluster.objects = before


def a_gap(user: User, script: str) -> None:
    stop, upgrade = script.splitlines()
    assert "would refuse new ones" in user.run(upgrade, fails=True)
    user.run(stop)
    assert user.sizes("afd") == (0, 0)
    user.run(upgrade)
    assert user.sizes("afd") == (2, 2)
    assert "max_step_tokens = 512" in user.get("ConfigMap", "afd-config-ffn")["data"]["afd.toml"]


def a_dead_node(user: User, script: str) -> None:
    dead, back = script.splitlines()
    user.run(dead)
    (taint,) = user.cluster.get("Node", "node-a")["spec"]["taints"]
    assert (taint["key"], taint["effect"]) == ("node.kubernetes.io/out-of-service", "NoExecute")
    user.run(back)
    assert not user.cluster.get("Node", "node-a")["spec"].get("taints")


def a_replaced_pod(user: User, script: str) -> None:
    before = user.pods("afd-")
    user.run(script)
    assert {name for name, uid in user.pods("afd-").items() if before[name] != uid} == {"afd-attention-1"}


def three_attention_workers(user: User, script: str) -> None:
    user.run(script)
    assert user.sizes("afd") == (3, 2)


def a_new_secret(user: User, script: str) -> None:
    secret, pods, green = user.get("Secret", "afd-secret"), user.pods("afd-"), user.pods("green-")
    user.run(script)
    assert user.get("Secret", "afd-secret")["data"] != secret["data"]
    assert user.pods("afd-").keys() == pods.keys() and not set(user.pods("afd-").values()) & set(pods.values())
    assert user.pods("green-") == green


BRINGS: dict[str, Callable[[User, str], None]] = {
    "cd deploy": a_secret_file,
    "afd coordinator": hosts_by_hand,
    "afd status": a_status,
    "kubectl create namespace": a_release,
    "afd plan": a_planned_release,
    "helm upgrade": an_upgrade,
    "helm install green": a_green_release,
    "kubectl -n llm create service": moved_traffic,
    "helm uninstall": no_blue_release,
    "kubectl -n llm scale statefulset/afd-attention statefulset/afd-ffn": a_gap,
    "kubectl taint": a_dead_node,
    "kubectl -n llm delete pod": a_replaced_pod,
    "kubectl -n llm scale statefulset/afd-attention --replicas=3": three_attention_workers,
    "kubectl -n llm create secret": a_new_secret,
}


def named(text: str) -> str:
    """With somebody's own names in place of those in capitals."""
    for name, own in NAMES.items():
        text = re.sub(rf"(?<![\w-]){name}(?![\w-])", own, text)
    return text


@pytest.mark.parametrize("frame", [one for one in FRAMES if not one.reason], ids=lambda one: one.title)
def test_a_command_brings_about_what_the_page_says(frame: Frame, user: User) -> None:
    if frame.language == "yaml":
        (user.folder / frame.text.split("\n")[0].removeprefix("# ")).write_text(named(frame.text))
        return
    (brings,) = [one for start, one in BRINGS.items() if frame.text.startswith(start)]
    brings(user, named(re.sub(r"\s+# .*$", "", frame.text.replace("\\\n", ""), flags=re.M).strip()))


def test_every_frame_runs_or_says_why_not() -> None:
    assert {one.language for one in FRAMES} <= {"sh", "yaml"}
    assert len([one for one in FRAMES if one.language == "sh" and not one.reason]) == len(BRINGS)
    assert len([one for one in FRAMES if one.reason]) == 2, "one that the tests cannot run is a rare thing"


def test_the_values_of_a_download_are_the_charts() -> None:
    (text,) = [one.text for one in FRAMES if one.text.startswith("# fetch.yaml")]
    objects = tuple(render_values({"secret": {"existingSecret": "s"}, **yaml.safe_load(named(text))}))
    for one in of_kind(objects, "StatefulSet"):
        (fetch,) = one["spec"]["template"]["spec"]["initContainers"]
        assert (fetch["name"], fetch["args"]) == ("download", ["org/model", "/models/m"])


def test_the_job_that_fills_a_claim_may_run_anywhere() -> None:
    (text,) = [one.text for one in FRAMES if one.text.startswith("# fill.yaml")]
    job = yaml.safe_load(named(text))
    kubernetes_validate.validate(job, "1.36", strict=True)
    assert not list(against_restricted(job["spec"]["template"]["spec"]))


def test_the_sizes_of_models_are_the_planners() -> None:
    """Attention's half with embedding and head, the FFN's, and a request's KV cache, at 16 bits."""
    rows = re.findall(r"^\| ([a-z0-9.-]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", PAGE, re.M)
    assert len(rows) == 7
    models = load_models()
    for name, attention, ffn, kv in rows:
        model = models[name]
        held = 2 * (model.linear_weights + model.embedding_weights)
        experts = sum(
            group.layers * (group.fixed_weights(model.hidden) + group.experts * group.expert_weights(model.hidden))
            for group in model.ffn
        )
        found = [held / 2**30, 2 * experts / 2**30, model.kv_resident_bytes(8192, 2) / 2**30]
        assert [f"{found[0]:.1f}", f"{found[1]:.1f}", f"{found[2]:.2f}"] == [attention, ffn, kv], name


INLINE = sorted(set(re.findall(r"`(afd [a-z][^`|]*?) *(?:\|[^`]*)?`", FRAME.sub("", PAGE).replace("\n", " "))))


@pytest.mark.parametrize("command", INLINE)
def test_a_command_in_the_text_exists(command: str) -> None:
    words = shlex.split(command)[1:]
    if words[-1].isalpha():  # a command's name alone
        with pytest.raises(SystemExit, match="0"):
            build_parser().parse_args([*words, "--help"])
    else:
        named_alone = words[-1].startswith("--") and words[-1] not in ("--once",)
        build_parser().parse_args([*words, "1"] if named_alone else words)

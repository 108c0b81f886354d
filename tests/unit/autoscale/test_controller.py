"""From the coordinator's answers to advice, notes and patches; the Kubernetes API is a local TLS-less stand-in."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from afd.cli.main import main
from afd.cluster.autoscale.controller import Controller
from afd.cluster.autoscale.decision import Adviser, Limits, Policy
from afd.cluster.autoscale.metrics import AutoscaleMetrics
from afd.cluster.autoscale.observation import Observer
from afd.cluster.autoscale.scale_target import ScaleError, ScaleTarget
from afd.errors import ConfigError, CoordinatorError
from afd.messages.membership import (
    ClusterView,
    ControlReply,
    ControlRequest,
    Member,
    MemberStatus,
    Plan,
    StatusReply,
    WorkerInfo,
)
from afd.types import Topology

CA_FILE = Path(__file__).parents[2] / "fixtures" / "tls" / "cert.pem"


def member(role: str, rank: int, **stats: float) -> MemberStatus:
    info = WorkerInfo(role, f"{role}{rank}", "host", 1, "")
    return MemberStatus(Member(info, rank, ready=True), age_s=0.1, loading=1.0, stats=stats)


def status(members: list[MemberStatus], *, formed: bool = True) -> StatusReply:
    view = ClusterView("c", 1, 1 if formed else 0, 2, 1, "m", "", "hybrid", Plan(), [one.member for one in members])
    return StatusReply(view, members, [])


def cluster(busy_s: float, *, num_attention: int = 2, formed: bool = True, **gateway: float) -> StatusReply:
    """Attention workers that have computed for busy_s, an FFN worker for half of it."""
    workers = [member("attention", rank, busy_s=busy_s, kv_free=0.5, waiting=1.0) for rank in range(num_attention)]
    return status(
        [*workers, member("ffn", 0, busy_s=busy_s / 2), member("gateway", 0, **gateway)],
        formed=formed,
    )


class FakeCoordinator:
    def __init__(self, replies: list[StatusReply | CoordinatorError]):
        self.replies = replies
        self.notes: list[str] = []

    def status(self) -> StatusReply:
        reply = self.replies.pop(0)
        if isinstance(reply, CoordinatorError):
            raise reply
        return reply

    def control(self, request: ControlRequest) -> ControlReply:
        assert request.action == "note"
        self.notes.append(request.target)
        return ControlReply(ok=True)


class FakeTarget:
    def __init__(self, replicas: int, *, refuses: bool = False):
        self.current = replicas
        self.refuses = refuses
        self.patches: list[int] = []

    def replicas(self) -> int:
        return self.current

    def set_replicas(self, replicas: int) -> None:
        if self.refuses:
            raise ScaleError("forbidden")
        self.patches.append(replicas)
        self.current = replicas


class Rig:
    """A controller on a scripted coordinator and a clock of 10 s a round, that decides at once."""

    def __init__(self, replies: list[StatusReply | CoordinatorError], target: FakeTarget | None = None):
        self.coordinator = FakeCoordinator(replies)
        self.registry = CollectorRegistry()
        self.now = 0.0
        self.controller = Controller(
            self.coordinator,
            Adviser(Policy(grow_s=10.0, settle_s=10.0), Limits(Topology.parse("2A1F"), Topology.parse("4A2F"))),
            AutoscaleMetrics(self.registry),
            target=target,
            clock=self.tick,
        )

    def tick(self) -> float:
        self.now += 10.0
        return self.now

    def run(self) -> list[str]:
        rounds = len(self.coordinator.replies)
        return [str(self.controller.step()) for _ in range(rounds)]

    def metric(self, name: str, **labels: str) -> float | None:
        return self.registry.get_sample_value(name, labels)


def test_counters_become_shares_of_the_time_between_two_answers() -> None:
    observer = Observer()
    assert observer.observe(cluster(100.0), 0.0) is None
    seen = observer.observe(cluster(106.0, queued=3.0, finished=20.0, tpot_p99_ms=40.0, ttft_p99_ms=900.0), 10.0)
    assert seen is not None
    assert (seen.num_attention, seen.num_ffn) == (2, 1)
    assert seen.attention_busy == pytest.approx(0.6) and seen.ffn_busy == pytest.approx(0.3)
    assert seen.kv_used == pytest.approx(0.5) and seen.queued == 5 and seen.num_finished == 20
    assert seen.tpot_p99_s == pytest.approx(0.04) and seen.ttft_p99_s == pytest.approx(0.9)


def test_a_restarted_worker_counts_from_its_second_answer() -> None:
    observer = Observer()
    observer.observe(status([member("attention", 0, busy_s=500.0), member("ffn", 0, busy_s=0.0)]), 0.0)
    assert observer.observe(status([member("attention", 1, busy_s=2.0), member("ffn", 0, busy_s=1.0)]), 10.0) is None
    seen = observer.observe(status([member("attention", 1, busy_s=6.0), member("ffn", 0, busy_s=1.0)]), 20.0)
    assert seen is not None and seen.attention_busy == pytest.approx(0.4)


def test_advice_is_told_once_and_exported() -> None:
    rig = Rig([cluster(busy) for busy in (0.0, 10.0, 20.0, 30.0)])
    assert rig.run() == ["None", "2A1F", "3A1F", "3A1F"]
    assert len(rig.coordinator.notes) == 1
    assert rig.coordinator.notes[0].startswith("autoscale: 2A1F should be 3A1F (2 sequences queue; attention 100% busy")
    assert rig.metric("afd_autoscale_recommended_instances", role="attention") == 3
    assert rig.metric("afd_autoscale_instances", role="attention") == 2
    assert rig.metric("afd_autoscale_busy_ratio", role="ffn") == pytest.approx(0.5)


def test_a_silent_coordinator_is_counted_and_readiness_says_so() -> None:
    rig = Rig([cluster(0.0), CoordinatorError("gone"), cluster(1.0)])
    ready = []
    for _ in range(3):
        rig.controller.step()
        ready.append(rig.controller.ready()[0])
    assert ready == [True, False, True]
    assert rig.metric("afd_autoscale_rounds_total", outcome="unanswered") == 1


def test_only_attention_workers_are_scaled() -> None:
    target = FakeTarget(2)
    rig = Rig([cluster(busy) for busy in (0.0, 10.0, 20.0)], target)
    rig.run()
    assert target.patches == [3]
    assert rig.metric("afd_autoscale_rounds_total", outcome="applied") == 1


def test_missing_pods_do_not_become_the_new_size() -> None:
    """Four are set, two are there (a node was lost): neither advice nor limits may make that two."""
    target = FakeTarget(4)
    Rig([cluster(busy) for busy in (0.0, 1.0, 2.0, 3.0)], target).run()
    Rig([cluster(0.0, num_attention=1, formed=False)] * 3, target).run()
    assert target.patches == []


def test_a_size_below_the_limit_is_raised_before_the_cluster_has_formed() -> None:
    target = FakeTarget(1)  # what Kubernetes seeds a role scaler with
    Rig([cluster(0.0, num_attention=1, formed=False)], target).run()
    assert target.patches == [2]


def test_a_refused_patch_is_counted_and_tried_again() -> None:
    target = FakeTarget(2, refuses=True)
    rig = Rig([cluster(busy) for busy in (0.0, 10.0, 20.0, 30.0)], target)
    rig.run()
    assert rig.metric("afd_autoscale_rounds_total", outcome="refused") == 2


# --- the Kubernetes API ---------------------------------------------------------------------------------------


class ApiServer:
    """Answers /scale of one StatefulSet and keeps what it was asked."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, str, str, bytes]] = []
        self.status = 200
        api = self

        class Handler(BaseHTTPRequestHandler):
            def answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length", 0)))
                api.requests.append((self.command, self.path, self.headers.get("authorization", ""), body))
                text = json.dumps({"kind": "Scale", "spec": {"replicas": 2}, "message": "no rights"}).encode()
                self.send_response(api.status)
                self.send_header("content-length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            do_GET = do_PATCH = answer

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture
def api() -> Iterator[ApiServer]:
    server = ApiServer()
    yield server
    server.close()


@pytest.fixture
def account(tmp_path: Path) -> Path:
    (tmp_path / "token").write_text("abc\n")
    (tmp_path / "namespace").write_text("demo\n")
    (tmp_path / "ca.crt").write_bytes(CA_FILE.read_bytes())
    return tmp_path


def test_the_scale_subresource_is_read_and_patched(api: ApiServer, account: Path) -> None:
    target = ScaleTarget("statefulsets", "afd-attention", api.url, account)
    assert target.replicas() == 2
    target.set_replicas(5)
    path = "/apis/apps/v1/namespaces/demo/statefulsets/afd-attention/scale"
    assert [request[:3] for request in api.requests] == [("GET", path, "Bearer abc"), ("PATCH", path, "Bearer abc")]
    assert json.loads(api.requests[1][3]) == {"spec": {"replicas": 5}}


def test_a_refusal_and_silence_are_scale_errors(api: ApiServer, account: Path) -> None:
    target = ScaleTarget("disaggregatedsetrolescalers", "afd-attention", api.url, account)
    api.status = 403
    with pytest.raises(ScaleError, match=r"PATCH of the scale of .*refused: 403 .*no rights"):
        target.set_replicas(1)
    with pytest.raises(ScaleError, match="cannot be reached"):
        ScaleTarget("statefulsets", "a", "http://127.0.0.1:1", account).replicas()
    with pytest.raises(ScaleError, match="service account's namespace"):
        ScaleTarget("statefulsets", "a", api.url, account / "none").replicas()


def test_the_target_is_named_by_resource_and_name(monkeypatch: pytest.MonkeyPatch, account: Path) -> None:
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", "6443")
    target = ScaleTarget.parse("statefulsets/afd-attention", account_dir=account)
    assert target.url == "https://10.0.0.1:6443" and target.name == "afd-attention"
    with pytest.raises(ConfigError, match="RESOURCE/NAME"):
        ScaleTarget.parse("pods/x", account_dir=account)
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST")
    with pytest.raises(ConfigError, match="inside a Kubernetes pod"):
        ScaleTarget.parse("statefulsets/x", account_dir=account)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--min", "4A1F", "--max", "2A2F"], "--min 4A1F exceeds --max 2A2F"),
        (["--interval", "0"], "--interval 0 is not between"),
        (["--config", "/nowhere.toml"], "cannot read config file"),
    ],
)
def test_bad_arguments_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["autoscale", *arguments]) == 2
    assert message in capsys.readouterr().err

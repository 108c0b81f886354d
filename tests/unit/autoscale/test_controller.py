"""From the coordinator's answers to advice, notes and patches; the Kubernetes API is a local TLS-less stand-in."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import msgspec
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
    StageLines,
    StatusReply,
    StepCosts,
    WorkerInfo,
)
from afd.types import Topology

CA_FILE = Path(__file__).parents[2] / "fixtures" / "tls" / "cert.pem"


COSTS = StepCosts(  # two such workers beside one FFN worker serve 466 tokens/s within 45 ms, with the load of `cluster`
    attention=(1e-3, 4e-3 / 3, 0.0),
    head=(0.0, 0.0),
    ffn=(1e-3, 1e-4),
    transfer_s=0.0,
    num_steps=1000,
    num_seqs=10,
    tokens=10.0,
    context=1000.0,
    rows=10.0,
    num_streams=3,
    lines=StageLines((1e-3, 4e-3 / 3, 0.0), (0.0, 0.0), (1e-3, 1e-4)),
)


def member(role: str, rank: int, *, costs: StepCosts | None = None, **stats: float) -> MemberStatus:
    info = WorkerInfo(role, f"{role}{rank}", "host", 1, "")
    return MemberStatus(Member(info, rank, ready=True), age_s=0.1, loading=1.0, stats=stats, costs=costs)


def status(members: list[MemberStatus], *, formed: bool = True) -> StatusReply:
    view = ClusterView("c", 1, 1 if formed else 0, 2, 1, "m", "", "hybrid", Plan(), [one.member for one in members])
    return StatusReply(view, members, [])


def cluster(busy_s: float, *, num_attention: int = 2, formed: bool = True, **gateway: float) -> StatusReply:
    """Attention workers that have computed for busy_s, 250 tokens in each second; an FFN worker for half of it.

    25 answers of 20 tokens a second, after prompts of 41.
    """
    tokens = 250.0 * busy_s
    load = {"busy_s": busy_s, "sampled": tokens, "rows": 3.0 * tokens, "attended": 90.0 * tokens, "kv_free": 0.5}
    workers = [member("attention", rank, costs=COSTS, **load) for rank in range(num_attention)]
    gateway = {"arrived": num_attention * tokens / 20.0, "running": 0.0, "queued": 0.0, **gateway}
    return status([*workers, member("ffn", 0, busy_s=busy_s / 2), member("gateway", 0, **gateway)], formed=formed)


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
            observer=Observer(3),
            target=target,
            clock=self.tick,
        )

    def tick(self) -> float:
        self.now += 10.0
        return self.now

    def run(self) -> list[str]:
        rounds = len(self.coordinator.replies)
        advice = [self.controller.step() for _ in range(rounds)]
        return [str(one and one.size) for one in advice]

    def metric(self, name: str, **labels: str) -> float | None:
        return self.registry.get_sample_value(name, labels)


def test_counters_become_rates_over_the_last_minute_and_what_a_token_costs() -> None:
    observer = Observer(3)
    assert observer.observe(cluster(100.0), 0.0) is None
    seen = observer.observe(cluster(106.0, finished=20.0, tpot_p99_ms=40.0, ttft_p99_ms=900.0), 10.0)
    assert seen is not None and seen.costs is not None
    assert seen.size == Topology(2, 1)
    assert seen.attention_busy == pytest.approx(0.6) and seen.ffn_busy == pytest.approx(0.3)
    assert seen.tokens_per_s == pytest.approx(300.0) and seen.costs.rows == pytest.approx(3.0)
    assert seen.costs.streams == range(3, 4)
    assert seen.kv_used == pytest.approx(0.5) and seen.num_finished == 20
    assert seen.tpot_p99_s == pytest.approx(0.04) and seen.ttft_p99_s == pytest.approx(0.9)


def test_who_waits_or_was_turned_away_is_asked_for_and_who_asks_again_is_not_counted_for_ever() -> None:
    """3,000 tokens are decoded in ten seconds: 150 answers of 20."""
    for more, asked in ((75.0, 450.0), (9e9, 1200.0)):
        observer = Observer(3)
        observer.observe(cluster(100.0), 0.0)
        crowd = cluster(106.0, arrived=2 * 250.0 * 106.0 / 20.0 + more, queued=more)
        seen = observer.observe(crowd, 10.0)
        assert seen is not None and seen.tokens_per_s == pytest.approx(asked)
        assert seen.costs is not None and seen.costs.rows == pytest.approx(3.0), "their prompts are not computed yet"


def test_costs_are_a_mean_over_several_answers_of_one_size() -> None:
    observer, noisy = (
        Observer(3),
        msgspec.structs.replace(COSTS, lines=StageLines((1e-3, 4e-3 / 3, 0.0), (0.0, 0.0), (11e-3, 1e-4))),
    )
    for step in range(20):
        reply = cluster(float(step))
        costs = noisy if step == 19 else COSTS
        members = [msgspec.structs.replace(one, costs=one.costs and costs) for one in reply.members]
        seen = observer.observe(msgspec.structs.replace(reply, members=members), 10.0 * step)
    assert seen is not None and seen.costs is not None
    assert seen.costs.ffn[1].base_s == pytest.approx(2e-3, rel=0.01)
    seen = observer.observe(cluster(20.0, num_attention=3), 200.0)
    assert seen is not None and seen.costs is not None
    assert seen.costs.ffn[1].base_s == pytest.approx(1e-3), "another size begins anew"


def with_link(reply: StatusReply, row_s: float) -> StatusReply:
    members = [
        msgspec.structs.replace(one, costs=one.costs and msgspec.structs.replace(one.costs, link_row_s=row_s))
        for one in reply.members
    ]
    return msgspec.structs.replace(reply, members=members)


def test_what_was_learnt_of_a_link_outlives_the_workers() -> None:
    observer = Observer(3)
    observer.observe(cluster(0.0), 0.0)
    observer.observe(with_link(cluster(10.0), 2e-4), 10.0)
    seen = observer.observe(cluster(20.0, num_attention=4), 20.0)
    assert seen is not None and seen.costs is not None
    assert seen.costs.link_row_s == pytest.approx(4e-4), "of twice as many rows at the FFN worker's end"


def test_a_restarted_worker_counts_from_its_second_answer() -> None:
    observer = Observer(3)
    observer.observe(status([member("attention", 0, busy_s=500.0), member("ffn", 0, busy_s=0.0)]), 0.0)
    assert observer.observe(status([member("attention", 1, busy_s=2.0), member("ffn", 0, busy_s=1.0)]), 10.0) is None
    seen = observer.observe(status([member("attention", 1, busy_s=6.0), member("ffn", 0, busy_s=1.0)]), 20.0)
    assert seen is not None and seen.attention_busy == pytest.approx(0.4)


def test_advice_is_told_once_and_exported() -> None:
    rig = Rig([cluster(busy) for busy in (0.0, 10.0, 20.0, 30.0)])
    assert rig.run() == ["None", "2A1F", "3A1F", "3A1F"]
    assert len(rig.coordinator.notes) == 1
    assert rig.coordinator.notes[0].startswith("autoscale: 2A1F should be 3A1F (500 tokens/s are asked for; within")
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

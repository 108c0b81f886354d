"""The coordinator over real gRPC: calls, refusals, strangers, and the membership thread's whole life."""

from __future__ import annotations

import logging
import queue
import socket
import threading
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import grpc
import msgspec
import pytest

from afd.config import ClusterConfig, resolve_config
from afd.coordinator.door import BODY_TIMEOUT_S, HANDSHAKE_TIMEOUT_S, MAX_STREAMS
from afd.coordinator.service import NUM_THREADS, run_coordinator
from afd.errors import ConfigError, CoordinatorError
from afd.membership.client import SERVICE, CoordinatorClient, CoordinatorUnreachableError
from afd.membership.port import SyncFields
from afd.membership.thread import MembershipLostError, MembershipThread, MembershipTiming
from afd.messages.keys import grpc_token
from afd.messages.membership import (
    MAX_SILENT_EXPERTS,
    ClusterView,
    ControlRequest,
    MeshAddress,
    RegisterRequest,
    SyncRequest,
    WorkerInfo,
)

SECRET = b"a secret of the test cluster"
TOKEN = grpc_token(SECRET)
WAIT_S = 10.0
TLS = Path(__file__).resolve().parents[1] / "fixtures" / "tls"
FAST = {
    "coordinator.heartbeat_s": 0.02,
    "coordinator.lost_after_s": 0.3,
    "coordinator.restart_grace_s": 0.5,
    "coordinator.stall_timeout_s": 0.3,
}
TIMING = MembershipTiming(heartbeat_s=0.02, alive_s=0.3, register_timeout_s=10.0, conflict_patience_s=1.5)


class Coordinator:
    """`run_coordinator` in a thread."""

    def __init__(self, config: ClusterConfig):
        self._stop = threading.Event()
        self._news: queue.Queue[dict[str, object]] = queue.Queue()
        self.exit_codes: list[int] = []
        self._thread = threading.Thread(
            target=lambda: self.exit_codes.append(run_coordinator(config, SECRET, self._stop, self._news.put))
        )
        self._thread.start()
        news = self._news.get(timeout=WAIT_S)
        self.address, self.metrics = str(news["address"]), str(news["metrics"])

    def join(self) -> None:
        self._thread.join(WAIT_S)
        assert not self._thread.is_alive()

    def close(self) -> None:
        self._stop.set()
        self.join()


def config(topology: str = "1A1F", address: str = "127.0.0.1:0", **overrides: object) -> ClusterConfig:
    return resolve_config(None, {"cluster.topology": topology, "coordinator.address": address, **FAST, **overrides})


@contextmanager
def coordinator(topology: str = "1A1F", address: str = "127.0.0.1:0", **overrides: object) -> Iterator[Coordinator]:
    running = Coordinator(config(topology, address, **overrides))
    try:
        yield running
    finally:
        running.close()


def info(role: str, *, rank: int = -1, config_hash: str = "same", bound: bool = True) -> WorkerInfo:
    return WorkerInfo(
        role=role,
        incarnation=uuid.uuid4().hex,
        host="127.0.0.1",
        pid=1,
        config_hash=config_hash,
        mesh=MeshAddress("", "127.0.0.1", 1) if bound and role != "gateway" else None,
        rank=rank,
    )


class Joined:
    """A MembershipThread with its news as queues."""

    def __init__(
        self,
        address: str,
        worker: WorkerInfo,
        *,
        token: str = TOKEN,
        fields: Callable[[], SyncFields] = SyncFields,
        timing: MembershipTiming = TIMING,
    ):
        self.info = worker
        self.views: queue.Queue[ClusterView] = queue.Queue()
        self.fatal: queue.Queue[CoordinatorError] = queue.Queue()
        self.news: list[dict[str, object]] = []
        self._settled = threading.Event()  # registered, or refused
        self.membership = MembershipThread(
            CoordinatorClient(address, token),
            worker,
            fields,
            timing=timing,
            on_fatal=self._on_fatal,
            announce=self.news.append,
        )
        self.membership.on_view(self._on_view)
        self.membership.start()

    def _on_view(self, view: ClusterView) -> None:
        self.views.put(view)
        self._settled.set()

    def _on_fatal(self, error: CoordinatorError) -> None:
        self.fatal.put(error)
        self._settled.set()

    def wait_rank(self) -> int:
        """The rank, once registered; raises what ended the membership instead (and leaves it in `fatal`)."""
        assert self._settled.wait(WAIT_S)
        if self.membership.rank < 0:
            error = self.fatal.get(timeout=WAIT_S)
            self.fatal.put(error)
            raise error
        return self.membership.rank

    def wait_view(self, wanted: Callable[[ClusterView], bool]) -> ClusterView:
        """The first of the coming views (or the present one) that is wanted."""
        view = self.membership.view()
        while view is None or not wanted(view):
            view = self.views.get(timeout=WAIT_S)
        return view


@contextmanager
def held_calls(address: str, count: int, token: str) -> Iterator[list[Any]]:
    """Calls whose body never comes, as many on one connection as it takes; each is a future."""
    ended = threading.Event()

    def never() -> Iterator[bytes]:
        ended.wait(6 * WAIT_S)
        yield from ()

    metadata = (("authorization", f"Bearer {token}"),) if token else ()
    with ExitStack() as channels:
        calls = []
        for idx in range(count):
            if idx % MAX_STREAMS == 0:
                options = [("grpc.use_local_subchannel_pool", 1)]
                channel = channels.enter_context(grpc.insecure_channel(address, options=options))
                method = channel.stream_unary(f"/{SERVICE}/Status")
            calls.append(method.future(never(), metadata=metadata))
        try:
            yield calls
        finally:
            ended.set()


def joined_members() -> Iterator[Callable[..., Joined]]:
    """Makes members, and ends them."""
    joined: list[Joined] = []

    def start(*args: object, **options: object) -> Joined:
        joined.append(Joined(*args, **options))  # type: ignore[arg-type]
        return joined[-1]

    yield start
    for one in joined:
        one.membership.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("membership")]


@pytest.fixture
def join() -> Iterator[Callable[..., Joined]]:
    yield from joined_members()


def test_calls_in_one_line_each() -> None:
    with coordinator() as running, CoordinatorClient(running.address, TOKEN) as client:
        worker = info("attention")
        reply = client.register(RegisterRequest(worker))
        assert reply.rank == 0 and reply.view is not None and reply.view.epoch == 0
        sync = client.sync(SyncRequest("attention", worker.incarnation, view_version=0, ready=True))
        assert sync.known and sync.view is not None
        assert client.status().members[0].member.ready
        assert "only one that serves" in client.control(ControlRequest("drain", "attention/0")).error
        assert not client.sync(SyncRequest("ffn", "nobody", view_version=0)).known


def test_metrics_and_probes_are_served() -> None:
    with coordinator() as running, CoordinatorClient(running.address, TOKEN) as client:
        client.register(RegisterRequest(info("attention")))
        client.register(RegisterRequest(info("ffn")))
        ready = threading.Event()

        def epoch_line() -> str:
            with urllib.request.urlopen(f"http://{running.metrics}/metrics", timeout=WAIT_S) as response:
                text = response.read().decode()
            return next(line for line in text.splitlines() if line.startswith("afd_coordinator_epoch"))

        for _ in range(100):  # published by the next tick, 0.1 s at the latest
            if epoch_line() == "afd_coordinator_epoch 1.0":
                ready.set()
                break
            ready.wait(0.02)
        assert ready.is_set()
        for path in ("livez", "readyz"):
            with urllib.request.urlopen(f"http://{running.metrics}/{path}", timeout=WAIT_S) as response:
                assert response.status == 200


def test_a_wrong_secret_is_named_and_learns_nothing() -> None:
    with coordinator() as running, CoordinatorClient(running.address, grpc_token(b"another secret 123")) as client:
        for call in (
            lambda: client.register(RegisterRequest(info("attention"))),
            client.status,
            lambda: client.control(ControlRequest("shutdown")),
        ):
            with pytest.raises(CoordinatorError, match="same --secret-file") as caught:
                call()
            assert not isinstance(caught.value, CoordinatorUnreachableError)
        assert not running.exit_codes


def test_strangers_do_not_disturb() -> None:
    host_port = None
    with coordinator() as running, CoordinatorClient(running.address, TOKEN) as client:
        host, _, port = running.address.rpartition(":")
        host_port = (host, int(port))
        for garbage in (
            b"\x00" * 64,
            b"GET / HTTP/1.1\r\n\r\n",
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xff" * 4096,
            b"",
        ):
            with socket.create_connection(host_port, timeout=WAIT_S) as stranger:
                stranger.sendall(garbage)
        with grpc.insecure_channel(running.address) as channel:
            call = channel.unary_unary(f"/{SERVICE}/Register")
            with pytest.raises(grpc.RpcError) as caught:
                call(b"", timeout=WAIT_S)
            assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED  # type: ignore[attr-defined]
            metadata = (("authorization", f"Bearer {TOKEN}"),)
            for body in (b"", b"\xc1", b"\x80", msgspec.msgpack.encode({"info": 3}), b"\x91" * 5000):
                with pytest.raises(grpc.RpcError) as caught:
                    call(body, timeout=WAIT_S, metadata=metadata)
                assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT  # type: ignore[attr-defined]
            with pytest.raises(grpc.RpcError) as caught:
                call(bytes(2 << 20), timeout=WAIT_S, metadata=metadata)
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED  # type: ignore[attr-defined]
        assert client.status().members == []


@pytest.mark.parametrize("count", [4, 200])
def test_calls_of_strangers_that_never_send_a_body_disturb_nobody(
    count: int, join: Callable[..., Joined], caplog: pytest.LogCaptureFixture
) -> None:
    """Neither the members, nor new calls; each of them is answered at once."""
    with coordinator() as running, held_calls(running.address, count, token="") as calls:
        members = [join(running.address, info(role)) for role in ("attention", "ffn", "gateway")]
        for member in members:
            member.wait_view(lambda view: view.formed)
        for call in calls:
            assert call.exception(timeout=WAIT_S).code() is grpc.StatusCode.UNAUTHENTICATED
        with CoordinatorClient(running.address, TOKEN) as client:
            assert len(client.status().members) == 3
        assert all(member.fatal.empty() for member in members)
    assert sum("wrong or no secret" in record.getMessage() for record in caplog.records) <= 2


def test_a_member_that_never_sends_its_body_is_cut_off_and_nobody_is_lost_for_it(join: Callable[..., Joined]) -> None:
    """It holds every thread there is until its deadline; then all others are there again."""
    with coordinator() as running:
        members = [join(running.address, info(role)) for role in ("attention", "ffn", "gateway")]
        for member in members:
            member.wait_rank()
        with held_calls(running.address, 2 * NUM_THREADS, token=TOKEN) as calls:
            for call in calls:
                assert call.exception(timeout=4 * BODY_TIMEOUT_S) is not None
        with CoordinatorClient(running.address, TOKEN, timeout_s=WAIT_S) as client:
            assert len(client.status().members) == 3
        assert all(member.fatal.empty() for member in members)


def test_idle_strangers_are_cut_off() -> None:
    """A connection that never says anything ends; the members' own ones are not counted among them."""
    with coordinator() as running:
        host, _, port = running.address.rpartition(":")
        with socket.create_connection((host, int(port)), timeout=4 * HANDSHAKE_TIMEOUT_S) as stranger:
            while stranger.recv(4096):
                pass  # the server's own first frames


def test_tls_when_certificates_are_given() -> None:
    files = {"coordinator.tls_cert_file": str(TLS / "cert.pem"), "coordinator.tls_key_file": str(TLS / "key.pem")}
    with coordinator(**files) as running:  # type: ignore[arg-type]
        with CoordinatorClient(running.address, TOKEN, ca_file=str(TLS / "cert.pem")) as client:
            assert client.status().members == []
        with (
            CoordinatorClient(running.address, TOKEN, timeout_s=1.0) as plain,
            pytest.raises(CoordinatorUnreachableError),
        ):
            plain.status()
    with pytest.raises(ConfigError, match="belong together"):
        config(**{"coordinator.tls_key_file": "x"})
    with pytest.raises(ConfigError, match="cannot read TLS file /nowhere"):
        CoordinatorClient("127.0.0.1:1", TOKEN, ca_file="/nowhere")
    with pytest.raises(ConfigError, match="not in PEM form"):
        CoordinatorClient("127.0.0.1:1", TOKEN, ca_file=__file__)


def test_a_port_in_use_is_one_clear_line() -> None:
    with coordinator() as running, pytest.raises(ConfigError, match="port is in use"):
        run_coordinator(config(address=running.address), SECRET, threading.Event(), lambda news: None)


def test_nobody_there_is_unreachable_within_the_deadline() -> None:
    with CoordinatorClient("127.0.0.1:1", TOKEN, timeout_s=0.5) as client:
        with pytest.raises(CoordinatorUnreachableError, match=r"127\.0\.0\.1:1"):
            client.status()
        client.close()
        with pytest.raises(CoordinatorUnreachableError, match="closed"):
            client.status()


def test_shutdown_ends_the_process_after_the_last_member(join: Callable[..., Joined]) -> None:
    running = Coordinator(config())
    worker = join(running.address, info("attention"))
    worker.wait_rank()
    with CoordinatorClient(running.address, TOKEN) as client:
        client.control(ControlRequest("shutdown"))
    worker.wait_view(lambda view: view.shutdown)
    worker.membership.close()
    running.join()
    assert running.exit_codes == [0]


def test_members_see_one_another_and_every_change(join: Callable[..., Joined]) -> None:
    with coordinator() as running:
        attention, ffn, gateway = (join(running.address, info(role)) for role in ("attention", "ffn", "gateway"))
        assert [one.wait_rank() for one in (attention, ffn, gateway)] == [0, 0, 0]
        view = gateway.wait_view(lambda view: view.formed)
        assert [m.ready for m in view.members] == [False, False, False]
        ffn.membership.set_loading(0.5)
        ffn.membership.set_ready(True)
        gateway.wait_view(lambda view: view.of_role("ffn")[0].ready)
        assert ffn.news == [{"loading": 0.5}, {"ready": True}]
        ffn.membership.set_draining(True)
        gateway.wait_view(lambda view: view.of_role("ffn")[0].draining)
        assert gateway.membership.coordinator_alive
        ffn.membership.close()
        gateway.wait_view(lambda view: not view.of_role("ffn"))


def test_addresses_may_come_after_the_rank(join: Callable[..., Joined]) -> None:
    with coordinator() as running:
        attention = join(running.address, info("attention"))
        ffn = join(running.address, info("ffn", bound=False))
        assert ffn.wait_rank() == 0
        ffn.membership.update_info(msgspec.structs.replace(ffn.info, mesh=MeshAddress("", "127.0.0.1", 7)))
        view = attention.wait_view(lambda view: view.formed)
        assert view.of_role("ffn")[0].info.mesh == MeshAddress("", "127.0.0.1", 7)
        with pytest.raises(ValueError, match="do not change"):
            ffn.membership.update_info(info("ffn"))


def test_another_model_is_refused_for_good(join: Callable[..., Joined]) -> None:
    with coordinator() as running:
        join(running.address, info("ffn")).wait_rank()
        other = join(running.address, info("attention", config_hash="other"))
        with pytest.raises(CoordinatorError, match=r"'other' differs from the cluster's 'same'") as caught:
            other.wait_rank()
        assert not isinstance(caught.value, MembershipLostError)
        assert other.fatal.get(timeout=WAIT_S) is caught.value


def test_a_wrong_secret_ends_the_membership_at_once(join: Callable[..., Joined]) -> None:
    with coordinator() as running:
        stranger = join(running.address, info("ffn"), token=grpc_token(b"another secret 123"))
        with pytest.raises(CoordinatorError, match="--secret-file"):
            stranger.wait_rank()


def test_a_dead_predecessor_is_waited_for_and_a_live_one_is_not_displaced(join: Callable[..., Joined]) -> None:
    with coordinator() as running:
        with CoordinatorClient(running.address, TOKEN) as client:
            assert client.register(RegisterRequest(info("ffn", rank=0))).rank == 0  # and never heard of again
        successor = join(running.address, info("ffn", rank=0))
        assert successor.wait_rank() == 0
        third = join(running.address, info("ffn", rank=0))
        with pytest.raises(MembershipLostError, match="held by another ffn worker"):
            third.wait_rank()


def test_a_stalled_worker_is_told_that_it_is_lost(join: Callable[..., Joined]) -> None:
    with coordinator() as running:
        worker = join(running.address, info("ffn"), fields=lambda: SyncFields(progress=3, pending=True))
        worker.wait_rank()
        worker.membership.set_ready(True)
        error = worker.fatal.get(timeout=WAIT_S)
        assert isinstance(error, MembershipLostError) and "no progress" in str(error)


def test_silent_experts_reach_the_status_and_the_events(join: Callable[..., Joined]) -> None:
    found = tuple((layer, expert) for layer in range(2) for expert in range(MAX_SILENT_EXPERTS))
    with coordinator() as running, CoordinatorClient(running.address, TOKEN) as client:
        worker = join(running.address, info("ffn"), fields=lambda: SyncFields(silent_experts=found))
        worker.wait_rank()
        worker.membership.set_ready(True)  # sent at once, in a heartbeat
        worker.wait_view(lambda view: any(member.ready for member in view.members))
        status = client.status()
        assert status.members[0].silent_experts == list(found[:MAX_SILENT_EXPERTS])
        assert "layer 0: expert 0, 1, 2" in status.events[-1]


def test_broken_links_are_told_until_they_heal(join: Callable[..., Joined]) -> None:
    with coordinator("2A1F") as running:
        workers = [join(running.address, info(role)) for role in ("attention", "attention", "ffn")]
        ranks = [worker.wait_rank() for worker in workers]
        workers[2].membership.set_ready(True)
        workers[2].wait_view(lambda view: view.formed and view.of_role("ffn")[0].ready)
        for worker in workers[:2]:
            worker.membership.report_pair("ffn/0", True, "reset by peer")
        workers[0].membership.report_pair("ffn/0", False)
        error = workers[1].fatal.get(timeout=WAIT_S)
        assert "reset by peer" in str(error)
        assert workers[0].membership.rank == ranks[0] and workers[0].fatal.empty()


def test_a_callback_that_fails_is_fatal_and_not_silent(
    join: Callable[..., Joined], caplog: pytest.LogCaptureFixture
) -> None:
    with coordinator() as running:

        def fields() -> SyncFields:
            raise RuntimeError("a bug")

        worker = join(running.address, info("ffn"), fields=fields)
        assert "a bug" in str(worker.fatal.get(timeout=WAIT_S))
    assert any(record.levelno == logging.ERROR for record in caplog.records)


def test_the_coordinator_may_come_later_go_and_come_back(join: Callable[..., Joined]) -> None:
    with coordinator() as first:
        address = first.address
    early = [join(address, info(role)) for role in ("attention", "ffn")]
    assert early[0].membership.rank == -1
    assert early[0].membership.view() is None and not early[0].membership.coordinator_alive
    with coordinator(address=address):
        assert [worker.wait_rank() for worker in early] == [0, 0]
        before = early[0].wait_view(lambda view: view.formed)
        early[0].wait_view(lambda view: view.formed)
    gone = threading.Event()
    for _ in range(500):
        if not early[0].membership.coordinator_alive:
            gone.set()
            break
        gone.wait(0.02)
    assert gone.is_set() and early[0].membership.view() is not None
    with coordinator(address=address):
        after = early[0].wait_view(lambda view: view.version > before.version)
        assert (after.epoch, after.cluster_id) == (before.epoch, before.cluster_id)
        early[1].wait_view(lambda view: view.version > before.version)
        assert [worker.membership.rank for worker in early] == [0, 0]
        early[1].membership.close()
        early[0].wait_view(lambda view: not view.formed)


def test_giving_up_when_no_coordinator_ever_answers(join: Callable[..., Joined]) -> None:
    with coordinator() as running:
        address = running.address
    timing = MembershipTiming(heartbeat_s=0.02, register_timeout_s=0.2)
    worker = join(address, info("ffn"), timing=timing)
    with pytest.raises(MembershipLostError, match="cannot be reached"):
        worker.wait_rank()


def test_close_is_quick_and_idempotent_whatever_the_coordinator_does(join: Callable[..., Joined]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts, and never says a word
        worker = join(f"127.0.0.1:{silent.getsockname()[1]}", info("ffn"))
        worker.membership.close()
        worker.membership.close()
        assert worker.membership.rank == -1

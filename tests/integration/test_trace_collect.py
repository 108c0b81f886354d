"""Collecting over real HTTP: clocks that differ, workers that are gone, old, garbled or cut short."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from afd.messages.membership import Member, MemberStatus, WorkerInfo
from afd.telemetry.exposition import MetricsServer, process_registry
from afd.telemetry.ring import Stage, TracePage, TraceRing
from afd.trace import collect as module
from afd.trace.collect import Target, collect, targets_of
from afd.trace.errors import TraceError

TOKEN = "the cluster's"


@contextlib.contextmanager
def worker(role: str, rank: int, num_stages: int = 1000, capacity: int = 50_000) -> Iterator[Target]:
    """A worker's metrics port with stages of the last seconds behind it, 1 ms each."""
    ring, now_s = TraceRing(capacity), time.perf_counter()
    name = "ffn" if role == "ffn" else "attention"
    for idx in range(num_stages):
        end_s = now_s - (num_stages - 1 - idx) / 1e3
        ring.add(Stage(name, end_s - 1e-3, end_s, 0, idx % 4, 8))
    page = TracePage(role, 1000 + rank)
    page.attach(rank, ring)
    server = MetricsServer("127.0.0.1", 0, process_registry(role), lambda: (True, ""), {"/trace": page}, token=TOKEN)
    try:
        yield Target(role, rank, server.address)
    finally:
        server.close()


@contextlib.contextmanager
def scripted(answer: Callable[[BaseHTTPRequestHandler], None]) -> Iterator[Target]:
    """A worker that answers /clock well and /trace as scripted."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/clock":
                body = b'{"perf_counter_s": 1.0}'
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)
            else:
                answer(self)

        def log_message(self, format: str, *args: object) -> None:
            return None

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield Target("attention", 9, f"127.0.0.1:{server.server_address[1]}")
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def body(text: bytes) -> Callable[[BaseHTTPRequestHandler], None]:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.end_headers()
        handler.wfile.write(text)

    return answer


def test_workers_of_this_machine_share_our_clock_exactly():
    with worker("attention", 0) as a, worker("ffn", 0) as f:
        before_s = time.perf_counter()
        collected = collect([a, f], 0.5, TOKEN, title="1A1F")
        after_s = time.perf_counter()
    assert [w.name for w in collected.timeline.workers] == ["attention/0", "ffn/0"]
    assert collected.timeline.workers[0].pid == 1000 and not collected.timeline.missing
    for offset in collected.offsets.values():
        assert offset.used.offset_s == offset.used.error_s == 0.0
        assert abs(offset.measured.offset_s) <= offset.measured.error_s < after_s - before_s
    for one in collected.timeline.workers:
        assert 1 <= len(one.stages) <= 501 and one.stages[-1].end_s <= 0.5 + 1e-9


def test_another_machines_clock_is_measured(monkeypatch):
    monkeypatch.setattr(module, "machine_id", lambda: "elsewhere")
    with worker("attention", 0) as a, worker("ffn", 0) as f:
        collected = collect([a, f], 0.5, TOKEN, clock=lambda: time.perf_counter() + 5000.0)
    errors = []
    for offset in collected.offsets.values():
        assert offset.used.low_s <= 5000.0 <= offset.used.high_s
        errors.append((offset.used, offset.measured.error_s))
    assert errors[0][0] == errors[1][0], "both are of one machine"
    assert all(used.error_s <= measured_s for used, measured_s in errors)
    assert collected.timeline.workers[0].clock_error_s == errors[0][0].error_s > 0.0
    assert collected.timeline.workers[1].stages


def test_a_ring_that_was_too_short_is_said():
    with worker("ffn", 0, num_stages=900, capacity=100) as f:
        collected = collect([f], 0.8, TOKEN)
    assert collected.timeline.workers[0].complete_from_s > 0.5


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def test_one_worker_that_is_gone_does_not_cost_the_others_trace():
    gone = Target("attention", 1, f"127.0.0.1:{free_port()}")
    with worker("ffn", 0) as f:
        collected = collect([gone, f], 0.5, TOKEN)
    [reason] = collected.timeline.missing
    assert reason.startswith(f"attention/1 at {gone.address} does not answer")
    assert [w.name for w in collected.timeline.workers] == ["ffn/0"]


HEADER = b'{"role":"ffn","rank":0,"pid":1,"machine":"","now_s":1.0,"kept_since_s":0.0,"num_stages":2}\n'


@pytest.mark.parametrize(
    ("answer", "complaint"),
    [
        (lambda handler: handler.send_error(404), r"has no /trace \(HTTP 404\)"),
        (body(b"\x00 garbage"), "does not answer"),
        (body(b""), "does not answer"),
        (body(HEADER + b'{"name":"ffn","start_s":0.1,"end_s":0.2}\n'), "ends after 1 of 2 stages"),
        (body(HEADER + b'{"name":"ffn"}\n{"name":'), "does not answer"),
        (lambda handler: handler.wfile.write(b"not http\r\n\r\n"), "does not answer"),
    ],
)
def test_what_a_worker_answers_wrongly_is_said(answer, complaint):
    with (
        scripted(answer) as target,
        pytest.raises(TraceError, match=f"no worker gave a trace: attention/9.*{complaint}"),
    ):
        collect([target], 0.5, TOKEN)


def test_a_worker_of_another_cluster_is_said():
    with (
        worker("ffn", 0) as f,
        pytest.raises(TraceError, match=r"ffn/0 at .* belongs to a cluster with another secret"),
    ):
        collect([f], 0.5, "another's")


def test_a_dump_without_end_is_cut_off(monkeypatch):
    monkeypatch.setattr(module, "MAX_BODY_BYTES", 1000)
    with scripted(body(b"x" * 5000)) as target, pytest.raises(TraceError, match="too long or too slow"):
        collect([target], 0.5, TOKEN)


@pytest.mark.parametrize("address", ["", "nowhere", "127.0.0.1:http", "127.0.0.1:99999999"])
def test_an_address_that_is_none_is_said(address):
    with pytest.raises(TraceError, match=r"ffn/0 at .*does not answer"):
        collect([Target("ffn", 0, address)], 0.5, TOKEN)


def test_a_cluster_without_workers_is_said():
    with pytest.raises(TraceError, match="has no worker yet"):
        collect([], 1.0, TOKEN)


def test_targets_are_the_workers_that_say_where_they_are():
    def status(role: str, rank: int, metrics: str) -> MemberStatus:
        return MemberStatus(Member(WorkerInfo(role, "i", "h", 1, "c", metrics=metrics), rank), 0.0, 1.0, {})

    members = [
        status("ffn", 0, "h:3"),
        status("attention", 1, "h:2"),
        status("gateway", 0, "h:9"),
        status("attention", 0, ""),
    ]
    assert [(t.name, t.address) for t in targets_of(members)] == [("attention/1", "h:2"), ("ffn/0", "h:3")]

"""The ring, and what a worker's metrics port says of it and of its clock."""

from __future__ import annotations

import http.client
import json
import select
import socket
import time
from collections.abc import Iterator

import msgspec
import pytest

from afd.telemetry import exposition
from afd.telemetry.exposition import MAX_REQUESTS, MetricsServer, process_registry
from afd.telemetry.ring import CHUNK_STAGES, Stage, StageBlock, TraceHeader, TracePage, TraceRing

WAIT_S = 10.0
LONG_MIB = 32  # more than sockets hold
AUTHORIZED = {"Authorization": "Bearer the cluster's"}


def stage_at(end_s: float) -> Stage:
    return Stage("attention", end_s - 0.5, end_s, 1, 2, 3)


def test_the_ring_keeps_the_newest_and_says_what_is_gone():
    ring = TraceRing(4)
    for second in range(1, 4):
        ring.add(stage_at(second))
    assert ring.kept_since_s == 0.0
    for second in range(4, 8):
        ring.add(stage_at(second))
    assert ring.kept_since_s == 4.0
    assert [stage.end_s for stage in ring.snapshot()] == [4, 5, 6, 7]
    assert [stage.end_s for stage in ring.snapshot(5.5)] == [6, 7]
    assert ring.snapshot(8.0) == [] and TraceRing(0).kept_since_s == 0.0


def test_blocks_are_stages_that_are_made_when_somebody_looks():
    made = []

    def block(*seconds: int) -> StageBlock:
        return StageBlock(seconds[-1], len(seconds), lambda: made.append(seconds) or map(stage_at, seconds))

    ring = TraceRing(5)
    ring.add_block(block(1, 2))
    ring.add(stage_at(3))
    ring.add_block(block(4, 5))
    assert not made and ring.kept_since_s == 0.0
    assert [stage.end_s for stage in ring.snapshot()] == [1, 2, 3, 4, 5]
    assert [stage.end_s for stage in ring.snapshot(4.5)] == [5]
    assert made == [(1, 2), (4, 5), (4, 5)]
    ring.add(stage_at(6))  # the oldest block falls out as a whole
    assert [stage.end_s for stage in ring.snapshot()] == [3, 4, 5, 6] and ring.kept_since_s == 3
    ring.add_block(block(7, 8, 9, 10, 11))
    assert [stage.end_s for stage in ring.snapshot()] == [7, 8, 9, 10, 11]


def read(page: TracePage, **query: str) -> tuple[TraceHeader, list[Stage]]:
    line, _, lines = b"".join(page(query)).partition(b"\n")
    return msgspec.json.decode(line, type=TraceHeader), msgspec.json.Decoder(Stage).decode_lines(lines)


def test_a_dump_is_a_header_and_the_stages_asked_for():
    ring = TraceRing()
    for idx in range(2 * CHUNK_STAGES + 1):
        ring.add(stage_at(idx / 100))
    page = TracePage("ffn", 42, clock=lambda: 6.0)
    assert read(page)[0].num_stages == 0 and read(page)[0].rank == -1
    page.attach(3, ring)
    header, stages = read(page, seconds="100")
    assert (header.role, header.rank, header.pid, header.now_s) == ("ffn", 3, 42, 6.0)
    assert stages == ring.snapshot() and header.num_stages == len(stages) == 2 * CHUNK_STAGES + 1
    header, stages = read(page, seconds="2.5")
    assert stages == ring.snapshot(3.5) and 0 < len(stages) < len(ring.snapshot())


@pytest.mark.parametrize("seconds", ["", "x", "-1", "nan", "inf", "1e9"])
def test_a_wrong_number_of_seconds_is_refused(seconds):
    with pytest.raises(ValueError):
        TracePage("ffn", 1)({"seconds": seconds})


@pytest.fixture
def server() -> Iterator[MetricsServer]:
    page = TracePage("ffn", 1)
    ring = TraceRing()
    ring.add(stage_at(time.perf_counter()))
    page.attach(0, ring)

    def long(query: object) -> Iterator[bytes]:
        yield from [b"x" * (1 << 20)] * LONG_MIB

    pages = {"/trace": page, "/long": long}
    server = MetricsServer("127.0.0.1", 0, process_registry("ffn"), lambda: (True, ""), pages, token="the cluster's")
    yield server
    server.close()


def connected(server: MetricsServer) -> http.client.HTTPConnection:
    host, _, port = server.address.rpartition(":")
    return http.client.HTTPConnection(host, int(port), timeout=WAIT_S)


def test_the_clock_answers_many_times_over_one_connection_but_not_for_ever(server):
    connection = connected(server)
    try:
        readings = []
        for _ in range(MAX_REQUESTS):
            connection.request("GET", "/clock")
            response = connection.getresponse()
            readings.append(json.loads(response.read())["perf_counter_s"])
        assert readings == sorted(readings) and readings[0] > 0.0
        assert abs(time.perf_counter() - readings[-1]) < WAIT_S  # one machine, one clock
        assert response.getheader("Connection") == "close"
    finally:
        connection.close()


def test_the_trace_is_served_and_wrong_queries_are_not(server):
    for path, status in (("/trace?seconds=5", 200), ("/trace", 200), ("/trace?seconds=soon", 400), ("/tracer", 404)):
        connection = connected(server)
        try:
            connection.request("GET", path, headers=AUTHORIZED)
            response = connection.getresponse()
            body = response.read()
        finally:
            connection.close()
        assert response.status == status
        if status == 200:
            assert [json.loads(line).get("name", "header") for line in body.splitlines()] == ["header", "attention"]
        if status == 404:
            assert b"/trace" in body and b"/clock" in body


@pytest.mark.parametrize("authorization", [None, "", "Bearer ", "Bearer the clusters", "Basic the cluster's"])
def test_strangers_get_no_trace(server, authorization):
    connection = connected(server)
    try:
        connection.request("GET", "/trace", headers={} if authorization is None else {"Authorization": authorization})
        response = connection.getresponse()
        assert response.status == 401 and b"token" in response.read()
        connection.request("GET", "/trace", headers=AUTHORIZED)  # the same connection, no stranger now
        assert connection.getresponse().read()
        connection.request("GET", "/trace")
        assert connection.getresponse().status == 401, "a token is for one request"
    finally:
        connection.close()


def test_without_a_token_nobody_gets_a_page():
    server = MetricsServer("127.0.0.1", 0, process_registry("ffn"), lambda: (True, ""), {"/trace": TracePage("ffn", 1)})
    try:
        for authorization in ("", "Bearer ", "Bearer"):
            connection = connected(server)
            connection.request("GET", "/trace", headers={"Authorization": authorization})
            assert connection.getresponse().status == 401
            connection.close()
    finally:
        server.close()


def test_a_long_page_comes_whole(server):
    connection = connected(server)
    try:
        connection.request("GET", "/long", headers=AUTHORIZED)
        assert len(connection.getresponse().read()) == LONG_MIB << 20
    finally:
        connection.close()


def test_a_slow_reader_is_cut_off(server, monkeypatch):
    monkeypatch.setattr(exposition, "ANSWER_TIMEOUT_S", 0.2)
    host, _, port = server.address.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=WAIT_S) as reader:
        reader.sendall(b"GET /long HTTP/1.0\r\nAuthorization: Bearer the cluster's\r\n\r\n")
        poll = select.poll()
        poll.register(reader, 0)
        assert poll.poll(WAIT_S * 1e3), "it was put out without having read a byte"


def test_a_reader_that_hangs_up_leaves_the_thread_free(server):
    host, _, port = server.address.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=WAIT_S) as reader:
        reader.sendall(b"GET /long HTTP/1.0\r\nAuthorization: Bearer the cluster's\r\n\r\n")
        assert reader.recv(10)
    connection = connected(server)
    try:
        connection.request("GET", "/livez")
        assert connection.getresponse().status == 200
    finally:
        connection.close()

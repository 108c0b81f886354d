"""The tiny HTTP thread of each worker: metrics, probes, strangers, its end."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from itertools import pairwise

import pytest
from prometheus_client import CollectorRegistry, Gauge

from afd.errors import ConfigError
from afd.telemetry import exposition
from afd.telemetry.exposition import MAX_CONNECTIONS, MAX_HEAD_BYTES, RESTS, MetricsServer, process_registry

WAIT_S = 10.0
PROBE_COSTS_S = 1.0  # of this process's CPU time, which no other load of the machine changes
HALF = b"GET /livez HTTP/1.1\r\nX: "
SCRAPES = b"GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n" * 16
STRANGERS = """
import selectors, signal, socket, sys
signal.alarm(60)  # not without us
address, say, count = (sys.argv[1], int(sys.argv[2])), sys.argv[3].encode(), int(sys.argv[4])
poll = selectors.DefaultSelector()
def come():
    stranger = socket.socket()
    stranger.setblocking(False)
    stranger.connect_ex(address)
    poll.register(stranger, selectors.EVENT_WRITE)
for _ in range(count):
    come()
print("they come", flush=True)
while True:
    for key, events in poll.select():
        try:
            if events & selectors.EVENT_WRITE:
                key.fileobj.send(say)
                poll.modify(key.fileobj, selectors.EVENT_READ)
                continue
            if key.fileobj.recv(1 << 16):
                continue
        except BlockingIOError:
            continue
        except OSError:
            pass
        poll.unregister(key.fileobj)
        key.fileobj.close()
        come()
"""


class Probe:
    def __init__(self) -> None:
        self.answer = (False, "loading the model")

    def __call__(self) -> tuple[bool, str]:
        return self.answer


@pytest.fixture
def probe() -> Probe:
    return Probe()


@pytest.fixture
def server(probe: Probe) -> Iterator[MetricsServer]:
    registry = process_registry("ffn")
    Gauge("afd_answer", "For the test", registry=registry).set(42)

    server = MetricsServer("127.0.0.1", 0, registry, probe)
    yield server
    server.close()


def get(server: MetricsServer, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://{server.address}{path}", timeout=WAIT_S) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def test_metrics_are_the_registrys(server: MetricsServer) -> None:
    status, text = get(server, "/metrics?name=x")
    assert status == 200
    assert "afd_answer 42.0" in text and 'afd_build_info{role="ffn"' in text
    assert "process_resident_memory_bytes" in text


def test_ready_is_asked_each_time_and_alive_is_not(server: MetricsServer, probe: Probe) -> None:
    assert get(server, "/readyz") == (503, "loading the model\n")
    assert get(server, "/livez") == (200, "ok\n")
    probe.answer = (True, "")
    assert get(server, "/readyz") == (200, "ok\n")
    assert get(server, "/other")[0] == 404


def test_strangers_do_not_disturb(server: MetricsServer) -> None:
    host, _, port = server.address.rpartition(":")
    for garbage in (b"", b"\x00" * 100, b"POST / HTTP/1.1\r\n\r\n", b"GET /" + b"x" * 70000 + b" HTTP/1.1\r\n\r\n"):
        with socket.create_connection((host, int(port)), timeout=WAIT_S) as stranger:
            stranger.sendall(garbage)
    assert get(server, "/livez")[0] == 200


def talk(server: MetricsServer, say: bytes) -> bytes:
    """All that is answered until the server closes."""
    host, _, port = server.address.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=WAIT_S) as client:
        client.sendall(say)
        answer = b""
        with suppress(ConnectionResetError):
            while data := client.recv(1 << 16):
                answer += data
        return answer


def test_requests_in_one_go_are_answered_in_order(server: MetricsServer, probe: Probe) -> None:
    paths = ("/livez", "/metrics", "/readyz", "/metrics", "/nothing", "/livez")
    answer = talk(server, b"".join(f"GET {path} HTTP/1.1\r\nHost: a\r\n\r\n".encode() for path in paths))
    assert re.findall(rb"HTTP/1.1 (\d+)", answer) == [b"200", b"200", b"503", b"200", b"404", b"200"]
    assert answer.count(b"afd_answer 42.0") == 2


@pytest.mark.parametrize(
    ("say", "status"),
    [
        (b"POST /livez HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\nab", b"405"),
        (b"HEAD /livez HTTP/1.1\r\nHost: a\r\n\r\n", b"405"),
        (
            b"GET /livez HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\nGET /x HTTP/1.1\r\n\r\n",
            b"200",
        ),
        (b"GET /livez HTTP/1.0\r\n\r\nGET /livez HTTP/1.0\r\n\r\n", b"200"),
        (b"CONNECT a:1 HTTP/1.1\r\nHost: a\r\n\r\nGET /livez HTTP/1.1\r\n\r\n", b"405"),
    ],
)
def test_after_an_odd_request_there_is_no_other(server: MetricsServer, say: bytes, status: bytes) -> None:
    answer = talk(server, say)
    assert re.findall(rb"HTTP/1.1 (\d+)", answer) == [status] and b"Connection: close" in answer


def test_a_client_that_has_said_all_gets_its_answer(server: MetricsServer) -> None:
    host, _, port = server.address.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=WAIT_S) as client:
        client.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
        client.shutdown(socket.SHUT_WR)
        answer = b""
        while data := client.recv(1 << 16):
            answer += data
    assert b"afd_answer 42.0" in answer


def test_a_head_without_end_is_cut_off(server: MetricsServer) -> None:
    assert talk(server, b"GET /livez HTTP/1.1\r\nX: " + b"x" * MAX_HEAD_BYTES + b"\r\n\r\n") == b""


@contextmanager
def slow_clients(server: MetricsServer, count: int, say: bytes) -> Iterator[list[socket.socket]]:
    host, _, port = server.address.rpartition(":")
    with ExitStack() as stack:
        clients = []
        for _ in range(count):
            client = stack.enter_context(socket.create_connection((host, int(port)), timeout=WAIT_S))
            with suppress(OSError):  # it was put out already
                client.sendall(say)
            clients.append(client)
        yield clients


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server waits for its clients longer than a probe does: who waits for others is not answered."""
    monkeypatch.setattr(exposition, "REQUEST_TIMEOUT_S", 3 * WAIT_S)
    monkeypatch.setattr(exposition, "ANSWER_TIMEOUT_S", 3 * WAIT_S)


def assert_probes_are_answered(server: MetricsServer, times: int) -> None:
    for _ in range(times):
        begun = time.process_time()
        assert get(server, "/livez") == (200, "ok\n")
        assert get(server, "/readyz")[0] == 503
        assert time.process_time() - begun < PROBE_COSTS_S, "others came first"


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize("say", [b"", HALF, SCRAPES])
@pytest.mark.parametrize("count", [1, MAX_CONNECTIONS + 50])
def test_probes_are_answered_while_others_are_slow(server: MetricsServer, count: int, say: bytes) -> None:
    """However many they are, whether they say nothing, half a request, or do not read their answers."""
    with slow_clients(server, count, say):
        assert_probes_are_answered(server, 20)


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize("say", [b"", HALF, SCRAPES])
def test_probes_are_answered_while_strangers_come_again_and_again(server: MetricsServer, say: bytes) -> None:
    """As fast as another process can, each as soon as it was put out: more than the server has room for."""
    command = [sys.executable, "-c", STRANGERS, *server.address.rsplit(":", 1), say.decode(), str(2 * MAX_CONNECTIONS)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as strangers:
        try:
            assert strangers.stdout is not None and strangers.stdout.readline() == b"they come\n"
            assert_probes_are_answered(server, 5)
        finally:
            strangers.kill()


def test_many_scrapes_cost_one_page_and_a_rest(server: MetricsServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Strangers who ask without a pause keep the process busy for a fifth of the time, and get what is true then."""
    made: list[tuple[float, float]] = []
    real = exposition.generate_latest

    def slowly(registry: CollectorRegistry) -> bytes:
        begun = time.monotonic()
        until = begun + 0.01
        while time.monotonic() < until:
            page = real(registry)
        made.append((begun, time.monotonic()))
        return page

    monkeypatch.setattr(exposition, "generate_latest", slowly)
    monkeypatch.setattr(exposition, "MAX_REST_S", WAIT_S)
    with ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(get, server, "/metrics") for _ in range(40)]
        assert all(answer.result()[0] == 200 for answer in answers)
    assert len(made) < 40
    for (begun, ended), (next_begun, _) in pairwise(made):
        assert next_begun - ended >= RESTS * (ended - begun) * 0.99


def test_a_request_that_comes_byte_by_byte_has_one_deadline(server: MetricsServer) -> None:
    """From the connection to its last byte, however alive it looks meanwhile; so does the next one over it."""
    with slow_clients(server, 1, HALF) as [client]:
        begun = time.monotonic()
        client.settimeout(0.1)
        while time.monotonic() - begun < WAIT_S:
            try:
                client.sendall(b"x")
                if not client.recv(1):
                    break
            except TimeoutError:
                continue
            except OSError:
                break
        assert time.monotonic() - begun < WAIT_S
    answer = talk(server, b"GET /livez HTTP/1.0\r\nConnection: keep-alive\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 200")


def test_strangers_raise_no_number_of_threads_or_descriptors(server: MetricsServer) -> None:
    get(server, "/metrics")
    threads, files = threading.active_count(), len(os.listdir("/proc/self/fd"))
    count = MAX_CONNECTIONS + 100
    with slow_clients(server, count, b"GET "):
        assert get(server, "/livez")[0] == 200
        assert threading.active_count() == threads
        assert len(os.listdir("/proc/self/fd")) - files <= count + MAX_CONNECTIONS + 1


def test_a_failure_of_ours_is_logged_and_answered(
    server: MetricsServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(registry: CollectorRegistry) -> bytes:
        raise ValueError("a collector's bug")

    monkeypatch.setattr(exposition, "generate_latest", fails)
    assert get(server, "/metrics")[0] == 500
    assert "a collector's bug" in caplog.text
    monkeypatch.undo()
    assert get(server, "/metrics")[0] == 200


def test_a_port_in_use_is_named(server: MetricsServer) -> None:
    host, _, port = server.address.rpartition(":")
    with pytest.raises(ConfigError, match=f"metrics cannot listen on 127.0.0.1:{port}"):
        MetricsServer(host, int(port), process_registry("ffn"), lambda: (True, ""))


def test_close_frees_the_port_and_the_thread_and_may_be_repeated(server: MetricsServer) -> None:
    host, _, port = server.address.rpartition(":")
    server.close()
    server.close()
    assert not any(thread.name.startswith("metrics") for thread in threading.enumerate())
    socket.create_server((host, int(port))).close()

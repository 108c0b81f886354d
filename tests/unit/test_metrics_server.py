"""The tiny HTTP thread of each worker: metrics, probes, strangers, its end."""

from __future__ import annotations

import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress

import pytest
from prometheus_client import Gauge

from afd.errors import ConfigError
from afd.metrics import MAX_CONNECTIONS, MetricsServer, process_registry

WAIT_S = 10.0
KUBELET_WAITS_S = 5.0  # for a liveness probe of the chart


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

    def endless(query: Mapping[str, str]) -> Iterator[bytes]:
        while True:
            yield b"x" * (1 << 16)

    server = MetricsServer("127.0.0.1", 0, registry, probe, {"/endless": endless})
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


def test_a_silent_client_does_not_hold_the_thread_for_ever(server: MetricsServer) -> None:
    host, _, port = server.address.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=WAIT_S):
        assert get(server, "/livez")[0] == 200


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


@pytest.mark.parametrize("say", [b"", b"GET /livez HTTP/1.0\r\nX: ", b"GET /endless HTTP/1.0\r\n\r\n"])
@pytest.mark.parametrize("count", [1, 3 * MAX_CONNECTIONS])
def test_probes_are_answered_while_others_are_slow(server: MetricsServer, count: int, say: bytes) -> None:
    """However many they are, whether they say nothing, half a request, or do not read a long answer."""
    with slow_clients(server, count, say):
        for _ in range(20):
            begun = time.monotonic()
            assert get(server, "/livez") == (200, "ok\n")
            assert time.monotonic() - begun < KUBELET_WAITS_S, "it waited for the others"


def test_a_request_that_comes_byte_by_byte_has_one_deadline(server: MetricsServer) -> None:
    """From the connection to its last byte, however alive it looks meanwhile; so does the next one over it."""
    with slow_clients(server, 1, b"GET /livez HTTP/1.0\r\nX: ") as [client]:
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
    with slow_clients(server, 1, b"GET /livez HTTP/1.0\r\nConnection: keep-alive\r\n\r\n") as [client]:
        answer = b""
        while data := client.recv(4096):
            answer += data
        assert answer.startswith(b"HTTP/1.0 200")


def test_a_number_of_threads_that_strangers_cannot_raise(server: MetricsServer) -> None:
    before = threading.active_count()
    with slow_clients(server, 4 * MAX_CONNECTIONS, b"GET "):
        assert get(server, "/livez")[0] == 200
        until = time.monotonic() + WAIT_S
        while threading.active_count() > before + MAX_CONNECTIONS and time.monotonic() < until:
            time.sleep(0.01)
        assert threading.active_count() <= before + MAX_CONNECTIONS


def test_a_port_in_use_is_named(server: MetricsServer) -> None:
    host, _, port = server.address.rpartition(":")
    with pytest.raises(ConfigError, match=f"metrics cannot listen on 127.0.0.1:{port}"):
        MetricsServer(host, int(port), process_registry("ffn"), lambda: (True, ""))


def test_close_frees_the_port_and_the_thread_and_may_be_repeated(server: MetricsServer) -> None:
    host, _, port = server.address.rpartition(":")
    server.close()
    server.close()
    assert not any(thread.name == "metrics" for thread in threading.enumerate())
    socket.create_server((host, int(port))).close()

"""The tiny HTTP thread of each worker: metrics, probes, strangers, its end."""

from __future__ import annotations

import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest
from prometheus_client import Gauge

from afd.errors import ConfigError
from afd.metrics import MetricsServer, process_registry

WAIT_S = 10.0


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


def test_a_silent_client_does_not_hold_the_thread_for_ever(server: MetricsServer) -> None:
    host, _, port = server.address.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=WAIT_S):
        assert get(server, "/livez")[0] == 200


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

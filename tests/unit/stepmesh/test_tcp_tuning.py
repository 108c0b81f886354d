"""TCP connections between ranks of one host."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from stepmesh.transports.names import resolve
from stepmesh.transports.sockets import dial_tcp, listen_tcp, tune_local

FRAME_BYTES = 150_000


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as opened:
        yield opened


def connected(stack: ExitStack, host: str) -> tuple[socket.socket, socket.socket]:
    """A connection as a data connection is made: (dialled, accepted)."""
    listener = stack.enter_context(listen_tcp(host, 0))
    dialled = stack.enter_context(dial_tcp(resolve(host, listener.getsockname()[1])))
    listener.setblocking(True)
    accepted = stack.enter_context(listener.accept()[0])
    return dialled, accepted


def congestion_control(sock: socket.socket) -> bytes:
    return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).rstrip(b"\0")


def test_both_ends_on_one_host_take_a_frame_at_once_and_are_not_paced(stack: ExitStack) -> None:
    for sock in connected(stack, "127.0.0.1"):
        tune_local(sock, FRAME_BYTES)
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) >= FRAME_BYTES
        if "reno" in Path("/proc/sys/net/ipv4/tcp_available_congestion_control").read_text(encoding="ascii"):
            assert congestion_control(sock) == b"reno"


def test_a_frame_that_the_system_would_not_hold_leaves_the_buffer_alone(stack: ExitStack) -> None:
    dialled, _ = connected(stack, "127.0.0.1")
    before = dialled.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
    tune_local(dialled, 1 << 40)
    assert dialled.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) == before


def test_other_peers_are_left_to_the_system(stack: ExitStack) -> None:
    listener = stack.enter_context(listen_tcp("127.0.0.1", 0))
    elsewhere = stack.enter_context(socket.socket())
    elsewhere.bind(("127.0.0.2", 0))  # stands for another host's address
    elsewhere.connect(listener.getsockname())
    before = congestion_control(elsewhere), elsewhere.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
    tune_local(elsewhere, FRAME_BYTES)
    assert (congestion_control(elsewhere), elsewhere.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)) == before


def test_one_that_is_not_connected_is_no_error() -> None:
    with socket.socket() as sock:
        tune_local(sock, FRAME_BYTES)

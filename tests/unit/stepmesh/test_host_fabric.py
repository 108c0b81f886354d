"""The real outside world: fallback and its reasons, blocking, waking, running out of descriptors."""

from __future__ import annotations

import errno
import os
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from stepmesh import (
    Address,
    CombineArrived,
    CombineMeta,
    ConfigError,
    DispatchArrived,
    Member,
    Mesh,
    PayloadLayout,
    PeerDown,
    PeerUp,
    TransportError,
    WireDtype,
)
from stepmesh.transports import host
from stepmesh.transports.base import Wakeups
from tests.contract.world import LIMIT_S, Holdings, World, attention, ffn, make_parts

A0, F0 = attention(0), ffn(0)


@pytest.fixture
def world() -> Iterator[World]:
    before = Holdings.now()
    world = World("auto")
    yield world
    world.close()
    assert Holdings.now() == before


def transports_of(world: World) -> tuple[str, str]:
    peer = world.meshes[A0].stats()["peers"]["ffn/0"]
    return peer["transport"], peer["transport_reason"]


def connect(world: World, address: Address | None = None) -> None:
    """Connect A0 to F0, by another address if one is given."""
    known = world.member(F0)
    world.meshes[A0].set_members(1, [Member(F0, known.incarnation, address or known.address)])
    world.meshes[F0].set_members(1, [world.member(A0)])
    world.until_connected()
    world.exchange(A0, [F0], make_parts(3))


def test_auto_takes_shared_memory_on_the_same_host(world: World) -> None:
    world.add(A0)
    world.add(F0)
    connect(world)
    assert transports_of(world) == ("shm", "same host: the peer's UNIX socket connects")


@pytest.mark.parametrize("unix", ["", "stepmesh-no-such-listener"])
def test_auto_falls_back_to_tcp_and_says_why(world: World, unix: str) -> None:
    world.add(A0)
    world.add(F0)
    address = world.meshes[F0].address
    connect(world, Address(unix, address.host, address.port))
    transport, reason = transports_of(world)
    assert transport == "tcp"
    assert "cannot be reached" in reason


def test_one_end_may_force_tcp(world: World) -> None:
    world.add(A0)
    world.add(F0, transport="tcp")
    assert world.meshes[F0].address.unix == ""
    connect(world)
    assert transports_of(world)[0] == "tcp"


def test_a_host_without_shared_memory_offers_tcp(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "unsupported_reason", lambda: "no shared memory here")
    world.add(A0)
    world.add(F0)
    connect(world)
    assert transports_of(world)[0] == "tcp"
    with pytest.raises(ConfigError, match="no shared memory here"):
        world.add(ffn(1), transport="shm")


def test_inproc_needs_a_network(world: World) -> None:
    with pytest.raises(ConfigError, match="InprocNetwork"):
        Mesh(world.config(A0, transport="inproc"))


def test_attention_ranks_leave_no_port_open(world: World) -> None:
    mesh = world.add(A0)
    assert (mesh.address.unix, mesh.address.port) == ("", 0)


def test_a_port_in_use_is_named(world: World) -> None:
    taken = world.add(F0, transport="tcp")
    with pytest.raises(TransportError, match=f"cannot listen on 127.0.0.1:{taken.address.port}"):
        world.add(ffn(1), transport="tcp", listen_port=taken.address.port)


def test_an_unknown_host_is_named(world: World) -> None:
    with pytest.raises(TransportError, match="no-such-host"):
        world.add(F0, transport="tcp", listen_host="no-such-host.invalid")


def test_listening_everywhere_needs_an_address_to_advertise(world: World) -> None:
    with pytest.raises(ConfigError, match="set advertise_host"):
        world.add(F0, listen_host="0.0.0.0")
    world.add(F0, listen_host="0.0.0.0", advertise_host="127.0.0.1")


def test_the_advertised_host_may_differ(world: World) -> None:
    mesh = world.add(F0, advertise_host="ffn.example")
    assert mesh.address.host == "ffn.example"
    assert mesh.address.port > 0


def serve(mesh: Mesh, stop: threading.Event) -> None:
    """An FFN rank in its own thread, blocking between events."""
    while not stop.is_set():
        for event in mesh.progress(5.0):
            if isinstance(event, DispatchArrived):
                mesh.combine(event, CombineMeta(), event.parts.rows)


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_blocked_ranks_wake_for_data(world: World, transport: Any) -> None:
    """Two threads that sleep between exchanges: no wake-up is lost in a few hundred of them."""
    server, client = world.add(F0, transport=transport), world.add(A0, transport=transport)
    client.set_members(1, [world.member(F0)])
    server.set_members(1, [world.member(A0)])
    stop = threading.Event()
    thread = threading.Thread(target=serve, args=(server, stop))
    thread.start()
    try:
        while not any(isinstance(event, PeerUp) for event in client.progress(5.0)):
            pass
        for round_idx in range(200):
            parts = make_parts(round_idx % 20, 0, seed=round_idx)
            began = time.monotonic()
            world.dispatch(A0, [F0], parts, stream=round_idx % 4)
            (event,) = client.progress(5.0)
            assert isinstance(event, CombineArrived)
            assert (event.rows == parts.rows).all()
            assert time.monotonic() - began < 5.0
    finally:
        stop.set()
        server.wake()
        thread.join()


def test_progress_keeps_to_its_time(world: World) -> None:
    mesh = world.add(A0)
    began = time.monotonic()
    assert mesh.progress(0.25) == []
    assert 0.24 <= time.monotonic() - began < 5.0


def test_wake_reaches_a_blocked_main_thread(world: World) -> None:
    mesh = world.add(A0)
    threading.Timer(0.05, mesh.wake).start()
    began = time.monotonic()
    assert mesh.progress(60.0) == []
    assert time.monotonic() - began < 30.0


def test_an_idle_mesh_hardly_runs(world: World) -> None:
    """Blocked, not polling: a connected pair without work takes next to no processor time."""
    world.build(1, 1)
    before = time.thread_time()
    world.meshes[A0].progress(0.5)
    assert time.thread_time() - before < 0.1


class NoDescriptors:
    """A listener whose accept fails as the system does when the process has no descriptor left."""

    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        self.failing = True
        self.calls = 0

    def accept(self) -> tuple[socket.socket, Any]:
        self.calls += 1
        if self.failing:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return self._listener.accept()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._listener, name)


def test_running_out_of_descriptors_is_survived(
    world: World, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "_ACCEPT_PAUSE_S", 0.1)
    world.add(A0, transport="tcp", connect_timeout_s=10.0)
    mesh = world.add(F0, transport="tcp")
    fabric: Any = mesh._fabric
    (fd,) = fabric._listeners
    starving = fabric._listeners[fd] = NoDescriptors(fabric._listeners[fd])
    world.form(1)
    world.until(lambda: "cannot accept connections" in caplog.text)
    world.settle(0.25)
    assert starving.calls <= 5  # it pauses instead of spinning
    starving.failing = False
    world.until_connected()
    world.exchange(A0, [F0], make_parts(2))


def test_a_lost_data_connection_is_a_loss_of_the_pair(world: World) -> None:
    world.transport = "tcp"
    world.build(1, 1)
    world.forget()
    channel: Any = world.pair(F0, A0).channel
    channel._sock.shutdown(socket.SHUT_RDWR)
    for here in (A0, F0):
        assert world.take(here, PeerDown)[0].retryable
        assert world.take(here, PeerUp)[0].generation == 2
    world.exchange(A0, [F0], make_parts(2))


def test_large_transfers_go_on_while_the_main_thread_is_away(world: World) -> None:
    """tcp: the I/O thread receives a payload that does not fit the socket buffers while nobody calls progress."""
    world.transport = "tcp"
    layout = PayloadLayout(8192, 512, 0, WireDtype.FP32, WireDtype.FP32)  # 16 MiB
    world.build(1, 1, layout=layout)
    channel: Any = world.pair(F0, A0).channel
    parts = make_parts(512, 0, layout=layout)
    world.dispatch(A0, [F0], parts)
    deadline = time.monotonic() + 20.0
    while not channel._arrived:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    (arrival,) = world.take(F0, DispatchArrived)
    assert (arrival.parts.rows == parts.rows).all()


def test_a_peer_that_closed_in_good_order_is_not_lost_whichever_socket_tells_first(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.add(A0, transport="tcp")
    world.add(F0, transport="tcp")
    connect(world)
    mesh, channel = world.meshes[F0], world.pair(F0, A0).channel
    world.stop(A0)
    deadline = time.monotonic() + LIMIT_S
    while channel.failure is None:  # the data connection's end is seen by polling, without a look at the control link
        mesh._fabric.collect()
        assert time.monotonic() < deadline
    with monkeypatch.context() as patched:
        patched.setattr(mesh._fabric, "wait", lambda timeout_s: Wakeups())
        (down,) = mesh.progress(0.01)
    assert isinstance(down, PeerDown)
    assert not down.retryable and "closed its mesh" in down.reason

"""Who gets in: only ranks of this cluster, with this configuration, that are members. The others learn nothing."""

from __future__ import annotations

import hmac
import logging
import random
import socket
from collections.abc import Sequence

import pytest

from stepmesh import Address, HandshakeError, PayloadLayout, PeerDown, PeerUp, WireDtype
from stepmesh.handshake import Hello, Initiator
from stepmesh.transports.base import Link
from stepmesh.wire import ATTACH_MAGIC, PREFIX, ControlKind, ControlParser
from tests.contract.world import LAYOUT, World, attention, ffn, make_parts

A0, A1 = attention(0), attention(1)
F0 = ffn(0)

over_sockets = pytest.mark.parametrize("transport", ("shm", "tcp", "verbs"), indirect=True)  # strangers need them
over_tcp = pytest.mark.parametrize("transport", ("tcp",), indirect=True)


def test_another_secret_completes_no_handshake(world: World, caplog: pytest.LogCaptureFixture) -> None:
    world.add(A0)
    world.add(A1, secret=b"another clusters secret", connect_timeout_s=0.2)
    world.add(F0)
    world.form(1)
    (down,) = world.take(A1, PeerDown)
    assert "another cluster secret?" in down.reason
    assert down.retryable
    world.until(lambda: world.seen(A0, PeerUp))
    world.exchange(A0, [F0], make_parts(2))
    assert all(event.peer == A0 for event in world.seen(F0, PeerUp))
    assert world.seen(F0, PeerDown) == []
    assert world.meshes[F0].stats()["turned_away"] >= 1
    assert "the peer has another cluster secret" in caplog.text


def test_another_configuration_is_refused_by_name(world: World) -> None:
    world.add(A0)
    world.add(A1, config_hash=b"another model")
    world.add(F0)
    world.form(1)
    for rank_id, peer in ((A1, F0), (F0, A1)):
        (down,) = world.take(rank_id, PeerDown)
        assert (down.peer, down.retryable) == (peer, False)
        assert "attention/1 has" in down.reason
        assert "ffn/0 has" in down.reason
    world.until(lambda: world.seen(A0, PeerUp))
    world.exchange(A0, [F0], make_parts(2))
    world.settle(0.2)
    assert world.seen(A1, PeerDown) == []  # told once, and not tried again


def test_another_slot_geometry_is_refused_by_field(world: World) -> None:
    world.add(A0, layout=PayloadLayout(LAYOUT.hidden, 32, 4, WireDtype.FP32, WireDtype.BF16))
    world.add(F0)
    world.form(1)
    (down,) = world.take(A0, PeerDown)
    assert not down.retryable
    assert "combine_dtype 2 against 1" in down.reason
    assert "max_tokens 32 against 64" in down.reason


@over_tcp
def test_no_transport_in_common_is_refused(world: World) -> None:
    world.add(A0, transport="shm", connect_timeout_s=0.1)
    world.add(F0)
    world.form(1)
    (down,) = world.take(A0, PeerDown)
    assert "'shm' is forced" in down.reason


def test_a_process_that_is_no_member_stays_outside(world: World) -> None:
    world.add(A0)
    world.add(F0)
    impostor = world.config(A0)
    world.meshes[F0].set_members(1, [world.member(A0)])
    world.stop(A0)
    world.add(A0, incarnation=impostor.incarnation)
    world.meshes[A0].set_members(1, [world.member(F0)])
    world.settle(0.2)
    assert world.seen(A0, PeerUp) == world.seen(F0, PeerUp) == []


def connect(world: World) -> list[socket.socket]:
    """A stranger's connections to every door of F0."""
    address = world.meshes[F0].address
    doors = []
    if address.unix:
        sock = socket.socket(socket.AF_UNIX)
        sock.connect("\0" + address.unix)
        doors.append(sock)
    if address.port:
        doors.append(socket.create_connection((address.host, address.port)))
    for sock in doors:
        sock.setblocking(False)
    return doors


def gets_nothing_but_a_close(world: World, sock: socket.socket) -> None:
    """Not one byte comes back."""

    def closed() -> bool:
        try:
            assert sock.recv(4096) == b""
        except BlockingIOError:
            return False
        except ConnectionResetError:
            pass
        return True

    try:
        world.until(closed)
    finally:
        sock.close()


GARBAGE = {
    "http": b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "zeros": bytes(4096),
    "ones": b"\xff" * 4096,
    "tls": bytes.fromhex("16030100c8010000c40303"),
    "a hello under no key": PREFIX.pack(ControlKind.HELLO, 0, 70) + b"SMSH\x01\x00" + bytes(64),
    "a heartbeat": PREFIX.pack(ControlKind.HEARTBEAT, 0, 9) + bytes(9),
    "a proof out of turn": PREFIX.pack(ControlKind.PROOF, 0, 64) + bytes(64),
    "a data connection of nobody": ATTACH_MAGIC + bytes(32),
    "a giant frame": PREFIX.pack(ControlKind.PROOF, 0, 65535) + bytes(1000),
}


@over_sockets
@pytest.mark.parametrize("name", GARBAGE)
def test_garbage_gets_a_closed_connection(world: World, name: str) -> None:
    world.build(1, 1)
    for sock in connect(world):
        sock.send(GARBAGE[name])
        gets_nothing_but_a_close(world, sock)
    world.exchange(A0, [F0], make_parts(2))
    assert world.seen(F0, PeerDown) == []


@over_sockets
def test_a_port_scan_leaves_no_trace(world: World) -> None:
    world.build(1, 1)
    for _ in range(20):
        for sock in connect(world):
            sock.close()
    world.settle(0.05)
    world.exchange(A0, [F0], make_parts(2))


@over_sockets
def test_silent_strangers_are_shown_out(world: World) -> None:
    world.build(1, 1, connect_timeout_s=0.3)
    for sock in connect(world):
        sock.send(b"\x01")  # the first byte of a hello, and then nothing
        gets_nothing_but_a_close(world, sock)
    world.exchange(A0, [F0], make_parts(2))


@over_sockets
def test_a_crowd_of_strangers_does_not_lock_members_out(world: World) -> None:
    world.add(F0, max_pending=4)
    world.meshes[F0].set_members(1, [])
    crowd = []
    for _ in range(10):
        crowd += connect(world)
        world.turn()
    world.add(A0)
    world.form(2)
    world.until_connected()
    world.exchange(A0, [F0], make_parts(2), epoch=2)
    for sock in crowd:
        sock.close()


@over_sockets
def test_a_recorded_handshake_is_worth_nothing(world: World) -> None:
    """An eavesdropper plays a member's frames back, word for word."""
    world.add(A0)
    world.add(F0)
    world.form(1)
    recorded: list[bytes] = []
    mesh = world.meshes[A0]
    connect_link = mesh._fabric.connect

    def recording(address: Address) -> Link:
        link = connect_link(address)
        assert link is not None
        send = link.send

        def send_and_record(frame: bytes, fds: Sequence[int] = ()) -> None:
            recorded.append(frame)
            send(frame, fds)

        link.send = send_and_record  # type: ignore[method-assign]
        return link

    mesh._fabric.connect = recording  # type: ignore[method-assign]
    world.until_connected()
    kinds = [frame[0] for frame in recorded[:3]]
    assert kinds == [ControlKind.HELLO, ControlKind.PROOF, ControlKind.ATTACH]
    world.forget()
    for sock in connect(world):
        sock.send(recorded[0])
        answer = bytearray()

        def answered(sock: socket.socket = sock, answer: bytearray = answer) -> bool:
            try:
                answer.extend(sock.recv(4096))
            except BlockingIOError:
                return False
            return True

        world.until(answered)
        parser = ControlParser()
        parser.feed(bytes(answer))
        frame = parser.next_frame()
        assert frame is not None
        assert frame.kind == ControlKind.CHALLENGE  # another nonce than the recorded proof answers
        sock.send(recorded[1])
        gets_nothing_but_a_close(world, sock)
    world.settle(0.05)
    assert world.events[F0] == []
    world.exchange(A0, [F0], make_parts(2))


@over_sockets
def test_mutated_hellos_are_never_accepted(world: World, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, logger="stepmesh")
    world.build(1, 1)
    world.forget()
    config = world.meshes[A0].config
    hello = Hello(A0, "x", "00", {}, ("tcp",), 1, F0, "y")
    rng = random.Random(5)
    genuine = Initiator(config.secret, bytes(range(32)), hello).start()
    for _ in range(60):
        frame = bytearray(genuine)
        for _ in range(rng.randint(1, 3)):
            frame[rng.randrange(len(frame))] ^= 1 << rng.randrange(8)
        if frame == genuine:
            continue
        for sock in connect(world):
            sock.send(frame)
            sock.shutdown(socket.SHUT_WR)
            gets_nothing_but_a_close(world, sock)
    assert world.events[F0] == []
    world.exchange(A0, [F0], make_parts(2))


@over_tcp
def test_a_data_connection_needs_the_sessions_token(world: World) -> None:
    world.build(1, 1)
    address = world.meshes[F0].address
    guess = hmac.digest(world.meshes[F0].config.secret, b"data connection", "sha256")
    sock = socket.create_connection((address.host, address.port))
    sock.setblocking(False)
    sock.send(ATTACH_MAGIC + guess)
    gets_nothing_but_a_close(world, sock)
    world.exchange(A0, [F0], make_parts(2))


@over_tcp
def test_many_data_connections_of_nobody_are_counted_and_do_not_fill_the_log(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    world.build(1, 1)
    address = world.meshes[F0].address
    for _ in range(100):
        sock = socket.create_connection((address.host, address.port))
        sock.setblocking(False)
        sock.send(ATTACH_MAGIC + bytes(32))
        gets_nothing_but_a_close(world, sock)
    lines = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(lines) == 1 and "belongs to no session" in lines[0].getMessage()
    assert world.meshes[F0].stats()["turned_away"] == 100


def test_handshake_error_says_whether_to_retry() -> None:
    assert HandshakeError("x").retryable
    assert not HandshakeError("x", retryable=False).retryable

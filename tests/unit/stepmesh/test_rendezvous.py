"""Meeting by one address: everybody gets what everybody brought, strangers get nothing, nobody waits for the dead."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stepmesh.errors import ProtocolError, TransportError
from stepmesh.rendezvous import RendezvousClient, RendezvousServer, wire
from stepmesh.rendezvous.server import Gatherings
from tests.contract.world import Holdings

SECRET = b"a cluster secret"
LIMIT_S = 20.0
SOON_S = 0.3


@pytest.fixture
def server() -> Iterator[RendezvousServer]:
    before = Holdings.now()
    with RendezvousServer("127.0.0.1", 0, SECRET) as server:
        yield server
    assert Holdings.now() == before


def client(server: RendezvousServer, who: str, secret: bytes = SECRET) -> RendezvousClient:
    return RendezvousClient(*server.address, secret, who, LIMIT_S)


def together(*calls: Callable[[], Any]) -> list[Any]:
    """Run all at once; results, or the exception, in order."""
    results: list[Any] = [None] * len(calls)

    def run(place: int, call: Callable[[], Any]) -> None:
        try:
            results[place] = call()
        except (TransportError, ProtocolError) as error:
            results[place] = error

    threads = [threading.Thread(target=run, args=item) for item in enumerate(calls)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT_S)
        assert not thread.is_alive()
    return results


def test_everybody_gets_what_everybody_brought(server: RendezvousServer) -> None:
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(client(server, f"rank {i}")) for i in range(5)]
        for name in ("first", "second", "first"):  # a name is free again once its gathering is over
            calls = [partial(c.gather, name, 5, {"i": i}, timeout_s=LIMIT_S) for i, c in enumerate(clients)]
            results = together(*calls)
            assert results == [{f"rank {i}": {"i": i} for i in range(5)}] * 5
    assert server.wait_left(5, LIMIT_S)


def test_gatherings_of_some_do_not_disturb_others(server: RendezvousServer) -> None:
    with client(server, "a") as a, client(server, "b") as b, client(server, "c") as c:
        results = together(
            lambda: a.gather("both", 2, 1, timeout_s=LIMIT_S),
            lambda: b.gather("both", 2, 2, timeout_s=LIMIT_S),
            lambda: c.gather("alone", 1, 3, timeout_s=LIMIT_S),
        )
        assert results == [{"a": 1, "b": 2}, {"a": 1, "b": 2}, {"c": 3}]


def test_nobody_waits_for_one_that_has_left(server: RendezvousServer) -> None:
    with client(server, "a") as a:
        b = client(server, "b")
        with pytest.raises(TransportError, match="not all 3 participants came within"):
            b.gather("all", 3, timeout_s=0.05)

        def b_leaves(_: float) -> None:
            with client(server, "c") as c:
                c.gather("probe", 1, timeout_s=LIMIT_S)  # answered: the server has seen before that "a" waits
            b.close()

        with pytest.raises(TransportError, match="b left while 1 of 3 waited"):
            a.gather("all", 3, timeout_s=LIMIT_S, meanwhile=b_leaves)


def test_time_passes_in_the_callers_way(server: RendezvousServer) -> None:
    with client(server, "a") as a, client(server, "b") as b:
        waits: list[float] = []

        def meanwhile(seconds: float) -> None:
            waits.append(seconds)
            if len(waits) == 3:
                together(lambda: b.gather("x", 2, timeout_s=LIMIT_S))

        assert a.gather("x", 2, 7, timeout_s=LIMIT_S, meanwhile=meanwhile) == {"a": 7, "b": None}
        assert all(0 < seconds <= LIMIT_S for seconds in waits)


def test_contradictions_are_told_to_who_makes_them(server: RendezvousServer) -> None:
    with client(server, "a") as a, client(server, "b") as b:
        with pytest.raises(TransportError, match="not all 2"):
            a.gather("x", 2, timeout_s=0.02)
        with pytest.raises(TransportError, match="b expects 3 participants, others 2"):
            b.gather("x", 3, timeout_s=LIMIT_S)
        with pytest.raises(ProtocolError, match="another participant called a"):
            RendezvousClient(*server.address, SECRET, "a", SOON_S)


def test_another_secret_gets_nowhere(server: RendezvousServer) -> None:
    with pytest.raises(ProtocolError, match="another secret"):
        RendezvousClient(*server.address, b"another secret!!", "a", SOON_S)


@pytest.mark.parametrize("say", [b"", wire.hello(SECRET, bytes(range(32)))], ids=["idle", "replayed"])
def test_strangers_do_not_keep_participants_out(server: RendezvousServer, say: bytes) -> None:
    """More of them than there are places, and again and again; a hello that was seen on the wire makes nobody known."""
    with client(server, "early") as early, contextlib.ExitStack() as strangers:
        for round_number in range(3):
            for _ in range(100):
                sock = strangers.enter_context(socket.create_connection(server.address, timeout=LIMIT_S))
                sock.sendall(say)
            name = f"late {round_number}"
            with client(server, name) as late:
                both = together(*(partial(one.gather, name, 2, timeout_s=LIMIT_S) for one in (early, late)))
                assert both[0] == {"early": None, name: None}


def test_one_that_only_repeats_a_hello_is_dropped_in_time(
    server: RendezvousServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stepmesh.rendezvous.server._STRANGER_LIMIT_S", SOON_S)
    with socket.create_connection(server.address, timeout=LIMIT_S) as stranger:
        stranger.sendall(wire.hello(SECRET, bytes(32)))
        while stranger.recv(1000):
            pass


def test_a_participant_that_is_put_out_as_a_stranger_comes_again() -> None:
    """A close before it is known is not an answer: it has its whole time to get in."""
    with socket.create_server(("127.0.0.1", 0)) as shut:
        address = shut.getsockname()

        def put_out_once() -> None:
            shut.accept()[0].close()
            shut.close()
            servers.append(RendezvousServer(*address, SECRET))

        servers: list[RendezvousServer] = []
        thread = threading.Thread(target=put_out_once)
        thread.start()
        try:
            RendezvousClient(*address, SECRET, "a", LIMIT_S).close()
        finally:
            thread.join()
            for server in servers:
                server.close()


def test_a_stranger_hears_nothing_but_a_close(server: RendezvousServer) -> None:
    for data in (b"GET / HTTP/1.1\r\n" * 10, wire.hello(b"x" * 16, bytes(32)), wire.MAGIC + bytes(64)):
        with socket.create_connection(server.address, timeout=LIMIT_S) as sock:
            sock.sendall(data)
            with contextlib.suppress(ConnectionResetError):
                assert sock.recv(100) == b""
    with client(server, "a") as a:
        assert a.gather("x", 1, timeout_s=LIMIT_S) == {"a": None}


def test_a_replayed_session_is_refused(server: RendezvousServer) -> None:
    nonce = bytes(range(32))
    recorded = wire.FrameCodec(SECRET, nonce, bytes(32), is_client=True)
    with socket.create_connection(server.address, timeout=LIMIT_S) as sock:
        sock.sendall(wire.hello(SECRET, nonce) + recorded.encode({"who": "a", "name": "x", "size": 1}))
        data = bytearray()
        with contextlib.suppress(ConnectionResetError):
            while chunk := sock.recv(1000):
                data += chunk
        assert len(data) <= wire.WELCOME_BYTES  # a nonce of its own, then the close


def test_nobody_there_is_named() -> None:
    with pytest.raises(TransportError, match=r"nobody answers at the rendezvous 127\.0\.0\.1:1"):
        RendezvousClient("127.0.0.1", 1, SECRET, "a", 0.05)


def test_a_rendezvous_that_closes_ends_the_wait() -> None:
    server = RendezvousServer("127.0.0.1", 0, SECRET)
    with client(server, "a") as a, pytest.raises(TransportError, match="closed the connection"):
        a.gather("x", 2, timeout_s=LIMIT_S, meanwhile=lambda _: server.close())


@given(st.lists(st.binary(max_size=40), max_size=6), st.lists(st.integers(1, 30), max_size=20))
@settings(max_examples=60, derandomize=True, deadline=None)
def test_frames_cross_in_any_pieces(payloads: list[bytes], cuts: list[int]) -> None:
    ours, theirs = (wire.FrameCodec(SECRET, b"c", b"s", is_client=side) for side in (True, False))
    messages = [{"x": payload.hex()} for payload in payloads]
    stream = b"".join(ours.encode(message) for message in messages)
    got = []
    for cut in [*cuts, len(stream)]:
        got += theirs.decode(stream[:cut])
        stream = stream[cut:]
    assert got == messages


@given(st.data())
@settings(max_examples=60, derandomize=True, deadline=None)
def test_a_changed_frame_is_refused(data: st.DataObject) -> None:
    ours, theirs = (wire.FrameCodec(SECRET, b"c", b"s", is_client=side) for side in (True, False))
    frame = bytearray(ours.encode({"x": 1}))
    place = data.draw(st.integers(4, len(frame) - 1))
    frame[place] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(ProtocolError):
        theirs.decode(bytes(frame))


def test_frames_are_not_replayed_or_reflected() -> None:
    ours, theirs = (wire.FrameCodec(SECRET, b"c", b"s", is_client=side) for side in (True, False))
    frame = ours.encode({"x": 1})
    assert theirs.decode(frame) == [{"x": 1}]
    with pytest.raises(ProtocolError):
        theirs.decode(frame)
    with pytest.raises(ProtocolError):
        ours.decode(frame)


def test_open_gatherings_are_bounded() -> None:
    gatherings = Gatherings()
    for number in range(1024):
        assert gatherings.come("a", f"gathering {number}", 2, None) == []
    (answer,) = gatherings.come("a", "one more", 2, None)
    assert "too many" in answer.message["error"]
    assert gatherings.leave("a") == []
    assert gatherings.come("a", "one more", 1, 5)[0].message == {"name": "one more", "brought": {"a": 5}}

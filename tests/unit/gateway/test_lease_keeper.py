"""Leases come from a thread: also while this one, which would be the event loop's, does nothing but wait."""

import contextlib

import zmq

from afd.gateway import lease_keeper
from afd.gateway.lease_keeper import LeaseKeeper
from afd.messages.serving import Lease, gateway_message_decoder, lease_identity
from afd.messages.serving_sockets import server_socket

SECRET = b"a secret for tests, long enough"
WAIT_MS = 10_000


@contextlib.contextmanager
def worker():
    """An attention worker's socket and its endpoint."""
    with zmq.Context() as context:
        socket = server_socket(context, SECRET, 1 << 20)
        port = socket.bind_to_random_port("tcp://127.0.0.1")
        try:
            yield socket, f"tcp://127.0.0.1:{port}"
        finally:
            socket.close(linger=0)


def assert_lease(socket):
    assert socket.poll(WAIT_MS)
    identity, frame = socket.recv_multipart()
    assert identity == lease_identity("g1")
    assert gateway_message_decoder.decode(frame) == Lease("g1", 3.0)


def test_leases_are_renewed_at_every_worker(monkeypatch):
    monkeypatch.setattr(lease_keeper, "INTERVAL_S", 0.01)
    with worker() as (first, first_endpoint), worker() as (second, second_endpoint):
        with contextlib.closing(LeaseKeeper(SECRET, "g1", 3.0)) as keeper:
            keeper.follow({"a": first_endpoint, "bad": "no endpoint"})
            for _ in range(3):
                assert_lease(first)
            keeper.follow({"b": second_endpoint})
            assert_lease(second)
        while second.poll(100):
            second.recv_multipart()
        assert not second.poll(100)


def test_an_event_loop_that_is_stuck_loses_its_leases(monkeypatch):
    monkeypatch.setattr(lease_keeper, "INTERVAL_S", 0.01)
    monkeypatch.setattr(lease_keeper, "MAX_BUSY_S", -1.0)
    with worker() as (socket, endpoint), contextlib.closing(LeaseKeeper(SECRET, "g1", 3.0)) as keeper:
        keeper.follow({"a": endpoint})
        assert not socket.poll(300)
        monkeypatch.setattr(lease_keeper, "MAX_BUSY_S", 1e9)
        keeper.beat()
        assert_lease(socket)

"""The serving sockets: members of the cluster talk, strangers do not get a word in, whatever keys they bring."""

import pytest
import zmq
from zmq.utils.monitor import recv_monitor_message

from afd.secrets import zmq_keypair
from afd.zmq_sockets import client_socket, server_socket

SECRET = b"the secret of this cluster"


class Wiring:
    """Sockets of one test; all are closed at its end."""

    def __init__(self):
        self.ctx = zmq.Context()
        self.sockets = []
        self.server = self.keep(server_socket(self.ctx, SECRET, 8192))
        self.server_events = self.keep(self.server.get_monitor_socket())
        self.endpoint = f"tcp://127.0.0.1:{self.server.bind_to_random_port('tcp://127.0.0.1')}"

    def keep(self, socket):
        self.sockets.append(socket)
        return socket

    def member(self):
        socket = self.keep(client_socket(self.ctx, SECRET, b"gateway-1"))
        socket.connect(self.endpoint)
        return socket

    def stranger(self, server_key):
        socket = self.keep(self.ctx.socket(zmq.DEALER))
        if server_key is not None:
            socket.curve_publickey, socket.curve_secretkey = zmq.curve_keypair()
            socket.curve_serverkey = server_key
        socket.connect(self.endpoint)
        return socket

    def wait_event(self, events):
        """Wait for one of `events` at the server; returns all events seen on the way."""
        seen = []
        while not (seen and seen[-1] in events):
            assert self.server_events.poll(8000), f"only {seen} happened"
            seen.append(recv_monitor_message(self.server_events)["event"])
        return seen

    def close(self):
        self.server.disable_monitor()
        for socket in self.sockets:
            socket.close(linger=0)
        self.ctx.term()


@pytest.fixture
def wiring():
    wiring = Wiring()
    yield wiring
    wiring.close()


def test_both_ways_between_members(wiring):
    client = wiring.member()
    client.send(b"hello")
    assert wiring.server.poll(5000)
    assert wiring.server.recv_multipart() == [b"gateway-1", b"hello"]
    wiring.server.send_multipart([b"gateway-1", b"tokens"])
    assert client.poll(5000)
    assert client.recv() == b"tokens"


@pytest.mark.parametrize(
    "server_key", [None, zmq_keypair(b"another cluster secret", "worker").public], ids=["no keys", "another cluster"]
)
def test_a_stranger_does_not_complete_the_handshake(wiring, server_key):
    wiring.stranger(server_key).send(b"let me in")
    failed = {zmq.Event.HANDSHAKE_FAILED_PROTOCOL, zmq.Event.HANDSHAKE_FAILED_NO_DETAIL, zmq.Event.DISCONNECTED}
    assert zmq.Event.HANDSHAKE_SUCCEEDED not in wiring.wait_event(failed)
    client = wiring.member()
    client.send(b"hello")
    assert wiring.server.poll(5000)
    assert wiring.server.recv_multipart() == [b"gateway-1", b"hello"]
    assert not wiring.server.poll(0)


def test_a_gateway_that_reconnects_takes_its_place_over(wiring):
    wiring.member().send(b"one")
    assert wiring.server.poll(5000)
    wiring.server.recv_multipart()
    second = wiring.member()
    second.send(b"two")
    assert wiring.server.poll(5000)
    assert wiring.server.recv_multipart() == [b"gateway-1", b"two"]
    wiring.server.send_multipart([b"gateway-1", b"answer"])
    assert second.poll(5000)
    assert second.recv() == b"answer"


def test_a_message_is_bounded_by_the_context(wiring):
    """What a connection may make the worker hold, before it has proved anything too."""
    assert wiring.server.maxmsgsize < 400 << 10

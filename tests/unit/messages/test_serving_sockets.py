"""The serving sockets: members of the cluster talk, strangers do not get a word in, whatever keys they bring."""

import socket
from contextlib import ExitStack, suppress

import psutil
import pytest
import zmq
from zmq.utils.monitor import recv_monitor_message

from afd.config import resolve_config
from afd.errors import ConfigError
from afd.messages.codec import encode
from afd.messages.keys import zmq_keypair
from afd.messages.serving import MAX_MESSAGE_BYTES, Lease, Submit, to_worker_bytes
from afd.messages.serving_sockets import client_socket, server_socket
from afd.types import SamplingParams

SECRET = b"the secret of this cluster"
MAX_BYTES = 300 << 10
WAIT_S = 10.0


class Wiring:
    """Sockets of one test; all are closed at its end."""

    def __init__(self):
        self.ctx = zmq.Context()
        self.sockets = []
        self.server = self.keep(server_socket(self.ctx, SECRET, MAX_BYTES))
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
        for one in self.sockets:
            one.close(linger=0)
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


def command_frame(num_bytes):
    """A ZMTP greeting with mechanism CURVE, and the head of a command of that size."""
    greeting = b"\xff" + bytes(8) + b"\x7f" + b"\x03\x01" + b"CURVE".ljust(20, b"\0") + bytes(32)
    return greeting + b"\x06" + num_bytes.to_bytes(8, "big")


@pytest.mark.parametrize("announced", [MAX_BYTES, MAX_BYTES + 1, 60 << 20, (1 << 63) - 1])
def test_memory_before_authentication_is_bounded(wiring, announced):
    """However much strangers announce and send, the worker holds no more of it than a message may have."""
    before = psutil.Process().memory_info().rss
    port = int(wiring.endpoint.rpartition(":")[2])
    with ExitStack() as stack:
        strangers = [stack.enter_context(socket.create_connection(("127.0.0.1", port))) for _ in range(6)]
        for stranger in strangers:
            stranger.settimeout(WAIT_S)
            stranger.sendall(command_frame(announced))
        for stranger in strangers:
            left = min(announced - 1, 30 << 20)
            with suppress(ConnectionError):
                while left:
                    left -= stranger.send(bytes(min(left, 1 << 16)))
        client = wiring.member()
        client.send(b"hello")  # the socket's thread has come past what the strangers sent before
        assert wiring.server.poll(5000)
        assert psutil.Process().memory_info().rss - before < 6 * (MAX_BYTES + (2 << 20))
        if announced > MAX_BYTES:
            wiring.wait_event({zmq.Event.DISCONNECTED})


def config_with(**values):
    return resolve_config(None, {key.replace("__", "."): value for key, value in values.items()})


def test_a_message_holds_a_request_as_long_as_the_context_and_the_ids_of_all_requests():
    for context, num_waiting in ((8192, 1024), (131_072, 1), (1 << 20, 1), (64, 200_000)):
        config = config_with(attention__max_waiting=num_waiting)
        limit = to_worker_bytes(config, context)
        ids = [2**32 - 1] * context
        bias = tuple((2**32 - 1, -0.1) for _ in range(1024))
        sampling = SamplingParams(context, 2**64 - 1, logit_bias=bias, stop_token_ids=tuple(ids[:1024]))
        assert len(encode(Submit("x" * 48, 1, ids, [], sampling))) < limit
        num_requests = num_waiting + config.attention.max_num_seqs
        assert len(encode(Lease("g" * 32, 5.0, ["x" * 48] * num_requests))) < limit
    assert to_worker_bytes(config_with(), 8192) < 400 << 10
    assert to_worker_bytes(config_with(model__max_context=100), 1 << 24) < 400 << 10


def test_a_size_that_makes_no_sense_is_refused_with_a_remedy():
    with pytest.raises(ConfigError, match=r"set model.max_context to at most ([0-9]+)") as refused:
        to_worker_bytes(config_with(), 1 << 24)
    advised = int(str(refused.value).split()[-1])
    assert to_worker_bytes(config_with(model__max_context=advised), 1 << 24) <= MAX_MESSAGE_BYTES
    with pytest.raises(ConfigError, match="max_waiting"):
        to_worker_bytes(config_with(attention__max_waiting=1 << 21), 8192)

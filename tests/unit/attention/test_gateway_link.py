"""The worker's socket: one message at a time, garbage, a taken port. What is said: tests/unit/sched/test_core."""

from __future__ import annotations

import random

import pytest
import zmq

from afd.attention.gateway_link import RECEIVE_BATCH, GatewayLink
from afd.errors import ConfigError
from afd.messages.codec import encode
from afd.messages.serving import Abort, Refused, Tokens, worker_message_decoder
from afd.messages.serving_sockets import client_socket, connect
from tests.fakes.worker_core import ScriptedWorker, submit

SECRET = b"s" * 32
GATEWAY = b"gw-1"
PATIENCE_S = 10.0


class Conversation:
    """A link and one gateway that is connected to it."""

    def __init__(self, endpoint: str = "tcp://127.0.0.1:*") -> None:
        self.context = zmq.Context()
        self.link = GatewayLink(SECRET, endpoint, 1 << 20)
        self.dealer = client_socket(self.context, SECRET, GATEWAY)
        connect(self.dealer, self.link.address)

    def send(self, *messages: object) -> None:
        for message in messages:
            self.dealer.send(message if isinstance(message, bytes) else encode(message))

    def received(self, count: int) -> list[object]:
        """The next `count` messages at the worker."""
        messages: list[object] = []
        while len(messages) < count:
            self.link.wait(PATIENCE_S)
            assert self.link.has_input, f"{len(messages)} of {count} messages came"
            messages += [message for gateway, message in self.link.receive() if gateway == GATEWAY]
        return messages

    def heard(self) -> object:
        """The next message at the gateway."""
        assert self.dealer.poll(PATIENCE_S * 1e3)
        return worker_message_decoder.decode(self.dealer.recv())

    def close(self) -> None:
        self.link.close()
        self.dealer.close()
        self.context.term()


@pytest.fixture
def talk():
    conversation = Conversation()
    yield conversation
    conversation.close()


def test_messages_come_with_their_gateway_and_answers_go_back_to_it(talk):
    talk.send(submit("a"))
    assert talk.received(1) == [submit("a")]
    talk.link.send([(GATEWAY, Refused("a", 0, "capacity", "full")), (b"nobody", Tokens([]))])
    talk.link.send([(GATEWAY, Tokens([]))])
    assert [talk.heard(), talk.heard()] == [Refused("a", 0, "capacity", "full"), Tokens([])]


def test_messages_are_taken_one_at_a_time(talk):
    """So that the worker can go on with its steps in the midst of a flood; nothing of it is lost."""
    talk.send(submit("a"))
    assert talk.received(1) == [submit("a")]
    talk.send(*(submit(name) for name in "bcd"))
    taken = []
    while len(taken) < 2:
        talk.link.wait(PATIENCE_S)
        taken.append(next(talk.link.receive())[1].req_id)
    assert taken == ["b", "c"]
    assert talk.received(1) == [submit("d")]


def test_a_flood_ends_a_call(talk):
    talk.send(*(submit(f"r{idx}") for idx in range(RECEIVE_BATCH + 50)))
    first = talk.received(1)
    assert len(first) <= RECEIVE_BATCH
    talk.received(RECEIVE_BATCH + 50 - len(first))


def test_what_is_no_message_is_dropped_and_the_rest_is_heard(talk):
    rng, valid = random.Random(1), encode(submit())
    for _ in range(300):
        frame = bytearray(valid)
        for _ in range(rng.randrange(1, 6)):
            frame[rng.randrange(len(frame))] = rng.randrange(256)
        talk.dealer.send(bytes(frame[: rng.randrange(len(frame) + 1)]))
    talk.dealer.send_multipart([b"", b"", b"x"])
    talk.send(Abort(["the last one"]))
    worker = ScriptedWorker.make()
    messages = []
    while Abort(["the last one"]) not in messages:
        messages += talk.received(1)
    for message in messages:
        worker.tell(message)
        for seq in worker.core.scheduler.sequences():
            assert all(0 <= token < 100 for token in seq.tokens)
            worker.tell(Abort([seq.req_id]))
    assert worker.core.scheduler.idle


def test_an_ipv6_address_is_one_like_others():
    talk = Conversation("tcp://[::1]:*")
    try:
        assert talk.link.address.startswith("tcp://[::1]:")
        talk.send(submit("a"))
        assert talk.received(1) == [submit("a")]
    finally:
        talk.close()


def test_a_port_that_is_taken_is_one_line(talk):
    with pytest.raises(ConfigError, match=r"attention.port: cannot listen on tcp://127.0.0.1:\d+"):
        GatewayLink(SECRET, talk.link.address, 1 << 20)

"""Two handshakes talking to one another, and everybody who should not be able to."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stepmesh.errors import HandshakeError, ProtocolError
from stepmesh.handshake import (
    Accepted,
    Attached,
    Established,
    Hello,
    Initiator,
    Proven,
    Reply,
    Responder,
    check_version,
)
from stepmesh.types import RankId, Role
from stepmesh.wire import ControlFrame, ControlKind, ControlParser

KEY = b"k" * 32
HELLO = Hello(
    id=RankId(Role.ATTENTION, 3),
    incarnation="abc",
    config_hash="00ff",
    geometry={"hidden": 64, "num_streams": 4},
    transports=("shm", "tcp"),
    generation=9,
    target=RankId(Role.FFN, 1),
    target_incarnation="def",
)


def frame(raw: bytes, fds: tuple[int, ...] = ()) -> ControlFrame:
    parser = ControlParser()
    parser.trusted = True
    parser.feed(raw, fds)
    parsed = parser.next_frame()
    assert parsed is not None
    return parsed


def pair(initiator_key: bytes = KEY, responder_key: bytes = KEY) -> tuple[Initiator, Responder]:
    return Initiator(initiator_key, b"i" * 32, HELLO), Responder(responder_key, b"r" * 32)


def reply(step: object) -> bytes:
    assert isinstance(step, Reply)
    return step.frame


def test_the_whole_exchange() -> None:
    initiator, responder = pair()
    challenge = reply(responder.receive(frame(initiator.start())))
    assert not responder.authenticated
    proof = reply(initiator.receive(frame(challenge)))
    assert initiator.authenticated
    step = responder.receive(frame(proof))
    assert step == Proven(HELLO)
    assert responder.authenticated
    assert responder.session_key == initiator.session_key
    accept = responder.accept("shm", "same host", {"slots": 3}, num_fds=2)
    accepted = initiator.receive(frame(accept, (7, 8)))
    assert accepted == Accepted("shm", "same host", {"slots": 3}, (7, 8))
    attached = responder.receive(frame(initiator.attach({"slots": 4}, num_fds=1), (9,)))
    assert attached == Attached({"slots": 4}, (9,))
    assert initiator.receive(frame(responder.ready())) == Established()
    assert initiator.done and responder.done


def test_session_keys_are_new_each_time() -> None:
    keys = set()
    for nonce in (b"1" * 32, b"2" * 32):
        initiator, responder = Initiator(KEY, nonce, HELLO), Responder(KEY, b"r" * 32)
        initiator.receive(frame(reply(responder.receive(frame(initiator.start())))))
        keys.add(initiator.session_key)
    assert len(keys) == 2


def test_a_responder_does_not_answer_another_secret() -> None:
    initiator, responder = pair(initiator_key=b"x" * 32)
    with pytest.raises(HandshakeError, match="another cluster secret"):
        responder.receive(frame(initiator.start()))


def test_an_initiator_tells_nothing_to_another_secret() -> None:
    initiator, _ = pair()
    initiator.start()
    # An impostor who has recorded a challenge of another session.
    other, responder = Initiator(KEY, b"j" * 32, HELLO), Responder(KEY, b"r" * 32)
    recorded = responder.receive(frame(other.start()))
    with pytest.raises(HandshakeError, match="another cluster secret"):
        initiator.receive(frame(reply(recorded)))


def test_a_replayed_proof_does_not_fit_a_fresh_challenge() -> None:
    initiator, responder = pair()
    hello = initiator.start()
    proof = reply(initiator.receive(frame(reply(responder.receive(frame(hello))))))
    fresh = Responder(KEY, b"s" * 32)
    fresh.receive(frame(hello))
    with pytest.raises(HandshakeError, match="PROOF is wrong"):
        fresh.receive(frame(proof))
    assert not fresh.authenticated


def test_a_message_cannot_be_reflected() -> None:
    """A peer without the key sends our own frames back to us."""
    initiator, _ = pair()
    hello = initiator.start()
    with pytest.raises(HandshakeError):
        initiator.receive(frame(hello))


def test_rejections_carry_reason_and_prospect() -> None:
    for retryable in (True, False):
        initiator, responder = pair()
        proof = reply(initiator.receive(frame(reply(responder.receive(frame(initiator.start()))))))
        responder.receive(frame(proof))
        rejection = responder.reject("not now", retryable=retryable)
        with pytest.raises(HandshakeError, match="not now") as caught:
            initiator.receive(frame(rejection))
        assert caught.value.retryable is retryable


def test_forged_decisions_are_refused() -> None:
    for kind in (ControlKind.ACCEPT, ControlKind.REJECT):
        initiator, responder = pair()
        initiator.receive(frame(reply(responder.receive(frame(initiator.start())))))
        with pytest.raises(HandshakeError, match="not signed"):
            initiator.receive(ControlFrame(kind, bytes(32) + b'{"reason":"go away","retryable":false}'))


def advance_to_challenge(initiator: Initiator, responder: Responder) -> bytes:
    return reply(responder.receive(frame(initiator.start())))


@pytest.mark.parametrize("kind", list(ControlKind))
def test_frames_out_of_turn_are_errors(kind: ControlKind) -> None:
    if kind is not ControlKind.HELLO:
        with pytest.raises(ProtocolError):
            Responder(KEY, b"r" * 32).receive(ControlFrame(kind, bytes(70)))
    if kind is not ControlKind.CHALLENGE:
        initiator, _ = pair()
        initiator.start()
        with pytest.raises(ProtocolError):
            initiator.receive(ControlFrame(kind, bytes(66)))


@given(st.integers(0, 69), st.integers(1, 255))
@settings(max_examples=120, derandomize=True)
def test_any_changed_byte_of_a_hello_is_noticed(position: int, change: int) -> None:
    initiator, responder = pair()
    hello = bytearray(frame(initiator.start()).body)
    hello[position] ^= change
    with pytest.raises(HandshakeError):
        responder.receive(ControlFrame(ControlKind.HELLO, bytes(hello)))


@given(st.integers(0, 65), st.integers(1, 255))
@settings(max_examples=80, derandomize=True)
def test_any_changed_byte_of_a_challenge_is_noticed(position: int, change: int) -> None:
    initiator, responder = pair()
    body = bytearray(frame(advance_to_challenge(initiator, responder)).body)
    body[position] ^= change
    with pytest.raises(HandshakeError):
        initiator.receive(ControlFrame(ControlKind.CHALLENGE, bytes(body)))


@given(st.data(), st.integers(1, 255))
@settings(max_examples=80, derandomize=True)
def test_any_changed_byte_of_a_proof_is_noticed(data: st.DataObject, change: int) -> None:
    initiator, responder = pair()
    proof = bytearray(frame(reply(initiator.receive(frame(advance_to_challenge(initiator, responder))))).body)
    proof[data.draw(st.integers(0, len(proof) - 1))] ^= change
    with pytest.raises(HandshakeError):
        responder.receive(ControlFrame(ControlKind.PROOF, bytes(proof)))


def test_hellos_survive_their_plain_form() -> None:
    assert Hello.from_dict(HELLO.to_dict()) == HELLO


BREAK: list[Callable[[dict[str, object]], object]] = [
    lambda fields: fields.pop("rank"),
    lambda fields: fields.update(role="boss"),
    lambda fields: fields.update(geometry=3),
    lambda fields: fields.update(transports=None),
    lambda fields: fields.update(generation="many"),
]


@pytest.mark.parametrize("spoil", BREAK)
def test_malformed_hellos_are_errors(spoil: Callable[[dict[str, object]], object]) -> None:
    fields = HELLO.to_dict()
    spoil(fields)
    with pytest.raises(ProtocolError, match="malformed"):
        Hello.from_dict(fields)


def test_versions_of_the_past_are_refused_for_good() -> None:
    check_version(1)
    check_version(2)  # a newer peer speaks our version, too
    with pytest.raises(HandshakeError) as caught:
        check_version(0)
    assert not caught.value.retryable


def test_a_hello_is_a_value() -> None:
    assert dataclasses.replace(HELLO, generation=10) != HELLO

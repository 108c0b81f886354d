"""stepmesh's parsers, handshake and session under mutated bytes, without a socket: errors are ProtocolErrors, and a
frame that was changed is never taken for the one that was sent."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from typing import Any

from stepmesh import MeshConfig, ProtocolError, RankId, Role
from stepmesh.errors import MeshError
from stepmesh.handshake import Accepted, Attached, Established, Hello, Initiator, Proven, Reply, Responder, Step
from stepmesh.session import Session
from stepmesh.topology import admit, choose_transport, geometry
from stepmesh.types import Address, Member
from stepmesh.wire import (
    HEADER,
    MAX_BODY_BYTES,
    PREFIX,
    ControlFrame,
    ControlKind,
    ControlParser,
    Heartbeat,
    encode_close,
    encode_control,
    encode_heartbeat,
    encode_idle,
    encode_json,
)
from tests.contract.world import LAYOUT, SECRET
from tests.fuzz.campaign import MemoryGauge, generator, nothing_left, volume
from tests.fuzz.mutations import mutate_bytes, mutate_value

A0, F0 = RankId(Role.ATTENTION, 0), RankId(Role.FFN, 0)
CONFIG = MeshConfig(F0, "responder", SECRET, b"agreed", LAYOUT)
MEMBERS = {A0: Member(A0, "initiator", Address("", "127.0.0.1", 1))}
HELLO = Hello(A0, "initiator", b"agreed".hex(), geometry(CONFIG), ("shm", "tcp"), 1, F0, "responder")
LARGEST_READ = 64 * 1024


def parsed(raw: bytes, *, trusted: bool = True) -> ControlFrame | None:
    parser = ControlParser()
    parser.trusted = trusted
    parser.feed(raw)
    return parser.next_frame()


def signed(frame: bytes) -> ControlFrame:
    whole = parsed(frame)
    assert whole is not None
    return whole


def test_control_streams() -> None:
    """Garbage in pieces of any size: frames within their bounds or a ProtocolError, and never a growing buffer."""
    num_cases = volume(40_000, 1_500)
    rng = generator("control streams", num_cases)
    kinds: list[Callable[[], bytes]] = [
        lambda: encode_heartbeat(Heartbeat(rng.getrandbits(64), rng.random() < 0.5)),
        lambda: encode_idle(rng.randrange(6), rng.getrandbits(64)),
        lambda: encode_close("the end " * rng.randrange(40), retryable=True),
        lambda: encode_control(ControlKind.DRAIN),
        lambda: encode_control(ControlKind.READY),
        lambda: Initiator(SECRET, rng.randbytes(32), HELLO).start(),
        lambda: encode_control(ControlKind.PROOF, rng.randbytes(rng.randrange(MAX_BODY_BYTES))),
        lambda: PREFIX.pack(rng.randrange(256), rng.randrange(256), rng.randrange(65536)),
    ]
    num_frames = num_refused = 0
    gauge = MemoryGauge(num_cases)
    for _ in range(num_cases):
        stream = b"".join(rng.choice(kinds)() for _ in range(rng.randint(1, 6)))
        if rng.random() < 0.8:
            stream = mutate_bytes(rng, stream)
        parser, session = ControlParser(), Session(CONFIG, 0.0)
        parser.trusted = rng.random() < 0.7
        try:
            while stream:
                size = rng.choice((1, 3, 64, LARGEST_READ))
                parser.feed(stream[:size])
                stream = stream[size:]
                while (frame := parser.next_frame()) is not None:
                    assert len(frame.body) <= MAX_BODY_BYTES
                    assert frame.fds == ()
                    assert parser.trusted or frame.kind <= ControlKind.REJECT
                    num_frames += 1
                    session.receive(frame, 0.0)
                assert len(parser._buffer) <= MAX_BODY_BYTES + PREFIX.size
        except ProtocolError:
            num_refused += 1
        gauge.step()
    gauge.check()
    assert num_frames > num_cases // 4
    assert num_refused > num_cases // 4


class Meeting:
    """A handshake from HELLO to READY in which one frame, the `spoilt`-th, is changed on its way."""

    def __init__(self, rng: random.Random, spoilt: int) -> None:
        self._rng = rng
        self._spoilt = spoilt
        self._sent = 0
        self.changed = False
        self.initiator = Initiator(SECRET, rng.randbytes(32), HELLO)
        self.responder = Responder(SECRET, rng.randbytes(32))

    def carry(self, raw: bytes, receiver: Initiator | Responder) -> Step | None:
        if self._sent == self._spoilt:
            genuine, raw = raw, mutate_bytes(self._rng, raw)
            self.changed = raw[: len(genuine)] != genuine
        self._sent += 1
        frame = parsed(raw, trusted=receiver.authenticated)
        return None if frame is None else receiver.receive(frame)

    def run(self) -> list[Step]:
        """What was reached, with every frame carried as long as the steps follow one another."""
        steps: list[Step] = []

        def reached(step: Step | None, kind: type) -> Any:
            if not isinstance(step, kind):
                raise ProtocolError("the handshake stops here")
            steps.append(step)
            return step

        challenge = reached(self.carry(self.initiator.start(), self.responder), Reply)
        proof = reached(self.carry(challenge.frame, self.initiator), Reply)
        reached(self.carry(proof.frame, self.responder), Proven)
        accept = self.responder.accept("tcp", "the only one", {"slots": 8}, 0)
        reached(self.carry(accept, self.initiator), Accepted)
        reached(self.carry(self.initiator.attach({"slots": 8}, 0), self.responder), Attached)
        reached(self.carry(self.responder.ready(), self.initiator), Established)
        return steps


def test_mutated_handshakes_go_no_further() -> None:
    """HELLO, CHALLENGE, PROOF and ACCEPT are signed: whatever changes in them, the handshake ends there."""
    num_cases = volume(40_000, 1_500)
    rng = generator("handshakes", num_cases)
    num_stopped = 0
    for _ in range(num_cases):
        spoilt = rng.randrange(6)
        meeting = Meeting(rng, spoilt)
        try:
            steps = meeting.run()
        except ProtocolError:
            assert meeting.changed
            num_stopped += 1
            continue
        # It came through: not changed within the frame, or ATTACH, whose truth the channel checks.
        assert not meeting.changed or spoilt >= 4, spoilt
        assert isinstance(steps[2], Proven)
        assert steps[2].hello == HELLO
        assert isinstance(steps[3], Accepted)
        assert steps[3].descriptor == {"slots": 8}
    assert num_stopped > num_cases // 2


def test_signed_hellos_with_odd_contents() -> None:
    """A peer that holds the key and says anything at all in its PROOF is refused by name or is the member it says."""
    num_cases = volume(20_000, 800)
    rng = generator("signed hellos", num_cases)
    num_admitted = num_refused = 0
    for _ in range(num_cases):
        fields = HELLO.to_dict()
        for _ in range(rng.randint(0, 3)):
            fields = mutate_value(rng, fields)
            if not isinstance(fields, dict):
                fields = HELLO.to_dict()
        initiator, responder = Initiator(SECRET, rng.randbytes(32), HELLO), Responder(SECRET, rng.randbytes(32))
        challenge = responder.receive(signed(initiator.start()))
        assert isinstance(challenge, Reply)
        initiator.receive(signed(challenge.frame))
        liar = Initiator(SECRET, initiator._nonce, HELLO)
        liar.start()
        liar._hello = OddHello(fields)  # type: ignore[assignment]
        try:
            proof = liar.receive(signed(challenge.frame))
            assert isinstance(proof, Reply)
            step = responder.receive(signed(proof.frame))
            assert isinstance(step, Proven)
            hello = step.hello
            refusal = admit(hello, CONFIG, MEMBERS, 0)
            if refusal is not None:
                responder.reject(refusal.reason, retryable=refusal.retryable)
                num_refused += 1
                continue
            choose_transport(hello.transports, ("tcp",), "tcp")
        except MeshError:
            num_refused += 1
            continue
        free = {"generation": 1, "transports": HELLO.transports, "withheld": HELLO.withheld}  # the rest is agreed on
        same = dataclasses.replace(hello, **free)
        assert len(hello.withheld) <= 1000
        assert same == HELLO
        HEADER.pack(b"SMDF", 1, 1, 0, 1, hello.generation, *(0,) * 15)  # it will stand in every header
        num_admitted += 1
    assert num_admitted > num_cases // 20
    assert num_refused > num_cases // 4


class OddHello:
    """Says what it was given."""

    def __init__(self, fields: dict[str, Any]) -> None:
        self._fields = fields

    def to_dict(self) -> dict[str, Any]:
        return self._fields


def test_signed_acceptances_with_odd_contents() -> None:
    """The same from the other side: an FFN rank that holds the key answers with anything."""
    num_cases = volume(10_000, 400)
    rng = generator("signed acceptances", num_cases)
    for _ in range(num_cases):
        initiator, responder = Initiator(SECRET, rng.randbytes(32), HELLO), Responder(SECRET, rng.randbytes(32))
        challenge = responder.receive(signed(initiator.start()))
        assert isinstance(challenge, Reply)
        proof = initiator.receive(signed(challenge.frame))
        assert isinstance(proof, Reply)
        responder.receive(signed(proof.frame))
        fields = mutate_value(rng, {"transport": "tcp", "reason": "why", "descriptor": {"a": 1}, "retryable": True})
        kind, label = rng.choice(((ControlKind.ACCEPT, b"accept"), (ControlKind.REJECT, b"reject")))
        try:
            body = encode_json(fields)
            answer = responder._mac(label, body) + body
            step = initiator.receive(signed(encode_control(kind, answer)))
        except MeshError:
            continue
        assert isinstance(step, Accepted)
        assert isinstance(step.descriptor, dict)


def test_descriptors_are_bounded_too() -> None:
    """A peer that pushes descriptors which no frame claims is cut off at a few."""
    with nothing_left():
        parser = ControlParser()
        parser.trusted = True
        num_held = 0
        try:
            for number in range(1000):
                parser.feed(encode_control(ControlKind.DRAIN), (1000 + number,))
                num_held += 1
                while parser.next_frame() is not None:
                    pass
        except ProtocolError:
            pass
        assert num_held < 10
        assert len(parser.take_fds()) == num_held

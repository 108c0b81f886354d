"""How two ranks come to trust each other: mutual challenge, hello, choice of transport, slot descriptors. Sans-I/O.

    attention (initiator)                                   FFN (responder)
    HELLO      version, nonce_i, mac(both)             ->   silent close when the mac is wrong
                                                       <-   CHALLENGE  version, nonce_r, mac(HELLO, nonce_r)
    PROOF      mac(HELLO, CHALLENGE, hello), hello     ->   fresh: covers nonce_r
                                                       <-   ACCEPT     mac(.., body), transport, slot descriptor
                                                            or REJECT  mac(.., body), reason, retryable
    ATTACH     slot descriptor                         ->
                                                       <-   READY      both may exchange

- Every mac is HMAC-SHA256 under the cluster's key with a label of its own, so no message can be reflected or
  replayed in another place. Nothing but fixed-size fields is parsed before the sender has proved the key, and
  a stranger learns nothing but a closed connection. A recorded HELLO draws a CHALLENGE, and ends there.
- Frames after the handshake carry no mac: peers are authenticated, payloads are not (docs/protocol.md).
- Nonces come in from outside, so runs can be repeated.
"""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

from stepmesh.config import MAX_ATTENTION_RANKS
from stepmesh.errors import HandshakeError, ProtocolError
from stepmesh.types import RankId, Role
from stepmesh.wire import (
    CHALLENGE,
    HELLO,
    HELLO_MAGIC,
    MAC_BYTES,
    NONCE_BYTES,
    OLDEST_VERSION,
    PROTOCOL_VERSION,
    ControlFrame,
    ControlKind,
    decode_json,
    encode_control,
    encode_json,
)

_MAX_U32 = (1 << 32) - 1
_MAX_NAME_CHARS = 128
_MAX_REASON_CHARS = 1000


@dataclass(frozen=True, slots=True)
class Hello:
    """Who the initiator is, what it was configured with, and whom it wants to reach."""

    id: RankId
    incarnation: str
    config_hash: str
    geometry: dict[str, int]  # layout and number of streams: both ends must have the same
    transports: tuple[str, ...]  # in order of preference
    generation: int
    target: RankId
    target_incarnation: str
    withheld: str = ""  # a transport that is not offered although it is there, and why, for logs

    def to_dict(self) -> dict[str, Any]:
        return {
            "role": self.id.role.value,
            "rank": self.id.rank,
            "incarnation": self.incarnation,
            "config_hash": self.config_hash,
            "geometry": self.geometry,
            "transports": list(self.transports),
            "generation": self.generation,
            "target_role": self.target.role.value,
            "target_rank": self.target.rank,
            "target_incarnation": self.target_incarnation,
            "withheld": self.withheld,
        }

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Hello:
        """Raises ProtocolError when a field is missing, of the wrong type or out of range."""
        try:
            return cls(
                id=RankId(Role(fields["role"]), _number(fields["rank"], 0, MAX_ATTENTION_RANKS - 1)),
                incarnation=_text(fields["incarnation"]),
                config_hash=_text(fields["config_hash"]),
                geometry={_text(name): _number(value, 0, _MAX_U32) for name, value in fields["geometry"].items()},
                transports=tuple(_text(name) for name in fields["transports"]),
                generation=_number(fields["generation"], 1, _MAX_U32),  # it stands in 32 bits of every header
                target=RankId(Role(fields["target_role"]), _number(fields["target_rank"], 0, MAX_ATTENTION_RANKS - 1)),
                target_incarnation=_text(fields["target_incarnation"]),
                withheld=_reason(fields.get("withheld", "")),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ProtocolError(f"hello is malformed: {error!r}") from None


@dataclass(frozen=True, slots=True)
class Reply:
    """Send this frame; the handshake goes on."""

    frame: bytes


@dataclass(frozen=True, slots=True)
class Proven:
    """Responder: the initiator holds the key. Decide, then call accept() or reject()."""

    hello: Hello


@dataclass(frozen=True, slots=True)
class Accepted:
    """Initiator: open this transport, attach the peer's slots, then send attach()."""

    transport: str
    reason: str
    descriptor: dict[str, Any]
    fds: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Attached:
    """Responder: attach the peer's slots, then send ready()."""

    descriptor: dict[str, Any]
    fds: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Established:
    """Initiator: the pair is up."""


Step = Reply | Proven | Accepted | Attached | Established


class _State(Enum):
    START = auto()
    AWAIT_HELLO = auto()
    AWAIT_CHALLENGE = auto()
    AWAIT_PROOF = auto()
    DECIDE = auto()  # the owner's turn
    AWAIT_ACCEPT = auto()
    OPENING = auto()  # the owner's turn
    AWAIT_ATTACH = auto()
    AWAIT_READY = auto()
    DONE = auto()


class _Handshake:
    """What both ends share: the transcript and the keyed digests over it."""

    def __init__(self, key: bytes, nonce: bytes, state: _State) -> None:
        assert len(nonce) == NONCE_BYTES
        self._key = key
        self._nonce = nonce
        self._state = state
        self._transcript = hashlib.sha256()
        self._session_key = b""

    @property
    def authenticated(self) -> bool:
        """True once the other end has proved that it holds the key."""
        return self._state not in (
            _State.START,
            _State.AWAIT_HELLO,
            _State.AWAIT_CHALLENGE,
            _State.AWAIT_PROOF,
        )

    @property
    def done(self) -> bool:
        """True once the handshake takes no more frames."""
        return self._state is _State.DONE

    @property
    def session_key(self) -> bytes:
        """A secret that only the two ends of this very session know. Set once PROOF was sent or verified."""
        assert self._session_key
        return self._session_key

    def _mac(self, label: bytes, body: bytes = b"") -> bytes:
        return hmac.digest(self._key, label + b"\0" + self._transcript.digest() + body, "sha256")

    def _check_mac(self, label: bytes, mac: bytes, body: bytes, failure: str) -> None:
        if not hmac.compare_digest(mac, self._mac(label, body)):
            raise HandshakeError(failure)

    def _signed_body(self, label: bytes, frame: ControlFrame, failure: str) -> dict[str, Any]:
        mac, body = frame.body[:MAC_BYTES], frame.body[MAC_BYTES:]
        self._check_mac(label, mac, body, failure)
        self._transcript.update(frame.body)
        return decode_json(body)

    def _sign_body(self, kind: ControlKind, label: bytes, fields: dict[str, Any], num_fds: int = 0) -> bytes:
        body = encode_json(fields)
        signed = self._mac(label, body) + body
        self._transcript.update(signed)
        return encode_control(kind, signed, num_fds)

    def _unexpected(self, frame: ControlFrame) -> HandshakeError:
        name = ControlKind(frame.kind).name
        return HandshakeError(f"{name} while in state {self._state.name}")


class Initiator(_Handshake):
    """The attention rank's end. Raises HandshakeError; the connection is then to be closed."""

    def __init__(self, key: bytes, nonce: bytes, hello: Hello) -> None:
        super().__init__(key, nonce, _State.START)
        self._hello = hello

    def start(self) -> bytes:
        """The first frame to send."""
        assert self._state is _State.START
        unsigned = HELLO.pack(HELLO_MAGIC, PROTOCOL_VERSION, self._nonce, b"")[:-MAC_BYTES]
        body = unsigned + self._mac(b"hello", unsigned)
        self._transcript.update(body)
        self._state = _State.AWAIT_CHALLENGE
        return encode_control(ControlKind.HELLO, body)

    def receive(self, frame: ControlFrame) -> Step:
        if self._state is _State.AWAIT_CHALLENGE and frame.kind == ControlKind.CHALLENGE:
            return Reply(self._prove(frame))
        if self._state is _State.AWAIT_ACCEPT and frame.kind == ControlKind.ACCEPT:
            return self._accepted(frame)
        if self._state is _State.AWAIT_ACCEPT and frame.kind == ControlKind.REJECT:
            fields = self._signed_body(b"reject", frame, "REJECT is not signed with this cluster's secret")
            raise HandshakeError(_reason(fields.get("reason")), retryable=bool(fields.get("retryable")))
        if self._state is _State.AWAIT_READY and frame.kind == ControlKind.READY:
            self._state = _State.DONE
            return Established()
        raise self._unexpected(frame)

    def attach(self, descriptor: dict[str, Any], num_fds: int) -> bytes:
        """The frame that tells the responder where this rank's slots are."""
        assert self._state is _State.OPENING
        self._state = _State.AWAIT_READY
        return encode_control(ControlKind.ATTACH, encode_json(descriptor), num_fds)

    def _prove(self, frame: ControlFrame) -> bytes:
        version, _nonce, mac = CHALLENGE.unpack(frame.body)
        self._check_mac(b"challenge", mac, frame.body[:-MAC_BYTES], "the peer has another cluster secret")
        check_version(version)
        self._transcript.update(frame.body)
        self._state = _State.AWAIT_ACCEPT
        proof = self._sign_body(ControlKind.PROOF, b"proof", self._hello.to_dict())
        self._session_key = self._mac(b"session")
        return proof

    def _accepted(self, frame: ControlFrame) -> Accepted:
        fields = self._signed_body(b"accept", frame, "ACCEPT is not signed with this cluster's secret")
        try:
            descriptor = dict(fields["descriptor"])
            step = Accepted(_text(fields["transport"]), _reason(fields["reason"]), descriptor, frame.fds)
        except (KeyError, TypeError, ValueError) as error:
            raise HandshakeError(f"ACCEPT is malformed: {error!r}") from None
        self._state = _State.OPENING
        return step


class Responder(_Handshake):
    """The FFN rank's end. Raises HandshakeError; the connection is then to be closed without an answer."""

    def __init__(self, key: bytes, nonce: bytes) -> None:
        super().__init__(key, nonce, _State.AWAIT_HELLO)

    def receive(self, frame: ControlFrame) -> Step:
        if self._state is _State.AWAIT_HELLO and frame.kind == ControlKind.HELLO:
            return Reply(self._challenge(frame))
        if self._state is _State.AWAIT_PROOF and frame.kind == ControlKind.PROOF:
            hello = Hello.from_dict(self._signed_body(b"proof", frame, "PROOF is wrong (a replayed hello?)"))
            self._session_key = self._mac(b"session")
            self._state = _State.DECIDE
            return Proven(hello)
        if self._state is _State.AWAIT_ATTACH and frame.kind == ControlKind.ATTACH:
            self._state = _State.DONE
            return Attached(decode_json(frame.body), frame.fds)
        raise self._unexpected(frame)

    def accept(self, transport: str, reason: str, descriptor: dict[str, Any], num_fds: int) -> bytes:
        assert self._state is _State.DECIDE
        self._state = _State.AWAIT_ATTACH
        fields = {"transport": transport, "reason": reason, "descriptor": descriptor}
        return self._sign_body(ControlKind.ACCEPT, b"accept", fields, num_fds)

    def ready(self) -> bytes:
        """The frame that tells the initiator that both ends may exchange."""
        assert self._state is _State.DONE
        return encode_control(ControlKind.READY)

    def reject(self, reason: str, *, retryable: bool) -> bytes:
        assert self._state is _State.DECIDE
        self._state = _State.DONE
        return self._sign_body(ControlKind.REJECT, b"reject", {"reason": reason, "retryable": retryable})

    def _challenge(self, frame: ControlFrame) -> bytes:
        magic, version, _nonce, mac = HELLO.unpack(frame.body)
        if magic != HELLO_MAGIC:
            raise HandshakeError("not a stepmesh hello")
        self._check_mac(b"hello", mac, frame.body[:-MAC_BYTES], "the peer has another cluster secret")
        check_version(version)
        self._transcript.update(frame.body)
        unsigned = CHALLENGE.pack(PROTOCOL_VERSION, self._nonce, b"")[:-MAC_BYTES]
        body = unsigned + self._mac(b"challenge", unsigned)
        self._transcript.update(body)
        self._state = _State.AWAIT_PROOF
        return encode_control(ControlKind.CHALLENGE, body)


def check_version(version: int) -> None:
    """Raise HandshakeError unless the two ends have a protocol version in common."""
    if version < OLDEST_VERSION:
        raise HandshakeError(
            f"the peer speaks protocol {version}, this end {OLDEST_VERSION}..{PROTOCOL_VERSION}", retryable=False
        )


def _number(value: object, low: int, high: int) -> int:
    """An integer of the JSON body, no other number. Raises ValueError."""
    if type(value) is not int or not low <= value <= high:
        raise ValueError(f"{str(value)[:40]} is no integer in {low}..{high}")
    return value


def _text(value: object) -> str:
    """A name out of the JSON body. Raises ValueError."""
    if not isinstance(value, str) or len(value) > _MAX_NAME_CHARS or not value.isascii():
        raise ValueError(f"{str(value)[:40]!a} is no name of up to {_MAX_NAME_CHARS} ASCII characters")
    return value


def _reason(value: object) -> str:
    """The peer's own words, fit for any log and any encoding."""
    return str(value).encode("ascii", "backslashreplace").decode()[:_MAX_REASON_CHARS]

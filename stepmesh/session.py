"""One generation of a pair, from READY to its end: liveness, idle, drain, close. Sans-I/O: `now` comes in.

    UP --CLOSE frame, link lost, silence, stall--> down (the owner revokes the generation)

A peer is lost when nothing is heard from it for peer_timeout_s, or when it has work pending and its main thread's
progress counter stands still for stall_timeout_s, or when it answers a dispatch of ours not at all for
exchange_timeout_s. `judge` must be called only after everything readable has been read: a main thread that
computed for seconds would otherwise take its own absence for the peer's silence.
"""

from __future__ import annotations

from dataclasses import dataclass

from stepmesh.config import MeshConfig
from stepmesh.errors import ProtocolError
from stepmesh.wire import ControlFrame, ControlKind, decode_close, decode_heartbeat, decode_idle


@dataclass(frozen=True, slots=True)
class Idle:
    """The peer goes idle on a stream."""

    stream: int
    after_seq: int


@dataclass(frozen=True, slots=True)
class Draining:
    """The peer asks to be left out."""


@dataclass(frozen=True, slots=True)
class Ended:
    """The peer ends the session deliberately."""

    reason: str
    retryable: bool


Notice = Idle | Draining | Ended


class Session:
    """The peer's sign of life, as this end sees it."""

    def __init__(self, config: MeshConfig, now: float) -> None:
        self._peer_timeout_s = config.peer_timeout_s
        self._stall_timeout_s = config.stall_timeout_s
        self._exchange_timeout_s = config.exchange_timeout_s
        self._num_streams = config.num_streams
        self._heard_at = now
        self._counter = -1
        self._moved_at = now  # when the counter last changed, or the peer last had nothing to do
        self._peer_pending = False
        self.draining = False

    def receive(self, frame: ControlFrame, now: float) -> Notice | None:
        """Take one control frame. Raises ProtocolError."""
        self._heard_at = now
        if frame.kind == ControlKind.HEARTBEAT:
            beat = decode_heartbeat(frame.body)
            if beat.counter != self._counter:
                self._counter = beat.counter
                self._moved_at = now
            self._peer_pending = beat.pending
            return None
        if frame.kind == ControlKind.IDLE:
            stream, after_seq = decode_idle(frame.body)
            if stream >= self._num_streams:
                raise ProtocolError(f"idle notice for stream {stream} of {self._num_streams}")
            return Idle(stream, after_seq)
        if frame.kind == ControlKind.DRAIN:
            known, self.draining = self.draining, True
            return None if known else Draining()
        if frame.kind == ControlKind.CLOSE:
            return Ended(*decode_close(frame.body))
        raise ProtocolError(f"{ControlKind(frame.kind).name} in an established session")

    def judge(self, now: float, *, oldest_sent_at: float | None) -> str | None:
        """Why the peer is lost, or None. `oldest_sent_at`: when this end's oldest unanswered dispatch was sent."""
        silent_s = now - self._heard_at
        if silent_s > self._peer_timeout_s:
            return f"no heartbeat for {silent_s:.2f} s"
        owes_us = oldest_sent_at is not None
        if not self._peer_pending and not owes_us:
            self._moved_at = now
            return None
        # A dispatch sent just now says nothing about the time before it.
        since = max(self._moved_at, oldest_sent_at or 0.0) if not self._peer_pending else self._moved_at
        if now - since > self._stall_timeout_s:
            return f"work pending, but no progress of its main loop for {now - since:.2f} s"
        if oldest_sent_at is not None and now - oldest_sent_at > self._exchange_timeout_s:
            return f"a dispatch has had no answer for {now - oldest_sent_at:.2f} s"
        return None

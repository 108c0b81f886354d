"""What can go wrong, by whose fault it is.

    MeshError
      ConfigError            the caller's configuration or arguments are wrong: fix them
      MeshClosedError        the mesh was closed: no call is possible any more
      PeerNotConnectedError  that peer is not up now: call progress, wait for PeerUp (retryable)
      SlotBusyError          the slot still waits for its answer: call progress first (retryable)
      StaleArrivalError      the arrival being answered is void (pair revoked or superseded): drop it
      ProtocolError          the other end broke the protocol; the connection is closed
        FrameError           a data frame does not fit the pair's state (becomes FrameRejected)
        HandshakeError       hello, challenge or descriptors are wrong (becomes PeerDown)
      TransportError         the operating system or the link failed (becomes PeerDown)

Loss of a peer is an event of `progress`, never an exception.
"""

from __future__ import annotations


class MeshError(Exception):
    """Base of all. `retryable`: the same call may succeed later without a change by the caller."""

    retryable = False


class ConfigError(MeshError, ValueError):
    """A configuration value or an argument is wrong."""


class MeshClosedError(MeshError):
    """The mesh was closed."""


class PeerNotConnectedError(MeshError):
    """The peer is not up. Nothing was sent to anybody."""

    retryable = True


class SlotBusyError(MeshError):
    """The slot's previous exchange has no answer yet. Nothing was sent to anybody."""

    retryable = True


class StaleArrivalError(MeshError):
    """The arrival is void: its pair was revoked, or a newer dispatch on that stream was answered."""


class ProtocolError(MeshError):
    """The other end sent what the protocol does not allow."""


class FrameError(ProtocolError):
    """A data frame is wrong in itself or does not fit the state of its pair."""


class HandshakeError(ProtocolError):
    """The handshake failed. `retryable`: another attempt with the same peer may succeed."""

    def __init__(self, reason: str, *, retryable: bool = True) -> None:
        super().__init__(reason)
        self.retryable = retryable


class TransportError(MeshError):
    """A socket, a mapping or a registration failed."""

    retryable = True

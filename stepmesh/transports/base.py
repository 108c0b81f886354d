"""The contract between the mesh and what carries its bytes.

A `Fabric` is a rank's outside world: its clock, its listeners, its waiting. It makes `Link`s, which carry control
frames to one peer, and `Channel`s, which carry transfer slots of one generation of one pair.

What every channel guarantees:
- A slot is named (stream, parity). `outgoing` is where this rank writes a frame (header, payload, trailer as in
  `stepmesh.layout`); `post` publishes it; the peer's `poll` then reports (stream, parity) and its `incoming` shows the
  complete frame. Posts of one stream become visible in order.
- After `post` the outgoing memory is the channel's until the exchange has been answered (the window sees to that).
- `incoming` memory changes only by a post of the peer to that very slot.
- A channel serves one generation. `close` revokes it: whatever the peer still writes never lands in memory that a
  later generation uses. Views of the slots that are still held stay readable.
- A failure shows up as `failure`, and never as an exception of `post` or `poll`.

Threads: all calls come from the mesh's main thread, but for `Link.send` and `Fabric.wake`, which any thread may call.

A new transport implements `Channel`, is made in `Fabric.open_channel`, and passes tests/contract unchanged.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from stepmesh.lane import LaneMemory
from stepmesh.types import Address
from stepmesh.wire import ControlFrame


@dataclass(frozen=True, slots=True)
class ChannelSpec:
    """Geometry and identity of one generation of one pair, from this rank's point of view."""

    name: str  # for logs: "ffn/0 -> attention/1 generation 3"
    num_streams: int
    rx_slot_bytes: int
    tx_slot_bytes: int
    session_secret: bytes  # known to the two ends of this session only


class Offer(NamedTuple):
    """What the peer needs in order to write into this rank's slots."""

    descriptor: dict[str, Any]  # JSON values
    fds: tuple[int, ...] = ()  # to be passed over the link; the channel's own, valid until attach or close


class Posted(NamedTuple):
    """A slot of ours that the peer has filled."""

    stream: int
    parity: int
    seq: int


class Failure(NamedTuple):
    """Why a channel is broken. `rejected`: the peer sent a frame that cannot be taken (not: the link was lost)."""

    reason: str
    rejected: bool


class Channel(ABC):
    """Transfer slots of one pair in one generation."""

    kind: str

    @abstractmethod
    def offer(self) -> Offer:
        """Describe this rank's slots to the peer."""

    @abstractmethod
    def attach(self, descriptor: dict[str, Any], fds: Sequence[int]) -> None:
        """Take the peer's description; takes over `fds`. Raises TransportError or ProtocolError."""

    @property
    @abstractmethod
    def ready(self) -> bool:
        """True once both directions work."""

    @abstractmethod
    def outgoing(self, stream: int, parity: int) -> memoryview:
        """Writable memory of one slot towards the peer; the same object's memory for the channel's life."""

    @abstractmethod
    def incoming(self, stream: int, parity: int) -> memoryview:
        """Memory of one slot that the peer fills."""

    @abstractmethod
    def post(self, stream: int, parity: int, seq: int, frame_bytes: int) -> None:
        """Publish the first `frame_bytes` of the outgoing slot. Never blocks."""

    @abstractmethod
    def poll(self) -> Sequence[Posted]:
        """Slots filled since the last call, in the order of their posts. Called in a tight loop: a look, no more."""

    @property
    def sign(self) -> object | None:
        """What `native.await_any` may look at in place of polling: the channel's board, or a descriptor that is
        readable when something came. None: only `poll` tells."""
        return None

    def lane(self, stream: int) -> LaneMemory | None:
        """The stream's slots for native code that exchanges by itself; None: it cannot use this channel."""
        return None

    @property
    @abstractmethod
    def failure(self) -> Failure | None:
        """Set once the channel is broken."""

    @abstractmethod
    def close(self) -> None:
        """Revoke and free. Idempotent."""


def close_fds(fds: Sequence[int]) -> None:
    """Close descriptors that arrived where none were wanted."""
    for fd in fds:
        os.close(fd)


class Received(NamedTuple):
    """Control frames that have arrived; `closed` names the reason once the link is dead (after the last frame)."""

    frames: list[ControlFrame]
    closed: str | None


class Link(ABC):
    """An ordered stream of control frames to one peer."""

    kind: str  # "unix" (can pass descriptors), "tcp" or "inproc"
    peer_name: str  # the remote end, for logs

    @abstractmethod
    def send(self, frame: bytes, fds: Sequence[int] = ()) -> None:
        """Queue a frame. Never blocks, never raises: failures show up in `receive`. Any thread."""

    @abstractmethod
    def receive(self) -> Received:
        """Everything that is readable now."""

    @abstractmethod
    def trust(self) -> None:
        """The peer has authenticated: descriptors and all frame kinds are welcome from now on."""

    @abstractmethod
    def close(self) -> None:
        """Close; what was sent is still delivered where the transport can. Idempotent."""


@dataclass(slots=True)
class Wakeups:
    """What a wait ended with."""

    accepted: list[Link] = field(default_factory=list)
    readable: list[Link] = field(default_factory=list)
    num_turned_away: int = 0  # connections closed because they were nobody's
    external: bool = False  # wake() was called, or a watched descriptor is readable


class Fabric(ABC):
    """A rank's outside world."""

    waits: bool  # False: time stands still between calls (inproc), `progress` must not loop on it
    address: Address

    @abstractmethod
    def now(self) -> float:
        """Monotonic seconds."""

    @abstractmethod
    def nonce(self, num_bytes: int) -> bytes:
        """Fresh unpredictable bytes (repeatable ones in inproc)."""

    @property
    @abstractmethod
    def transports(self) -> tuple[str, ...]:
        """Transports this rank offers, in order of preference."""

    @abstractmethod
    def connect(self, address: Address) -> Link | None:
        """Begin to connect; the link may still be connecting. None: ask again, the host's name is being looked up.

        Never blocks. Raises TransportError.
        """

    @abstractmethod
    def open_channel(self, transport: str, spec: ChannelSpec, link: Link) -> Channel:
        """Make this rank's half of a channel. Raises TransportError."""

    @abstractmethod
    def collect(self) -> None:
        """Receive for channels that share a descriptor; called before the channels are polled."""

    @abstractmethod
    def leave(self) -> None:
        """The main thread turns to other work, until the next `collect`."""

    @abstractmethod
    def wait(self, timeout_s: float) -> Wakeups:
        """Block until something happens or the time is over. 0: only look."""

    @abstractmethod
    def every(self, interval_s: float, call: Callable[[], None]) -> None:
        """Call back periodically, from another thread where there are threads, until close."""

    @abstractmethod
    def watch(self, fd: int) -> None:
        """Let `wait` return when `fd` is readable."""

    @abstractmethod
    def unwatch(self, fd: int) -> None:
        """Undo `watch`. Idempotent."""

    @abstractmethod
    def wake(self) -> None:
        """End a `wait` that is running, or the next one. Any thread."""

    @abstractmethod
    def close(self) -> None:
        """Close listeners, threads and descriptors. Links and channels are closed by their owner. Idempotent."""

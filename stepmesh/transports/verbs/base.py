"""The narrow seam between the transport's logic and whatever speaks verbs.

`binding.load` finds pyverbs and gives the real `Verbs`; tests use a twin in pure Python that keeps hardware's rules
(queue limits, receives that must be there, the error state), so the transport runs on machines without RDMA.

Addresses are virtual addresses of this process, sizes are bytes. All calls come from the mesh's main thread; none
blocks. A call that fails raises TransportError; a transfer that fails is a `Completion` with a status.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

POLL_BATCH = 16  # completions that one poll reports at most


class GidKind(IntEnum):
    """What a GID table's entry is for, as verbs numbers them. A higher one is preferred."""

    INFINIBAND = 0
    ROCE_V1 = 1
    ROCE_V2 = 2


class Gid(NamedTuple):
    """An entry of a port's GID table."""

    number: int  # its index
    kind: GidKind
    address: str  # IPv6 notation; "::ffff:10.0.0.1" is an IPv4 address


@dataclass(frozen=True, slots=True)
class Port:
    """A port that could be used. `mtu` is the code of verbs (1: 256 bytes, each further one doubles, 5: 4096)."""

    device: str
    number: int
    active: bool
    ethernet: bool
    mtu: int
    lid: int  # InfiniBand only
    max_message_bytes: int
    max_completions: int  # of one queue
    gids: tuple[Gid, ...]
    pci_path: str = ""  # real path in /sys of the function behind it; "" for a software device


class Completion(NamedTuple):
    """A work request is over. Only wr_id and status mean anything when status is not 0."""

    wr_id: int
    status: int
    imm: int  # of a receive


@dataclass(frozen=True, slots=True)
class QueueLimits:
    """What a queue pair must be able to hold."""

    num_writes: int
    num_receives: int


@dataclass(frozen=True, slots=True)
class Wire:
    """How packets of a connection travel: see VerbsOptions for the values."""

    mtu: int
    service_level: int
    traffic_class: int
    timeout: int
    retry_count: int
    rnr_retry: int


@dataclass(frozen=True, slots=True)
class Remote:
    """The other end of a connection."""

    qp_number: int
    psn: int
    gid: str
    lid: int


class RowSource(NamedTuple):
    """Registered memory from which a frame's bytes right behind its head are taken, instead of from the slot."""

    base: int  # as work requests call it
    num_bytes: int
    lkey: int


class Region(ABC):
    """Registered memory. Whoever made it keeps the memory alive; `close` ends all access by the device."""

    base: int  # what offset 0 is called in work requests, here and at the peer (not always the virtual address)
    lkey: int
    rkey: int

    @abstractmethod
    def close(self) -> None:
        """Deregister. Idempotent. After the queue pairs that use it."""


class QueuePair(ABC):
    """One end of a connection. Receives may be posted from the start, frames once connected."""

    number: int
    inline_bytes: int  # a frame's head of up to this size is copied when it is posted

    @abstractmethod
    def post_receive(self, wr_id: int) -> None:
        """Be ready for one more immediate."""

    @abstractmethod
    def connect(self, psn: int, remote: Remote, wire: Wire, lkey: int, rkey: int) -> None:
        """Ready to receive and to send. Frames are read under `lkey` and written under `rkey`."""

    @abstractmethod
    def post_frame(
        self,
        wr_id: int,
        signalled: bool,
        source: int,
        target: int,
        head: int,
        size: int,
        imm: int,
        rows: RowSource | None = None,
    ) -> None:
        """Write `size` bytes from `source` to `target`: what is behind `head` first, then the head with the immediate.

        The peer sees the immediate when all of it is in place. One doorbell; one work request if head == size, else
        two, and one more with `rows`. The last one is `signalled` or not.
        """

    @abstractmethod
    def post_probe(self, wr_id: int) -> None:
        """Write no bytes, signalled: its completion says whether the peer can be reached."""

    @abstractmethod
    def close(self) -> None:
        """Destroy: nothing the peer writes lands any more. Idempotent."""


class Adapter(ABC):
    """An opened port: protection domain, one completion queue for all connections, its event channel."""

    port: Port
    event_fd: int  # readable when `arm` was called and something completed since

    @abstractmethod
    def register(self, address: int, num_bytes: int, *, remote: bool) -> Region:
        """Make memory known to the device; `remote`: peers may write there."""

    @abstractmethod
    def register_dmabuf(self, fd: int, offset: int, num_bytes: int, *, remote: bool) -> Region:
        """The same for device memory behind a dma-buf descriptor, which stays the caller's."""

    @abstractmethod
    def create_queue_pair(self, gid_index: int, limits: QueueLimits) -> QueuePair:
        """A new end of a connection that sends from that GID."""

    @abstractmethod
    def poll(self) -> Sequence[tuple[int, int, int]]:
        """What has completed, in order, POLL_BATCH at most; fewer mean that there is no more.

        Fields of a `Completion`: a plain tuple does, it is taken apart at once.
        """

    @abstractmethod
    def arm(self) -> None:
        """Make the next completion ring event_fd. What completed before may not ring: poll once more."""

    @abstractmethod
    def take_event(self) -> None:
        """event_fd is readable: consume its event."""

    @abstractmethod
    def close(self) -> None:
        """Free everything. Idempotent. After queue pairs and regions."""


class Verbs(ABC):
    """A way to speak verbs."""

    version: str  # for logs and `doctor`: "pyverbs of rdma-core 44"

    @abstractmethod
    def ports(self) -> list[Port]:
        """All ports of all devices. Empty when there is none; raises TransportError when they cannot be read."""

    @abstractmethod
    def open(self, port: Port, num_completions: int) -> Adapter:
        """Open the device of a port with a completion queue of that size."""

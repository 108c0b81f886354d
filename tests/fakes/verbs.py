"""Verbs in pure Python, between the ranks of one process, with hardware's rules rather than Soft-RoCE's.

- The send queue's entries come back only with a polled completion of a signalled request; a post too many fails.
- An immediate without a posted receive, a key that was revoked, an address out of bounds, a peer that is gone: a
  failed completion, and both queues of the connection are flushed.
- Completions ring the event descriptor once, and only after `arm`.

Every transfer happens at once, unless the network is paused: then posts wait in their send queues until `resume`.

It does not model time, loss and retransmission, MTUs, the order of writes within a frame, or what a NIC's firmware
refuses: tests/rdma runs the same code over Soft-RoCE.
"""

from __future__ import annotations

import ctypes
import errno
import itertools
import os
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from stepmesh.errors import TransportError
from stepmesh.transports.verbs.base import (
    POLL_BATCH,
    Adapter,
    Completion,
    Gid,
    GidKind,
    Port,
    QueueLimits,
    QueuePair,
    Region,
    Remote,
    RowSource,
    Verbs,
    Wire,
)

REM_ACCESS_ERR, FLUSH_ERR, RETRY_EXC_ERR, RNR_RETRY_EXC_ERR = 10, 5, 12, 13
INLINE_BYTES = 192


def port(name: str = "fake0", number: int = 1, *, address: str = "::ffff:10.0.0.1", active: bool = True) -> Port:
    gids = (Gid(0, GidKind.ROCE_V2, "fe80::1"), Gid(1, GidKind.ROCE_V2, address)) if address else ()
    return Port(
        device=name,
        number=number,
        active=active,
        ethernet=True,
        mtu=5,
        lid=0,
        max_message_bytes=1 << 31,
        max_completions=4096,
        gids=gids,
    )


class FakeVerbs(Verbs):
    """A network of ports; what one process's ranks open of it is all there is."""

    version = "fake"

    def __init__(self, ports: list[Port] | None = None, *, inline_bytes: int = INLINE_BYTES) -> None:
        self._ports = [port()] if ports is None else ports
        self.inline_bytes = inline_bytes
        self.memlock_bytes = 1 << 40
        self.queue_pairs: dict[int, FakeQueuePair] = {}
        self.regions: dict[int, FakeRegion] = {}
        self.adapters: list[FakeAdapter] = []
        self.numbers = itertools.count(0x100)
        self.takes_dmabuf = True
        self.dmabuf_addresses: dict[int, int] = {}  # what an exporter's descriptor begins with, offset included
        self.paused = False
        self.routed = True  # False: no packet finds its way
        self._waiting: deque[Callable[[], None]] = deque()

    def ports(self) -> list[Port]:
        return self._ports

    def open(self, port: Port, num_completions: int) -> FakeAdapter:
        adapter = FakeAdapter(self, port, num_completions)
        self.adapters.append(adapter)
        return adapter

    def transfer(self, call: Callable[[], None]) -> None:
        if self.paused:
            self._waiting.append(call)
        else:
            call()

    def resume(self) -> None:
        """Carry out what was posted during the pause."""
        self.paused = False
        while self._waiting:
            self._waiting.popleft()()

    def break_all(self, adapter: FakeAdapter, status: int) -> None:
        """Every connection of an adapter fails, as when its link goes down."""
        for pair in list(self.queue_pairs.values()):
            if pair.adapter is adapter:
                pair.fail(pair.last_wr_id, status)


class FakeAdapter(Adapter):
    def __init__(self, verbs: FakeVerbs, port: Port, num_completions: int) -> None:
        self.verbs = verbs
        self.port = port
        self.event_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.open = True
        self.armed = False
        self.polls = 0
        self._num_completions = num_completions
        self._completions: deque[tuple[Completion, Callable[[], None] | None]] = deque()

    def register(self, address: int, num_bytes: int, *, remote: bool) -> FakeRegion:
        if sum(region.num_bytes for region in self.verbs.regions.values()) + num_bytes > self.verbs.memlock_bytes:
            raise TransportError(f"cannot register {num_bytes} bytes: {os.strerror(errno.ENOMEM)}")
        return FakeRegion(self.verbs, address, address, num_bytes, remote=remote)

    def register_dmabuf(self, fd: int, offset: int, num_bytes: int, *, remote: bool) -> FakeRegion:
        if not self.verbs.takes_dmabuf:
            raise TransportError("cannot register device memory: Operation not supported")
        os.fstat(fd)  # open, as the kernel wants it
        address = self.verbs.dmabuf_addresses[fd]
        return FakeRegion(self.verbs, offset, address, num_bytes, remote=remote)

    def create_queue_pair(self, gid_index: int, limits: QueueLimits) -> FakeQueuePair:
        assert any(gid.number == gid_index for gid in self.port.gids)
        return FakeQueuePair(self, limits)

    def poll(self) -> list[Completion]:
        assert self.open
        self.polls += 1
        found: list[Completion] = []
        while self._completions and len(found) < POLL_BATCH:
            completion, polled = self._completions.popleft()
            if polled is not None:
                polled()
            found.append(completion)
        return found

    def complete(self, completion: Completion, polled: Callable[[], None] | None = None) -> None:
        assert len(self._completions) < self._num_completions, "completion queue overrun"
        self._completions.append((completion, polled))
        if self.armed:
            self.armed = False
            os.eventfd_write(self.event_fd, 1)

    def arm(self) -> None:
        self.armed = True

    def take_event(self) -> None:
        assert os.eventfd_read(self.event_fd) == 1

    def close(self) -> None:
        if self.open:
            self.open = False
            assert not any(pair.adapter is self for pair in self.verbs.queue_pairs.values()), "queue pairs left behind"
            self.verbs.adapters.remove(self)
            os.close(self.event_fd)


class FakeRegion(Region):
    def __init__(self, verbs: FakeVerbs, base: int, address: int, num_bytes: int, *, remote: bool) -> None:
        self._verbs = verbs
        self.base = base
        self.address = address
        self.num_bytes = num_bytes
        self.remote = remote
        self.lkey = self.rkey = next(verbs.numbers)
        verbs.regions[self.rkey] = self

    def at(self, where: int, num_bytes: int) -> int | None:
        """The real address of a range, if the region covers it."""
        inside = self.base <= where and where + num_bytes <= self.base + self.num_bytes
        return self.address + where - self.base if inside else None

    def close(self) -> None:
        self._verbs.regions.pop(self.rkey, None)


@dataclass
class Posted:
    """One frame as it was posted."""

    num_requests: int
    signalled: bool
    inline: bool
    size: int
    imm: int


@dataclass
class Connection:
    remote: Remote
    wire: Wire
    lkey: int
    rkey: int


@dataclass
class SendQueue:
    """Entries in use: those polled-for signalled requests give back, and those no signal covers yet."""

    depth: int
    taken: int = 0
    uncovered: int = 0
    posts: list[Posted] = field(default_factory=list)


class FakeQueuePair(QueuePair):
    def __init__(self, adapter: FakeAdapter, limits: QueueLimits) -> None:
        self.adapter = adapter
        self.verbs = adapter.verbs
        self.number = next(self.verbs.numbers)
        self.inline_bytes = self.verbs.inline_bytes
        self.send_queue = SendQueue(limits.num_writes)
        self.receives: deque[int] = deque()
        self.max_receives = limits.num_receives
        self.connection: Connection | None = None
        self.failed = False
        self.last_wr_id = 0
        self.verbs.queue_pairs[self.number] = self

    def post_receive(self, wr_id: int) -> None:
        if len(self.receives) == self.max_receives:
            raise TransportError("cannot post a receive: the queue is full")
        self.receives.append(wr_id)

    def connect(self, psn: int, remote: Remote, wire: Wire, lkey: int, rkey: int) -> None:
        self.connection = Connection(remote, wire, lkey, rkey)

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
        inline = head <= self.inline_bytes
        num_requests = 1 if head == size else 2 if rows is None else 3
        self._take(wr_id, num_requests)
        self.send_queue.posts.append(Posted(num_requests, signalled, inline, size, imm))
        copied = ctypes.string_at(source, head) if inline else None
        covered = self._cover(num_requests, signalled)
        self.verbs.transfer(lambda: self._write_frame(wr_id, covered, source, target, head, size, imm, copied, rows))

    def post_probe(self, wr_id: int) -> None:
        self._take(wr_id, 1)
        covered = self._cover(1, signalled=True)
        self.verbs.transfer(lambda: self._probe(wr_id, covered))

    def close(self) -> None:
        self.verbs.queue_pairs.pop(self.number, None)

    def fail(self, wr_id: int, status: int) -> None:
        """The error state: this request fails, everything else is flushed."""
        if self.failed:
            status = FLUSH_ERR
        self.failed = True
        self.adapter.complete(Completion(wr_id, status, 0))
        while self.receives:
            self.adapter.complete(Completion(self.receives.popleft(), FLUSH_ERR, 0))

    def _take(self, wr_id: int, num_requests: int) -> None:
        queue = self.send_queue
        if queue.taken + num_requests > queue.depth:
            raise TransportError(f"cannot post a write: {os.strerror(errno.ENOMEM)}")
        queue.taken += num_requests
        self.last_wr_id = wr_id

    def _cover(self, num_requests: int, signalled: bool) -> int:
        queue = self.send_queue
        queue.uncovered += num_requests
        if not signalled:
            return 0
        covered, queue.uncovered = queue.uncovered, 0
        return covered

    def _peer(self) -> FakeQueuePair | None:
        assert self.connection is not None
        peer = self.verbs.queue_pairs.get(self.connection.remote.qp_number)
        alive = (
            self.verbs.routed
            and peer is not None
            and not peer.failed
            and peer.connection is not None
            and peer.adapter.open
        )
        return peer if alive else None

    def _succeed(self, wr_id: int, covered: int) -> None:
        if covered:

            def give_back() -> None:
                self.send_queue.taken -= covered

            self.adapter.complete(Completion(wr_id, 0, 0), give_back)

    def _probe(self, wr_id: int, covered: int) -> None:
        if self.number not in self.verbs.queue_pairs:
            return
        if self.failed or self._peer() is None:
            self.fail(wr_id, RETRY_EXC_ERR)
        else:
            self._succeed(wr_id, covered)

    def _write_frame(
        self,
        wr_id: int,
        covered: int,
        source: int,
        target: int,
        head: int,
        size: int,
        imm: int,
        copied: bytes | None,
        rows: RowSource | None,
    ) -> None:
        if self.number not in self.verbs.queue_pairs:
            return  # destroyed with its requests
        assert self.connection is not None
        peer = self._peer()
        if self.failed or peer is None:
            self.fail(wr_id, RETRY_EXC_ERR)
            return
        local = self.verbs.regions[self.connection.lkey].at(source, size)
        assert local is not None, "the frame lies outside of its region"
        region = self.verbs.regions.get(self.connection.rkey)
        remote = region.at(target, size) if region is not None and region.remote else None
        if remote is None:
            peer.fail(peer.last_wr_id, FLUSH_ERR)
            self.fail(wr_id, REM_ACCESS_ERR)
            return
        ctypes.memmove(remote + head, local + head, size - head)
        if rows is not None:
            taken = self.verbs.regions[rows.lkey].at(rows.base, rows.num_bytes)
            assert taken is not None, "the rows lie outside of their region"
            ctypes.memmove(remote + head, taken, rows.num_bytes)
        if not peer.receives:
            self.fail(wr_id, RNR_RETRY_EXC_ERR)
            return
        if copied is None:
            ctypes.memmove(remote, local, head)
        else:
            ctypes.memmove(remote, copied, head)
        peer.adapter.complete(Completion(peer.receives.popleft(), 0, imm))
        self._succeed(wr_id, covered)

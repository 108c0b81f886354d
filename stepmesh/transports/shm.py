"""Same-host channel: each rank owns one sealed memfd per pair and generation, which the peer maps and writes into.

    offset 0            bell word: number of posts so far (uint64, alone in its cache line)
    64 * (1 + p)        post number n, p = n % (2 * num_streams): slot 2 * stream + parity, then seq (two uint64)
    next whole page     the slots, one after the other

A post writes, in this order: payload, header, trailer (the mesh), slot and seq, bell word, and a write to the
receiver's eventfd. Plain stores are enough because x86-64 keeps the order of stores; elsewhere this channel is not
offered. There are as many places for posts as slots, and a slot is filled again only once its exchange was answered, so
nothing unread is ever overwritten; a bell that is further ahead than that is a failure. The eventfd is always written
(well under a microsecond), so there is no sleeping flag and no lost wake-up; a rank has one for all its peers. The
memfd has no name: nothing is left behind when a process dies.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import platform
import sys
from collections.abc import Callable, Sequence
from typing import Any

from stepmesh.errors import ProtocolError, TransportError
from stepmesh.lane import LaneMemory
from stepmesh.layout import NUM_PARITIES, PAGE_BYTES, align
from stepmesh.native import native
from stepmesh.transports.base import Channel, ChannelSpec, Failure, Offer, Posted, close_fds

_LINE_BYTES = 64
_LINE_WORDS = _LINE_BYTES // 8
_NOTHING: tuple[Posted, ...] = ()


def unsupported_reason() -> str | None:
    """Why this host cannot use shm, or None."""
    if not sys.platform.startswith("linux"):
        return "shm needs Linux (memfd, eventfd)"
    if platform.machine() not in ("x86_64", "AMD64"):
        return f"shm relies on x86-64's order of stores, this is {platform.machine()}"
    return None


def region_bytes(num_streams: int, slot_bytes: int) -> int:
    """Size of a region: bell and posts, then the slots."""
    return _board_bytes(num_streams) + num_streams * NUM_PARITIES * slot_bytes


def _board_bytes(num_streams: int) -> int:
    return align(_LINE_BYTES * (1 + num_streams * NUM_PARITIES), PAGE_BYTES)


class Board:
    """The bell and the posts of a region, for the end that posts or the one that reads. Has a twin in `_native.c`."""

    def __init__(self, memory: memoryview, num_slots: int, posted_type: type[Posted]) -> None:
        self._words = memory.cast("Q")
        self._num_slots = num_slots
        self._posted_type = posted_type
        self._seen = 0  # posts made or read

    def post(self, slot: int, seq: int, bell_fd: int) -> int:
        """Write the next post and ring: 0, or errno of the bell."""
        words = self._words
        at = _LINE_WORDS * (1 + self._seen % self._num_slots)
        words[at] = slot
        words[at + 1] = seq
        self._seen += 1
        words[0] = self._seen
        try:
            os.eventfd_write(bell_fd, 1)
        except BlockingIOError:
            return 0  # the counter is full: the peer is being woken anyway
        except OSError as error:
            return error.errno or errno.EIO
        return 0

    def poll(self) -> Sequence[Posted]:
        """What was posted since the last call. Raises ValueError for what no honest peer writes."""
        words, seen, num_slots = self._words, self._seen, self._num_slots
        posts = words[0]
        if posts == seen:
            return _NOTHING
        if not seen < posts <= seen + num_slots:
            raise ValueError(f"bell of {posts} posts, {seen} were seen, {num_slots} slots")
        found = []
        for post in range(seen, posts):
            at = _LINE_WORDS * (1 + post % num_slots)
            slot = words[at]
            if slot >= num_slots:
                raise ValueError(f"post into slot {slot} of {num_slots}")
            found.append(self._posted_type(slot // NUM_PARITIES, slot % NUM_PARITIES, words[at + 1]))
        self._seen = posts
        return found


_board_type = Board if native is None else native.Board


class _Region:
    """A mapping and its views. Freed with the last view, so a view that the engine still holds stays readable."""

    def __init__(self, fd: int, num_streams: int, slot_bytes: int) -> None:
        size = region_bytes(num_streams, slot_bytes)
        try:
            mapping = mmap.mmap(fd, size)
        except (OSError, ValueError) as error:
            raise TransportError(f"cannot map {size} bytes of shared memory: {error}") from error
        memory = memoryview(mapping)
        start = _board_bytes(num_streams)
        self.board_memory = memory[:start]
        self.board = _board_type(self.board_memory, num_streams * NUM_PARITIES, Posted)
        self.slots = [memory[offset : offset + slot_bytes] for offset in range(start, size, slot_bytes)]


class ShmChannel(Channel):
    """One generation of a same-host pair."""

    kind = "shm"

    def __init__(self, spec: ChannelSpec, bell_fd: int, wakeups_fd: int) -> None:
        self._spec = spec
        # Both are the fabric's, not owned: the bell is passed to the peer, `wakeups` is readable when it rings, too.
        self._bell_fd, self._wakeups_fd = bell_fd, wakeups_fd
        self._memfd = _sealed_memfd(region_bytes(spec.num_streams, spec.rx_slot_bytes))
        self._rx = _Region(self._memfd, spec.num_streams, spec.rx_slot_bytes)
        self._rx_board = self._rx.board
        self._tx: _Region | None = None
        self._publish: Callable[[int, int, int], int] | None = None
        self._peer_bell_fd = -1
        self._failure: Failure | None = None

    def offer(self) -> Offer:
        descriptor = {"rx_slot_bytes": self._spec.rx_slot_bytes, "num_streams": self._spec.num_streams}
        return Offer(descriptor, (self._memfd, self._bell_fd))

    def attach(self, descriptor: dict[str, Any], fds: Sequence[int]) -> None:
        if len(fds) != 2:
            close_fds(fds)
            raise ProtocolError(f"shm descriptor came with {len(fds)} file descriptors, expected 2")
        memfd, self._peer_bell_fd = fds
        try:
            _check_bell(self._peer_bell_fd)
            self._check_region(descriptor, memfd)
            self._tx = _Region(memfd, self._spec.num_streams, self._spec.tx_slot_bytes)
            self._publish = self._tx.board.post
        finally:
            os.close(memfd)
            self._close_memfd()

    @property
    def ready(self) -> bool:
        return self._tx is not None

    def outgoing(self, stream: int, parity: int) -> memoryview:
        assert self._tx is not None
        return self._tx.slots[NUM_PARITIES * stream + parity]

    def incoming(self, stream: int, parity: int) -> memoryview:
        return self._rx.slots[NUM_PARITIES * stream + parity]

    def post(self, stream: int, parity: int, seq: int, frame_bytes: int) -> None:
        publish = self._publish
        if publish is None:
            return
        code = publish(NUM_PARITIES * stream + parity, seq, self._peer_bell_fd)
        if code:
            self._failure = Failure(f"doorbell: {os.strerror(code)}", False)

    def poll(self) -> Sequence[Posted]:
        if self._failure is not None:
            return _NOTHING
        try:
            return self._rx_board.poll()
        except ValueError as error:
            self._failure = Failure(str(error), True)
            return _NOTHING

    @property
    def sign(self) -> object:
        return self._rx_board

    def lane(self, stream: int) -> LaneMemory | None:
        if native is None or self._tx is None or self._failure is not None:
            return None
        places = [NUM_PARITIES * stream + parity for parity in range(NUM_PARITIES)]
        return LaneMemory(
            self._tx.board,
            self._rx.board,
            [self._tx.slots[place] for place in places],
            [self._rx.slots[place] for place in places],
            self._peer_bell_fd,
            self._bell_fd,
            self._wakeups_fd,
        )

    @property
    def failure(self) -> Failure | None:
        return self._failure

    def close(self) -> None:
        # Mappings go with their last view: dropping ours is all that is needed, and safe while others hold one.
        self._tx = self._publish = None
        self._close_memfd()
        if self._peer_bell_fd >= 0:
            os.close(self._peer_bell_fd)
            self._peer_bell_fd = -1

    def _close_memfd(self) -> None:
        if self._memfd >= 0:
            os.close(self._memfd)
            self._memfd = -1

    def _check_region(self, descriptor: dict[str, Any], memfd: int) -> None:
        theirs = (descriptor.get("rx_slot_bytes"), descriptor.get("num_streams"))
        ours = (self._spec.tx_slot_bytes, self._spec.num_streams)
        if theirs != ours:
            raise ProtocolError(f"peer's slots (bytes, streams) are {theirs}, expected {ours}")
        seals = 0
        with contextlib.suppress(OSError):
            seals = fcntl.fcntl(memfd, fcntl.F_GET_SEALS)
        if seals & _seals() != _seals():
            raise ProtocolError("peer's memory is not a sealed memfd: it could shrink under our hands")
        size, needed = os.fstat(memfd).st_size, region_bytes(self._spec.num_streams, self._spec.tx_slot_bytes)
        if size != needed:
            raise ProtocolError(f"peer's memory has {size} bytes, expected {needed}")


def _seals() -> int:
    """The size is fixed for good, and so are the seals."""
    return fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


def _check_bell(fd: int) -> None:
    """Raise ProtocolError unless ringing the peer's bell can neither block nor write anywhere else."""
    kind = os.readlink(f"/proc/self/fd/{fd}")
    if kind != "anon_inode:[eventfd]" or os.get_blocking(fd):
        raise ProtocolError(f"peer's bell is no non-blocking eventfd but {kind}")


def _sealed_memfd(size: int) -> int:
    """Anonymous memory of a size that can never change. Pages are taken when first touched."""
    fd = -1
    try:
        fd = os.memfd_create("stepmesh", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, size)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _seals())
    except OSError as error:
        if fd >= 0:
            os.close(fd)
        raise TransportError(f"cannot create {size} bytes of shared memory: {error.strerror}") from error
    return fd

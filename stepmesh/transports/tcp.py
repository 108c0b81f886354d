"""The channel that is always available: one TCP data connection per pair and generation, one I/O thread per rank.

The attention rank opens the data connection to the FFN rank's listener and begins with ATTACH_MAGIC and a token that
only the two ends of this session can compute. After that either direction carries frames exactly as they lie in a
slot: header, payload, trailer. They are sent straight from the outgoing slot. What arrives between two frames goes
through a stage of a few KiB, so that a small frame costs one call; the rest of a large one goes straight into its slot.
Both calls release the interpreter lock.

Two threads share the work. The main thread sends what the socket takes at once and receives while it is in `progress`:
no thread switch. The I/O thread sends the rest, and receives while the main thread computes, so that a transfer goes
on meanwhile. All data sockets are in one epoll of their own, which the main thread's and the I/O thread's epoll
contain: one call keeps the I/O thread asleep while the main thread looks itself.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from stepmesh.errors import FrameError
from stepmesh.layout import HEADER_BYTES, NUM_PARITIES, frame_bytes
from stepmesh.transports.base import Channel, ChannelSpec, Failure, Offer, Posted, close_fds
from stepmesh.transports.sockets import tune_local
from stepmesh.wire import DATA_MAGIC, PLACE

_STAGE_BYTES = 16 * 1024  # a small frame comes with one call; of a large one this much is copied once more
_ROUND_BYTES = 8 << 20  # what one connection may read before the others get their turn
_LONG_ABSENCE_S = 200e-6  # the I/O thread is worth waking for a main thread that stays away longer than this
_PATROL_S = 0.02  # the I/O thread looks this often whether it is needed
_HUGE_FROM_BYTES = 512 * 1024  # slots of this size and more ask for huge pages
_NOTHING: tuple[Posted, ...] = ()


class TcpIo:
    """The I/O thread and the registry of data connections. Started with the first channel, joined by close()."""

    def __init__(self, name: str, main_epoll: select.epoll, ring: Callable[[], None]) -> None:
        self.ring = ring  # wakes the main thread
        self._data = select.epoll()  # all data sockets
        self.data_fd = self._data.fileno()
        main_epoll.register(self.data_fd, select.EPOLLIN)
        self._main_epoll = main_epoll
        self._epoll = select.epoll()  # the I/O thread's
        self._epoll.register(self.data_fd, 0)
        self._channels: dict[int, TcpChannel] = {}
        self._writing: set[int] = set()
        self._left_at = 0.0  # when the main thread turned to other work; 0.0: it is here
        self._stays_away = False  # its last absence was a long one, so the next one will be
        self._guarded = False  # the I/O thread receives
        self._stop_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._epoll.register(self._stop_fd, select.EPOLLIN)
        self._thread = threading.Thread(target=self._run, name=f"stepmesh-tcp {name}", daemon=True)
        self._thread.start()

    def add(self, channel: TcpChannel, fd: int) -> None:
        """Start receiving."""
        self._channels[fd] = channel
        self._data.register(fd, select.EPOLLIN)

    def remove(self, fd: int) -> None:
        """Neither receive nor send any more."""
        self.want_write(fd, False)
        self._channels.pop(fd, None)
        self._data.unregister(fd)

    def want_write(self, fd: int, wanted: bool) -> None:
        """Let the I/O thread send when the socket can take more."""
        if wanted:
            self._writing.add(fd)
            self._epoll.register(fd, select.EPOLLOUT)
        elif fd in self._writing:
            self._writing.discard(fd)
            self._epoll.unregister(fd)

    def collect(self, *, patiently: bool = False) -> None:
        """Receive what has come. Main thread; `patiently`: also where the I/O thread is at it."""
        if self._left_at:
            self._come_back()
        for fd, _ in self._data.poll(0):
            if (channel := self._channels.get(fd)) is not None:
                channel.receive(patiently=patiently)

    def leave(self) -> None:
        """The main thread turns to other work: from now on the I/O thread receives, unless that is over at once."""
        self._left_at = time.monotonic()
        if self._stays_away:
            self._guard()

    def close(self) -> None:
        """Stop and join. Idempotent. Channels are closed by their owners, before."""
        if self._epoll.closed:
            return
        os.eventfd_write(self._stop_fd, 1)
        self._thread.join()
        self._main_epoll.unregister(self.data_fd)
        self._epoll.close()
        self._data.close()
        os.close(self._stop_fd)

    def _guard(self) -> None:
        if not self._guarded:
            self._guarded = True
            self._epoll.modify(self.data_fd, select.EPOLLIN)

    def _come_back(self) -> None:
        self._stays_away = time.monotonic() - self._left_at > _LONG_ABSENCE_S
        self._left_at = 0.0
        if self._guarded:
            self._guarded = False
            self._epoll.modify(self.data_fd, 0)

    def _run(self) -> None:
        while True:
            if self._left_at and time.monotonic() - self._left_at > _PATROL_S:
                self._guard()  # not foreseen by the main thread
            for fd, _ in self._epoll.poll(_PATROL_S):
                if fd == self._stop_fd:
                    return
                if fd == self.data_fd:
                    self._receive()
                elif (channel := self._channels.get(fd)) is not None:
                    channel.send_queued()

    def _receive(self) -> None:
        """Receive what comes while the main thread is busy otherwise."""
        news = False
        for fd, _ in self._data.poll(0):
            if (channel := self._channels.get(fd)) is not None:
                news |= channel.receive()
        if news:
            self.ring()


class TcpChannel(Channel):
    """One generation of a pair over TCP. `dial` makes the data connection (attention rank), None waits for it."""

    kind = "tcp"

    def __init__(self, spec: ChannelSpec, io: TcpIo, token: bytes, dial: Callable[[], socket.socket] | None) -> None:
        self._spec = spec
        self._io = io
        self.token = token
        self._dial = dial
        num_slots = spec.num_streams * NUM_PARITIES
        self._rx_slots = _split(mmap.mmap(-1, num_slots * spec.rx_slot_bytes), spec.rx_slot_bytes)
        self._tx_slots = _split(mmap.mmap(-1, num_slots * spec.tx_slot_bytes), spec.tx_slot_bytes)
        self._sock: socket.socket | None = None
        self._fd = -1
        self._open = True
        self._failure: Failure | None = None
        self._attached = False
        # Order of locking: _rx_lock, _tx_lock, _state_lock.
        self._rx_lock = threading.Lock()  # held by whichever thread receives
        self._tx_lock = threading.Lock()  # held by whichever thread sends
        self._state_lock = threading.Lock()  # guards _tx_queue, _failure and the registrations
        self._tx_queue: deque[memoryview] = deque()
        self._rx_stage = memoryview(bytearray(_STAGE_BYTES))  # begins of frames whose slot is not known yet
        self._rx_staged = 0
        self._rx_posted: Posted | None = None  # the frame that is being received into its slot
        self._rx_rest = self._rx_stage[:0]  # where the rest of it goes
        self._rx_last_seq = [0] * spec.num_streams
        self._arrived: deque[Posted] = deque()

    def offer(self) -> Offer:
        return Offer({})

    def attach(self, descriptor: dict[str, Any], fds: Sequence[int]) -> None:
        close_fds(fds)
        self._attached = True
        if self._dial is not None:
            self._start(self._dial(), memoryview(self.token))

    def adopt(self, sock: socket.socket) -> None:
        """FFN rank: the data connection has arrived and shown the token."""
        if self.expected:
            self._start(sock, None)
        else:
            sock.close()

    @property
    def expected(self) -> bool:
        """FFN rank: the data connection has still to come."""
        return self._open and self._sock is None

    @property
    def ready(self) -> bool:
        return self._attached and self._sock is not None

    def outgoing(self, stream: int, parity: int) -> memoryview:
        return self._tx_slots[NUM_PARITIES * stream + parity]

    def incoming(self, stream: int, parity: int) -> memoryview:
        return self._rx_slots[NUM_PARITIES * stream + parity]

    def post(self, stream: int, parity: int, seq: int, frame_bytes: int) -> None:
        frame = self._tx_slots[NUM_PARITIES * stream + parity][:frame_bytes]
        if not self._tx_queue and self._tx_lock.acquire(blocking=False):
            # Nothing is queued and the I/O thread does not send: order is kept.
            try:
                frame = frame[self._send_some(frame) :]
            finally:
                self._tx_lock.release()
            if not frame:
                return
        self._queue(frame)

    def poll(self) -> Sequence[Posted]:
        """Received are frames by `TcpIo.collect`, or by the I/O thread."""
        arrived = self._arrived
        if not arrived:
            return _NOTHING
        found = []
        while arrived:
            found.append(arrived.popleft())
        return found

    @property
    def sign(self) -> object:
        return self._io.data_fd

    @property
    def failure(self) -> Failure | None:
        return self._failure

    def close(self) -> None:
        with self._rx_lock, self._tx_lock, self._state_lock:
            self._open = False
            self._tx_queue.clear()
            if self._sock is not None:
                if self._failure is None:
                    self._io.remove(self._fd)
                self._sock.close()
                self._sock = None

    def send_queued(self) -> None:
        """Send what is queued until the socket is full. I/O thread."""
        with self._tx_lock:
            while self._tx_queue:
                frame = self._tx_queue[0]
                sent = self._send_some(frame)
                with self._state_lock:
                    if not self._tx_queue:
                        return  # closed
                    if sent < len(frame):
                        self._tx_queue[0] = frame[sent:]
                        return
                    self._tx_queue.popleft()
                    if not self._tx_queue and self._failure is None:
                        self._io.want_write(self._fd, False)

    def receive(self, *, patiently: bool = True) -> bool:
        """Receive until the socket is empty; True when there is news for `poll` or `failure`. Either thread.

        Not `patiently`: only if the other thread is not at it.
        """
        if not self._rx_lock.acquire(patiently):
            return False
        try:
            if self._sock is None or self._failure is not None:
                return False
            known = len(self._arrived)
            failure = self._read_frames(self._sock)
            if failure is not None:
                self._fail(failure)
            return failure is not None or len(self._arrived) != known
        finally:
            self._rx_lock.release()

    def _start(self, sock: socket.socket, first: memoryview | None) -> None:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        tune_local(sock, self._spec.tx_slot_bytes)
        self._sock = sock
        self._fd = sock.fileno()
        self._io.add(self, self._fd)
        if first is not None:
            self._queue(first)  # once connected, the I/O thread can send

    def _queue(self, frame: memoryview) -> None:
        with self._state_lock:
            if self._sock is None or self._failure is not None:
                return
            self._tx_queue.append(frame)
            if len(self._tx_queue) == 1:
                self._io.want_write(self._fd, True)

    def _send_some(self, frame: memoryview) -> int:
        """Number of bytes the socket took. A failure is recorded and takes none. Under _tx_lock."""
        sock = self._sock
        if sock is None or self._failure is not None:
            return 0
        try:
            return sock.send(frame)
        except BlockingIOError:
            return 0
        except OSError as error:
            self._fail(Failure(f"data connection: {error.strerror}", False))
            return 0

    def _read_frames(self, sock: socket.socket) -> Failure | None:
        """Receive until nothing is left: between frames into the stage, within one into its slot."""
        budget = _ROUND_BYTES
        try:
            while budget > 0:
                target = self._rx_stage[self._rx_staged :] if self._rx_posted is None else self._rx_rest
                got = sock.recv_into(target)
                if got == 0:
                    return Failure("the peer closed the data connection", False)
                budget -= got
                if self._rx_posted is None:
                    self._rx_staged += got
                    self._unstage()
                    if self._rx_posted is None and got < len(target):
                        return None  # the socket was emptied; asking once more would cost as much as all of this
                else:
                    self._rx_rest = target[got:]
                    if got == len(target):
                        self._arrived.append(self._rx_posted)
                        self._rx_posted = None
        except BlockingIOError:
            pass
        except OSError as error:
            return Failure(f"data connection: {error.strerror}", False)
        except FrameError as error:
            return Failure(str(error), True)
        return None

    def _unstage(self) -> None:
        """Move what is staged into its slots, until less than a header is left, or a frame that has still to come."""
        stage, begin, end = self._rx_stage, 0, self._rx_staged
        while end - begin >= HEADER_BYTES:
            posted, slot = self._slot_of(stage[begin : begin + HEADER_BYTES])
            have = min(len(slot), end - begin)
            slot[:have] = stage[begin : begin + have]
            begin += have
            if have < len(slot):
                self._rx_posted, self._rx_rest = posted, slot[have:]
            else:
                self._arrived.append(posted)
        stage[: end - begin] = stage[begin:end]
        self._rx_staged = end - begin

    def _slot_of(self, memory: memoryview) -> tuple[Posted, memoryview]:
        """Which slot a header is for, and the part of the slot that its frame fills. Raises FrameError."""
        magic, seq, payload_bytes, stream = PLACE.unpack_from(memory)
        size = frame_bytes(payload_bytes)
        if magic != DATA_MAGIC or stream >= self._spec.num_streams or size > self._spec.rx_slot_bytes:
            raise FrameError(f"unusable header on the data connection: {size} bytes for stream {stream}")
        last_seq = self._rx_last_seq[stream]
        if seq <= last_seq:
            # Receiving it would overwrite a slot that may be in use.
            raise FrameError(f"seq {seq} of stream {stream} is not above {last_seq}")
        self._rx_last_seq[stream] = seq
        parity = seq & 1
        return Posted(stream, parity, seq), self._rx_slots[NUM_PARITIES * stream + parity][:size]

    def _fail(self, failure: Failure) -> None:
        """Stop polling the socket; the mesh finds `failure` at its next look."""
        with self._state_lock:
            if self._failure is None and self._sock is not None:
                self._failure = failure
                self._tx_queue.clear()
                self._io.remove(self._fd)
                self._io.ring()


def _split(mapping: mmap.mmap, slot_bytes: int) -> list[memoryview]:
    """Cut page-aligned anonymous memory into slots; pages are taken when first touched."""
    if slot_bytes >= _HUGE_FROM_BYTES:  # frames of megabytes go through the kernel some 4 % faster
        with contextlib.suppress(OSError):
            mapping.madvise(mmap.MADV_HUGEPAGE)
    memory = memoryview(mapping)
    return [memory[offset : offset + slot_bytes] for offset in range(0, len(memory), slot_bytes)]

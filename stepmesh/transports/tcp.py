"""The channel that is always available: one TCP data connection per pair and generation, one I/O thread per rank.

The attention rank opens the data connection to the FFN rank's listener and begins with ATTACH_MAGIC and a token that
only the two ends of this session can compute. After that either direction carries frames exactly as they lie in a
slot: header, payload, trailer. The I/O thread receives straight into the slot that the header names and sends
straight from the outgoing slot; both calls release the interpreter lock, so a transfer goes on while the main
thread computes. Small frames are sent by the main thread itself, which saves a thread switch.
"""

from __future__ import annotations

import mmap
import os
import select
import socket
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from stepmesh.errors import FrameError
from stepmesh.layout import HEADER_BYTES, NUM_PARITIES, frame_bytes
from stepmesh.transports.base import Channel, ChannelSpec, Failure, Offer, Posted, close_fds
from stepmesh.wire import DATA_MAGIC, read_header

INLINE_BYTES = 64 * 1024  # a frame up to this size is sent by the main thread: cheaper than waking another one
_ROUND_BYTES = 8 << 20  # what one connection may read before the I/O thread looks at the others
_NOTHING: tuple[Posted, ...] = ()


class TcpIo:
    """The I/O thread: moves bytes between sockets and slots. Started with the first channel, joined by close()."""

    def __init__(self, name: str, ring: Callable[[], None]) -> None:
        self.ring = ring  # wakes the main thread
        self.epoll = select.epoll()
        self._channels: dict[int, TcpChannel] = {}
        self._stop_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.epoll.register(self._stop_fd, select.EPOLLIN)
        self._thread = threading.Thread(target=self._run, name=f"stepmesh-tcp {name}", daemon=True)
        self._thread.start()

    def add(self, channel: TcpChannel, fd: int, mask: int) -> None:
        self._channels[fd] = channel
        self.epoll.register(fd, mask)

    def remove(self, fd: int) -> None:
        self._channels.pop(fd, None)
        self.epoll.unregister(fd)

    def close(self) -> None:
        """Stop and join. Idempotent. Channels are closed by their owners, before or after."""
        if self.epoll.closed:
            return
        os.eventfd_write(self._stop_fd, 1)
        self._thread.join()
        self.epoll.close()
        os.close(self._stop_fd)

    def _run(self) -> None:
        while True:
            for fd, mask in self.epoll.poll():
                if fd == self._stop_fd:
                    return
                channel = self._channels.get(fd)
                if channel is not None:
                    channel.on_ready(mask)


class TcpChannel(Channel):
    """One generation of a pair over TCP. `dial` makes the data connection (attention rank), None waits for it."""

    kind = "tcp"
    spins = False

    def __init__(self, spec: ChannelSpec, io: TcpIo, token: bytes, dial: Callable[[], socket.socket] | None) -> None:
        self._spec = spec
        self._io = io
        self.token = token
        self._dial = dial
        num_slots = spec.num_streams * NUM_PARITIES
        self._rx_slots = _split(mmap.mmap(-1, num_slots * spec.rx_slot_bytes), spec.rx_slot_bytes)
        self._tx_slots = _split(mmap.mmap(-1, num_slots * spec.tx_slot_bytes), spec.tx_slot_bytes)
        self._sock: socket.socket | None = None
        self._open = True
        self._failure: Failure | None = None
        self._attached = False
        # Order of locking: _rx_lock before _tx_lock.
        self._tx_lock = threading.Lock()  # guards _tx_queue, _failure and what the socket is polled for
        self._tx_queue: deque[memoryview] = deque()
        self._rx_lock = threading.Lock()  # held by the I/O thread while it receives; close() takes it
        self._rx_header = memoryview(bytearray(HEADER_BYTES))
        self._rx_target = self._rx_header
        self._rx_filled = 0
        self._rx_posted: Posted | None = None  # the frame whose payload is being received
        self._rx_last_seq = [0] * spec.num_streams
        self._arrived: deque[Posted] = deque()

    def offer(self) -> Offer:
        return Offer({})

    def attach(self, descriptor: dict[str, Any], fds: Sequence[int]) -> None:
        close_fds(fds)
        self._attached = True
        if self._dial is not None:
            self._tx_queue.append(memoryview(self.token))
            self._start(self._dial())

    def adopt(self, sock: socket.socket) -> None:
        """FFN rank: the data connection has arrived and shown the token."""
        if self._sock is not None or not self._open:
            sock.close()
            return
        self._start(sock)

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
        with self._tx_lock:
            if self._sock is None or self._failure is not None:
                return
            if not self._tx_queue and frame_bytes <= INLINE_BYTES:
                try:
                    sent = self._sock.send(frame)
                except BlockingIOError:
                    sent = 0
                except OSError as error:
                    self._fail(f"data connection: {error.strerror}")
                    return
                if sent == frame_bytes:
                    return
                frame = frame[sent:]
            self._tx_queue.append(frame)
            if len(self._tx_queue) == 1:
                self._io.epoll.modify(self._sock, select.EPOLLIN | select.EPOLLOUT)

    def poll(self) -> Sequence[Posted]:
        if not self._arrived:
            return _NOTHING
        found = []
        while self._arrived:
            found.append(self._arrived.popleft())
        return found

    @property
    def failure(self) -> Failure | None:
        return self._failure

    def close(self) -> None:
        with self._rx_lock, self._tx_lock:
            self._open = False
            self._tx_queue.clear()
            if self._sock is not None:
                if self._failure is None:
                    self._io.remove(self._sock.fileno())
                self._sock.close()
                self._sock = None

    def on_ready(self, mask: int) -> None:
        """The socket can be read or written. I/O thread."""
        if mask & select.EPOLLOUT:
            self._send()
        if mask & ~select.EPOLLOUT:
            self._receive()

    def _start(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._sock = sock
        self._io.add(self, sock.fileno(), select.EPOLLIN | (select.EPOLLOUT if self._tx_queue else 0))

    def _send(self) -> None:
        with self._tx_lock:
            if self._sock is None or self._failure is not None:
                return
            try:
                while self._tx_queue:
                    frame = self._tx_queue[0]
                    sent = self._sock.send(frame)
                    if sent < len(frame):
                        self._tx_queue[0] = frame[sent:]
                    else:
                        self._tx_queue.popleft()
            except BlockingIOError:
                return
            except OSError as error:
                self._fail(f"data connection: {error.strerror}")
                return
            self._io.epoll.modify(self._sock, select.EPOLLIN)

    def _receive(self) -> None:
        with self._rx_lock:
            if self._sock is None or self._failure is not None:
                return
            failure = self._read_frames(self._sock)
            if failure is not None:
                with self._tx_lock:
                    self._fail(failure.reason, rejected=failure.rejected)

    def _read_frames(self, sock: socket.socket) -> Failure | None:
        budget = _ROUND_BYTES
        try:
            while budget > 0:
                got = sock.recv_into(self._rx_target[self._rx_filled :])
                if got == 0:
                    return Failure("the peer closed the data connection", False)
                budget -= got
                self._rx_filled += got
                if self._rx_filled == len(self._rx_target):
                    self._next_target()
        except BlockingIOError:
            pass
        except OSError as error:
            return Failure(f"data connection: {error.strerror}", False)
        except FrameError as error:
            return Failure(str(error), True)
        return None

    def _next_target(self) -> None:
        """The header is complete: receive the rest into its slot. Or the frame is complete: report it."""
        self._rx_filled = 0
        if self._rx_posted is not None:
            self._arrived.append(self._rx_posted)
            self._rx_posted = None
            self._rx_target = self._rx_header
            self._io.ring()
            return
        header = read_header(self._rx_header)
        size = frame_bytes(header.payload_bytes)
        if header.magic != DATA_MAGIC or header.stream >= self._spec.num_streams or size > self._spec.rx_slot_bytes:
            raise FrameError(f"unusable header on the data connection: {size} bytes for stream {header.stream}")
        if header.seq <= self._rx_last_seq[header.stream]:
            # Receiving it would overwrite a slot that may be in use.
            raise FrameError(
                f"seq {header.seq} of stream {header.stream} is not above {self._rx_last_seq[header.stream]}"
            )
        self._rx_last_seq[header.stream] = header.seq
        parity = header.seq & 1
        slot = self.incoming(header.stream, parity)
        slot[:HEADER_BYTES] = self._rx_header
        self._rx_target = slot[HEADER_BYTES:size]
        self._rx_posted = Posted(header.stream, parity, header.seq)

    def _fail(self, reason: str, *, rejected: bool = False) -> None:
        """Stop polling the socket, tell the main thread. Under _tx_lock."""
        if self._failure is None and self._sock is not None:
            self._failure = Failure(reason, rejected)
            self._io.remove(self._sock.fileno())
            self._io.ring()


def _split(mapping: mmap.mmap, slot_bytes: int) -> list[memoryview]:
    """Cut page-aligned anonymous memory into slots; pages are taken when first touched."""
    memory = memoryview(mapping)
    return [memory[offset : offset + slot_bytes] for offset in range(0, len(memory), slot_bytes)]

"""A GPU's driver in pure Python: device memory is host memory, streams are queues that run when the test says so."""

from __future__ import annotations

import ctypes
import os
from collections import deque
from collections.abc import Callable

import numpy as np

from stepmesh.gpu import DmaBuf, GpuDriver, GpuError
from tests.fakes.verbs import FakeVerbs


class FakeGpu(GpuDriver):
    name = "fake"

    def __init__(self, verbs: FakeVerbs, *, peer_memory: bool = True, dmabuf: bool = True) -> None:
        self._verbs = verbs
        self._peer_memory = peer_memory
        self._dmabuf = dmabuf
        self._queues: dict[int, deque[Callable[[], None]]] = {}
        self._events: set[int] = set()
        self._done: set[int] = set()
        self.pinned: dict[int, int] = {}
        self.num_copies = 0
        self.can_pin = True
        self.broken = False  # every further call fails, as after an illegal access

    @property
    def num_events(self) -> int:
        return len(self._events)

    def launch(self, stream: int, kernel: Callable[[], None]) -> None:
        """Queue work that makes rows."""
        self._queues.setdefault(stream, deque()).append(kernel)

    def run(self, stream: int) -> None:
        """Carry out everything queued on a stream."""
        queue = self._queues.get(stream, deque())
        while queue:
            queue.popleft()()

    def has_peer_memory(self) -> bool:
        return self._peer_memory

    def export_dmabuf(self, address: int, num_bytes: int) -> DmaBuf:
        if not self._dmabuf:
            raise GpuError("cuMemGetHandleForAddressRange: operation not supported (801)")
        fd = os.memfd_create("fake-dmabuf")
        self._verbs.dmabuf_addresses[fd] = address
        return DmaBuf(fd, 512)

    def pin(self, address: int, num_bytes: int) -> None:
        if not self.can_pin:
            raise GpuError("cuMemHostRegister: out of memory (2)")
        assert address not in self.pinned
        self.pinned[address] = num_bytes

    def unpin(self, address: int) -> None:
        del self.pinned[address]

    def copy_to_host(self, target: int, source: int, num_bytes: int, stream: int) -> None:
        self._check()
        self.num_copies += 1
        self.launch(stream, lambda: void(ctypes.memmove(target, source, num_bytes)))

    def record(self, stream: int) -> object:
        self._check()
        event = len(self._events) + len(self._done) + 1
        self._events.add(event)
        self.launch(stream, lambda: self._done.add(event))
        return event

    def done(self, event: int) -> bool:
        self._check()
        return event in self._done

    def release(self, event: int) -> None:
        self._events.remove(event)

    def close(self) -> None:
        assert not self._events
        assert not self.pinned

    def _check(self) -> None:
        if self.broken:
            raise GpuError("cuEventQuery: an illegal memory access was encountered (700)")


def void(_: object) -> None:
    """A kernel returns nothing."""


def address_of(array: np.ndarray) -> int:  # type: ignore[type-arg]
    return int(array.ctypes.data)

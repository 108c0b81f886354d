"""What the mesh needs of a GPU: a driver's few calls behind an interface, and the values around them.

`gpu_cuda.CudaDriver` speaks to CUDA, a twin in pure Python serves the tests; `gpu_fabric` makes use of either.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

from stepmesh.errors import TransportError

PAGE_BYTES = 65536  # what CUDA exports as a dma-buf begins and ends on pages of this size


class GpuError(TransportError):
    """A driver call failed; the message names it."""


class DmaBuf(NamedTuple):
    """An open descriptor of device memory, and where in it the wanted range begins. The receiver closes it."""

    fd: int
    offset: int


class DeviceRows(NamedTuple):
    """Contiguous rows in device memory, as they go on the wire."""

    address: int
    num_bytes: int


class GpuPath(NamedTuple):
    """How rows of a buffer reach the wire: "peermem", "dmabuf" (the card reads them) or "staged"; and why."""

    kind: str
    reason: str


class GpuDriver(ABC):
    """The few calls of a GPU's driver that are needed. None blocks. All raise GpuError."""

    name: str

    @abstractmethod
    def has_peer_memory(self) -> bool:
        """A kernel module lets network cards register device memory by its address (nvidia-peermem)."""

    @abstractmethod
    def export_dmabuf(self, address: int, num_bytes: int) -> DmaBuf:
        """A descriptor of the range for other devices."""

    @abstractmethod
    def pin(self, address: int, num_bytes: int) -> None:
        """Let the GPU copy to and from this host memory without the CPU."""

    @abstractmethod
    def unpin(self, address: int) -> None:
        """Undo `pin`."""

    @abstractmethod
    def copy_to_host(self, target: int, source: int, num_bytes: int, stream: int) -> None:
        """Queue a copy on a stream."""

    @abstractmethod
    def record(self, stream: int) -> object:
        """An event that is done when everything queued on the stream so far is."""

    @abstractmethod
    def done(self, event: Any) -> bool:
        """Look, never wait."""

    @abstractmethod
    def release(self, event: Any) -> None:
        """The event is not needed any more."""

    @abstractmethod
    def close(self) -> None:
        """Free what the driver keeps. Idempotent. After the mesh that uses it."""

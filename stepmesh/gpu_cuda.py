"""CUDA's driver through ctypes: what `GpuDriver` needs of libcuda.so.1, no toolkit, no torch.

Memory, streams and events belong to the current context of the calling thread, which torch or cupy have made: call
`open_cuda` after the first allocation, from the mesh's main thread. Unverified on hardware (docs/rdma.md).
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

from stepmesh.gpu import PAGE_BYTES, DmaBuf, GpuDriver, GpuError

_MODULES = Path("/proc/modules")
_PEER_MODULES = ("nvidia_peermem ", "nv_peer_mem ")
_NOT_READY = 600
_EVENT_DISABLE_TIMING = 2
_HOST_REGISTER_PORTABLE = 1
_RANGE_HANDLE_DMA_BUF = 1

_CALLS: dict[str, tuple[Any, ...]] = {
    "cuCtxGetCurrent": (ctypes.POINTER(ctypes.c_void_p),),
    "cuGetErrorString": (ctypes.c_int, ctypes.POINTER(ctypes.c_char_p)),
    "cuMemGetAddressRange_v2": (ctypes.POINTER(ctypes.c_uint64), ctypes.POINTER(ctypes.c_size_t), ctypes.c_uint64),
    "cuMemGetHandleForAddressRange": (
        ctypes.c_void_p,
        ctypes.c_uint64,
        ctypes.c_size_t,
        ctypes.c_int,
        ctypes.c_ulonglong,
    ),
    "cuMemHostRegister_v2": (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint),
    "cuMemHostUnregister": (ctypes.c_void_p,),
    "cuMemcpyDtoHAsync_v2": (ctypes.c_void_p, ctypes.c_uint64, ctypes.c_size_t, ctypes.c_void_p),
    "cuEventCreate": (ctypes.POINTER(ctypes.c_void_p), ctypes.c_uint),
    "cuEventRecord": (ctypes.c_void_p, ctypes.c_void_p),
    "cuEventQuery": (ctypes.c_void_p,),
    "cuEventDestroy_v2": (ctypes.c_void_p,),
}


def open_cuda() -> CudaDriver:
    """The driver of this machine. Raises GpuError: no driver, a call it does not have, or no current context."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise GpuError(f"no CUDA driver: {error}") from error
    return CudaDriver(library)


class CudaDriver(GpuDriver):
    """Keeps events in a pool: making one costs more than everything else here."""

    name = "CUDA"

    def __init__(self, library: Any) -> None:
        self._functions = {}
        for name, types in _CALLS.items():
            try:
                function = getattr(library, name)
            except AttributeError:
                if name == "cuMemGetHandleForAddressRange":
                    continue  # drivers before 11.7: no dma-buf
                raise GpuError(f"the CUDA driver has no {name}") from None
            function.argtypes, function.restype = types, ctypes.c_int
            self._functions[name] = function
        self._free_events: list[Any] = []
        context = ctypes.c_void_p()
        self._call("cuCtxGetCurrent", ctypes.byref(context))
        if not context:
            raise GpuError("this thread has no CUDA context yet: allocate something on the GPU first")

    def has_peer_memory(self) -> bool:
        try:
            modules = _MODULES.read_text()
        except OSError:
            return False
        return any(line.startswith(_PEER_MODULES) for line in modules.splitlines())

    def export_dmabuf(self, address: int, num_bytes: int) -> DmaBuf:
        if "cuMemGetHandleForAddressRange" not in self._functions:
            raise GpuError("the CUDA driver exports no dma-buf (11.7 and later do)")
        base, size = ctypes.c_uint64(), ctypes.c_size_t()
        self._call("cuMemGetAddressRange_v2", ctypes.byref(base), ctypes.byref(size), address)
        # Whole pages around the range, within the allocation, which begins and ends on such pages itself.
        start = max(address // PAGE_BYTES * PAGE_BYTES, base.value)
        end = min(-(-(address + num_bytes) // PAGE_BYTES) * PAGE_BYTES, base.value + size.value)
        fd = ctypes.c_int(-1)
        self._call("cuMemGetHandleForAddressRange", ctypes.byref(fd), start, end - start, _RANGE_HANDLE_DMA_BUF, 0)
        return DmaBuf(fd.value, address - start)

    def pin(self, address: int, num_bytes: int) -> None:
        self._call("cuMemHostRegister_v2", address, num_bytes, _HOST_REGISTER_PORTABLE)

    def unpin(self, address: int) -> None:
        self._call("cuMemHostUnregister", address)

    def copy_to_host(self, target: int, source: int, num_bytes: int, stream: int) -> None:
        self._call("cuMemcpyDtoHAsync_v2", target, source, num_bytes, stream)

    def record(self, stream: int) -> object:
        event = self._free_events.pop() if self._free_events else self._new_event()
        self._call("cuEventRecord", event, stream)
        return event

    def done(self, event: Any) -> bool:
        return self._call("cuEventQuery", event, allowed=_NOT_READY) == 0

    def release(self, event: Any) -> None:
        self._free_events.append(event)

    def close(self) -> None:
        while self._free_events:
            self._call("cuEventDestroy_v2", self._free_events.pop())

    def _new_event(self) -> Any:
        event = ctypes.c_void_p()
        self._call("cuEventCreate", ctypes.byref(event), _EVENT_DISABLE_TIMING)
        return event

    def _call(self, name: str, *arguments: Any, allowed: int = 0) -> int:
        code = int(self._functions[name](*arguments))
        if code not in (0, allowed):
            text = ctypes.c_char_p()
            self._functions["cuGetErrorString"](code, ctypes.byref(text))
            raise GpuError(f"{name}: {(text.value or b'unknown error').decode()} ({code})")
        return code

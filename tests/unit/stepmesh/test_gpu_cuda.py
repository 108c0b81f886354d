"""The driver's binding against a library of our own: arguments, errors, what an old driver lacks."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import pytest

from stepmesh import gpu_cuda
from stepmesh.gpu import GpuError
from stepmesh.gpu_cuda import CudaDriver, open_cuda

MIB = 1 << 20
BASE = 0x7F00_0000_0000


class Library:
    """libcuda, as far as it is used. Remembers its calls, answers with `codes` where there is one."""

    def __init__(self, *, missing: str = "") -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.codes: dict[str, int] = {}
        self.num_events = 0
        self.context = 5
        for name in gpu_cuda._CALLS:
            if name != missing:
                setattr(self, name, self._function(name))

    def _function(self, name: str) -> Any:
        def call(*arguments: Any) -> int:
            self.calls.append((name, *arguments))
            if name == "cuCtxGetCurrent":
                ctypes.cast(arguments[0], ctypes.POINTER(ctypes.c_void_p))[0] = self.context
            elif name == "cuMemGetAddressRange_v2":
                ctypes.cast(arguments[0], ctypes.POINTER(ctypes.c_uint64))[0] = BASE
                ctypes.cast(arguments[1], ctypes.POINTER(ctypes.c_size_t))[0] = 4 * MIB
            elif name == "cuMemGetHandleForAddressRange":
                ctypes.cast(arguments[0], ctypes.POINTER(ctypes.c_int))[0] = 33
            elif name == "cuGetErrorString":
                ctypes.cast(arguments[1], ctypes.POINTER(ctypes.c_char_p))[0] = b"out of memory"
            elif name == "cuEventCreate":
                self.num_events += 1
            return self.codes.get(name, 0)

        return call

    def last(self, name: str) -> tuple[Any, ...]:
        return [call[1:] for call in self.calls if call[0] == name][-1]


def test_a_machine_without_cuda_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(gpu_cuda.ctypes, "CDLL", fail)
    with pytest.raises(GpuError, match=r"no CUDA driver: libcuda.so.1"):
        open_cuda()


def test_a_thread_without_a_context_says_so() -> None:
    library = Library()
    library.context = 0
    with pytest.raises(GpuError, match="no CUDA context yet"):
        CudaDriver(library)


def test_a_driver_without_a_needed_call_is_refused_and_one_without_dmabuf_is_not() -> None:
    with pytest.raises(GpuError, match="the CUDA driver has no cuEventQuery"):
        CudaDriver(Library(missing="cuEventQuery"))
    driver = CudaDriver(Library(missing="cuMemGetHandleForAddressRange"))
    with pytest.raises(GpuError, match="exports no dma-buf"):
        driver.export_dmabuf(BASE, 4096)


def test_a_dmabuf_covers_whole_pages_within_the_allocation() -> None:
    library = Library()
    exported = CudaDriver(library).export_dmabuf(BASE + 100_000, 50_000)
    assert exported == (33, 100_000 - 65536)
    _, start, size, kind, flags = library.last("cuMemGetHandleForAddressRange")
    assert (start, size, kind, flags) == (BASE + 65536, 131072, 1, 0)
    CudaDriver(library).export_dmabuf(BASE + 4 * MIB - 100, 100)
    _, start, size, _, _ = library.last("cuMemGetHandleForAddressRange")
    assert start + size == BASE + 4 * MIB


def test_events_are_looked_at_and_come_back() -> None:
    library = Library()
    driver = CudaDriver(library)
    event = driver.record(7)
    library.codes["cuEventQuery"] = 600
    assert not driver.done(event)
    library.codes["cuEventQuery"] = 0
    assert driver.done(event)
    driver.release(event)
    assert driver.record(7) is event
    assert library.num_events == 1
    driver.release(event)
    driver.close()
    driver.close()
    assert [call[0] for call in library.calls].count("cuEventDestroy_v2") == 1


def test_a_call_that_fails_is_named_with_the_drivers_words() -> None:
    library = Library()
    driver = CudaDriver(library)
    library.codes["cuMemHostRegister_v2"] = 2
    with pytest.raises(GpuError, match=r"cuMemHostRegister_v2: out of memory \(2\)"):
        driver.pin(4096, 4096)
    library.codes["cuEventQuery"] = 700
    with pytest.raises(GpuError, match=r"cuEventQuery: .*\(700\)"):
        driver.done(driver.record(0))


def test_copies_and_pins_pass_addresses_through() -> None:
    library = Library()
    driver = CudaDriver(library)
    driver.copy_to_host(1, 2, 3, 4)
    assert library.last("cuMemcpyDtoHAsync_v2") == (1, 2, 3, 4)
    driver.pin(4096, 8192)
    driver.unpin(4096)
    assert library.last("cuMemHostRegister_v2") == (4096, 8192, 1)
    assert library.last("cuMemHostUnregister") == (4096,)


@pytest.mark.parametrize(("modules", "there"), [("nvidia_peermem 16384 0 - Live\n", True), ("nvidia 1 2\n", False)])
def test_peer_memory_is_a_loaded_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, modules: str, there: bool
) -> None:
    file = tmp_path / "modules"
    file.write_text(modules)
    monkeypatch.setattr(gpu_cuda, "_MODULES", file)
    assert CudaDriver(Library()).has_peer_memory() is there
    monkeypatch.setattr(gpu_cuda, "_MODULES", tmp_path / "nothing")
    assert not CudaDriver(Library()).has_peer_memory()

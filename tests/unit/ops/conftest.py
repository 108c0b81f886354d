"""Fixtures of the kernel tests: every implementation that can run on this machine."""

from __future__ import annotations

import ctypes
import shutil
from collections.abc import Callable, Iterator

import pytest
import torch

from afd.ops.cpu.abi import ISAS
from afd.ops.cpu.binding import KernelsUnavailableError, NativeKernels, available_isas, load_library
from afd.ops.cpu.ops import CpuOps
from afd.ops.ops import Ops
from afd.ops.reference import ReferenceOps
from afd.ops.torch_ops import TorchOps


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def library() -> Iterator[ctypes.CDLL]:
    """The built library; a machine without a compiler has none and skips, any other must have built it."""
    try:
        loaded = load_library()
    except KernelsUnavailableError as error:
        if shutil.which("c++") is None and shutil.which("g++") is None:
            pytest.skip(f"no C++ compiler here: {error}")
        pytest.fail(str(error))
    yield loaded
    loaded.afd_stop_workers()
    assert loaded.afd_num_workers() == 0


@pytest.fixture(params=ISAS)
def kernels(request: pytest.FixtureRequest, library: ctypes.CDLL) -> NativeKernels:
    """The native kernels of one instruction set."""
    if request.param not in available_isas(library):
        pytest.skip(f"this processor has no {request.param}")
    return NativeKernels(library, request.param)


@pytest.fixture(params=["reference", "torch", *ISAS])
def ops_of(request: pytest.FixtureRequest) -> Callable[[torch.dtype], Ops]:
    """The ops of one implementation, by the dtype of activations."""
    if request.param == "reference":
        return ReferenceOps
    if request.param == "torch":
        return TorchOps
    library: ctypes.CDLL = request.getfixturevalue("library")
    if request.param not in available_isas(library):
        pytest.skip(f"this processor has no {request.param}")
    native = NativeKernels(library, request.param)
    return lambda dtype: CpuOps(native, dtype)

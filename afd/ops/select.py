"""Which `Ops` a process computes with: the only place that asks what the machine is."""

from __future__ import annotations

import os
import warnings

import torch

from afd.errors import ConfigError, ModelError
from afd.ops.cpu.abi import ISAS
from afd.ops.cpu.binding import KernelsUnavailableError, NativeKernels, available_isas, load_library
from afd.ops.cpu.ops import CpuOps
from afd.ops.ops import Ops
from afd.ops.reference import ReferenceOps
from afd.ops.torch_ops import TorchOps

ISA_VARIABLE = "AFD_KERNELS_ISA"
"""The environment variable that forces an instruction set, for debugging."""

REFERENCE = "reference"

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def select(device: str, dtype: str | torch.dtype, isa: str | None = None) -> Ops:
    """The operations for activations of `dtype` on "cpu" or "cuda".

    isa: an instruction set of the CPU (`ISAS`), or "reference" for plain torch; by default what AFD_KERNELS_ISA says,
    else the best that this processor has. If the native library cannot be used, a warning says so, and torch does the
    work: the same results within rounding, slower.

    ModelError for another dtype; KernelsUnavailableError for an `isa` that cannot be had here.
    """
    resolved = _DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if resolved is None or resolved not in _DTYPES.values():
        raise ModelError(f"compute dtype {dtype} is not supported (known: {', '.join(_DTYPES)})")
    host = _host_ops(resolved, isa or os.environ.get(ISA_VARIABLE))
    return host if device == "cpu" else TorchOps(resolved, device, host)


def native_kernels(isa: str | None = None) -> NativeKernels:
    """The native kernels of one instruction set, by default of the best that this processor has.

    KernelsUnavailableError if they cannot be had here.
    """
    if isa is not None and isa not in ISAS:
        raise KernelsUnavailableError(f"no instruction set {isa!r}: use one of {', '.join(ISAS)}, {REFERENCE}")
    library = load_library()
    available = available_isas(library)
    if isa is not None and isa not in available:
        raise KernelsUnavailableError(f"this processor has no {isa}: it can run {', '.join(available)}")
    return NativeKernels(library, isa or available[-1])


def check_device(device: str, key: str) -> None:
    """ConfigError when `device` cannot be used here. key: the configuration key that asked for it."""
    if device == "cuda" and not torch.cuda.is_available():
        built = "this torch build has no CUDA support" if torch.version.cuda is None else "torch finds no usable GPU"
        raise ConfigError(f"{key} = 'cuda', but {built} (torch {torch.__version__}); use 'cpu'")


def _host_ops(dtype: torch.dtype, isa: str | None) -> Ops:
    if isa == REFERENCE:
        return ReferenceOps(dtype)
    try:
        return CpuOps(native_kernels(isa), dtype)
    except KernelsUnavailableError as error:
        if isa is not None:
            raise
        warnings.warn(f"native kernels are not in use, attention will be slow: {error}", RuntimeWarning, stacklevel=3)
        return ReferenceOps(dtype)

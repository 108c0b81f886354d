"""torch tensors and wire rows, in both directions, without copies. The only file of stepmesh that imports torch.

FP32      torch.float32        <-> numpy float32
BF16      torch.bfloat16       <-> numpy uint16 (the bits)
FP8_E4M3  torch.float8_e4m3fn  <-> numpy uint8 (the bits)
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from stepmesh.errors import ConfigError
from stepmesh.types import WireDtype

_TORCH = {
    WireDtype.FP32: torch.float32,
    WireDtype.BF16: torch.bfloat16,
    WireDtype.FP8_E4M3: torch.float8_e4m3fn,
}
# numpy has no such types: the bits travel as integers of the same size.
_TORCH_BITS = {WireDtype.FP32: torch.float32, WireDtype.BF16: torch.int16, WireDtype.FP8_E4M3: torch.uint8}
_NUMPY_BITS = {WireDtype.FP32: np.float32, WireDtype.BF16: np.int16, WireDtype.FP8_E4M3: np.uint8}


def torch_dtype(dtype: WireDtype) -> torch.dtype:
    """The torch type of rows on the wire."""
    return _TORCH[dtype]


def as_tensor(rows: npt.NDArray[Any], dtype: WireDtype) -> torch.Tensor:
    """A tensor on the same memory as `rows`. Valid for as long as the rows are."""
    if rows.dtype != dtype.numpy:
        raise ConfigError(f"rows are {rows.dtype}, {dtype.name} on the wire is {dtype.numpy}")
    return torch.from_numpy(rows.view(_NUMPY_BITS[dtype])).view(_TORCH[dtype])


def as_rows(tensor: torch.Tensor, dtype: WireDtype) -> npt.NDArray[Any]:
    """Wire rows on the same memory as a CPU tensor. Raises ConfigError for another dtype or device."""
    if tensor.dtype is not _TORCH[dtype]:
        raise ConfigError(f"tensor is {tensor.dtype}, the wire carries {_TORCH[dtype]}")
    if tensor.device.type != "cpu":
        raise ConfigError(f"tensor is on {tensor.device}: copy it to host memory first")
    bits: npt.NDArray[Any] = tensor.detach().view(_TORCH_BITS[dtype]).numpy()
    return bits.view(dtype.numpy)

"""torch tensors and wire rows, in both directions, without copies. The only file of stepmesh that imports torch.

The rest of the mesh never sees a tensor: `compat`, which takes those of its users, calls the functions on bytes below.

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
_WIRE = {torch_type: dtype for dtype, torch_type in _TORCH.items()}
# numpy has no such types: the bits travel as integers of the same size.
_TORCH_BITS = {WireDtype.FP32: torch.float32, WireDtype.BF16: torch.int16, WireDtype.FP8_E4M3: torch.uint8}
_NUMPY_BITS = {WireDtype.FP32: np.float32, WireDtype.BF16: np.int16, WireDtype.FP8_E4M3: np.uint8}


def torch_dtype(dtype: WireDtype) -> torch.dtype:
    """The torch type of rows on the wire."""
    return _TORCH[dtype]


def to_torch(rows: npt.NDArray[Any], dtype: WireDtype) -> torch.Tensor:
    """A tensor on the same memory as `rows`, valid for as long as they are. Raises ConfigError for another dtype."""
    if rows.dtype != dtype.numpy:
        raise ConfigError(f"rows are {rows.dtype}, {dtype.name} on the wire is {dtype.numpy}")
    return torch.from_numpy(rows.view(_NUMPY_BITS[dtype])).view(_TORCH[dtype])


def to_numpy(tensor: torch.Tensor) -> npt.NDArray[Any]:
    """Wire rows on the same memory as a CPU tensor. Raises ConfigError for a dtype that the wire cannot carry."""
    dtype = _WIRE.get(tensor.dtype)
    if dtype is None:
        raise ConfigError(f"{tensor.dtype} has no wire type: convert to one of {[str(known) for known in _WIRE]}")
    if not tensor.is_cpu:
        raise ConfigError(f"tensor is on {tensor.device}: copy it to host memory first")
    if tensor.requires_grad:
        tensor = tensor.detach()
    bits: npt.NDArray[Any] = tensor.view(_TORCH_BITS[dtype]).numpy()
    return bits.view(dtype.numpy)


def read_bytes(tensor: torch.Tensor) -> npt.NDArray[np.uint8]:
    """A tensor's bytes: its own memory where it is contiguous and on the host, else a copy made behind its producer."""
    raw: npt.NDArray[np.uint8] = flat_bytes(tensor.detach().cpu().contiguous()).numpy()
    return raw


def write_bytes(tensor: torch.Tensor, content: npt.NDArray[np.uint8]) -> None:
    """Fill the first bytes of a tensor that has as many or more; any strides, any device."""
    tensor = tensor.detach()
    if tensor.is_contiguous() and tensor.device.type == "cpu":
        flat_bytes(tensor).numpy()[: content.size] = content
        return
    filled = read_bytes(tensor).copy()
    filled[: content.size] = content
    tensor.copy_(from_bytes(torch.from_numpy(filled), str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)))


def flat_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a contiguous tensor as a flat tensor on the same memory. Raises ConfigError for another one."""
    if not tensor.is_contiguous():
        raise ConfigError("the tensor must be contiguous")
    return tensor.detach().reshape(-1).view(torch.uint8)


def from_bytes(flat: torch.Tensor, dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
    """A flat tensor of bytes as one of torch's type `dtype` ("bfloat16"), on the same memory."""
    return flat.view(getattr(torch, dtype)).reshape(shape)


def from_numpy_bytes(content: npt.NDArray[np.uint8], dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
    """The same on bytes of numpy's."""
    return from_bytes(torch.from_numpy(content), dtype, shape)

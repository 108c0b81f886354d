"""Tensors of torch and arrays of numpy as bytes, and back: what the rest of `compat` needs to know of them.

torch is imported, by `stepmesh.tensor`, only where the user's program or a message from one brings it.
"""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Iterable
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from stepmesh.errors import ConfigError

Bytes = npt.NDArray[np.uint8]
_TORCH_SIZES = {
    "float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1,
    "int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint8": 1, "bool": 1,
}  # fmt: skip
_MAX_DIMS = 16


class Described(NamedTuple):
    """Which library, which element type by its name there, which shape."""

    library: str
    dtype: str
    shape: tuple[int, ...]

    @classmethod
    def of(cls, library: str, dtype: str, shape: Iterable[Any]) -> Described:
        """Checked: raises ValueError for what no tensor can be."""
        sizes = tuple(shape)
        if not all(type(size) is int and 0 <= size < 1 << 40 for size in sizes) or len(sizes) > _MAX_DIMS:
            raise ValueError(f"shape {str(sizes)[:80]}")
        described = cls(library, dtype, sizes)
        _ = described.num_bytes
        return described

    @property
    def num_bytes(self) -> int:
        """Raises ValueError for an unknown type."""
        if self.library == "torch":
            if self.dtype not in _TORCH_SIZES:
                raise ValueError(f"unknown torch type {self.dtype[:40]!r}")
            size = _TORCH_SIZES[self.dtype]
        else:
            try:
                kind = np.dtype(self.dtype)
            except TypeError:
                raise ValueError(f"unknown numpy type {self.dtype[:40]!r}") from None
            if kind.hasobject:
                raise ValueError("Python objects")
            size = kind.itemsize
        return math.prod(self.shape) * size


def describe(tensor: Any) -> Described:
    """Describe a torch tensor or a numpy array. Raises ConfigError for anything else."""
    if isinstance(tensor, np.ndarray):
        described = "numpy", tensor.dtype.str, tensor.shape
    elif _is_torch(tensor):
        described = "torch", str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)
    else:
        raise ConfigError(f"{type(tensor).__name__} is neither a torch tensor nor a numpy array")
    try:
        return Described.of(*described)
    except ValueError as error:
        raise ConfigError(f"a tensor that cannot be sent: {error}") from None


def read(tensor: Any) -> Bytes:
    """The bytes of a tensor, in its own memory where that is contiguous and on the host."""
    if isinstance(tensor, np.ndarray):
        return np.ascontiguousarray(tensor).reshape(-1).view(np.uint8)
    raw: Bytes = _tensor().read_bytes(tensor)
    return raw


def write(tensor: Any, content: Bytes) -> None:
    """Fill the first bytes of a tensor. Raises ConfigError when it is smaller than the content."""
    described = describe(tensor)
    if content.size > described.num_bytes:
        raise ConfigError(f"{content.size} bytes do not fit {described.dtype}{list(described.shape)}")
    if not isinstance(tensor, np.ndarray):
        _tensor().write_bytes(tensor, content)
    elif tensor.flags.c_contiguous:
        tensor.reshape(-1).view(np.uint8)[: content.size] = content
    else:
        filled = read(tensor)
        filled[: content.size] = content
        tensor[...] = filled.view(tensor.dtype).reshape(tensor.shape)


def view(content: Bytes, described: Described) -> Any:
    """A tensor of the sender's kind on these bytes. Raises ConfigError when it needs torch and there is none."""
    if described.library == "numpy":
        return content.view(np.dtype(described.dtype)).reshape(described.shape)
    return _tensor().from_numpy_bytes(content, described.dtype, described.shape)


def part(tensor: Any, place: int, count: int) -> Any:
    """The place-th of `count` equal parts of a contiguous tensor's bytes, as a flat tensor of uint8 on its memory."""
    described = describe(tensor)
    size, rest = divmod(described.num_bytes, count)
    if rest:
        raise ConfigError(f"{described.num_bytes} bytes cannot be cut into {count} equal parts")
    if not isinstance(tensor, np.ndarray):
        flat = _tensor().flat_bytes(tensor)
    elif tensor.flags.c_contiguous:
        flat = tensor.reshape(-1).view(np.uint8)
    else:
        raise ConfigError("the tensor must be contiguous")
    return flat[place * size : (place + 1) * size]


def reshape(flat: Any, described: Described) -> Any:
    """The first bytes of a flat uint8 tensor as the described one, on the same memory, in the library of `flat`."""
    flat = flat[: described.num_bytes]
    if not isinstance(flat, np.ndarray):
        name = described.dtype if described.library == "torch" else np.dtype(described.dtype).name
        return _tensor().from_bytes(flat, name, described.shape)
    return view(flat, described)


def _is_torch(tensor: Any) -> bool:
    torch = sys.modules.get("torch")  # whoever holds a tensor has imported it
    return torch is not None and isinstance(tensor, torch.Tensor)


def _tensor() -> ModuleType:
    try:
        return importlib.import_module("stepmesh.tensor")
    except ImportError:
        raise ConfigError("a worker has sent torch tensors: install torch here, or push numpy arrays") from None

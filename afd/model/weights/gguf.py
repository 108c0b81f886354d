"""GGUF files: metadata and quantised tensors.

The header is parsed here rather than with gguf.GGUFReader, which takes two seconds for a 49k-token vocabulary and
would be paid by every process of the cluster; the `gguf` package dequantises.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from afd.errors import ModelError
from afd.model.families.config_reader import shown
from afd.model.weights.source import MAX_TENSORS, RawTensor, Slices, StoredTensor, TensorSource, bounds

MAX_HEADER_BYTES = 256 << 20
MAX_DIMENSIONS = 4
MAX_KEYS = 1 << 16
MAX_ITEMS = 1 << 22
"""Items of all arrays together: four times what the largest vocabulary with merges, scores and types has."""

_LEAST_KEY_BYTES = 8 + 4 + 1
_LEAST_TENSOR_BYTES = 8 + 4 + 8 + 4 + 8
_STRING, _ARRAY = 8, 9
_SCALARS = {
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """offsets: of each tensor's bytes, from the start of the file."""

    metadata: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]
    offsets: Mapping[str, int]


class GgufSource(TensorSource):
    """One GGUF file. Slices of rows read only those rows; column slices read whole rows and cut after dequantising."""

    def __init__(self, path: Path):
        self._path = path
        self._header = read_gguf_header(path)

    @property
    def metadata(self) -> Mapping[str, Any]:
        return self._header.metadata

    @property
    def tensors(self) -> Mapping[str, StoredTensor]:
        return self._header.tensors

    @property
    def files(self) -> tuple[Path, ...]:
        return (self._path,)

    @property
    def readable_dtypes(self) -> frozenset[str]:
        """Types in the file that the gguf package dequantises, found by asking it for one block."""
        return frozenset(dtype for dtype in {t.dtype for t in self.tensors.values()} if _can_dequantize(dtype))

    def read(self, name: str, slices: Slices = ()) -> RawTensor:
        tensor = self._header.tensors[name]
        kind = GGMLQuantizationType[tensor.dtype]
        row_bytes = _row_bytes(kind, tensor.shape[-1])
        limits = bounds(tensor.shape, slices)
        outer = tensor.shape[:-1]
        mapped = np.memmap(self._path, np.uint8, "r", offset=self._header.offsets[name], shape=(*outer, row_bytes))
        rows = np.array(mapped[tuple(slice(*limit) for limit in limits[:-1])])
        if rows.size == 0:
            return RawTensor(np.empty([stop - start for start, stop in limits], np.float32))
        return RawTensor(dequantize(rows, kind)[..., slice(*limits[-1])])


def _can_dequantize(dtype: str) -> bool:
    kind = GGMLQuantizationType[dtype]
    try:
        dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


def _row_bytes(kind: GGMLQuantizationType, row_elements: int) -> int:
    block_elements, block_bytes = GGML_QUANT_SIZES[kind]
    return int(row_elements // block_elements * block_bytes)


def read_gguf_header(path: Path) -> GgufHeader:
    """Parse and check everything before the tensor data; ModelError when the file is not whole.

    The file is mapped, so only what the header holds is read, and no count in it is believed before the bytes left and
    the bounds of this module allow it.
    """
    file_bytes = path.stat().st_size
    if file_bytes < 4:
        raise ModelError(f"{path}: not a GGUF file")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        cursor = _Cursor(data, min(file_bytes, MAX_HEADER_BYTES))
        try:
            return _parse(cursor, path, file_bytes)
        except (struct.error, LookupError, ValueError, OverflowError) as error:
            raise ModelError(
                f"{path}: truncated or malformed GGUF header at byte {cursor.pos} of {file_bytes}: {error}"
            ) from error


def _parse(cursor: _Cursor, path: Path, file_bytes: int) -> GgufHeader:
    if cursor.take(4) != b"GGUF":
        raise ModelError(f"{path}: not a GGUF file")
    version = cursor.scalar("<I")
    if version not in (2, 3):
        raise ModelError(f"{path}: GGUF version {version} is not supported (known: 2, 3)")
    num_tensors, num_keys = cursor.scalar("<Q"), cursor.scalar("<Q")
    cursor.expect(num_keys, _LEAST_KEY_BYTES, MAX_KEYS, "keys")
    metadata: dict[str, Any] = {}
    for _ in range(num_keys):
        key = cursor.string()
        if key in metadata:
            raise ValueError(f"key {shown(key)} stands twice")
        metadata[key] = cursor.value(cursor.scalar("<I"))
    cursor.expect(num_tensors, _LEAST_TENSOR_BYTES, MAX_TENSORS, "tensors")
    infos = [_tensor_info(cursor, path) for _ in range(num_tensors)]
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or isinstance(alignment, bool) or alignment < 1 or alignment & (alignment - 1):
        raise ModelError(f"{path}: general.alignment is {shown(alignment)}, expected a power of two")
    data_start = -(-cursor.pos // alignment) * alignment
    tensors: dict[str, StoredTensor] = {}
    offsets: dict[str, int] = {}
    for tensor, kind, offset in infos:
        start = data_start + offset
        end = start + prod(tensor.shape[:-1]) * _row_bytes(kind, tensor.shape[-1])
        if end > file_bytes:
            raise ModelError(f"{path}: truncated: tensor {tensor.name} ends at byte {end}, the file has {file_bytes}")
        if tensor.name in tensors:
            raise ModelError(f"{path}: tensor {tensor.name} stands twice")
        tensors[tensor.name], offsets[tensor.name] = tensor, start
    return GgufHeader(metadata, tensors, offsets)


def _tensor_info(cursor: _Cursor, path: Path) -> tuple[StoredTensor, GGMLQuantizationType, int]:
    name = cursor.string()
    num_dims = cursor.scalar("<I")
    if not 1 <= num_dims <= MAX_DIMENSIONS:
        raise ModelError(f"{path}: tensor {name}: {num_dims} dimensions")
    shape = tuple(cursor.scalar("<Q") for _ in range(num_dims))[::-1]  # GGUF lists the fastest dimension first
    code, offset = cursor.scalar("<I"), cursor.scalar("<Q")
    try:
        kind = GGMLQuantizationType(code)
    except ValueError as error:
        raise ModelError(f"{path}: tensor {name}: unknown quantisation type {code}") from error
    if shape[-1] % GGML_QUANT_SIZES[kind][0]:
        raise ModelError(f"{path}: tensor {name}: rows of {shape[-1]} do not fit blocks of {kind.name}")
    return StoredTensor(name, shape, kind.name, str(path)), kind, offset


class _Cursor:
    """Reads little-endian values from bytes; struct.error, LookupError or ValueError past the end or the bounds."""

    def __init__(self, data: mmap.mmap, end: int):
        self._data = data
        self._end = end
        self._items_left = MAX_ITEMS
        self.pos = 0

    def expect(self, count: int, least_bytes: int, most: int, what: str) -> None:
        """Believe a count: so many items of at least so many bytes are still to come."""
        if count > most or count * least_bytes > self._end - self.pos:
            raise ValueError(f"{count} {what} are more than the file holds or than {most}")

    def take(self, num_bytes: int) -> bytes:
        end = self.pos + num_bytes
        if end > self._end:
            raise IndexError(f"{num_bytes} bytes are more than are left")
        chunk = self._data[self.pos : end]
        self.pos = end
        return chunk

    def scalar(self, code: str) -> Any:
        value = struct.unpack_from(code, self._data, self.pos)[0]
        self.pos += struct.calcsize(code)
        return value

    def string(self) -> str:
        return self.take(self.scalar("<Q")).decode("utf-8")

    def value(self, kind: int) -> Any:
        """A number, a string, a list of strings, or an array of numbers."""
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            if kind not in _SCALARS:
                raise ValueError(f"value type {kind}")
            return self.scalar(_SCALARS[kind])
        item_kind, count = self.scalar("<I"), self.scalar("<Q")
        if item_kind not in _SCALARS and item_kind != _STRING:
            raise ValueError(f"array of type {item_kind}")
        dtype = np.dtype(_SCALARS.get(item_kind, "<Q"))  # a string has its length before it
        self.expect(count, dtype.itemsize, self._items_left, "array items")
        self._items_left -= count
        if item_kind == _STRING:
            return self._strings(count)
        return np.frombuffer(self.take(count * dtype.itemsize), dtype)

    def _strings(self, count: int) -> list[str]:
        """A vocabulary has tens of thousands: read without a call per string."""
        data, pos, end, unpack = self._data, self.pos, self._end, struct.Struct("<Q").unpack_from
        strings = []
        for _ in range(count):
            start = pos + 8
            pos = start + unpack(data, pos)[0]
            if pos > end:
                raise IndexError("a string is longer than the bytes that are left")
            strings.append(data[start:pos].decode("utf-8"))
        self.pos = pos
        return strings

"""safetensors folders: model.safetensors, or shards named by model.safetensors.index.json.

The format is a length, a JSON header, then raw little-endian tensors, so a few lines read it, need no torch and can
name exactly what is wrong with a file. Each read maps the file for its own duration: mapped pages count as
resident memory and would otherwise pile up to the size of the checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from afd.errors import ModelError
from afd.model.model_files import find_file, read_json_object
from afd.model.weights.block_fp8 import E4M3_VALUES
from afd.model.weights.source import RawTensor, Slices, StoredTensor, TensorSource

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
MAX_HEADER_BYTES = 100 << 20

_NUMPY_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "F8_E4M3": "u1"}


class SafetensorsSource(TensorSource):
    """All shards of one folder. Headers are read and checked against the file sizes at once, data only on read."""

    def __init__(self, folder: Path):
        self._files = _shard_files(folder)
        self._tensors: dict[str, StoredTensor] = {}
        self._offsets: dict[str, int] = {}
        for path in self._files:
            for tensor, offset in _read_header(path):
                if tensor.name in self._tensors:
                    raise ModelError(f"{path}: tensor {tensor.name} is also in {self._tensors[tensor.name].file}")
                self._tensors[tensor.name] = tensor
                self._offsets[tensor.name] = offset

    @property
    def tensors(self) -> Mapping[str, StoredTensor]:
        return self._tensors

    @property
    def files(self) -> tuple[Path, ...]:
        return self._files

    @property
    def readable_dtypes(self) -> frozenset[str]:
        return frozenset(_NUMPY_DTYPES)

    def read(self, name: str, slices: Slices = ()) -> RawTensor:
        tensor = self._tensors[name]
        dtype = _NUMPY_DTYPES[tensor.dtype]
        if prod(tensor.shape) == 0:
            array = np.empty(tensor.shape, dtype)
        else:
            mapped = np.memmap(tensor.file, dtype, "r", offset=self._offsets[name], shape=tensor.shape)
            array = np.array(mapped[slices])
        if tensor.dtype == "F8_E4M3":
            return RawTensor(E4M3_VALUES[array])
        return RawTensor(array, is_bfloat16=tensor.dtype == "BF16")


def _shard_files(folder: Path) -> tuple[Path, ...]:
    index_path = folder / INDEX_NAME
    index = read_json_object(folder, INDEX_NAME)
    if index is None:
        single = find_file(folder, SINGLE_NAME)
        if single is None:
            raise ModelError(f"{folder}: has neither {SINGLE_NAME} nor {INDEX_NAME}")
        return (folder / SINGLE_NAME,)
    try:
        names = sorted(set(index["weight_map"].values()))
    except (KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index_path}: not a safetensors index: {error}") from error
    files = tuple(folder / str(name) for name in names)
    for path in files:
        if path.parent != folder:
            raise ModelError(f"{index_path}: shard {str(path)!r} lies outside the folder")
        if find_file(folder, path.name) is None:
            raise ModelError(f"{path}: missing, although {INDEX_NAME} names it")
    return files


def _read_header(path: Path) -> list[tuple[StoredTensor, int]]:
    """Every tensor of one file with the offset of its bytes; ModelError for a file that is not whole."""
    file_bytes = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        header_bytes = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or not 2 <= header_bytes <= min(MAX_HEADER_BYTES, file_bytes - 8):
            raise ModelError(f"{path}: not a safetensors file, or truncated: {file_bytes} bytes, no whole header")
        raw = file.read(header_bytes)
    try:
        header = json.loads(raw)
        entries = [(str(k), v) for k, v in header.items() if k != "__metadata__"]
        return [_entry(path, name, value, 8 + header_bytes, file_bytes) for name, value in entries]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{path}: malformed safetensors header: {error!r}") from error


def _entry(path: Path, name: str, value: Any, data_start: int, file_bytes: int) -> tuple[StoredTensor, int]:
    dtype = str(value["dtype"])
    shape = tuple(int(size) for size in value["shape"])
    begin, end = (int(offset) for offset in value["data_offsets"])
    if not 0 <= begin <= end or min(shape, default=0) < 0:
        raise ValueError(f"{name}: shape {list(shape)}, data_offsets {[begin, end]}")
    if data_start + end > file_bytes:
        raise ModelError(f"{path}: truncated: tensor {name} ends at byte {data_start + end}, the file has {file_bytes}")
    known = _NUMPY_DTYPES.get(dtype)
    if known is not None and end - begin != prod(shape) * np.dtype(known).itemsize:
        raise ModelError(f"{path}: tensor {name}: {end - begin} bytes do not hold shape {list(shape)} of {dtype}")
    return StoredTensor(name, shape, dtype, str(path)), data_start + begin

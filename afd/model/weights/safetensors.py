"""safetensors folders: model.safetensors, or shards named by model.safetensors.index.json.

The format is a length, a JSON header, then raw little-endian tensors, so a few lines read it, need no torch and can
name exactly what is wrong with a file. Each read maps the file for its own duration: mapped pages count as
resident memory and would otherwise pile up to the size of the checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from afd.errors import ModelError
from afd.model.families.config_reader import shown
from afd.model.model_files import find_file, read_json_object
from afd.model.weights.block_fp8 import E4M3_VALUES
from afd.model.weights.source import MAX_TENSORS, RawTensor, Slices, StoredTensor, TensorSource

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
MAX_HEADER_BYTES = 100 << 20
MAX_DIMENSIONS = 8

_NUMPY_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "F8_E4M3": "u1"}
_ITEM_BYTES = {name: np.dtype(dtype).itemsize for name, dtype in _NUMPY_DTYPES.items()}
_COMPARED_BYTES = 1 << 24


class SafetensorsSource(TensorSource):
    """All shards of one folder. Headers are read and checked against the file sizes at once, data only on read.

    Which files there are is decided as in transformers: model.safetensors where it exists, else those that the index
    names. A tensor that several of them hold is read from the one that the index names; the others must be equal.
    """

    def __init__(self, folder: Path):
        self._files, weight_map = _shard_files(folder)
        self._tensors: dict[str, StoredTensor] = {}
        self._offsets: dict[str, int] = {}
        doubles: list[tuple[StoredTensor, int]] = []
        for path in self._files:
            for tensor, offset in _read_header(path):
                if weight_map is not None and tensor.name not in weight_map:
                    tensor = replace(tensor, listed=False)
                first = self._tensors.get(tensor.name)
                if first is not None and (weight_map is None or weight_map.get(tensor.name) != path.name):
                    doubles.append((tensor, offset))
                    continue
                if first is not None:
                    doubles.append((first, self._offsets[tensor.name]))
                self._tensors[tensor.name], self._offsets[tensor.name] = tensor, offset
            if len(self._tensors) > MAX_TENSORS:
                raise ModelError(f"{folder}: more than {MAX_TENSORS} tensors")
        for tensor, offset in doubles:
            self._check_equal(tensor, offset)

    def _check_equal(self, double: StoredTensor, offset: int) -> None:
        chosen = self._tensors[double.name]
        same = (double.shape, double.dtype) == (chosen.shape, chosen.dtype)
        if same and double.dtype in _NUMPY_DTYPES:
            num_bytes = prod(double.shape) * _ITEM_BYTES[double.dtype]
            same = _equal_bytes(double.file, offset, chosen.file, self._offsets[double.name], num_bytes)
        if not same:
            raise ModelError(f"{double.file}: tensor {double.name} is also in {chosen.file}, with other numbers")

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


def _equal_bytes(one: str, one_offset: int, other: str, other_offset: int, num_bytes: int) -> bool:
    with open(one, "rb") as first, open(other, "rb") as second:
        first.seek(one_offset)
        second.seek(other_offset)
        while num_bytes > 0:
            size = min(num_bytes, _COMPARED_BYTES)
            if first.read(size) != second.read(size):
                return False
            num_bytes -= size
    return True


def _shard_files(folder: Path) -> tuple[tuple[Path, ...], Mapping[str, str] | None]:
    """The files, and the index's map from tensors to them; None without an index."""
    index, index_path = read_json_object(folder, INDEX_NAME), folder / INDEX_NAME
    if find_file(folder, SINGLE_NAME) is not None:
        return (folder / SINGLE_NAME,), None
    if index is None:
        raise ModelError(f"{folder}: has neither {SINGLE_NAME} nor {INDEX_NAME}")
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{index_path}: not a safetensors index: weight_map is {shown(weight_map)}")
    names = list(dict.fromkeys(weight_map.values()))
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise ModelError(f"{index_path}: shard {shown(name)} lies outside the folder")
        if find_file(folder, name) is None:
            raise ModelError(f"{folder / name}: missing, although {INDEX_NAME} names it")
    return tuple(folder / name for name in sorted(names)), weight_map


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
        if len(header) > MAX_TENSORS:
            raise ModelError(f"{path}: more than {MAX_TENSORS} tensors")
        entries = [(str(k), v) for k, v in header.items() if k != "__metadata__"]
        return [_entry(path, name, value, 8 + header_bytes, file_bytes) for name, value in entries]
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise ModelError(f"{path}: malformed safetensors header: {type(error).__name__}: {error}") from error


def _entry(path: Path, name: str, value: Any, data_start: int, file_bytes: int) -> tuple[StoredTensor, int]:
    dtype = str(value["dtype"])
    shape = tuple(int(size) for size in value["shape"])
    begin, end = (int(offset) for offset in value["data_offsets"])
    if not 0 <= begin <= end or min(shape, default=0) < 0 or len(shape) > MAX_DIMENSIONS:
        raise ValueError(f"{name}: shape {list(shape[:MAX_DIMENSIONS])}, data_offsets {[begin, end]}")
    if data_start + end > file_bytes:
        raise ModelError(f"{path}: truncated: tensor {name} ends at byte {data_start + end}, the file has {file_bytes}")
    size = _ITEM_BYTES.get(dtype)
    if size is not None and end - begin != prod(shape) * size:
        raise ModelError(f"{path}: tensor {name}: {end - begin} bytes do not hold shape {list(shape)} of {dtype}")
    return StoredTensor(name, shape, dtype, str(path)), data_start + begin

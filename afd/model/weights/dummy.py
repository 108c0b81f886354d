"""Seeded random weights of a model's shapes: for tests, benches and sizing, without any file.

Every element depends only on (seed, tensor name, its index), so a slice equals the same slice of the whole, and all
ranks of a sharded dummy model agree.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from math import sqrt
from pathlib import Path

import numpy as np

from afd.model.families import Naming
from afd.model.inventory import TensorSpec
from afd.model.weights.source import RawTensor, Slices, StoredTensor, TensorSource, bounds

ROWS_PER_CHUNK = 64


class DummySource(TensorSource):
    """tensors: the model's inventory. Stored names are "<part>" or "<part>.<layer>".

    vector_mean: of one-dimensional tensors: 1 for norms' factors, 0 where norms are stored as offsets from 1.
    """

    def __init__(self, tensors: tuple[TensorSpec, ...], seed: int = 0, vector_mean: float = 1.0):
        self._seed = seed
        self._vector_mean = vector_mean
        self._tensors = {
            dummy_name(t): StoredTensor(dummy_name(t), t.shape, "F32", f"dummy (seed {seed})") for t in tensors
        }

    @property
    def tensors(self) -> Mapping[str, StoredTensor]:
        return self._tensors

    @property
    def files(self) -> tuple[Path, ...]:
        return ()

    @property
    def readable_dtypes(self) -> frozenset[str]:
        return frozenset(("F32",))

    def read(self, name: str, slices: Slices = ()) -> RawTensor:
        shape = self._tensors[name].shape
        limits = bounds(shape, slices)
        out = np.empty([stop - start for start, stop in limits], np.float32)
        if len(shape) == 1:
            out[:] = self._vector_mean + 0.1 * self._uniform(name, 0, 0, 1, shape[0])[0, slice(*limits[0])]
        elif len(shape) == 2:
            self._fill_matrix(out, name, 0, shape, limits)
        else:
            first = limits[0][0]
            for i in range(out.shape[0]):
                self._fill_matrix(out[i], name, first + i, shape[1:], limits[1:])
        return RawTensor(out)

    def _fill_matrix(
        self,
        out: np.ndarray[tuple[int, ...], np.dtype[np.float32]],
        name: str,
        matrix_idx: int,
        shape: tuple[int, ...],
        limits: tuple[tuple[int, int], ...],
    ) -> None:
        """Uniform numbers with variance 1/columns, so that activations keep their scale through the layers."""
        amplitude = sqrt(3.0 / shape[1])
        (row_start, row_stop), columns = limits
        first_chunk = row_start // ROWS_PER_CHUNK
        for chunk in range(first_chunk, -(-row_stop // ROWS_PER_CHUNK)):
            base = chunk * ROWS_PER_CHUNK
            start, stop = max(base, row_start), min(base + ROWS_PER_CHUNK, row_stop)
            values = self._uniform(name, matrix_idx, chunk, stop - base, shape[1])
            out[start - row_start : stop - row_start] = amplitude * values[start - base :, slice(*columns)]

    def _uniform(
        self, name: str, matrix_idx: int, chunk: int, rows: int, columns: int
    ) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
        """[rows, columns] in (-1, 1): the first rows of this chunk."""
        key = (self._seed & 0xFFFFFFFF) << 32 | zlib.crc32(name.encode())
        bits = np.random.Philox(key=key, counter=[0, chunk, matrix_idx, 0])
        return np.random.Generator(bits).random((rows, columns), np.float32) * np.float32(2) - np.float32(1)


def dummy_name(tensor: TensorSpec) -> str:
    return tensor.part if tensor.layer < 0 else f"{tensor.part}.{tensor.layer}"


def dummy_naming(tensors: tuple[TensorSpec, ...]) -> Naming:
    return Naming({t.part: t.part if t.layer < 0 else f"{t.part}.{{layer}}" for t in tensors})

"""A source seen as a model: AFD's parts mapped to stored names, and the check that header and spec agree."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import dropwhile

import numpy as np

from afd.errors import ModelError
from afd.model.families import Naming
from afd.model.families.config_reader import DEFAULT_BLOCK
from afd.model.inventory import TensorSpec, inventory
from afd.model.spec import ModelSpec
from afd.model.weights.block_fp8 import SCALE_SUFFIX, apply_scales, block_range, scale_shape
from afd.model.weights.source import RawTensor, Slices, StoredTensor, TensorSource, bounds

FP8_DTYPES = frozenset(("F8_E4M3",))
MAX_PROBLEMS_SHOWN = 3


class Checkpoint:
    """Reads a model's tensors by part; holds headers and metadata, no open file.  where: the file or folder.

    block: rows and columns of one scale, where matrices are stored in float8.
    """

    def __init__(
        self,
        spec: ModelSpec,
        source: TensorSource,
        naming: Naming,
        where: str,
        block: tuple[int, int] = DEFAULT_BLOCK,
    ):
        self.spec = spec
        self.source = source
        self.where = where
        self._block = block
        self._stored = {naming.canonical(name): tensor for name, tensor in source.tensors.items()}
        self.naming = naming.for_names(self._stored)

    def verify(self) -> None:
        """Compare the whole header with the spec's inventory; every difference found is in one ModelError."""
        expected: set[str] = set()
        problems: list[str] = []
        for tensor in inventory(self.spec):
            for name, shape in self._pieces(tensor):
                expected.add(name)
                if name in self._stored and self._stored[name].dtype in FP8_DTYPES:
                    expected.add(name + SCALE_SUFFIX)
                problems.extend(self._problems(name, shape))
        tied_head = self.naming.names["head"] if self.spec.tie_embeddings else None
        for name, found in self._stored.items():
            if name not in expected and name != tied_head and not self.naming.is_ignored(name, self.spec.num_layers):
                problems.append(
                    f"{found.file}: extra tensor {name} of shape {list(found.shape)}, "
                    f"which family {self.spec.family} does not have"
                )
        if problems:
            hidden = len(problems) - MAX_PROBLEMS_SHOWN
            more = f" (and {hidden} more)" if hidden > 0 else ""
            raise ModelError(f"{self.where}: {'; '.join(problems[:MAX_PROBLEMS_SHOWN])}{more}")

    def read(self, tensor: TensorSpec, slices: Slices = ()) -> RawTensor:
        """A part, or its slice, whatever way it is stored."""
        if not self.naming.is_per_expert(tensor.part):
            return self._read(self.naming.stored_name(tensor), tensor.shape, slices)
        first, stop = bounds(tensor.shape, slices)[0]
        one = [self._read(self.naming.stored_name(tensor, e), tensor.shape[1:], slices[1:]) for e in range(first, stop)]
        if not one:
            return RawTensor(np.empty([stop - start for start, stop in bounds(tensor.shape, slices)], np.float32))
        return RawTensor(np.stack([raw.array for raw in one]), is_bfloat16=one[0].is_bfloat16)

    def _read(self, name: str, shape: tuple[int, ...], slices: Slices) -> RawTensor:
        stored = self._stored[name]
        if len(stored.shape) != len(shape):  # [1, n] for [n]
            slices = (slice(None),) * (len(stored.shape) - len(shape)) + slices
        raw = self.source.read(stored.name, slices)
        if stored.dtype in FP8_DTYPES:
            return self._scaled(name, raw, shape, slices)
        return RawTensor(raw.array.reshape(raw.array.shape[-len(shape) :]), raw.is_bfloat16)

    def _scaled(self, name: str, raw: RawTensor, shape: tuple[int, ...], slices: Slices) -> RawTensor:
        *outer, rows, columns = bounds(shape, slices)
        wanted = [slice(*limit) for limit in outer]
        wanted += [block_range(*rows, self._block[0]), block_range(*columns, self._block[1])]
        scales = self._read(name + SCALE_SUFFIX, scale_shape(shape, self._block), tuple(wanted))
        assert raw.array.dtype == np.float32, "float8 is read as float32"
        values = np.asarray(raw.array, np.float32)
        return RawTensor(apply_scales(values, as_float32(scales), (rows[0], columns[0]), self._block))

    def _pieces(self, tensor: TensorSpec) -> Iterator[tuple[str, tuple[int, ...]]]:
        """(canonical name, shape) of the stored tensors that make up a part."""
        if not self.naming.is_per_expert(tensor.part):
            yield self.naming.stored_name(tensor), tensor.shape
            return
        for expert in range(tensor.shape[0]):
            yield self.naming.stored_name(tensor, expert), tensor.shape[1:]

    def _problems(self, name: str, shape: tuple[int, ...]) -> Iterator[str]:
        found = self._stored.get(name)
        if found is None:
            yield f"missing tensor {name}, expected shape {list(shape)}"
        elif _without_leading_ones(found.shape) != _without_leading_ones(shape):
            yield f"{found.file}: tensor {found.name}: expected shape {list(shape)}, found {list(found.shape)}"
        elif found.dtype not in self.source.readable_dtypes:
            readable = ", ".join(sorted(self.source.readable_dtypes))
            yield f"{found.file}: tensor {found.name}: dtype {found.dtype} is not supported (readable here: {readable})"
        elif found.dtype in FP8_DTYPES:
            yield from self._scale_problems(found, name + SCALE_SUFFIX, shape)

    def _scale_problems(self, matrix: StoredTensor, name: str, shape: tuple[int, ...]) -> Iterator[str]:
        if len(shape) < 2:
            yield f"{matrix.file}: tensor {matrix.name}: {matrix.dtype} is read for matrices only"
            return
        wanted, found = scale_shape(shape, self._block), self._stored.get(name)
        if found is None:
            yield f"missing tensor {name}, the scales of {matrix.dtype} tensor {matrix.name}, shape {list(wanted)}"
        elif found.shape != wanted:
            yield (
                f"{found.file}: tensor {found.name}: expected shape {list(wanted)}, one scale for each block of "
                f"{self._block[0]} x {self._block[1]}, found {list(found.shape)}"
            )
        elif found.dtype not in ("F32", "BF16"):
            yield f"{found.file}: tensor {found.name}: scales are F32 or BF16, found {found.dtype}"


def as_float32(raw: RawTensor) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    """The numbers of a raw tensor in float32."""
    if raw.is_bfloat16:
        return (raw.array.astype(np.uint32) << 16).view(np.float32)
    return raw.array.astype(np.float32, copy=False)


def _without_leading_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(dropwhile(lambda size: size == 1, shape))

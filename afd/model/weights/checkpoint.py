"""A source seen as a model: AFD's parts mapped to stored names, and the check that header and spec agree."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import dropwhile, islice
from math import prod

import numpy as np

from afd.errors import ModelError
from afd.model.families import Naming
from afd.model.families.quantisation import DEFAULT_BLOCK, WHAT_LOADS
from afd.model.inventory import TensorSpec, inventory
from afd.model.spec import ModelSpec
from afd.model.weights.block_fp8 import SCALE_SUFFIX, apply_scales, block_range, scale_shape
from afd.model.weights.foreign import foreign_layout
from afd.model.weights.source import RawTensor, Slices, StoredTensor, TensorSource, bounds

FP8_DTYPES = frozenset(("F8_E4M3",))
MAX_PROBLEMS_SHOWN = 3
COMPARED_ELEMENTS = 1 << 22


class Checkpoint:
    """Reads a model's tensors by part; holds headers and metadata, no open file.

    where: the file or folder.

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
        self._layout = naming
        self._stored: dict[str, StoredTensor] = {}
        for name, tensor in source.tensors.items():
            other = self._stored.setdefault(naming.canonical(name), tensor)
            if other is not tensor:
                raise ModelError(f"{where}: tensors {other.name} and {name} are the same part of the model")
        self.naming = naming.for_names(self._stored, spec.num_layers)

    def with_spec(self, spec: ModelSpec) -> Checkpoint:
        """The same files, read as another model."""
        return Checkpoint(spec, self.source, self._layout, self.where, self._block)

    def verify(self) -> None:
        """Compare the header with the spec's inventory; the first differences found are in one ModelError."""
        problems = list(islice(self._differences(), MAX_PROBLEMS_SHOWN + 1))
        if not problems:
            return
        layout = foreign_layout(self._stored)
        if layout is not None:
            raise ModelError(f"{self.where}: weights are stored as {layout}, which is not supported; {WHAT_LOADS}")
        more = " (and more)" if len(problems) > MAX_PROBLEMS_SHOWN else ""
        raise ModelError(f"{self.where}: {'; '.join(problems[:MAX_PROBLEMS_SHOWN])}{more}")

    def _differences(self) -> Iterator[str]:
        """One by one, so that the many tensors that a configuration may claim are not all looked for."""
        expected: set[str] = set()
        for tensor in inventory(self.spec):
            for name, shape in self._pieces(tensor):
                if name in expected:
                    continue
                expected.add(name)
                if name in self._stored and self._stored[name].dtype in FP8_DTYPES:
                    expected.add(name + SCALE_SUFFIX)
                yield from self._problems(name, shape)
        tied_head = self.naming.names["head"] if self.spec.tie_embeddings else None
        for name, found in self._stored.items():
            if name in expected or name == tied_head or not found.listed:
                continue
            if not self.naming.is_ignored(name, self.spec.num_layers):
                yield (
                    f"{found.file}: extra tensor {name} of shape {list(found.shape)}, "
                    f"which family {self.spec.family} does not have"
                )

    def has_own_head(self) -> bool:
        """Whether a head is stored beside the embedding with other numbers: then it is not tied, whatever is said."""
        head, embedding = (self._stored.get(self.naming.names[part]) for part in ("head", "embed"))
        if head is None or embedding is None:
            return False
        if (head.shape, head.dtype) != (embedding.shape, embedding.dtype):
            return True
        step = max(COMPARED_ELEMENTS // max(prod(head.shape[1:]), 1), 1)
        for start in range(0, head.shape[0], step):
            rows = (slice(start, start + step),)
            ours, theirs = (self.source.read(tensor.name, rows).array for tensor in (head, embedding))
            if not np.array_equal(ours, theirs):
                return True
        return False

    def read(self, tensor: TensorSpec, slices: Slices = ()) -> RawTensor:
        """A part, or its slice, whatever way it is stored."""
        if not self.naming.is_per_expert(tensor.part):
            place, number = self.naming.stack_of(tensor.part)
            if number == 1:
                return self._read(self.naming.stored_name(tensor), tensor.shape, slices)
            limits = [slice(*limit) for limit in bounds(tensor.shape, slices)]
            offset = place * tensor.shape[-2]
            limits[-2] = slice(limits[-2].start + offset, limits[-2].stop + offset)
            return self._read(self.naming.stored_name(tensor), _stacked(tensor.shape, number), tuple(limits))
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
            _, number = self.naming.stack_of(tensor.part)
            yield self.naming.stored_name(tensor), _stacked(tensor.shape, number)
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


def _stacked(shape: tuple[int, ...], number: int) -> tuple[int, ...]:
    """The shape of `number` such parts, one below the other."""
    return shape if number == 1 else (*shape[:-2], number * shape[-2], shape[-1])


def as_float32(raw: RawTensor) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    """The numbers of a raw tensor in float32."""
    if raw.is_bfloat16:
        return (raw.array.astype(np.uint32) << 16).view(np.float32)
    return raw.array.astype(np.float32, copy=False)


def _without_leading_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(dropwhile(lambda size: size == 1, shape))

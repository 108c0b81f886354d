"""The interface of all weight sources, and the stored form in which they hand out numbers.

A source knows names, shapes and bytes; it knows nothing of models. Reading takes slices, and a source reads only
the bytes of the slice where its format allows it, so that a worker never holds more than its shard and one piece.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

Slices = tuple[slice, ...]

Progress = Callable[[int, int], None]
"""Called as (tensors done, tensors in all) while a half loads."""

MAX_TENSORS = 400_000
"""Tensors of a checkpoint at most: three times what those with most experts have."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """dtype: the format's own name for it ("BF16", "Q4_1").
    file: that holds it.

    listed: False for a tensor that the folder's index does not name: read if the model has it, else left alone.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    file: str
    listed: bool = True


@dataclass(frozen=True, slots=True)
class RawTensor:
    """Numbers as read. numpy has no bfloat16: `is_bfloat16` says that `array` holds its bits as uint16."""

    array: npt.NDArray[np.generic]
    is_bfloat16: bool = False


class TensorSource(ABC):
    """A readable set of named tensors. Between reads nothing is open or mapped."""

    @property
    @abstractmethod
    def tensors(self) -> Mapping[str, StoredTensor]:
        """Every tensor by name, from headers alone."""

    @property
    @abstractmethod
    def files(self) -> tuple[Path, ...]:
        """Files that hold the bytes, for the fingerprint; empty when there are none."""

    @property
    @abstractmethod
    def readable_dtypes(self) -> frozenset[str]:
        """Stored dtypes that `read` can hand out."""

    @abstractmethod
    def read(self, name: str, slices: Slices = ()) -> RawTensor:
        """A copy of tensor[slices] (step 1; missing trailing slices mean all), in the stored precision or float32."""


def bounds(shape: tuple[int, ...], slices: Slices) -> tuple[tuple[int, int], ...]:
    """(start, stop) along every dimension."""
    full = slices + (slice(None),) * (len(shape) - len(slices))
    return tuple(s.indices(size)[:2] for s, size in zip(full, shape, strict=True))

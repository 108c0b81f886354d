"""Block-scaled float8 checkpoints (DeepSeek's layout): e4m3 values, one inverse scale for each block of a matrix."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

SCALE_SUFFIX = "_scale_inv"
"""Suffix of the scale tensor's name: "weight" -> "weight_scale_inv"."""


def _e4m3_values() -> npt.NDArray[np.float32]:
    """The float of each of the 256 bit patterns (OCP FP8 E4M3: no infinities, two NaNs)."""
    bits = np.arange(256)
    exponent, mantissa = bits >> 3 & 15, bits & 7
    magnitude = np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent - 10.0))
    magnitude[(bits & 127) == 127] = np.nan
    return np.where(bits >> 7, -magnitude, magnitude).astype(np.float32)


E4M3_VALUES = _e4m3_values()


def scale_shape(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, ...]:
    """Shape of the scale tensor that belongs to a matrix, or to a stack of matrices, of `shape`."""
    return (*shape[:-2], -(-shape[-2] // block[0]), -(-shape[-1] // block[1]))


def block_range(start: int, stop: int, size: int) -> slice:
    """The blocks of `size` that cover start..stop."""
    return slice(start // size, -(-stop // size))


def apply_scales(
    values: npt.NDArray[np.float32],
    scales: npt.NDArray[np.float32],
    first: tuple[int, int],
    block: tuple[int, int],
) -> npt.NDArray[np.float32]:
    """values [..., rows, columns] times the scales of their blocks.

    first: row and column of values[..., 0, 0] in the whole matrix.
    scales: of the blocks that `block_range` names.
    """
    for axis, start, size in ((-2, first[0], block[0]), (-1, first[1], block[1])):
        positions = np.arange(start, start + values.shape[axis])
        scales = np.take(scales, positions // size - start // size, axis=axis)
    return values * scales

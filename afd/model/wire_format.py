"""Rows in the types that cross between attention and FFN workers.

float8 rows carry one float32 scale for each group of 128 columns (the last group of a row may be short): the largest
number of a group becomes the largest that e4m3 can hold.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from stepmesh.layout import SCALE_GROUP
from stepmesh.tensor import torch_dtype
from stepmesh.types import WireDtype

_E4M3_MAX = 448.0
_SMALLEST_SCALE = 1e-30  # of a group of zeros


def encode_rows(rows: Tensor, dtype: WireDtype, scales: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """rows [n, hidden] of any float type -> (rows of the wire's type, scales [n, groups] float32 for float8).

    scales: those of rows that were encoded before; they pass unchanged.
    """
    if dtype is not WireDtype.FP8_E4M3:
        wire_type = torch_dtype(dtype)
        return rows if rows.dtype is wire_type else rows.to(wire_type), None
    if scales is not None:
        return rows, scales
    groups = _grouped(rows.float())
    scales = (groups.abs().amax(dim=2) / _E4M3_MAX).clamp(min=_SMALLEST_SCALE)
    values = (groups / scales[:, :, None]).flatten(1)[:, : rows.shape[1]]
    return values.contiguous().to(torch.float8_e4m3fn), scales


def decode_rows(rows: Tensor, scales: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The inverse, in the compute dtype; the same memory where the types agree."""
    if scales is None:
        return rows if rows.dtype is dtype else rows.to(dtype)
    values = _grouped(rows.float()) * scales[:, :, None]
    return values.flatten(1)[:, : rows.shape[1]].to(dtype)


def _grouped(rows: Tensor) -> Tensor:
    """[n, groups, SCALE_GROUP], the last group filled up with zeros."""
    num_groups = -(-rows.shape[1] // SCALE_GROUP)
    return F.pad(rows, (0, num_groups * SCALE_GROUP - rows.shape[1])).view(rows.shape[0], num_groups, SCALE_GROUP)

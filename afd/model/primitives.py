"""Row-wise primitives of both halves. On the CPU they are AFD's native kernels where those are faster, elsewhere torch.

All compute in float32 inside and round once, to the dtype of their input.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from afd import ops as kernels
from afd.model.int8 import Int8Weight, int8_linear
from afd.ops import Packed, PackedMatrix, RowMax

Weight = Tensor | Packed | Int8Weight
"""A matrix [out, in], or a stack of them."""


def prepared(weight: Tensor) -> Tensor | PackedMatrix:
    """The matrix as `linear` takes it fastest here. Its memory may be reordered: the caller drops `weight`."""
    return kernels.pack(weight) if kernels.can_pack(weight) else weight


def prepared_for(dtype: torch.dtype, weight: Tensor | Int8Weight) -> Weight:
    """As `prepared`, of either kind, for activations of `dtype`."""
    if isinstance(weight, Tensor):
        return prepared(weight)
    if dtype is torch.bfloat16 and kernels.can_pack_int8(weight.values):
        return kernels.pack_int8(weight.values, weight.scales)
    return weight


def device_of(weight: Weight) -> torch.device:
    if isinstance(weight, Int8Weight):
        return weight.values.device
    return weight.device if isinstance(weight, Tensor) else weight.data.device


def linear(x: Tensor, weight: Weight) -> Tensor:
    """x [n, in] times the transpose of weight [out, in] -> [n, out]."""
    if isinstance(weight, Packed):
        return kernels.gemm(x, weight, num_threads=torch.get_num_threads())
    if isinstance(weight, Int8Weight):
        return int8_linear(x, weight)
    return F.linear(x, weight)


def linear_into(out: Tensor, x: Tensor, weight: Weight) -> None:
    """As `linear`, into a float32 `out` [n, out]; from packed weights, without rounding to bfloat16 on the way."""
    if isinstance(weight, Packed):
        kernels.gemm(x, weight, out, num_threads=torch.get_num_threads())
    else:
        out.copy_(linear(x, weight))


def linear_row_max(x: Tensor, weight: Weight, best: RowMax, start: int, stop: int) -> None:
    """Go on in `best`, of the columns before start, up to stop. What `linear_into` would write is not kept."""
    if isinstance(weight, Packed):
        kernels.gemm_row_max(x, weight, best, start, stop, num_threads=torch.get_num_threads())
        return
    largest, idx = linear(x, rows_of(weight, start, stop)).float().max(dim=1)
    best.join(RowMax(largest, idx + start))


def rows_of(weight: Weight, start: int, stop: int) -> Weight:
    """A view of rows start..stop of a matrix, which are whole panels of a packed one."""
    return weight.narrow_rows(start, stop) if isinstance(weight, Packed) else weight.narrow(0, start, stop - start)


def embedding(ids: Tensor, weight: Tensor | PackedMatrix) -> Tensor:
    """Rows ids [n] int64 of weight [vocab, hidden] -> [n, hidden] float32."""
    if isinstance(weight, PackedMatrix):
        return kernels.unpack_rows(weight, ids, torch.get_num_threads())
    return F.embedding(ids, weight).float()


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype | None = None) -> Tensor:
    """x [n, width] -> the same shape, in `dtype`, by default that of x.  weight [width] float32."""
    dtype = dtype or x.dtype
    if x.is_cpu:
        direct = dtype in (x.dtype, torch.bfloat16)
        out = torch.empty(x.shape, dtype=dtype if direct else x.dtype)
        return kernels.rms_norm(x, weight, eps, out).to(dtype)
    return F.rms_norm(x.float(), (x.shape[-1],), weight, eps).to(dtype)


def silu_mul(gate_up: Tensor, limit: float = 0.0) -> Tensor:
    """silu(gate) * up of [n, 2 * width], gate first -> [n, width].

    limit > 0: min(silu(gate), limit) * clamp(up, -limit, limit), the clamped SwiGLU of Step-3.5.
    """
    if gate_up.is_cpu:
        return kernels.silu_mul(gate_up, limit)
    gate, up = gate_up.chunk(2, dim=-1)
    if limit > 0:
        return F.silu(gate).clamp(max=limit) * up.clamp(-limit, limit)
    return F.silu(gate) * up

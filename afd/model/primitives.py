"""Row-wise primitives of both halves. On the CPU they are AFD's native kernels where those are faster, elsewhere torch.

All compute in float32 inside and round once, to the dtype of their input.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from afd import kernels
from afd.model.int8 import Int8Weight, int8_linear

SMALL_GEMM_ROWS = 32
"""Up to so many rows a bfloat16 GEMM is bound by reading its weights, and the native one reads them faster."""


Weight = Tensor | Int8Weight
"""A matrix [out, in], or a stack of them."""


def linear(x: Tensor, weight: Weight) -> Tensor:
    """x [n, in] times the transpose of weight [out, in] -> [n, out]."""
    if isinstance(weight, Int8Weight):
        return int8_linear(x, weight)
    if _small_gemm(x, weight):
        return kernels.gemm_bf16_small(x, weight, num_threads=torch.get_num_threads())
    return F.linear(x, weight)


def linear_into(out: Tensor, x: Tensor, weight: Tensor) -> None:
    """As `linear`, into a float32 `out` [n, out]; with few rows the sums reach it without rounding to bfloat16."""
    if _small_gemm(x, weight):
        kernels.gemm_bf16_small(x, weight, out, num_threads=torch.get_num_threads())
    else:
        out.copy_(F.linear(x, weight))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [n, width] -> the same shape and dtype.  weight [width] float32."""
    if x.is_cpu:
        return kernels.rms_norm(x, weight, eps)
    return F.rms_norm(x.float(), (x.shape[-1],), weight, eps).to(x.dtype)


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


def _small_gemm(x: Tensor, weight: Tensor) -> bool:
    return x.is_cpu and weight.dtype is torch.bfloat16 and x.shape[0] <= SMALL_GEMM_ROWS

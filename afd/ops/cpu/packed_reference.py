"""Products with packed matrices in torch: what the native GEMMs are tested against (int8 ones bit for bit)."""

from __future__ import annotations

import torch
from torch import Tensor

from afd.ops.cpu.packed import PAIRS, QUADS, Int8Order, Packed, PackedInt8


def product(x: Tensor, w: Packed) -> Tensor:
    """x [m, k] bfloat16 times the transpose of w [n, k]: [m, n] float32."""
    if isinstance(w, PackedInt8):
        return int8_product(x, w.unpacked(), w.scales[: w.shape[0]], w.order)
    return x.float() @ w.unpacked().float().T


def int8_product(x: Tensor, values: Tensor, scales: Tensor, order: Int8Order) -> Tensor:
    """x [m, k] bfloat16 times the transpose of values [n, k] int8, whose rows have scales [n]: [m, n] float32."""
    integers, row_scales = round_rows(x, order)
    width = group_width(x.shape[1], order)
    sums = torch.zeros(x.shape[0], values.shape[0], dtype=torch.float64)
    for group, begin in enumerate(range(0, x.shape[1], width)):
        part = slice(begin, begin + width)
        exact = integers[:, part].double() @ values[:, part].double().T  # of products whose sum fits 32 bits
        if order == PAIRS:  # one group: its scale meets that of the weights
            return exact.float() * (row_scales * scales)
        sums = torch.addcmul(sums, exact, row_scales[:, group, None].double()).float().double()  # as one rounding
    return sums.float() * scales


def group_width(num_columns: int, order: Int8Order) -> int:
    """Elements of a row of x that the int8 GEMM scales together: all, or kInt8Group of src/gemm_vnni.h."""
    return 64 if order == QUADS else max(num_columns, 1)


def round_rows(x: Tensor, order: Int8Order) -> tuple[Tensor, Tensor]:
    """x [m, k] bfloat16 as the int8 GEMM takes it -> integers [m, k] int16, scales [m, groups of elements] float32.

    Integers of 8 bits for src/gemm_vnni.h; else as large as they can be if no sum of k products with weights of -127 to
    127 may leave an int32. A group with an infinity or a NaN becomes zeros with a scale of NaN.
    """
    num_rows, num_columns = x.shape
    width = group_width(num_columns, order)
    most = 127 if order == QUADS else min((2**31 - 1) // (127 * width), 2**15 - 1)
    wide = torch.nn.functional.pad(x.float(), (0, -num_columns % width))
    wide = wide.reshape(num_rows, -(-num_columns // width), width)
    largest = wide.abs().amax(dim=2)
    finite = largest.isfinite()
    largest = largest.clamp(min=2.0**-100)
    limit = torch.tensor(float(most))
    integers = torch.where(finite[:, :, None], wide * torch.div(limit, largest)[:, :, None], 0.0).round()
    integers = integers.flatten(1)[:, :num_columns].to(torch.int16)
    return integers, torch.div(largest, limit).where(finite, torch.nan)

"""Primitives against plain float32 torch, with plain and with packed weights."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from afd.model.primitives import embedding, linear, linear_into, prepared, rms_norm, rows_of, silu_mul
from afd.ops import PackedMatrix

ROWS = [0, 1, 5, 40]
DTYPES = [torch.float32, torch.bfloat16]


def _randn(*shape: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _close(got: torch.Tensor, exact: torch.Tensor, dtype: torch.dtype) -> None:
    """Within one rounding to `dtype` of the float32 result."""
    assert got.dtype is dtype
    torch.testing.assert_close(got.float(), exact, rtol=2**-7 if dtype is torch.bfloat16 else 1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", ROWS)
def test_linear(rows: int, dtype: torch.dtype) -> None:
    x, weight = _randn(rows, 72, dtype=dtype, seed=0), _randn(140, 72, dtype=dtype, seed=1)
    exact = x.float() @ weight.float().T
    _close(linear(x, weight), exact, dtype)
    _close(linear(x, prepared(weight)), exact, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", ROWS)
def test_linear_into_a_slice(rows: int, dtype: torch.dtype) -> None:
    """The other columns stay; packed weights reach float32 unrounded, so that near-equal logits stay distinct."""
    x, weight = _randn(rows, 72, dtype=dtype, seed=0), _randn(140, 72, dtype=dtype, seed=1)
    exact = x.float() @ weight.float().T
    matrix = prepared(weight)
    rounded = dtype is torch.bfloat16 and not isinstance(matrix, PackedMatrix)
    out = torch.full((rows, 150), 7.0)
    linear_into(out[:, 4:80], x, rows_of(matrix, 64, 140))
    torch.testing.assert_close(out[:, 4:80], exact[:, 64:], rtol=2**-7 if rounded else 1e-5, atol=1e-5)
    assert torch.equal(out[:, :4], torch.full((rows, 4), 7.0)) and torch.equal(out[:, 80:], torch.full((rows, 70), 7.0))


@pytest.mark.parametrize("dtype", DTYPES)
def test_embedding(dtype: torch.dtype) -> None:
    table = _randn(140, 72, dtype=dtype, seed=1)
    ids = torch.tensor([139, 0, 64, 63, 128])
    expected = table[ids]
    matrix = prepared(table)
    assert torch.equal(embedding(ids, matrix), expected)
    for wrong in (-1, 140):
        with pytest.raises(IndexError):
            embedding(torch.tensor([wrong]), matrix)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", ROWS)
def test_rms_norm_and_silu_mul(rows: int, dtype: torch.dtype) -> None:
    x, weight = _randn(rows, 72, dtype=dtype, seed=2), _randn(72, dtype=torch.float32, seed=3)
    exact = x.float() / (x.float().square().mean(1, keepdim=True) + 1e-5).sqrt() * weight
    _close(rms_norm(x, weight, 1e-5), exact, dtype)
    gate, up = x.float().chunk(2, dim=1)
    _close(silu_mul(x), F.silu(gate) * up, dtype)

"""Dense operations of every `Ops` against plain float32 torch, with plain and with prepared weights."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from afd.ops.cpu.packed import PackedMatrix
from afd.ops.ops import Ops, RowMax
from afd.ops.reference import ReferenceOps
from afd.ops.torch_ops import TorchOps

ROWS = [0, 1, 5, 40]
DTYPES = [torch.float32, torch.bfloat16]
OpsOf = Callable[[torch.dtype], Ops]


def _randn(*shape: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _close(got: torch.Tensor, exact: torch.Tensor, dtype: torch.dtype) -> None:
    """Within one rounding to `dtype` of the float32 result."""
    assert got.dtype is dtype
    torch.testing.assert_close(got.float(), exact, rtol=2**-7 if dtype is torch.bfloat16 else 1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", ROWS)
def test_linear(ops_of: OpsOf, rows: int, dtype: torch.dtype) -> None:
    ops = ops_of(dtype)
    x, weight = _randn(rows, 72, dtype=dtype, seed=0), _randn(140, 72, dtype=dtype, seed=1)
    exact = x.float() @ weight.float().T
    _close(ops.linear(x, weight), exact, dtype)
    _close(ops.linear(x, ops.prepare(weight)), exact, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", ROWS)
def test_a_slice_of_the_head(ops_of: OpsOf, rows: int, dtype: torch.dtype) -> None:
    """The other columns stay; packed weights reach float32 unrounded, so that near-equal logits stay distinct."""
    ops = ops_of(dtype)
    x, weight = _randn(rows, 72, dtype=dtype, seed=0), _randn(140, 72, dtype=dtype, seed=1)
    exact = x.float() @ weight.float().T
    head = ops.prepare(weight)
    rounded = dtype is torch.bfloat16 and not isinstance(head, PackedMatrix)
    out = torch.full((rows, 140), 7.0)
    ops.head_logits(x, head, out, 64, 128)
    torch.testing.assert_close(out[:, 64:128], exact[:, 64:128], rtol=2**-7 if rounded else 1e-5, atol=1e-5)
    assert torch.equal(out[:, :64], torch.full((rows, 64), 7.0)) and torch.equal(
        out[:, 128:], torch.full((rows, 12), 7.0)
    )
    best, whole = RowMax.of_nothing(rows), torch.empty(rows, 140)
    for start, stop in ((0, 64), (64, 140)):
        ops.head_max(x, head, best, start, stop)
        ops.head_logits(x, head, whole, start, stop)
    assert torch.equal(best.idx, whole.argmax(dim=1)) and torch.equal(best.largest, whole.amax(dim=1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_embed(ops_of: OpsOf, dtype: torch.dtype) -> None:
    ops = ops_of(dtype)
    table = _randn(140, 72, dtype=dtype, seed=1)
    ids = torch.tensor([139, 0, 64, 63, 128])
    expected = table[ids].float()
    matrix = ops.prepare(table)
    assert torch.equal(ops.embed(ids, matrix), expected)
    for wrong in (-1, 140):
        with pytest.raises(IndexError):
            ops.embed(torch.tensor([wrong]), matrix)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", ROWS)
def test_norm_and_silu_mul(ops_of: OpsOf, rows: int, dtype: torch.dtype) -> None:
    ops = ops_of(dtype)
    x, weight = _randn(rows, 72, dtype=dtype, seed=2), _randn(72, dtype=torch.float32, seed=3)
    exact = x.float() / (x.float().square().mean(1, keepdim=True) + 1e-5).sqrt() * weight
    _close(ops.norm(x, weight, 1e-5), exact, dtype)
    _close(ops.norm(x, weight, 1e-5, torch.bfloat16), exact, torch.bfloat16)
    gate, up = x.float().chunk(2, dim=1)
    tolerant = dtype if ops.name != "torch" else torch.bfloat16  # which rounds in between
    got = ops.silu_mul(x, 0.0)
    assert got.dtype is dtype
    _close(got.to(tolerant), F.silu(gate) * up, tolerant)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("limit", [0.0, 0.7])
def test_swiglu(ops_of: OpsOf, dtype: torch.dtype, limit: float) -> None:
    ops = ops_of(dtype)
    gate_up, down = _randn(2 * 40, 72, dtype=dtype, seed=1) * 0.2, _randn(72, 40, dtype=dtype, seed=2) * 0.2
    rows = _randn(5, 72, dtype=dtype, seed=3)
    gate, up = (rows.float() @ gate_up.float().T).chunk(2, dim=1)
    active = F.silu(gate).clamp(max=limit) * up.clamp(-limit, limit) if limit else F.silu(gate) * up
    exact = active @ down.float().T
    got = ops.swiglu(ops.prepare(gate_up), ops.prepare(down), limit)(rows)
    assert got.dtype is dtype and (got.float() - exact).norm() <= 2e-2 * exact.norm()


@pytest.mark.parametrize("ops", [ReferenceOps(torch.bfloat16), TorchOps(torch.bfloat16)])
def test_a_matrix_prepared_for_other_ops_is_refused(ops: Ops) -> None:
    with pytest.raises(TypeError, match="PackedMatrix was prepared for other ops"):
        ops.linear(torch.ones(1, 8).bfloat16(), PackedMatrix(torch.ones(64, 8).bfloat16()))

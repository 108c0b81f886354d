"""The GEMM over int8 weights: every instruction set gives exactly what integers give."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from afd.ops.cpu.binding import NativeKernels
from afd.ops.cpu.ops import CpuOps
from afd.ops.cpu.packed import PAIRS, PANEL_ROWS, QUADS, Int8Order, PackedInt8
from afd.ops.cpu.packed_reference import product, round_rows
from afd.ops.int8 import Int8Weight

ORDERS = st.sampled_from([PAIRS, QUADS])
FAST = settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def matrix(n: int, k: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    """(values, scales), the ends of the range included."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(-127, 128, (n, k), generator=generator).to(torch.int8)
    values[1::5] = 127
    values[2::5] = -127
    return values, torch.rand(n, generator=generator)


def rows(m: int, k: int, seed: int = 0) -> Tensor:
    """bfloat16 [m, k], a slice of wider rows: of many magnitudes, some of zeros, some of one element, some constant."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(m, k + 3, generator=generator) * torch.logspace(-20, 20, m)[:, None]
    x[1::6] = 0
    x[2::6, 1:] = 0
    x[3::6] = x[3::6, :1]
    return x.bfloat16()[:, :k]


def oracle(x: Tensor, values: Tensor, scales: Tensor, order: Int8Order) -> Tensor:
    """float32 [m, n] by integers."""
    integers, row_scales = round_rows(x, order)
    if order == PAIRS:
        sums = integers.long() @ values.long().T
        assert sums.numel() == 0 or int(sums.abs().max()) < 2**31
        return sums.float() * (row_scales * scales if x.shape[1] else scales)
    out = torch.zeros(x.shape[0], values.shape[0])
    for group, begin in enumerate(range(0, x.shape[1], 64)):
        sums = integers[:, begin : begin + 64].long() @ values[:, begin : begin + 64].long().T
        assert sums.numel() == 0 or int(sums.abs().max()) < 2**24, "as a float32 it is exact"
        # A product of 48 bits and a sum that is rounded once: twice in float64 and float32 gives the same but in ties.
        out = (out.double() + sums.double() * row_scales[:, group, None].double()).float()
    return out * scales


@FAST
@given(
    m=st.one_of(st.integers(0, 18), st.sampled_from([31, 70])),
    n=st.one_of(st.integers(0, 70), st.sampled_from([128, 261])),
    k=st.one_of(st.integers(0, 40), st.sampled_from([515, 516, 517, 1536, 5001])),
    out_dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    num_threads=st.sampled_from([1, 2, 3]),
)
def test_gemm_is_exact(
    kernels: NativeKernels, m: int, n: int, k: int, out_dtype: torch.dtype, num_threads: int
) -> None:
    x, (values, scales) = rows(m, k), matrix(n, k)
    wide = torch.full((m, n + 2), float("nan"), dtype=out_dtype)
    order = kernels.int8_order
    kernels.gemm(x, PackedInt8.pack(values.clone(), scales.clone(), order), wide[:, :n], num_threads)
    assert torch.equal(wide[:, :n], oracle(x, values, scales, order).to(out_dtype))
    assert wide[:, n:].isnan().all(), "wrote behind the rows of out"


@FAST
@given(
    m=st.integers(0, 9),
    n=st.integers(0, 70),
    k=st.one_of(st.integers(0, 40), st.sampled_from([63, 64, 65, 300])),
    order=ORDERS,
)
def test_the_reference_is_exact(m: int, n: int, k: int, order: Int8Order) -> None:
    x, (values, scales) = rows(m, k), matrix(n, k)
    out = product(x, PackedInt8.pack(values.clone(), scales.clone(), order))
    assert torch.equal(out, oracle(x, values, scales, order))


@pytest.mark.parametrize("k", [1, 64, 516, 517, 4096, 40000])
def test_the_largest_sums_fit(kernels: NativeKernels, k: int) -> None:
    """All products of one sign and at their largest: of PAIRS one step more, and an int32 would wrap."""
    x = torch.full((7, k), 3.0).bfloat16()
    values, scales = torch.full((33, k), 127, dtype=torch.int8), torch.full((33,), 0.5)
    values[1] = -127
    out, order = torch.empty(7, 33), kernels.int8_order
    kernels.gemm(x, PackedInt8.pack(values.clone(), scales, order), out, 2)
    assert torch.equal(out, oracle(x, values, scales, order))
    torch.testing.assert_close(out[:, 0], torch.full((7,), 3.0 * 127 * 0.5 * k), rtol=1e-5, atol=0)
    most = int(round_rows(x, PAIRS)[0].max())
    assert k * 127 * most < 2**31 <= k * 127 * (most + 1) or most == 32767


@pytest.mark.parametrize("order", [PAIRS, QUADS])
def test_rounded_rows_are_near_and_the_rest_is_the_weights(order: Int8Order) -> None:
    x = rows(30, 577).float()
    integers, scales = round_rows(x.bfloat16(), order)
    width, most = (64, 127) if order == QUADS else (577, (2**31 - 1) // (127 * 577))
    assert scales.shape == (30, -(-577 // width))
    for group, begin in enumerate(range(0, 577, width)):
        part, rounded = x[:, begin : begin + width], integers[:, begin : begin + width]
        largest = part.abs().amax(1)
        bound = torch.maximum(largest, torch.tensor(2.0**-100)) / most * 0.501
        assert ((rounded * scales[:, group, None] - part).abs().amax(1) <= bound).all()
        assert (rounded.abs().amax(1)[largest > 2.0**-100] == most).all()


def test_a_large_element_coarsens_its_group_alone() -> None:
    x = torch.ones(1, 256).bfloat16()
    x[0, 200] = 1e4
    integers, scales = round_rows(x, QUADS)
    assert (integers[0, :128] * scales[0, 0] - 1.0).abs().max() < 1e-6
    assert not integers[0, 192:200].any() and integers[0, 200] == 127


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), float("-inf")])
def test_a_row_that_is_not_finite_spoils_itself_alone(kernels: NativeKernels, wrong: float) -> None:
    x, (values, scales) = rows(9, 250), matrix(40, 250)
    x[4, 249] = wrong
    w = PackedInt8.pack(values.clone(), scales, kernels.int8_order)
    out, want = torch.empty(9, 40), product(x, w)
    kernels.gemm(x, w, out, 1)
    assert out[4].isnan().all() and want[4].isnan().all()
    others = [0, 1, 2, 3, 5, 6, 7, 8]
    assert torch.equal(out[others], want[others]) and out[others].isfinite().all()


def test_a_row_depends_neither_on_its_batch_nor_on_threads(kernels: NativeKernels) -> None:
    x, (values, scales) = rows(32, 576), matrix(1603, 576)
    w = PackedInt8.pack(values, scales, kernels.int8_order)
    together, again = torch.empty(32, 1603), torch.empty(32, 1603)
    kernels.gemm(x, w, together, 1)
    for num_threads in (2, 4):
        kernels.gemm(x, w, again, num_threads)
        assert torch.equal(together, again)
    for m in (1, 2, 5, 7):
        kernels.gemm(x[3 : 3 + m], w, again[:m], 1)
        assert torch.equal(together[3 : 3 + m], again[:m])
    kernels.close()


@pytest.mark.parametrize("order", [PAIRS, QUADS])
@pytest.mark.parametrize(("n", "k"), [(0, 4), (1, 1), (32, 2), (64, 6), (65, 9), (200, 0), (130, 32)])
def test_packing_keeps_every_element(n: int, k: int, order: Int8Order) -> None:
    values, scales = matrix(n, k)
    packed = PackedInt8.pack(values.clone(), scales.clone(), order)
    assert packed.shape == (n, k) and packed.order == order and torch.equal(packed.unpacked(), values)
    assert torch.equal(packed.scales[:n], scales)
    if n > PANEL_ROWS:
        assert torch.equal(packed.narrow_rows(PANEL_ROWS, n).unpacked(), values[PANEL_ROWS:])
        assert torch.equal(packed.narrow_rows(0, order.panel_rows).unpacked(), values[: order.panel_rows])
        with pytest.raises(ValueError, match="panels"):
            packed.narrow_rows(1, n)


@pytest.mark.parametrize("order", [PAIRS, QUADS])
def test_whole_panels_are_packed_in_their_place(order: Int8Order) -> None:
    values, scales = matrix(64, 8)
    packed = PackedInt8.pack(values, scales, order)
    assert packed.data.data_ptr() == values.data_ptr() and packed.scales.data_ptr() == scales.data_ptr()


def test_a_matrix_packed_for_another_instruction_set_is_refused(kernels: NativeKernels) -> None:
    (values, scales), x = matrix(40, 8), rows(3, 8)
    w = PackedInt8.pack(values, scales, PAIRS if kernels.int8_order == QUADS else QUADS)
    with pytest.raises(ValueError, match="multiplies int8 weights as"):
        kernels.gemm(x, w, torch.empty(3, 40), 1)


def test_what_cannot_be_packed_is_refused(kernels: NativeKernels) -> None:
    ops = CpuOps(kernels, torch.bfloat16)
    if not kernels.vectorised:
        pytest.skip("it packs nothing")
    values, scales = matrix(40, 8)
    for wrong in ((values.float(), scales), (values.T, scales), (values, scales[:-1]), (values, scales.double())):
        with pytest.raises(ValueError):
            ops.prepare(Int8Weight(*wrong))
    stack = Int8Weight(values[None], scales[None])
    assert ops.prepare(stack) is stack
    w = ops.prepare(Int8Weight(values, scales))
    assert isinstance(w, PackedInt8)
    for x in (torch.zeros(3, 8), torch.zeros(3, 7).bfloat16()):
        with pytest.raises(ValueError):
            ops.linear(x, w)
    for out in (torch.zeros(3, 39), torch.zeros(2, 40), torch.zeros(40, 3).T):
        with pytest.raises(ValueError):
            ops.head_logits(rows(3, 8), w, out, 0, 40)

"""The GEMM over int8 weights: every instruction set gives exactly what integers give."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from afd import kernels as face
from afd.kernels.native import NativeKernels
from afd.kernels.packed import INT8_PANEL_ROWS, PANEL_ROWS, PackedInt8
from afd.kernels.reference import ReferenceKernels, round_rows

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


def oracle(x: Tensor, values: Tensor, scales: Tensor) -> Tensor:
    """float32 [m, n] by integers."""
    integers, row_scales = round_rows(x)
    sums = integers.long() @ values.long().T
    assert sums.numel() == 0 or int(sums.abs().max()) < 2**31
    return sums.float() * (row_scales[:, None] * scales)


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
    kernels.gemm(x, PackedInt8.pack(values.clone(), scales.clone()), wide[:, :n], num_threads)
    assert torch.equal(wide[:, :n], oracle(x, values, scales).to(out_dtype))
    assert wide[:, n:].isnan().all(), "wrote behind the rows of out"


@FAST
@given(m=st.integers(0, 9), n=st.integers(0, 70), k=st.integers(0, 40))
def test_the_reference_is_exact(m: int, n: int, k: int) -> None:
    x, (values, scales) = rows(m, k), matrix(n, k)
    out = torch.empty(m, n)
    ReferenceKernels().gemm(x, PackedInt8.pack(values.clone(), scales.clone()), out, 1)
    assert torch.equal(out, oracle(x, values, scales))


@pytest.mark.parametrize("k", [1, 516, 517, 4096, 40000])
def test_the_largest_sums_fit(kernels: NativeKernels, k: int) -> None:
    """All products of one sign and at their largest: one step more, and an int32 would wrap."""
    x = torch.full((7, k), 3.0).bfloat16()
    values, scales = torch.full((33, k), 127, dtype=torch.int8), torch.full((33,), 0.5)
    values[1] = -127
    out = torch.empty(7, 33)
    kernels.gemm(x, PackedInt8.pack(values.clone(), scales), out, 2)
    assert torch.equal(out, oracle(x, values, scales))
    torch.testing.assert_close(out[:, 0], torch.full((7,), 3.0 * 127 * 0.5 * k), rtol=1e-6, atol=0)
    integers, _ = round_rows(x)
    assert k * 127 * int(integers.max()) < 2**31 <= k * 127 * (int(integers.max()) + 1) or int(integers.max()) == 32767


def test_rounded_rows_are_near_and_the_rest_is_the_weights() -> None:
    x = rows(30, 577).float()
    integers, scales = round_rows(x.bfloat16())
    largest = x.abs().amax(1)
    most = (2**31 - 1) // (127 * 577)
    bound = torch.maximum(largest, torch.tensor(2.0**-100)) / most * 0.501
    assert ((integers * scales[:, None] - x).abs().amax(1) <= bound).all()
    assert (integers.abs().amax(1)[largest > 0] == most).all()


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), float("-inf")])
def test_a_row_that_is_not_finite_spoils_itself_alone(kernels: NativeKernels, wrong: float) -> None:
    x, (values, scales) = rows(9, 50), matrix(40, 50)
    x[4, 49] = wrong
    w = PackedInt8.pack(values.clone(), scales)
    out, want = torch.empty(9, 40), torch.empty(9, 40)
    kernels.gemm(x, w, out, 1)
    ReferenceKernels().gemm(x, w, want, 1)
    assert out[4].isnan().all() and want[4].isnan().all()
    others = [0, 1, 2, 3, 5, 6, 7, 8]
    assert torch.equal(out[others], want[others]) and out[others].isfinite().all()


def test_a_row_depends_neither_on_its_batch_nor_on_threads(kernels: NativeKernels) -> None:
    x, (values, scales) = rows(32, 576), matrix(1603, 576)
    w = PackedInt8.pack(values, scales)
    together, again = torch.empty(32, 1603), torch.empty(32, 1603)
    kernels.gemm(x, w, together, 1)
    for num_threads in (2, 4):
        kernels.gemm(x, w, again, num_threads)
        assert torch.equal(together, again)
    for m in (1, 2, 5, 7):
        kernels.gemm(x[3 : 3 + m], w, again[:m], 1)
        assert torch.equal(together[3 : 3 + m], again[:m])
    kernels.close()


@pytest.mark.parametrize(("n", "k"), [(0, 4), (1, 1), (32, 2), (64, 6), (65, 9), (200, 0), (130, 32)])
def test_packing_keeps_every_element(n: int, k: int) -> None:
    values, scales = matrix(n, k)
    packed = PackedInt8.pack(values.clone(), scales.clone())
    assert packed.shape == (n, k) and torch.equal(packed.unpacked(), values)
    assert torch.equal(packed.scales[:n], scales)
    if n > PANEL_ROWS:
        assert torch.equal(packed.narrow_rows(PANEL_ROWS, n).unpacked(), values[PANEL_ROWS:])
        assert torch.equal(packed.narrow_rows(0, INT8_PANEL_ROWS).unpacked(), values[:INT8_PANEL_ROWS])
        with pytest.raises(ValueError, match="panels"):
            packed.narrow_rows(1, n)


def test_whole_panels_are_packed_in_their_place() -> None:
    values, scales = matrix(64, 6)
    packed = PackedInt8.pack(values, scales)
    assert packed.data.data_ptr() == values.data_ptr() and packed.scales.data_ptr() == scales.data_ptr()


def test_what_cannot_be_packed_is_refused() -> None:
    values, scales = matrix(40, 8)
    assert not face.can_pack_int8(values[0])
    for wrong in ((values.float(), scales), (values.T, scales), (values, scales[:-1]), (values, scales.double())):
        with pytest.raises(ValueError):
            face.pack_int8(*wrong)
    w = face.pack_int8(values, scales)
    for x, out in ((torch.zeros(3, 8), None), (torch.zeros(3, 7).bfloat16(), None), (rows(3, 8), torch.zeros(3, 41))):
        with pytest.raises(ValueError):
            face.gemm(x, w, out)

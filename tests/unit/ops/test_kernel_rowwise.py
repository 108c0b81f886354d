"""KV write, RoPE, norms, SwiGLU and the small GEMM against the torch reference."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from afd.ops.cpu.binding import NativeKernels
from afd.ops.cpu.ops import CpuOps
from afd.ops.cpu.packed import PANEL_ROWS, PackedInt8, PackedMatrix
from afd.ops.ops import KvWrite, Rotation, RowMax
from afd.ops.reference import ReferenceOps, add_rms_norm, row_max

DTYPES = [torch.float32, torch.bfloat16]
REFERENCE = ReferenceOps(torch.float32)
FAST = settings(
    max_examples=30, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def packed(kernels: NativeKernels, w: Tensor) -> PackedMatrix:
    copy = w.clone()
    kernels.pack(copy)
    return PackedMatrix(copy)


def assert_close(got: Tensor, want: Tensor, rtol: float = 1e-5) -> None:
    """Equal to rounding: `rtol` in float32, a unit in the last place in bfloat16."""
    if got.dtype == torch.bfloat16:
        rtol = 2**-7
    torch.testing.assert_close(got, want, rtol=rtol, atol=1e-6)


def random_slots(num_tokens: int, num_slots: int) -> Tensor:
    """Distinct slots, every fifth token without one."""
    slots = torch.randperm(num_slots, generator=torch.Generator().manual_seed(1))[:num_tokens]
    slots[::5] = -1
    return slots


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("head_dim", "v_dim", "block_size"), [(64, 64, 16), (80, 128, 8), (32, 8, 24)])
def test_k_and_v_of_a_projection(
    kernels: NativeKernels, dtype: torch.dtype, head_dim: int, v_dim: int, block_size: int
) -> None:
    """Slices of wider rows, of different widths, without a rotation: stored as they are."""
    qkv = random(33, 2 * (head_dim + v_dim) + 8, dtype=dtype)
    k = qkv[:, 8 : 8 + 2 * head_dim].view(33, 2, head_dim)
    v = qkv[:, 8 + 2 * head_dim :].view(33, 2, v_dim)
    slots = random_slots(33, 7 * block_size)
    caches = [[torch.zeros(7, 2, block_size, dim, dtype=dtype) for dim in (head_dim, v_dim)] for _ in range(2)]
    none = torch.empty(33, 0)
    kernels.rope_write_kv(k.clone(), KvWrite(k, v, *caches[0], slots), Rotation(none, none))
    for rows, cache in zip((k, v), caches[1], strict=True):
        REFERENCE.write_rows(rows, cache, slots)
    assert torch.equal(caches[0][0], caches[1][0]) and torch.equal(caches[0][1], caches[1][1])
    assert caches[0][0].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(64, 64), (128, 64), (32, 32), (80, 36), (256, 256), (16, 0)])
def test_rope_write_kv(
    kernels: NativeKernels, dtype: torch.dtype, interleaved: bool, head_dim: int, rotary_dim: int
) -> None:
    q, k, v = (random(9, heads, head_dim, dtype=dtype, seed=heads) for heads in (6, 2, 2))
    k_before = k.clone()
    cos, sin = random(9, rotary_dim // 2, seed=7).cos(), random(9, rotary_dim // 2, seed=7).sin()
    slots = random_slots(9, 48)
    results = []
    for implementation in (kernels, REFERENCE):
        rotated, k_cache = q.clone(), torch.zeros(3, 2, 16, head_dim, dtype=dtype)
        v_cache = torch.zeros_like(k_cache)
        write = KvWrite(k, v, k_cache, v_cache, slots)
        returned = implementation.rope_write_kv(rotated, write, Rotation(cos, sin, interleaved))
        results.append((rotated if returned is None else returned, k_cache, v_cache))
    for got, want in zip(*results, strict=True):
        assert_close(got, want)
    assert torch.equal(k, k_before)
    assert torch.equal(results[0][0][..., rotary_dim:], q[..., rotary_dim:])


def test_a_slot_behind_the_cache_is_refused_before_anything_is_written(kernels: NativeKernels) -> None:
    k = random(3, 2, 32)
    cos = torch.ones(3, 16)
    for implementation in (kernels, REFERENCE):
        cache, q = torch.zeros(2, 2, 8, 32), random(3, 4, 32)
        q_before = q.clone()
        slots = torch.tensor([0, 1, 16])
        with pytest.raises(ValueError, match="slot"):
            implementation.rope_write_kv(q, KvWrite(k, k, cache, cache, slots), Rotation(cos, cos))
        assert not cache.any() and torch.equal(q, q_before)


@FAST
@given(
    num_rows=st.integers(0, 9),
    width=st.one_of(st.integers(1, 70), st.sampled_from([576, 1000, 4096])),
    num_partials=st.integers(0, 4),
    dtype=st.sampled_from(DTYPES),
    partial_dtype=st.sampled_from(DTYPES),
)
def test_add_rms_norm(
    kernels: NativeKernels,
    num_rows: int,
    width: int,
    num_partials: int,
    dtype: torch.dtype,
    partial_dtype: torch.dtype,
) -> None:
    x = random(num_rows, width, dtype=dtype)
    partials = [random(num_rows, width, dtype=partial_dtype, seed=1 + i) for i in range(num_partials)]
    weight = random(width, seed=9)
    results = []
    for norm in (kernels.add_rms_norm, add_rms_norm):
        residual, out = x.clone(), torch.full_like(x, float("nan"))
        norm(residual, partials, weight, 1e-5, out)
        results.append((residual, out))
    assert torch.equal(results[0][0], results[1][0]), "the residual is a sum in a given order: no rounding may differ"
    assert_close(results[0][1], results[1][1])


@FAST
@given(
    num_rows=st.integers(0, 5),
    width=st.one_of(st.integers(0, 70), st.just(1536)),
    limit=st.sampled_from([0.0, 0.0, 0.5, 7.0]),
    dtype=st.sampled_from(DTYPES),
)
def test_silu_mul(kernels: NativeKernels, num_rows: int, width: int, limit: float, dtype: torch.dtype) -> None:
    gate_up = (random(num_rows, 2 * width + 3) * 20)[:, : 2 * width].to(dtype)
    got = torch.full((num_rows, width), float("nan"), dtype=dtype)
    kernels.silu_mul(gate_up, limit, got)
    assert_close(got, REFERENCE.silu_mul(gate_up, limit))


@pytest.mark.parametrize("width", [1, 36, 576])
def test_a_norm_of_the_residual_in_the_activation_dtype(kernels: NativeKernels, width: int) -> None:
    x, weight = random(5, width), random(width, seed=9)
    partials = [random(5, width, dtype=torch.bfloat16, seed=3)]
    results = []
    for norm in (kernels.add_rms_norm, add_rms_norm):
        residual, out = x.clone(), torch.empty(5, width, dtype=torch.bfloat16)
        norm(residual, partials, weight, 1e-5, out)
        results.append((residual, out))
    assert torch.equal(results[0][0], results[1][0])
    assert_close(results[0][1], results[1][1])


def test_silu_mul_at_the_ends_of_the_range(kernels: NativeKernels) -> None:
    gate = torch.tensor([[-3e38, -1000.0, -88.0, -87.0, 0.0, 88.0, 1000.0, 3e38]])
    out = torch.empty_like(gate)
    kernels.silu_mul(torch.cat([gate, torch.ones_like(gate)], dim=1), 0.0, out)
    want = torch.nn.functional.silu(gate)
    torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-30)


@FAST
@given(
    m=st.one_of(st.integers(0, 8), st.sampled_from([13, 16, 31, 70])),
    n=st.one_of(st.integers(0, 9), st.sampled_from([64, 100, 128, 261])),
    pairs=st.one_of(st.integers(0, 35), st.sampled_from([288, 2500])),
    out_dtype=st.sampled_from(DTYPES),
    num_threads=st.sampled_from([1, 2, 3]),
)
def test_gemm(kernels: NativeKernels, m: int, n: int, pairs: int, out_dtype: torch.dtype, num_threads: int) -> None:
    k = 2 * pairs
    x = random(m, k + 5, dtype=torch.bfloat16)[:, :k]
    w = random(n, k, dtype=torch.bfloat16, seed=1)
    wide = torch.full((m, n + 2), float("nan"), dtype=out_dtype)
    kernels.gemm(x, packed(kernels, w), wide[:, :n], num_threads)
    want = x.double() @ w.double().T
    magnitude = x.double().abs() @ w.double().abs().T
    bound = 1e-6 * magnitude + (2**-8 * want.abs() if out_dtype == torch.bfloat16 else 0)
    assert ((wide[:, :n].double() - want).abs() <= bound + 1e-30).all()
    assert wide[:, n:].isnan().all(), "wrote behind the rows of out"


@pytest.mark.parametrize("out_dtype", DTYPES)
@pytest.mark.parametrize(("m", "n"), [(64, 576), (48, 960), (100, 640), (64, 200), (33, 3 * PANEL_ROWS - 7)])
def test_panels_that_do_not_share_out_evenly(kernels: NativeKernels, m: int, n: int, out_dtype: torch.dtype) -> None:
    """Their rows are shared: the same sums, each once, nothing behind the rows of out."""
    k = 2 * 4096  # enough to be worth several threads
    x, w = random(m, k + 5, dtype=torch.bfloat16)[:, :k], packed(kernels, random(n, k, dtype=torch.bfloat16, seed=1))
    alone = torch.empty(m, n, dtype=out_dtype)
    kernels.gemm(x, w, alone, 1)
    for num_threads in (2, 3, 4):
        wide = torch.full((m, n + 2), float("nan"), dtype=out_dtype)
        kernels.gemm(x, w, wide[:, :n], num_threads)
        assert torch.equal(alone, wide[:, :n]) and wide[:, n:].isnan().all()


def test_a_gemm_row_does_not_depend_on_its_batch_nor_on_threads(kernels: NativeKernels) -> None:
    x, w = random(32, 576, dtype=torch.bfloat16), random(1603, 576, dtype=torch.bfloat16, seed=1)
    w_packed = packed(kernels, w)
    together = torch.empty(32, 1603)
    kernels.gemm(x, w_packed, together, 1)
    for num_threads in (2, 4):
        again = torch.empty(32, 1603)
        kernels.gemm(x, w_packed, again, num_threads)
        assert torch.equal(together, again)
    for m in (1, 2, 5, 7):
        part = torch.empty(m, 1603)
        kernels.gemm(x[3 : 3 + m], w_packed, part, 1)
        assert torch.equal(together[3 : 3 + m], part)
    kernels.close()


@given(
    st.integers(1, 5),
    st.integers(1, 2600),
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 2599), st.sampled_from([9.0, float("nan"), float("inf")]))),
    st.integers(1, 3),
)
@FAST
def test_row_max(kernels: NativeKernels, rows: int, width: int, marks: list, num_threads: int) -> None:
    """numpy's answer: the first of equal elements (bfloat16 has many), the first NaN where there is one."""
    x = random(rows, width + 3).bfloat16().float()[:, :width]
    for row, column, value in marks:
        x[row % rows, column % width] = value
    got = RowMax.of_nothing(rows)
    kernels.row_max(x, got, num_threads)
    assert got.idx.tolist() == x.numpy().argmax(axis=1).tolist()
    assert torch.equal(got.largest.nan_to_num(7.5), x.amax(dim=1).nan_to_num(7.5))


@pytest.mark.parametrize("value", [0.0, -float("inf"), float("inf"), float("nan")])
def test_row_max_of_equal_elements(kernels: NativeKernels, value: float) -> None:
    got = RowMax.of_nothing(2)
    kernels.row_max(torch.full((2, 3000), value), got, 1)
    assert got.idx.tolist() == [0, 0]


@pytest.mark.parametrize("weights", ["bfloat16", "int8"])
@pytest.mark.parametrize(("m", "n", "k"), [(0, 70, 8), (1, 1, 2), (3, 130, 10), (70, 1000, 32), (2, 5000, 64)])
def test_gemm_row_max(kernels: NativeKernels, m: int, n: int, k: int, weights: str) -> None:
    """That of the product: of equal columns the first, the first NaN, with any number of threads."""
    w = random(n, k, dtype=torch.bfloat16)
    w[n // 2 :] = w[: n - n // 2].clone()
    x = random(m, k, dtype=torch.bfloat16)
    x[1::3] = float("nan")
    x[2::3] = 0
    scales = torch.full((n,), 0.5)
    matrix = (
        packed(kernels, w)
        if weights == "bfloat16"
        else PackedInt8.pack((w * 20).to(torch.int8), scales, kernels.int8_order)
    )
    products, want = torch.empty(m, n), RowMax.of_nothing(m)
    kernels.gemm(x, matrix, products, 1)
    kernels.row_max(products, want, 1)
    for num_threads, step in itertools.product((1, 2, 3), (64, 192, 5056)):
        got = RowMax.of_nothing(m)
        for start in range(0, n, step):
            kernels.gemm_row_max(x, matrix, got, start, min(start + step, n), num_threads)
        assert torch.equal(got.idx, want.idx)
        assert torch.equal(got.largest.nan_to_num(7.5), want.largest.nan_to_num(7.5))
    kernels.close()


@pytest.mark.parametrize(
    ("start", "stop", "rows", "message"),
    [
        (64, 64, 2, "no columns"),
        (-64, 64, 2, "no columns"),
        (64, 131, 2, "no columns"),
        (0, 100, 2, "panels"),
        (32, 130, 2, "panels"),
        (0, 130, 3, "best must be"),
    ],
)
def test_gemm_row_max_refuses(kernels: NativeKernels, start: int, stop: int, rows: int, message: str) -> None:
    w, x = PackedMatrix(torch.zeros(130, 8, dtype=torch.bfloat16)), torch.zeros(2, 8, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=message):
        CpuOps(kernels, torch.bfloat16).head_max(x, w, RowMax.of_nothing(rows), start, stop)


@given(st.lists(st.sampled_from([float("nan"), -float("inf"), 0.0, 1.0, 2.0]), min_size=1, max_size=6), st.data())
@FAST
def test_row_maxima_of_two_parts_are_those_of_the_whole(values: list[float], data: st.DataObject) -> None:
    row = torch.tensor([values])
    at = data.draw(st.integers(1, max(1, len(values) - 1)))
    best = RowMax.of_nothing(1)
    for begin, end in ((0, at), (at, len(values))):
        if begin < end:
            part = row_max(row[:, begin:end])
            best.join(RowMax(part.largest, part.idx + begin))
    assert best.idx.item() == row.numpy().argmax()


@pytest.mark.parametrize(("n", "k"), [(0, 4), (1, 2), (64, 6), (65, 10), (200, 0), (130, 32)])
def test_packing_keeps_every_element(kernels: NativeKernels, n: int, k: int) -> None:
    w = random(n, k, dtype=torch.bfloat16)
    matrix = packed(kernels, w)
    assert torch.equal(matrix.unpacked(), w)
    idx = torch.arange(n).flip(0)
    assert torch.equal(matrix.rows(idx), w[idx])
    if n and k:
        for num_threads in (1, 3):
            out = torch.empty(n, k)
            kernels.unpack_rows(matrix, idx, out, num_threads)
            assert torch.equal(out, w[idx].float())
    if n > PANEL_ROWS:
        assert torch.equal(matrix.narrow_rows(PANEL_ROWS, n).unpacked(), w[PANEL_ROWS:])
        with pytest.raises(ValueError, match="panels"):
            matrix.narrow_rows(1, n)
    kernels.pack(matrix.data, unpack=True)
    assert torch.equal(matrix.data, w)

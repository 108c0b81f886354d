"""FFN kinds and shards: against one-expert-at-a-time arithmetic, and partial rows summing to the whole."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from afd.model.ffn import Dispatch, MoeFfn, SharedExpert
from afd.model.halves import FFNHalf
from afd.model.loading import load_ffn_half, resolve_model
from afd.model.router import Router
from afd.model.sharding import ShardSpec, partition
from afd.model.spec import RouterSpec
from afd.ops.select import select
from afd.types import FfnParallel
from tests.unit.model.model_files import STEP3_TINY

HIDDEN, WIDTH, EXPERTS = 16, 12, 5
OPS = select("cpu", "float32")


@given(total=st.integers(0, 100), num_parts=st.integers(1, 12))
def test_parts_are_contiguous_and_near_equal(total: int, num_parts: int) -> None:
    parts = [partition(total, num_parts, part) for part in range(num_parts)]
    assert [i for part in parts for i in part] == list(range(total))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def _weights(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    gate_up = torch.randn(EXPERTS, 2 * WIDTH, HIDDEN, generator=generator)
    return gate_up, torch.randn(EXPERTS, HIDDEN, WIDTH, generator=generator)


def _one_expert(gate_up: torch.Tensor, down: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
    gate, up = (gate_up @ row)[:WIDTH], (gate_up @ row)[WIDTH:]
    return down @ (F.silu(gate) * up)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    num_tokens=st.integers(0, 9), top_k=st.integers(1, 3), first=st.integers(0, 4), count=st.integers(0, 5),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_routed_experts_against_one_token_at_a_time(
    num_tokens: int, top_k: int, first: int, count: int, seed: int
) -> None:
    """Any token count, any contiguous set of local experts, choices that hit none of them."""
    generator = torch.Generator().manual_seed(seed)
    gate_up, down = _weights(seed)
    local = range(first, min(first + count, EXPERTS))
    ids = torch.stack([torch.randperm(EXPERTS, generator=generator)[:top_k] for _ in range(num_tokens)]).int() \
        if num_tokens else torch.empty(0, top_k, dtype=torch.int32)  # fmt: skip
    weights = torch.rand(num_tokens, top_k, generator=generator)
    rows = torch.randn(num_tokens, HIDDEN, generator=generator)
    moe = MoeFfn(OPS, [OPS.swiglu(gate_up[e], down[e]) for e in local], local.start, None)
    got = moe(Dispatch(0, rows, ids, weights))
    expected = torch.zeros(num_tokens, HIDDEN)
    for token in range(num_tokens):
        for choice in range(top_k):
            expert = int(ids[token, choice])
            if expert in local:
                expected[token] += weights[token, choice] * _one_expert(gate_up[expert], down[expert], rows[token])
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_all_tokens_to_one_expert() -> None:
    gate_up, down = _weights(0)
    rows = torch.randn(7, HIDDEN, generator=torch.Generator().manual_seed(1))
    ids, weights = torch.full((7, 1), 3, dtype=torch.int32), torch.ones(7, 1)
    moe = MoeFfn(OPS, [OPS.swiglu(*pair) for pair in zip(gate_up, down, strict=True)], 0, None)
    got = moe(Dispatch(0, rows, ids, weights))
    torch.testing.assert_close(got, OPS.swiglu(gate_up[3], down[3])(rows))


@pytest.mark.parametrize("row_idx", [None, torch.tensor([4, 1, 2, 9, 3], dtype=torch.int32)])
def test_shared_expert_rows_of_a_rank(row_idx: torch.Tensor | None) -> None:
    """With ep, rank r of y serves the rows whose place in the sender's batch is r modulo y."""
    gate_up, down = _weights(2)
    swiglu = OPS.swiglu(gate_up[0], down[0])
    rows = torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(3))
    places = list(range(5)) if row_idx is None else row_idx.tolist()
    for rank in range(3):
        out = torch.zeros(5, HIDDEN)
        SharedExpert(swiglu, rank, 3).add_to(out, Dispatch(0, rows, row_idx=row_idx))
        for row, place in enumerate(places):
            expected = swiglu(rows[row : row + 1])[0] if place % 3 == rank else torch.zeros(HIDDEN)
            torch.testing.assert_close(out[row], expected)


@pytest.fixture(scope="module")
def whole() -> FFNHalf:
    return load_ffn_half(resolve_model(str(STEP3_TINY)), ShardSpec(), select("cpu", "float32"))


def _dispatch(half: FFNHalf, layer: int, num_tokens: int) -> Dispatch:
    generator = torch.Generator().manual_seed(layer)
    rows = torch.randn(num_tokens, half.spec.hidden, generator=generator)
    ffn = half.spec.layers[layer].ffn
    if not ffn.top_k:
        return Dispatch(layer, rows)
    scores = torch.rand(num_tokens, ffn.num_experts, generator=generator)
    weights, ids = scores.topk(ffn.top_k)
    return Dispatch(layer, rows, ids.int(), weights)


@pytest.mark.parametrize("parallel", FfnParallel)
@pytest.mark.parametrize("num_ranks", [2, 3, 5, 11])
def test_partial_rows_sum_to_the_whole(whole: FFNHalf, parallel: FfnParallel, num_ranks: int) -> None:
    """8 experts and widths 256 and 64: neither 3, 5 nor 11 divides them, and 11 ranks leave some without experts."""
    folder = resolve_model(str(STEP3_TINY))
    shards = [
        load_ffn_half(folder, ShardSpec(rank, num_ranks, parallel), select("cpu", "float32"))
        for rank in range(num_ranks)
    ]
    for layer in range(whole.spec.num_layers):
        dispatch = _dispatch(whole, layer, 6)
        total = sum((shard.layer(dispatch) for shard in shards), torch.zeros(6, whole.spec.hidden))
        torch.testing.assert_close(total, whole.layer(dispatch), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_rows_are_ordinary(dtype: torch.dtype) -> None:
    half = load_ffn_half(resolve_model("dummy:step3-tiny"), ShardSpec(1, 3), select("cpu", dtype))
    for layer in range(half.spec.num_layers):
        dispatch = _dispatch(half, layer, 0)
        dispatch.rows = dispatch.rows.to(dtype)
        rows = half.layer(dispatch)
        assert rows.shape == (0, half.spec.hidden) and rows.dtype is dtype


def test_a_rank_without_any_slice_answers_zeros() -> None:
    folder = resolve_model("dummy:step3-tiny")
    half = load_ffn_half(
        folder, ShardSpec(0, 300, FfnParallel.TP), select("cpu", "bfloat16")
    )  # width 256 over 300 ranks
    rows = half.layer(Dispatch(0, torch.ones(3, 128, dtype=torch.bfloat16)))
    assert rows.dtype is torch.bfloat16 and not rows.any()


def test_bfloat16_is_near_float32(whole: FFNHalf) -> None:
    low = load_ffn_half(resolve_model(str(STEP3_TINY)), ShardSpec(), select("cpu", "bfloat16"))
    dispatch = _dispatch(whole, 1, 8)
    exact = whole.layer(dispatch)
    dispatch.rows = dispatch.rows.bfloat16()
    got = low.layer(dispatch)
    assert got.dtype is torch.bfloat16
    assert (got.float() - exact).norm() < 0.02 * exact.norm()


@pytest.mark.parametrize("renormalise", [False, True])
def test_router(renormalise: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, rows = torch.randn(6, HIDDEN, generator=generator), torch.randn(4, HIDDEN, generator=generator)
    ids, weights = Router(OPS, RouterSpec(renormalise=renormalise, scaling=2.0), 3, weight)(rows)
    assert ids.dtype is torch.int32 and weights.dtype is torch.float32
    for token in range(4):
        probabilities = torch.softmax(weight @ rows[token], 0)
        best = probabilities.argsort(descending=True)[:3]
        assert ids[token].tolist() == best.tolist()
        expected = probabilities[best] / (probabilities[best].sum() if renormalise else 1.0) * 2.0
        torch.testing.assert_close(weights[token], expected)


def test_router_logits_in_the_dtype_of_its_weight() -> None:
    """Step-3: bfloat16 logits, float32 softmax; a float32 router upcasts the rows instead."""
    generator = torch.Generator().manual_seed(0)
    weight, rows = torch.randn(6, HIDDEN, generator=generator), torch.randn(4, HIDDEN, generator=generator).bfloat16()
    _, low = Router(OPS, RouterSpec(), 6, weight.bfloat16())(rows)
    _, high = Router(OPS, RouterSpec(dtype="float32"), 6, weight)(rows)
    torch.testing.assert_close(low.sum(1), torch.ones(4))
    expected = torch.softmax((rows @ weight.bfloat16().T).float(), 1).sort(descending=True).values
    torch.testing.assert_close(low, expected, rtol=0, atol=0)
    assert not torch.equal(low, high)

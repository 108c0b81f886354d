"""Sparse dispatch sends a rank what it works on, no row more and no row less, so the combined rows stay the same."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from afd.errors import ConfigError
from afd.model.halves import Dispatch, FFNHalf
from afd.model.loading import load_attention_half, load_ffn_half, resolve_model
from afd.model.row_selection import RowSelection
from afd.model.sharding import ShardSpec, check_sparse
from afd.ops.select import select
from afd.types import FfnParallel

EP, HYBRID, TP = FfnParallel.EP, FfnParallel.HYBRID, FfnParallel.TP
CASES = [("step3-tiny", EP), ("qwen3-moe-tiny", EP), ("qwen3-moe-tiny", HYBRID)]


@cache
def folder_of(preset: str):
    return resolve_model(f"dummy:{preset}")


@cache
def shards_of(preset: str, num_ranks: int, parallel: FfnParallel) -> list[FFNHalf]:
    return [
        load_ffn_half(folder_of(preset), ShardSpec(r, num_ranks, parallel), select("cpu", torch.float32))
        for r in range(num_ranks)
    ]


@cache
def attention_of(preset: str):
    return load_attention_half(folder_of(preset), select("cpu", "float32"))


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    case=st.sampled_from(CASES),
    num_ranks=st.sampled_from([2, 3, 7]),
    num_tokens=st.integers(0, 9),
    num_favourites=st.integers(1, 8),
    seed=st.integers(0, 99),
)
@torch.inference_mode()
def test_combined_sparse_partials_equal_broadcast_ones(case, num_ranks, num_tokens, num_favourites, seed):
    """Any routing, from all rows to the same experts to an even one; ranks without a row take part."""
    preset, parallel = case
    torch.set_num_threads(1)
    spec, shards = folder_of(preset).spec, shards_of(preset, num_ranks, parallel)
    selection = RowSelection(spec, num_ranks, parallel)
    generator = torch.Generator().manual_seed(seed)
    for layer, kind in enumerate(spec.layers):
        rows = torch.randn(num_tokens, spec.hidden, generator=generator)
        ffn = kind.ffn
        if not ffn.top_k:
            assert selection.rows_of_ranks(layer, None) is None
            continue
        reach = max(ffn.top_k, num_favourites)
        ids = torch.rand(num_tokens, reach, generator=generator).argsort(dim=1)[:, : ffn.top_k].int()
        weights = torch.rand(num_tokens, ffn.top_k, generator=generator)
        chosen = selection.rows_of_ranks(layer, ids.numpy())
        assert chosen is not None and len(chosen) == num_ranks
        places = [torch.from_numpy(of_rank) for of_rank in chosen]
        broadcast = torch.randn(num_tokens, spec.hidden, generator=generator)
        sparse = broadcast.clone()
        half = attention_of(preset)
        half.combine(broadcast, [shard.layer(Dispatch(layer, rows, ids, weights)) for shard in shards])
        partials = [
            shard.layer(Dispatch(layer, rows[p], ids[p], weights[p], p.int()))
            for shard, p in zip(shards, places, strict=True)
        ]
        half.combine(sparse, partials, places)
        torch.testing.assert_close(sparse, broadcast, rtol=1e-5, atol=1e-6)


def test_a_rank_is_sent_nothing_that_it_would_answer_with_zeros():
    spec = folder_of("step3-tiny").spec  # 8 experts: ranks hold 0-1, 2-4, 5-7
    ids = np.array([[0, 1, 1], [2, 3, 4], [0, 7, 2], [5, 6, 7]], np.int32)
    routed = [{0, 2}, {1, 2}, {2, 3}]
    shared = [{0, 3}, {1}, {2}]
    found = RowSelection(spec, 3, EP).rows_of_ranks(1, ids)
    assert found is not None
    assert [set(of_rank.tolist()) for of_rank in found] == [r | s for r, s in zip(routed, shared, strict=True)]
    assert all((np.diff(of_rank) > 0).all() for of_rank in found)
    without_shared = RowSelection(folder_of("qwen3-moe-tiny").spec, 2, HYBRID).rows_of_ranks(1, ids[:1])
    assert without_shared is not None
    assert [of_rank.tolist() for of_rank in without_shared] == [[0], []]


def test_one_rank_needs_every_row():
    ids = np.zeros((4, 3), np.int32)
    assert RowSelection(folder_of("step3-tiny").spec, 1, EP).rows_of_ranks(1, ids) is None


@pytest.mark.parametrize(
    ("preset", "parallel", "message"),
    [
        ("step3-tiny", TP, "ffn_parallel tp slices every expert over all ranks"),
        ("step3-tiny", HYBRID, "hybrid slices the shared expert of .* use ep"),
        ("qwen3-tiny", EP, "has no MoE layer"),
    ],
)
def test_where_every_rank_needs_every_row_sparse_is_refused(preset, parallel, message):
    with pytest.raises(ConfigError, match=f"cluster.dispatch sparse: .*{message}"):
        check_sparse(folder_of(preset).spec, parallel)


@pytest.mark.parametrize(("preset", "parallel"), CASES)
def test_where_rows_can_be_left_out_sparse_is_allowed(preset, parallel):
    check_sparse(folder_of(preset).spec, parallel)

"""Batches, KV cache, rotary embedding and paged attention against obvious twins."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from afd.kv.cache import BlockCounts, KVCache, count_blocks
from afd.model.batch import AttentionBatch
from afd.model.loading import resolve_model
from afd.model.rope import inverse_frequencies
from afd.model.spec import RopeScaling, RopeSpec
from afd.ops.ops import KvWrite, Rotation
from afd.ops.rope import MOST_POSITIONS, AngleTable, cos_sin, rotate
from afd.ops.select import select

OPS = select("cpu", "float32")


def test_batch_of_a_decode_and_a_chunk() -> None:
    batch = AttentionBatch.build([(9, 1, [5, 2]), (6, 4, [7, 0, 3])], block_size=8)
    assert batch.positions.tolist() == [9, 6, 7, 8, 9]
    assert batch.slot_mapping.tolist() == [17, 62, 63, 0, 1]
    assert batch.query_start.tolist() == [0, 1, 5] and batch.query_start.dtype is torch.int32
    assert batch.seq_lens.tolist() == [10, 10]
    assert batch.block_table.tolist() == [[5, 2], [7, 0]]
    assert (batch.num_tokens, batch.num_seqs, batch.max_query_len, batch.max_seq_len) == (5, 2, 4, 10)


def test_an_empty_batch_is_ordinary() -> None:
    batch = AttentionBatch.build([], 16)
    assert (batch.num_tokens, batch.num_seqs, batch.max_query_len) == (0, 0, 0)


def test_cache_shapes_and_sizes() -> None:
    spec = resolve_model("dummy:step3-tiny").spec
    cache = KVCache(spec, 6, 16, torch.bfloat16)
    assert len(cache.k) == len(cache.v) == 5
    assert cache.k[0].shape == cache.v[4].shape == (6, 1, 16, 32)
    assert cache.num_bytes == 6 * 16 * spec.kv_bytes_per_token("bfloat16")
    assert count_blocks(spec, cache.num_bytes, 16, torch.bfloat16) == BlockCounts(6)
    assert count_blocks(spec, cache.num_bytes - 1, 16, torch.bfloat16) == BlockCounts(5)
    assert count_blocks(spec, 0, 16, torch.bfloat16, num_full=7) == BlockCounts(7)
    cache.close()
    assert cache.num_bytes == 0


def test_windowed_layers_have_a_count_of_blocks_of_their_own() -> None:
    """As many as their sequences can hold at once; the rest of the memory is the others'."""
    spec = resolve_model("dummy:step3.5-flash-tiny").spec  # 2 full and 4 windowed layers of 64 elements
    block_bytes = 16 * 64 * 2
    total = 600 * block_bytes
    assert count_blocks(spec, total, 16, torch.bfloat16, most_windowed=50) == BlockCounts((600 - 200) // 2, 50)
    assert count_blocks(spec, total, 16, torch.bfloat16, most_windowed=500) == BlockCounts(100, 100)
    assert count_blocks(spec, total, 16, torch.bfloat16, 50, num_full=90) == BlockCounts(90, 50)
    cache = KVCache(spec, 200, 16, torch.bfloat16, num_window_blocks=50)
    assert cache.num_bytes == total
    assert [k.shape[0] for k in cache.k] == [200, 50, 50, 50, 200, 50]


def _twin(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int) -> torch.Tensor:
    """One query [heads, dim] after the context k, v [length, kv_heads, dim], one head at a time, in float64."""
    out = []
    for head in range(q.shape[0]):
        kv_head = head * k.shape[1] // q.shape[0]
        first = max(0, k.shape[0] - window) if window else 0
        scores = k[first:, kv_head].double() @ q[head].double() / math.sqrt(q.shape[1])
        out.append(torch.softmax(scores, 0) @ v[first:, kv_head].double())
    return torch.stack(out)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    seqs=st.lists(st.tuples(st.integers(0, 40), st.integers(1, 20)), min_size=1, max_size=4),
    heads=st.sampled_from([(4, 4), (6, 2), (8, 1)]),
    window=st.sampled_from([0, 1, 7, 16]),
    seed=st.integers(0, 1000),
    block_size=st.sampled_from([8, 4]),
)
def test_paged_attention_against_the_twin(
    seqs: list[tuple[int, int]], heads: tuple[int, int], window: int, seed: int, block_size: int
) -> None:
    """Mixed batches: contexts written in two parts, blocks in random order, every query compared on its own.

    Blocks of 8 go through the native kernels, blocks of 4 through torch.
    """
    torch.manual_seed(seed)
    num_heads, num_kv_heads = heads
    lengths = [start + new for start, new in seqs]
    needed = [-(-length // block_size) for length in lengths]
    free = torch.randperm(sum(needed) + 3).tolist()
    blocks = [[free.pop() for _ in range(count)] for count in needed]
    k_cache, v_cache = (torch.zeros(sum(needed) + 3, num_kv_heads, block_size, 16) for _ in range(2))
    context = [tuple(torch.randn(length, num_kv_heads, 16) for _ in range(2)) for length in lengths]
    past = [(0, start, own) for (start, _), own in zip(seqs, blocks, strict=True) if start]
    for layout, part in ((past, 0), ([(s, n, own) for (s, n), own in zip(seqs, blocks, strict=True)], 1)):
        batch = AttentionBatch.build(layout, block_size)
        rows = [
            tuple(t[:start] if part == 0 else t[start:] for t in kv)
            for (start, _), kv in zip(seqs, context, strict=True)
        ]
        for cache, parts in ((k_cache, [k for k, _ in rows]), (v_cache, [v for _, v in rows])):
            OPS.write_rows(torch.cat(parts), cache, batch.slot_mapping)
    q = torch.randn(batch.num_tokens, num_heads, 16)
    out = OPS.paged_attention(batch.attention(q, k_cache, v_cache, 0.25, window))
    row = 0
    for (start, new), (k, v) in zip(seqs, context, strict=True):
        for position in range(start, start + new):
            expected = _twin(q[row], k[: position + 1], v[: position + 1], window)
            torch.testing.assert_close(out[row].double(), expected, rtol=1e-5, atol=1e-5)
            row += 1


@pytest.mark.parametrize(
    "scaling", [None, RopeScaling("linear", 4.0), RopeScaling("llama3", 8.0, 1.0, 4.0, 256)], ids=str
)
def test_rope_against_transformers(scaling: RopeScaling | None) -> None:
    parameters = {"rope_type": "default", "rope_theta": 10000.0}
    if scaling is not None:
        parameters = {"rope_type": scaling.kind, "rope_theta": 10000.0, "factor": scaling.factor}
    if scaling is not None and scaling.kind == "llama3":
        parameters |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 256}
    config = LlamaConfig(
        hidden_size=128, num_attention_heads=2, max_position_embeddings=4096, rope_parameters=parameters
    )
    q, k = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0)), torch.ones(1, 5, 64)
    positions = torch.tensor([0, 1, 77, 1500, 4095])
    hf_cos, hf_sin = LlamaRotaryEmbedding(config)(q, positions[None])
    hf_q, _ = apply_rotary_pos_emb(q[None], k[None], hf_cos, hf_sin)
    inv_freq = inverse_frequencies(RopeSpec(10000.0, 64, scaling=scaling))
    cos, sin = cos_sin(inv_freq, positions)
    torch.testing.assert_close(rotate(q.transpose(0, 1), cos, sin, False).transpose(0, 1), hf_q[0])


def test_interleaved_rope_is_half_split_rope_on_reordered_dimensions() -> None:
    x = torch.randn(3, 2, 16, generator=torch.Generator().manual_seed(1))
    cos, sin = cos_sin(inverse_frequencies(RopeSpec(100.0, 16)), torch.tensor([3, 5, 9]))
    order = torch.arange(16).view(2, 8).T.flatten()  # half-split dimension of each interleaved one
    half_split = rotate(x, cos, sin, interleaved=False)
    torch.testing.assert_close(rotate(x[..., order], cos, sin, interleaved=True), half_split[..., order])


def test_a_table_has_the_angles_of_any_position() -> None:
    spec = RopeSpec(100.0, 16, scaling=RopeScaling("linear", 2.0, attention_factor=1.5))
    table = AngleTable(inverse_frequencies(spec), 1.5)
    for positions in ([0], [5, 2047, 3], [2048], [7000, 1, 1], [MOST_POSITIONS - 1], [MOST_POSITIONS, 0]):
        got = table.of(torch.tensor(positions), max(positions) + 1)
        torch.testing.assert_close(got, cos_sin(inverse_frequencies(spec), torch.tensor(positions), 1.5))


def test_partial_rope_leaves_the_other_dimensions() -> None:
    x = torch.randn(2, 1, 16, generator=torch.Generator().manual_seed(2))
    cos, sin = cos_sin(inverse_frequencies(RopeSpec(100.0, 8)), torch.tensor([4, 6]))
    out = rotate(x, cos, sin, interleaved=False)
    torch.testing.assert_close(out[..., 8:], x[..., 8:], rtol=0, atol=0)
    torch.testing.assert_close(out[..., :8], rotate(x[..., :8], cos, sin, interleaved=False))
    assert not torch.allclose(out[..., :8], x[..., :8])


@pytest.mark.parametrize("interleaved", [False, True])
def test_the_native_rope_and_write_equal_torch(interleaved: bool) -> None:
    generator = torch.Generator().manual_seed(4)
    batch = AttentionBatch.build([(3, 2, [1]), (0, 3, [0])], 8)
    tables = cos_sin(inverse_frequencies(RopeSpec(100.0, 8)), batch.positions)
    q, k, v = (torch.randn(5, heads, 16, generator=generator) for heads in (4, 2, 2))
    caches = [torch.zeros(2, 2, 8, 16) for _ in range(4)]
    expected = rotate(q, *tables, interleaved)
    for rows, cache in zip((rotate(k, *tables, interleaved), v), caches, strict=False):
        OPS.write_rows(rows, cache, batch.slot_mapping)
    got = OPS.rope_write_kv(q, KvWrite(k, v, *caches[2:], batch.slot_mapping), Rotation(*tables, interleaved))
    torch.testing.assert_close(got, expected)
    for native, twin in zip(caches[2:], caches[:2], strict=True):
        torch.testing.assert_close(native, twin)

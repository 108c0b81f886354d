"""What must hold for each tiny preset, whatever its family: empty batches, bfloat16, 8-bit shards."""

from __future__ import annotations

import pytest
import torch

from afd.kv.cache import KVCache
from afd.model.batch import AttentionBatch, NewTokens
from afd.model.halves import AttentionHalf, FFNHalf
from afd.model.loading import load_attention_half, load_ffn_half, resolve_model
from afd.model.presets import PRESETS
from afd.model.reference import forward
from afd.model.sharding import ShardSpec
from afd.ops.cpu.packed import QUADS
from afd.ops.select import select
from afd.types import FfnParallel
from tests.fakes.native_ops import native_ops

TINY = [preset for preset in PRESETS if preset.endswith("-tiny")]


@torch.inference_mode()
def _logits(attention: AttentionHalf, ffns: list[FFNHalf], seqs: list[NewTokens]) -> torch.Tensor:
    cache = KVCache(attention.spec, 4, 16, attention.dtype)
    tokens = torch.arange(sum(count for _, count, _ in seqs)) * 7 % attention.spec.vocab_size
    return attention.logits(forward(attention, ffns, tokens, AttentionBatch.build(seqs, 16), cache))


@pytest.mark.parametrize("preset", TINY)
def test_a_batch_without_tokens_is_ordinary(preset: str) -> None:
    folder = resolve_model(f"dummy:{preset}")
    attention = load_attention_half(folder, select("cpu", "bfloat16"), weights="int8-all")
    for parallel in FfnParallel:
        ffns = [
            load_ffn_half(folder, ShardSpec(rank, 3, parallel), select("cpu", "bfloat16"), weights="int8")
            for rank in range(3)
        ]
        assert _logits(attention, ffns, []).shape == (0, folder.spec.vocab_size)


@pytest.mark.parametrize("preset", TINY)
def test_bfloat16_stays_close_to_float32(preset: str) -> None:
    """Two sequences of different lengths in one batch. The median: a router may choose another expert near a tie."""
    folder = resolve_model(f"dummy:{preset}")
    seqs: list[NewTokens] = [(0, 30, [3, 1]), (0, 4, [0])]
    whole = {
        dtype: _logits(
            load_attention_half(folder, select("cpu", dtype)),
            [load_ffn_half(folder, ShardSpec(), select("cpu", dtype))],
            seqs,
        )
        for dtype in ("float32", "bfloat16")
    }
    errors = (whole["bfloat16"] - whole["float32"]).norm(dim=1) / whole["float32"].norm(dim=1)
    assert errors.median() < 0.06


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("preset", TINY)
def test_int8_stays_close_to_float32(preset: str, dtype: str) -> None:
    """With all that can be int8 in int8: torch's path in float32, the native kernels (where they run) in bfloat16."""
    folder = resolve_model(f"dummy:{preset}")
    seqs: list[NewTokens] = [(0, 30, [3, 1]), (0, 4, [0])]
    exact = _logits(
        load_attention_half(folder, select("cpu", "float32")),
        [load_ffn_half(folder, ShardSpec(), select("cpu", "float32"))],
        seqs,
    )
    halves = [load_ffn_half(folder, ShardSpec(rank, 2), select("cpu", dtype), weights="int8-all") for rank in range(2)]
    rounded = _logits(load_attention_half(folder, select("cpu", dtype), weights="int8-all"), halves, seqs)
    errors = (rounded - exact).norm(dim=1) / exact.norm(dim=1)
    native = native_ops()
    rounds_x_to_8_bits = dtype == "bfloat16" and native is not None and native.kernels.int8_order == QUADS
    assert 1e-4 < errors.median() < (0.12 if rounds_x_to_8_bits else 0.08)


@pytest.mark.parametrize("preset", TINY)
def test_a_sequence_does_not_see_its_neighbours(preset: str) -> None:
    """Alone and in company, float32: the same logits up to the order of sums."""
    folder = resolve_model(f"dummy:{preset}")
    attention, ffn = (
        load_attention_half(folder, select("cpu", "float32")),
        load_ffn_half(folder, ShardSpec(), select("cpu", "float32")),
    )
    alone = _logits(attention, [ffn], [(0, 20, [2, 0])])
    together = _logits(attention, [ffn], [(0, 20, [2, 0]), (0, 9, [1])])
    torch.testing.assert_close(together[:20], alone, rtol=1e-4, atol=1e-4)

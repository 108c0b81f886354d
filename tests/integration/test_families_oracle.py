"""Every family against transformers: logits of whole prompts, and greedy tokens through prefill chunks and decode."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from afd.kv.cache import KVCache
from afd.model.batch import AttentionBatch
from afd.model.halves import AttentionHalf, FFNHalf
from afd.model.loading import load_attention_half, load_ffn_half, resolve_model
from afd.model.reference import forward, reference_generate
from afd.model.sharding import ShardSpec
from afd.ops.select import select
from afd.types import FfnParallel, SamplingParams
from tests.oracles.families import MODELS, VOCAB, Logits, save_model

FAMILIES = [*MODELS, "step3p5"]
PROMPT_TOKENS = 45
NUM_GREEDY = 12


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Logits]]:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp(request.param)
    yield folder, save_model(request.param, folder)


def _logits(attention: AttentionHalf, ffns: list[FFNHalf], ids: torch.Tensor) -> torch.Tensor:
    cache = KVCache(attention.spec, 8, 8, torch.float32)
    batch = AttentionBatch.build([(0, len(ids), [3, 1, 7, 0, 2, 5, 4, 6])], 8)
    return attention.logits(forward(attention, ffns, ids, batch, cache))


def _relative_l2(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).norm() / want.norm())


@torch.inference_mode()
def test_logits_equal_the_oracle(model: tuple[Path, Logits]) -> None:
    folder, oracle = model
    found = resolve_model(str(folder))
    attention, ffn = (
        load_attention_half(found, select("cpu", "float32")),
        load_ffn_half(found, ShardSpec(), select("cpu", "float32")),
    )
    ids = torch.randint(VOCAB, (PROMPT_TOKENS,), generator=torch.Generator().manual_seed(5))
    want = oracle(ids[None])[0]
    assert _relative_l2(_logits(attention, [ffn], ids), want) < 1e-5
    for parallel in FfnParallel:
        ffns = [load_ffn_half(found, ShardSpec(rank, 3, parallel), select("cpu", "float32")) for rank in range(3)]
        assert _relative_l2(_logits(attention, ffns, ids), want) < 1e-5, parallel


@torch.inference_mode()
def test_greedy_tokens_equal_the_oracle(model: tuple[Path, Logits]) -> None:
    """Through prefill in chunks and one-token decode, across a sliding window and several blocks."""
    folder, oracle = model
    found = resolve_model(str(folder))
    attention, ffn = (
        load_attention_half(found, select("cpu", "float32")),
        load_ffn_half(found, ShardSpec(), select("cpu", "float32")),
    )
    ids = torch.randint(VOCAB, (19,), generator=torch.Generator().manual_seed(6)).tolist()
    params = SamplingParams(max_tokens=NUM_GREEDY, seed=0, temperature=0.0)
    got = reference_generate(attention, [ffn], ids, params, chunk=7)
    assert min(got.top2_gaps) > 1e-3, "a tie decides nothing"
    for token in got.token_ids:
        assert int(oracle(torch.tensor([ids]))[0, -1].argmax()) == token
        ids.append(token)

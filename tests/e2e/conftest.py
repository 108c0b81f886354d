"""References that the end-to-end tests compare with, computed once a session in this process."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch

from afd.kv.cache import KVCache
from afd.model.batch import AttentionBatch
from afd.model.loading import load_attention_half, load_ffn_half, resolve_model
from afd.model.reference import BLOCK_SIZE, ReferenceOutput, compare, forward
from afd.model.sharding import ShardSpec
from afd.ops.select import select
from afd.types import FfnParallel

STEP3_TINY = str(Path(__file__).parent.parent / "fixtures" / "step3-tiny")
SMOLLM2 = "smollm2-135m-instruct"


class Reference:
    """Greedy float32 output of the in-process reference for any of the test models; counts excused differences."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        self.num_compared = 0
        self.num_excused = 0

    @cache  # noqa: B019 - one instance a session
    def halves(self, model: str):
        folder = resolve_model(model)
        whole = ShardSpec(0, 1, FfnParallel.HYBRID)
        return load_attention_half(folder, select("cpu", "float32")), load_ffn_half(
            folder, whole, select("cpu", "float32")
        )

    @cache  # noqa: B019 - one instance a session
    def along(self, model: str, prompt: tuple[int, ...], output: tuple[int, ...]) -> ReferenceOutput:
        """What it would say after the prompt and each part of the output: one pass instead of one for every token."""
        attention, ffn = self.halves(model)
        tokens = [*prompt, *output[:-1]]
        num_blocks = -(-len(tokens) // BLOCK_SIZE)
        cache = KVCache(attention.spec, num_blocks, BLOCK_SIZE, attention.dtype)
        batch = AttentionBatch.build([(0, len(tokens), range(num_blocks))], BLOCK_SIZE)
        with torch.inference_mode():
            x = forward(attention, [ffn], torch.tensor(tokens), batch, cache)
            top = attention.logits(x[len(prompt) - 1 :]).float().topk(2)
        gaps = (top.values[:, 0] - top.values[:, 1]).tolist()
        return ReferenceOutput(top.indices[:, 0].tolist(), [None] * len(output), gaps)

    def check(self, model: str, prompt, got: list[int], max_tokens: int) -> None:
        """The equality rule."""
        assert len(got) == max_tokens
        verdict = compare(self.along(model, tuple(prompt), tuple(got)), got)
        assert verdict.ok, f"prompt of {len(prompt)} tokens differs: {verdict}"
        self.num_compared += 1
        self.num_excused += verdict.excused


@pytest.fixture(scope="session")
def reference():
    oracle = Reference()
    yield oracle
    print(f"\nequality rule: {oracle.num_compared} outputs compared, {oracle.num_excused} differences excused")

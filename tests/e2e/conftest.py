"""References that the end-to-end tests compare with, computed once a session in this process."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch

from afd.model.loading import load_attention_half, load_ffn_half, resolve_model
from afd.model.reference import ReferenceOutput, compare, reference_generate
from afd.model.sharding import ShardSpec
from afd.types import FfnParallel, SamplingParams

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
        return load_attention_half(folder, "float32"), load_ffn_half(folder, whole, "float32")

    @cache  # noqa: B019 - one instance a session
    def generate(self, model: str, prompt: tuple[int, ...], max_tokens: int) -> ReferenceOutput:
        attention, ffn = self.halves(model)
        params = SamplingParams(max_tokens=max_tokens, seed=0, temperature=0.0)
        return reference_generate(attention, [ffn], prompt, params)

    def check(self, model: str, prompt, got: list[int], max_tokens: int) -> None:
        """The equality rule."""
        verdict = compare(self.generate(model, tuple(prompt), max_tokens), got)
        assert verdict.ok, f"prompt of {len(prompt)} tokens differs: {verdict}"
        self.num_compared += 1
        self.num_excused += verdict.excused


@pytest.fixture(scope="session")
def reference():
    oracle = Reference()
    yield oracle
    print(f"\nequality rule: {oracle.num_compared} outputs compared, {oracle.num_excused} differences excused")

"""References that the end-to-end tests compare with, computed once a session in this process."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch

from afd.model.loading import load_attention_half, load_ffn_half, resolve_model
from afd.model.reference import TOP2_TOLERANCE, shortfalls
from afd.model.sharding import ShardSpec
from afd.ops.select import select
from afd.types import FfnParallel

STEP3_TINY = str(Path(__file__).parent.parent / "fixtures" / "step3-tiny")
SMOLLM2 = "smollm2-135m-instruct"


class Reference:
    """Greedy float32 output of the in-process reference for any of the test models; counts what rounding excuses."""

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
    def shortfalls(self, model: str, prompt: tuple[int, ...], output: tuple[int, ...]) -> list[float]:
        """How far each token of the output lies below the largest logit after what is before it."""
        attention, ffn = self.halves(model)
        return shortfalls(attention, [ffn], prompt, output)

    def check(self, model: str, prompt, got: list[int], max_tokens: int) -> None:
        """The equality rule, for every token after those before it."""
        assert len(got) == max_tokens
        found = self.shortfalls(model, tuple(prompt), tuple(got))
        wrong = [(idx, shortfall) for idx, shortfall in enumerate(found) if shortfall > TOP2_TOLERANCE]
        assert not wrong, (
            f"prompt of {len(prompt)} tokens: {len(wrong)} wrong ones, first (position, logit) {wrong[:3]}"
        )
        self.num_compared += 1
        self.num_excused += any(found)


@pytest.fixture(scope="session")
def reference():
    oracle = Reference()
    yield oracle
    print(f"\nequality rule: {oracle.num_compared} outputs compared, {oracle.num_excused} of them excused by rounding")

"""What experts did: counts, sampled output sizes, imbalance, silence."""

from __future__ import annotations

import pytest
import torch

from afd.model.expert_load import SAMPLE_EVERY, ExpertLoad
from afd.model.ffn import Dispatch, MoeFfn
from afd.ops.select import select

HIDDEN, WIDTH = 16, 12


def test_a_layer_counts_what_its_experts_do() -> None:
    torch.manual_seed(2)
    gate_up, down = torch.randn(3, 2 * WIDTH, HIDDEN), torch.randn(3, HIDDEN, WIDTH)
    down[1] *= 1e-6
    ops = select("cpu", "float32")
    layer = MoeFfn(ops, [ops.swiglu(*pair) for pair in zip(gate_up, down, strict=True)], first_expert=4, shared=None)
    ids = torch.tensor([[4, 5], [4, 9], [5, 0]], dtype=torch.int32)  # 9 and 0 live elsewhere
    rows = torch.randn(3, HIDDEN)
    dispatch = Dispatch(0, rows, ids, torch.full((3, 2), 0.25))
    for _ in range(SAMPLE_EVERY):
        layer(dispatch)
    load = layer.load
    assert load.num_tokens == [2 * SAMPLE_EVERY, 2 * SAMPLE_EVERY, 0]
    assert load.num_sampled == [2, 2, 0], "the first of so many batches is measured"
    first, _, third = load.output_rms()
    assert first == pytest.approx(float(layer._experts[0](rows[:2]).square().mean().sqrt()), rel=1e-5)
    assert third is None
    assert load.silent() == [5]
    assert load.imbalance() == pytest.approx(1.5)


def test_nothing_is_claimed_without_a_comparison() -> None:
    load = ExpertLoad(0, [0, 0])
    assert load.imbalance() == 0.0 and load.silent() == []
    load.add([2, 0], [0.0, 0.0])
    assert load.silent() == [], "one expert alone has no layer to compare with"
    load.add([0, 2], [0.0, 2.0])
    assert load.silent() == [0]


def test_damaged_outputs_count_as_silent() -> None:
    load = ExpertLoad(0, [0, 0, 0])
    load.add([1, 1, 1], [1.0, float("nan"), 1.0])
    assert load.silent() == [1]

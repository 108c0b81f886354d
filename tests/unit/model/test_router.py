"""Expert choice against a loop over tokens, for every rule that a family uses."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from afd.model.router import Router
from afd.model.spec import RouterRule, RouterSpec
from afd.ops.select import select

HIDDEN, EXPERTS = 8, 12
OPS = select("cpu", "float32")


def _twin(spec: RouterSpec, top_k: int, logits: list[float], bias: list[float]) -> dict[int, float]:
    """Expert -> weight of one token."""
    if spec.rule is RouterRule.SIGMOID:
        scores = [1 / (1 + math.exp(-x)) for x in logits]
    else:
        total = sum(math.exp(x) for x in logits)
        scores = [math.exp(x) / total for x in logits]
    biased = [s + b for s, b in zip(scores, bias, strict=True)]
    size = len(logits) // spec.num_groups
    groups = [range(g * size, (g + 1) * size) for g in range(spec.num_groups)]
    groups.sort(key=lambda members: -sum(sorted((biased[e] for e in members), reverse=True)[:2]))
    allowed = [e for members in groups[: spec.top_groups] for e in members]
    chosen = sorted(allowed, key=lambda e: -biased[e])[:top_k]
    divisor = max(sum(scores[e] for e in chosen), spec.norm_min) if spec.renormalise else 1.0
    return {e: scores[e] / divisor * spec.scaling for e in chosen}


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    rule=st.sampled_from(RouterRule),
    groups=st.sampled_from([(1, 1), (3, 2), (4, 2), (6, 3)]),
    top_k=st.integers(1, 4),
    selection_bias=st.booleans(),
    renormalise=st.booleans(),
    scaling=st.sampled_from([1.0, 2.5]),
    num_tokens=st.integers(0, 5),
    seed=st.integers(0, 999),
)
def test_against_one_token_at_a_time(
    rule: RouterRule, groups: tuple[int, int], top_k: int, selection_bias: bool, renormalise: bool, scaling: float,
    num_tokens: int, seed: int,
) -> None:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(EXPERTS, HIDDEN, generator=generator)
    bias = torch.randn(EXPERTS, generator=generator) * 0.3
    spec = RouterSpec(rule, "float32", selection_bias, *groups, renormalise=renormalise, scaling=scaling)
    rows = torch.randn(num_tokens, HIDDEN, generator=generator)
    ids, weights = Router(OPS, spec, top_k, weight, bias if selection_bias else None)(rows)
    assert ids.shape == weights.shape == (num_tokens, top_k)
    assert ids.dtype is torch.int32 and weights.dtype is torch.float32
    for row, own_ids, own_weights in zip(rows, ids.tolist(), weights.tolist(), strict=True):
        logits = (weight @ row).tolist()
        expected = _twin(spec, top_k, logits, bias.tolist() if selection_bias else [0.0] * EXPERTS)
        got = dict(zip(own_ids, own_weights, strict=True))
        assert got == pytest.approx(expected, rel=1e-4)


def test_the_bias_chooses_and_does_not_weigh() -> None:
    weight = torch.zeros(3, 2)
    bias = torch.tensor([0.0, 5.0, -5.0])
    ids, weights = Router(OPS, RouterSpec(RouterRule.SIGMOID, selection_bias=True), 1, weight, bias)(torch.ones(1, 2))
    assert ids.tolist() == [[1]] and weights.tolist() == [[0.5]]


def test_bfloat16_rows_meet_a_float32_router_in_float32() -> None:
    weight = torch.randn(EXPERTS, HIDDEN)
    rows = torch.randn(4, HIDDEN).bfloat16()
    ids, weights = Router(OPS, RouterSpec(dtype="float32"), 2, weight)(rows)
    expected = torch.softmax(rows.float() @ weight.T, 1).topk(2, 1)
    assert torch.equal(ids.long(), expected.indices)
    torch.testing.assert_close(weights, expected.values)

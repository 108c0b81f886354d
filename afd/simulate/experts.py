"""Crowded experts: how many rows the busiest FFN holder gets when some experts are asked for more than others. Pure."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import pairwise

from afd.plan.models import ModelShape


def expert_imbalance(model: ModelShape, num_holders: int, skew: float, seed: int) -> float:
    """Rows of the busiest holder of experts over those of the holder with most experts if all were alike, at least 1:
    the mean over the layers, each of which waits for its busiest.

    The i-th popular expert of a layer is asked for as often as i to the power of -skew. Which one that is differs by
    layer, and experts are cut into `num_holders` equal runs without regard to it.
    """
    rng = random.Random(f"{seed}/experts")
    total = num_layers = 0.0
    for group in model.ffn:
        if not group.experts:
            continue
        chances = chosen(popularity(group.experts, skew), group.top_k)
        for _ in range(round(group.layers)):
            rng.shuffle(chances)
            held = runs(chances, min(num_holders, group.experts))
            fullest = max(len(run) for run in held)
            total += max(sum(run) for run in held) / (group.top_k * fullest / group.experts)
            num_layers += 1
    return max(1.0, total / num_layers) if num_layers else 1.0


def popularity(num_experts: int, skew: float) -> list[float]:
    """Shares of the experts, the most popular first."""
    weights = [(idx + 1) ** -skew for idx in range(num_experts)]
    return [weight / sum(weights) for weight in weights]


def chosen(shares: Sequence[float], top_k: int) -> list[float]:
    """The chance that a token goes to each expert, `top_k` in all: in proportion to its share, and at most 1."""
    chances = [0.0] * len(shares)
    left, open_idx = float(top_k), list(range(len(shares)))
    while left > 0.0 and open_idx:
        scale = left / sum(shares[idx] for idx in open_idx)
        certain = [idx for idx in open_idx if shares[idx] * scale >= 1.0]
        for idx in certain or open_idx:
            chances[idx] = 1.0 if certain else shares[idx] * scale
        left -= len(certain) if certain else left
        open_idx = [idx for idx in open_idx if idx not in certain] if certain else []
    return chances


def runs(values: Sequence[float], num_runs: int) -> list[Sequence[float]]:
    """The values cut into runs whose lengths differ by one at most, as experts are placed."""
    bounds = [len(values) * idx // num_runs for idx in range(num_runs + 1)]
    return [values[low:high] for low, high in pairwise(bounds)]

"""Larger operations made of an `Ops`' smaller ones, for machines without code of their own for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from afd.ops.device import to_device
from afd.ops.ops import Ops, Routing, SwiGlu, Weight


@dataclass(frozen=True, slots=True)
class ComposedSwiGlu:
    """`ops.SwiGlu` as two GEMMs and the activation."""

    ops: Ops
    gate_up: Weight
    down: Weight
    limit: float

    def __call__(self, rows: Tensor) -> Tensor:
        """rows [n, hidden] -> [n, hidden], in the same dtype."""
        return self.ops.linear(self.ops.silu_mul(self.ops.linear(rows, self.gate_up), self.limit), self.down)


@dataclass(frozen=True, slots=True)
class ComposedExperts:
    """`ops.Experts`, one expert after another. The routing may lie in host memory while rows are a GPU's."""

    experts: Sequence[SwiGlu]
    first_expert: int

    def add_to(
        self, out: Tensor, rows: Tensor, routing: Routing, measured: bool
    ) -> tuple[Sequence[int], Sequence[float] | None]:
        """Sort the (token, expert) pairs by expert, then run each expert that has tokens, in id order."""
        num_local = len(self.experts)
        squares = [0.0] * num_local if measured else None
        local = (routing.ids - self.first_expert).flatten().long()
        pairs = ((local >= 0) & (local < num_local)).nonzero()[:, 0]
        order = pairs[torch.argsort(local[pairs], stable=True)]
        counts: list[int] = torch.bincount(local[order], minlength=num_local).tolist()
        if not len(order):
            return counts, squares
        tokens = to_device(order // routing.ids.shape[1], rows.device)
        weights = to_device(routing.weights.flatten()[order][:, None], rows.device)
        stop = 0
        for e, count in enumerate(counts):
            if not count:
                continue
            start, stop = stop, stop + count
            mine = tokens[start:stop]
            answers = self.experts[e](rows[mine])
            if squares is not None:
                squares[e] = float(answers.float().square().mean(dim=1).sum())
            out.index_add_(0, mine, answers.float() * weights[start:stop])
        return counts, squares

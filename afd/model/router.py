"""Expert choice: top-k ids and weights per token. Runs on the attention side; the result travels with the rows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from afd.model.spec import RouterRule, RouterSpec


class Router:
    """weight [num_experts, hidden], in the dtype in which the spec wants the logits; bias [num_experts] float32."""

    def __init__(self, spec: RouterSpec, top_k: int, weight: Tensor, bias: Tensor | None = None):
        self._spec = spec
        self._top_k = top_k
        self._weight = weight
        self._bias = bias

    def __call__(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """rows [n, hidden] -> (expert_ids [n, k] int32, expert_weights [n, k] float32), best expert first."""
        spec = self._spec
        logits = F.linear(rows.to(self._weight.dtype), self._weight).float()
        scores = torch.sigmoid(logits) if spec.rule is RouterRule.SIGMOID else torch.softmax(logits, dim=-1)
        choice = scores if self._bias is None else scores + self._bias
        if spec.num_groups > 1:
            choice = _within_top_groups(choice, spec.num_groups, spec.top_groups)
        ids = torch.topk(choice, self._top_k, dim=-1).indices
        weights = scores.gather(1, ids)
        if spec.renormalise:
            weights = weights / weights.sum(dim=-1, keepdim=True).clamp(min=spec.norm_min)
        if spec.scaling != 1.0:
            weights = weights * spec.scaling
        return ids.to(torch.int32), weights


def _within_top_groups(choice: Tensor, num_groups: int, top_groups: int) -> Tensor:
    """choice [n, num_experts] with -inf outside each row's best groups (DeepSeek-V3 report, section 2.1.2)."""
    grouped = choice.view(choice.shape[0], num_groups, choice.shape[1] // num_groups)
    best = grouped.topk(2, dim=-1).values.sum(dim=-1).topk(top_groups, dim=-1).indices
    outside = torch.ones(grouped.shape[:2], dtype=torch.bool, device=choice.device).scatter_(1, best, False)
    return grouped.masked_fill(outside[:, :, None], -torch.inf).view(choice.shape)

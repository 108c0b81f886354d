"""Expert choice: top-k ids and weights per token. Runs on the attention side; the result travels with the rows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from afd.model.spec import RouterSpec


class Router:
    """weight [num_experts, hidden], in the dtype in which the spec wants the logits."""

    def __init__(self, spec: RouterSpec, top_k: int, weight: Tensor):
        self._spec = spec
        self._top_k = top_k
        self._weight = weight

    def __call__(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """rows [n, hidden] -> (expert_ids [n, k] int32, expert_weights [n, k] float32), best expert first."""
        logits = F.linear(rows.to(self._weight.dtype), self._weight)
        scores = torch.softmax(logits.float(), dim=-1)
        weights, ids = torch.topk(scores, self._top_k, dim=-1)
        if self._spec.renormalise:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        if self._spec.scaling != 1.0:
            weights = weights * self._spec.scaling
        return ids.to(torch.int32), weights

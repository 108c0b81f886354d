"""Expert choice: top-k ids and weights per token. Runs on the attention side; the result travels with the rows."""

from __future__ import annotations

from torch import Tensor

from afd.model.spec import RouterRule, RouterSpec
from afd.ops.ops import Ops, Routing, RoutingRule


class Router:
    """weight [num_experts, hidden], in the dtype in which the spec wants the logits; bias [num_experts] float32."""

    def __init__(self, ops: Ops, spec: RouterSpec, top_k: int, weight: Tensor, bias: Tensor | None = None):
        self._ops = ops
        self._weight = weight
        self._bias = bias
        self._rule = RoutingRule(
            top_k=top_k,
            sigmoid=spec.rule is RouterRule.SIGMOID,
            num_groups=spec.num_groups,
            top_groups=spec.top_groups,
            renormalise=spec.renormalise,
            norm_min=spec.norm_min,
            scaling=spec.scaling,
        )

    def __call__(self, rows: Tensor) -> Routing:
        """rows [n, hidden] -> (expert ids [n, k] int32, their weights [n, k] float32), best expert first."""
        return self._ops.route(rows, self._weight, self._bias, self._rule)

"""How long a worker takes from its start until it serves: the process, and its weights."""

from __future__ import annotations

from dataclasses import dataclass

from afd.plan.deployment import Deployment
from afd.plan.efficiency import Efficiency
from afd.plan.memory import HEAD_BYTES, ffn_memory


@dataclass(frozen=True, slots=True)
class LoadTimes:
    """Seconds of a worker of each role."""

    attention_s: float = 0.0
    ffn_s: float = 0.0

    @classmethod
    def of(cls, deployment: Deployment, efficiency: Efficiency, gb_per_s: float, start_s: float) -> LoadTimes:
        """Every instance reads each weight that it holds once, at 1e9 x `gb_per_s` bytes/s, after `start_s`."""
        model = deployment.model
        attention = model.linear_weights * model.weights.linear + model.embedding_weights * HEAD_BYTES
        ffn = ffn_memory(deployment, efficiency).weight_bytes * deployment.ranks_per_instance
        return cls(start_s + attention / 1e9 / gb_per_s, start_s + ffn / 1e9 / gb_per_s)

    def of_role(self, role: str) -> float:
        return self.attention_s if role == "attention" else self.ffn_s

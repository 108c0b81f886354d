"""Does it fit: weights, KV cache and workspace per chip of each role."""

from __future__ import annotations

from dataclasses import dataclass

from afd.errors import ConfigError
from afd.plan.deployment import Deployment
from afd.plan.efficiency import Efficiency
from afd.plan.hardware import Chip

HEAD_BYTES = 2
"""Embedding and LM head stay 16-bit; both are sliced over the ranks of an attention instance."""


@dataclass(frozen=True, slots=True)
class MemoryUse:
    """Bytes of one chip. free_bytes: what is left of the usable share; negative = does not fit."""

    capacity_bytes: float
    weight_bytes: float
    kv_bytes: float
    workspace_bytes: float
    free_bytes: float


def attention_memory(deployment: Deployment, efficiency: Efficiency, context: int, num_requests: int) -> MemoryUse:
    """`num_requests` resident requests of `context` tokens on one attention chip."""
    model = deployment.model
    head = model.embedding_weights * HEAD_BYTES / deployment.ranks_per_instance
    weights = model.linear_weights * model.weights.linear + head
    if model.draft is not None and deployment.drafts.count:
        held = min(model.draft.count, deployment.drafts.count)
        weights += held * model.draft.dense_weights(model.hidden) * model.weights.linear
        weights += held * model.draft.own_head * model.head_weights * HEAD_BYTES / deployment.ranks_per_instance
    kv_bytes = num_requests * model.kv_resident_bytes(context, deployment.kv_dtype.bytes_per_element)
    return _use(deployment.attention_chip, efficiency, weights, kv_bytes)


def ffn_memory(deployment: Deployment, efficiency: Efficiency, load: float = 1.0) -> MemoryUse:
    """One FFN chip of the instance that holds most experts, of those with such a load."""
    model, weights = deployment.model, 0.0
    for group in model.ffn:
        fixed = load * group.fixed_weights(model.hidden) / deployment.ffn_ranks
        weights += group.layers * fixed * model.weights.shared
        held = deployment.fullest_share(group.experts, load) * group.experts / deployment.ranks_per_instance
        weights += group.layers * held * group.expert_weights(model.hidden) * model.weights.routed
    return _use(deployment.ffn_chip, efficiency, weights, 0.0)


def max_requests(deployment: Deployment, efficiency: Efficiency, context: int) -> int:
    """Requests of `context` tokens that one attention chip holds, the mean over kinds; 0 when a role does not fit."""
    if any(ffn_memory(view, efficiency, load).free_bytes < 0 for view, load in deployment.ffn_views()):
        return 0
    least = 1 << 20
    for view, load in deployment.attention_views():
        free = attention_memory(view, efficiency, context, 0).free_bytes
        one = load * attention_memory(view, efficiency, context, 1).kv_bytes
        least = min(least, max(0, int(free // one))) if one else least
    return least


def require_weights_fit(deployment: Deployment, efficiency: Efficiency) -> None:
    """ConfigError naming the role whose weights do not fit its chips."""
    uses = [
        ("attention", attention_memory(v, efficiency, 1, 0), v.attention_chip) for v, _ in deployment.attention_views()
    ]
    uses += [("ffn", ffn_memory(v, efficiency, load), v.ffn_chip) for v, load in deployment.ffn_views()]
    for role, use, chip in uses:
        if use.free_bytes < 0:
            room = use.free_bytes + use.weight_bytes
            raise ConfigError(
                f"{deployment.topology}: {deployment.model.name} needs {use.weight_bytes / 1e9:.1f} GB of {role} "
                f"weights per {chip.title}, which leaves {room / 1e9:.1f} GB for them"
            )


def _use(chip: Chip, efficiency: Efficiency, weights: float, kv_bytes: float) -> MemoryUse:
    workspace = min(efficiency.workspace_bytes, 0.1 * chip.memory_bytes)
    free = chip.memory_bytes * efficiency.memory - weights - kv_bytes - workspace
    return MemoryUse(chip.memory_bytes, weights, kv_bytes, workspace, free)

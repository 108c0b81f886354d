"""The alternative to AFD: every chip does attention for its own requests and holds a share of the experts (EP).

With two micro-batches a chip, one's expert all-to-all hides behind the other's compute (DeepSeek's decode deployment);
with one, nothing overlaps but the weights are read once a layer instead of twice. The baseline takes the better.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from afd.plan.deployment import Deployment
from afd.plan.efficiency import Efficiency
from afd.plan.estimate import MAX_BATCH, Objective
from afd.plan.memory import HEAD_BYTES
from afd.plan.stages import attention_time, collective_times, dispatch_row_bytes, gemm_time, head_time
from afd.types import Topology

MICRO_BATCHES = (1, 2)
"""Micro-batches per chip that are tried."""


@dataclass(frozen=True, slots=True)
class Colocated:
    """Best colocated deployment of one size. requests_per_chip: decoding at once on one chip."""

    chip: str
    num_chips: int
    micro_batches: int
    requests_per_chip: int
    tpot_s: float
    compute_s: float
    transfer_s: float
    usd_per_mtok: float | None

    @property
    def tgs(self) -> float:
        return self.requests_per_chip / self.tpot_s


@dataclass(frozen=True, slots=True)
class ColocatedModel:
    """Colocated times of the model and attention chip of `template`; its topology and streams are ignored."""

    template: Deployment
    efficiency: Efficiency

    def _servers(self, num_chips: int) -> Deployment:
        return self.template.replace(topology=Topology(max(1, num_chips // self.template.ranks_per_instance), 1))

    def times(self, num_chips: int, context: int, num_tokens: int) -> tuple[float, float]:
        """Compute and all-to-all of one micro-batch of `num_tokens` tokens per chip in one layer, seconds.

        Routed experts are spread over all chips (at least one each), the shared expert is whole on every chip, dense
        FFN layers are sliced over a server, whose collectives show as much as an FFN instance's. Rows to experts of the
        same server cross its interconnect, the others the NIC, at the same time.
        """
        deployment, model, efficiency = self._servers(num_chips), self.template.model, self.efficiency
        chip, ranks, layers = deployment.attention_chip, deployment.ranks_per_instance, model.num_layers
        hidden = model.hidden
        weights = flops = 0.0
        for group in model.ffn:
            fixed = group.fixed_weights(hidden)
            if group.experts:
                hit = group.experts_hit(num_tokens * num_chips) / min(num_chips, group.experts)
                weights += group.layers * (fixed + hit * group.expert_weights(hidden))
            else:
                weights += group.layers * fixed / ranks
            flops += group.layers * 2 * group.active_weights(hidden) * num_tokens
        dense_share = sum(group.layers for group in model.ffn if not group.experts) / layers
        collective_s = dense_share * sum(collective_times(deployment, efficiency, num_tokens * ranks))
        ffn_s = gemm_time(chip, efficiency, weights, flops, deployment.weight_bytes) / layers + efficiency.launch_s
        ffn_s += efficiency.collective_exposed * collective_s
        compute_s = attention_time(deployment, efficiency, context, num_tokens) + ffn_s
        routed = sum(group.layers * group.top_k for group in model.ffn) / layers
        row_bytes = routed * num_tokens * (dispatch_row_bytes(deployment) + 2 * hidden)
        remote_s = row_bytes * (num_chips - ranks) / num_chips / (chip.network_bytes_per_s * efficiency.network)
        link = chip.interconnect_bytes_per_s * efficiency.interconnect
        return compute_s, max(remote_s, row_bytes * (ranks - 1) / num_chips / link)

    def tpot(self, num_chips: int, context: int, num_tokens: int, micro_batches: int) -> float:
        """Seconds per step of `micro_batches` micro-batches of `num_tokens` tokens on each of `num_chips` chips."""
        compute_s, transfer_s = self.times(num_chips, context, num_tokens)
        busy_s = compute_s + transfer_s if micro_batches == 1 else micro_batches * max(compute_s, transfer_s)
        head_s = micro_batches * head_time(self._servers(num_chips), self.efficiency, num_tokens)
        layers_s = self.template.model.num_layers * busy_s * self.efficiency.colocated_stretch
        return (layers_s + head_s) * (1.0 + self.efficiency.jitter)

    def capacity(self, num_chips: int, context: int) -> int:
        """Requests of `context` tokens one chip holds beside its weights."""
        template, model = self.template, self.template.model
        chip, ranks = template.attention_chip, template.ranks_per_instance
        weights = model.linear_weights * template.weight_bytes + model.embedding_weights * HEAD_BYTES / ranks
        for group in model.ffn:
            fixed = group.layers * group.fixed_weights(model.hidden) * template.weight_bytes
            weights += fixed if group.experts else fixed / ranks
            held = -(-group.experts // num_chips)
            weights += group.layers * held * group.expert_weights(model.hidden) * template.weight_bytes
        free = chip.memory_bytes * self.efficiency.memory - weights - self.efficiency.workspace_bytes
        kv_bytes = model.kv_resident_bytes(context, template.kv_dtype.bytes_per_element)
        return max(0, int(free // kv_bytes)) if kv_bytes else MAX_BATCH

    def best(self, objective: Objective, sizes: Sequence[int]) -> Colocated | None:
        """The size with the most tokens per chip under the SLA, each at its largest batch; None when none holds it."""
        found = [self._at_size(objective, size, micro_batches) for size in sizes for micro_batches in MICRO_BATCHES]
        return max((c for c in found if c is not None), key=lambda c: c.tgs, default=None)

    def _at_size(self, objective: Objective, num_chips: int, micro_batches: int) -> Colocated | None:
        context, low = objective.context, 0
        high = min(MAX_BATCH, self.capacity(num_chips, context) // micro_batches)
        while low < high:  # TPOT rises with the batch: bisect for the largest that holds the SLA
            middle = (low + high + 1) // 2
            if self.tpot(num_chips, context, middle, micro_batches) <= objective.sla_tpot_s:
                low = middle
            else:
                high = middle - 1
        if not low:
            return None
        tpot_s = self.tpot(num_chips, context, low, micro_batches)
        compute_s, transfer_s = self.times(num_chips, context, low)
        requests, price = micro_batches * low, self.template.attention_chip.usd_per_hour
        return Colocated(
            chip=self.template.attention_chip.name,
            num_chips=num_chips,
            micro_batches=micro_batches,
            requests_per_chip=requests,
            tpot_s=tpot_s,
            compute_s=compute_s,
            transfer_s=transfer_s,
            usd_per_mtok=None if price is None else price / 3600 * tpot_s / requests * 1e6,
        )


def server_sizes(ranks_per_instance: int, max_chips: int) -> list[int]:
    """Whole servers up to `max_chips` chips."""
    return list(range(ranks_per_instance, max_chips + 1, ranks_per_instance))

"""The other alternative to AFD: every layer sliced over the chips of a server (TP), servers in a pipeline (PP).

Heads, FFN widths and the vocabulary are divided. A cache of fewer KV heads than chips is held several times: one
latent (MLA) or one KV head (MFA) by every chip. Two all-reduces a layer hide behind nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from afd.plan.colocated import Colocated, beside, hops_time, layout_name
from afd.plan.deployment import Deployment
from afd.plan.efficiency import Efficiency
from afd.plan.estimate import MAX_BATCH, Objective
from afd.plan.memory import HEAD_BYTES
from afd.plan.request_rate import RequestShape
from afd.plan.stages import GemmWork, Prefill, chunks_time, draft_time, head_time
from afd.sched.largest import largest


@dataclass(frozen=True, slots=True)
class TensorParallelModel:
    """Times of the model on the attention chip of `template`, over the chips of one instance and `stages` of them."""

    template: Deployment
    efficiency: Efficiency
    stages: int = 1
    requests: RequestShape | None = None

    @property
    def _ranks(self) -> int:
        return self.template.ranks_per_instance

    def tpot(self, context: int, num_tokens: int) -> float:
        """Seconds per step of a micro-batch of `num_tokens` tokens; as many micro-batches as stages are in flight."""
        template, efficiency = self.template, self.efficiency
        drafts, prefill = template.drafts, self._prefill(num_tokens)
        rows = num_tokens * drafts.rows / self._ranks
        layers_s = self._layers_s(context, num_tokens) * efficiency.colocated_stretch
        layers_s *= template.pipeline_layers / template.model.num_layers
        head_s = head_time(template, efficiency, rows)
        head_s += draft_time(template, efficiency, context, num_tokens / self._ranks)
        prompts = 0.0 if prefill is None else prefill.num_tokens / self._ranks
        hops_s = hops_time(template, efficiency, self.stages, rows + prompts)
        return (layers_s + head_s + hops_s) * (1.0 + efficiency.jitter) / drafts.emitted

    def _layers_s(self, context: int, num_tokens: int) -> float:
        template, efficiency, ranks = self.template, self.efficiency, self._ranks
        model, chip = template.model, template.attention_chip
        core_s, work, rows = 0.0, GemmWork(chip), float(num_tokens * template.drafts.rows)
        prefill = self._prefill(num_tokens)
        for attention in model.attention:
            width = template.kv_dtype.bytes_per_element or attention.kv_bytes
            moved = num_tokens * attention.moved_bytes(context, width) / min(ranks, attention.kv_shards)
            moved_s = moved / chip.memory_bytes_per_s / efficiency.core_bandwidth(width)
            flops = rows * attention.core_flops(context) / ranks
            core_s += max(moved_s, flops / chip.flops_at(min(width, 2.0)) / efficiency.core_flops)
            if prefill is not None:
                shards = min(ranks, attention.kv_shards)
                core_s += chunks_time(chip, efficiency, attention, prefill, width, ranks, shards)
        rows += 0.0 if prefill is None else prefill.num_tokens
        work.add(model.weights.linear, model.linear_weights / ranks, rows)
        for group in model.ffn:
            work.add(model.weights.shared, group.layers * group.fixed_weights(model.hidden) / ranks, rows)
            if group.experts:
                weights = group.layers * group.expert_weights(model.hidden) / ranks
                hit = group.experts_hit(rows)
                work.add_experts(model.weights.routed, weights, hit, rows * group.top_k)
        link = chip.interconnect_bytes_per_s * efficiency.interconnect
        reduce_s = 2 * (ranks - 1) / ranks * rows * 2 * model.hidden / link
        return core_s + work.seconds(efficiency) + model.num_layers * 2 * (reduce_s + efficiency.launch_s)

    def _prefill(self, num_tokens: float) -> Prefill | None:
        if self.requests is None:
            return None
        return self.requests.prefill_beside(num_tokens * self.template.drafts.emitted, 1)

    def capacity(self, context: int) -> int:
        """Requests of `context` tokens in one micro-batch; each stage holds its layers of all of them."""
        template, ranks = self.template, self._ranks
        model, chip = template.model, template.attention_chip
        weights = model.linear_weights * model.weights.linear
        for group in model.ffn:
            weights += group.layers * group.fixed_weights(model.hidden) * model.weights.shared
            weights += group.layers * group.experts * group.expert_weights(model.hidden) * model.weights.routed
        weights = weights / self.stages / ranks + model.embedding_weights * HEAD_BYTES / ranks
        free = chip.memory_bytes * self.efficiency.memory - weights - self.efficiency.workspace_bytes
        width = template.kv_dtype.bytes_per_element
        one = sum(g.resident_bytes(context, width) / min(ranks, g.kv_shards) for g in model.attention)
        return max(0, int(free // one)) if one else MAX_BATCH

    def best(self, objective: Objective) -> Colocated | None:
        """The largest batch under the SLA; None when not even one request holds it or fits."""
        context = objective.context
        most = min(MAX_BATCH, max(0, self.capacity(context) - (self.requests is not None)))  # and a prompt
        batch = largest(most, lambda num_tokens: self.tpot(context, num_tokens) <= objective.sla_tpot_s)
        if not batch:
            return None
        return Colocated(
            layout=layout_name(f"TP{self._ranks}", self.stages),
            chip=self.template.attention_chip,
            num_chips=self._ranks * self.stages,
            micro_batches=self.stages,
            batch=batch * self.stages,
            tpot_s=self.tpot(context, batch),
            **beside(
                self.template,
                self.requests,
                self._prefill(batch),
                self.stages,
                self.tpot(context, batch),
            ),
        )

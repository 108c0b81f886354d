"""The alternative to AFD: every chip does attention for its own requests and holds a share of the experts (EP).

With two micro-batches a chip, one's expert all-to-all hides behind the other's compute (DeepSeek's decode deployment);
with one, nothing overlaps but the weights are read once a layer instead of twice. The baseline takes the better.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from afd.plan.deployment import Deployment
from afd.plan.efficiency import Efficiency
from afd.plan.estimate import MAX_BATCH, Objective
from afd.plan.hardware import Chip
from afd.plan.memory import HEAD_BYTES
from afd.plan.request_rate import RequestShape
from afd.plan.stages import (
    GemmWork,
    Prefill,
    attention_time,
    collective_times,
    dispatch_row_bytes,
    draft_time,
    head_time,
)
from afd.sched.largest import largest
from afd.types import Topology

MICRO_BATCHES = (1, 2)
"""Micro-batches per chip that are tried."""

MAX_STAGES = 8
"""Pipeline stages (PP) that are tried, in powers of two."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Colocated:
    """One colocated deployment at its best batch.

    layout: "EP40", "TP8 x PP2", ...
    micro_batches: per chip.
    batch: requests decoding at once, over all chips.
    lanes, prompt_s: prompts that are computed at once beside the decodes, and how long one takes; 0 = elsewhere.
    """

    layout: str
    chip: Chip
    num_chips: int
    micro_batches: int
    batch: int
    tpot_s: float
    step_s: float = 0.0
    lanes: float = 0.0
    prompt_s: float = 0.0

    @property
    def chips(self) -> dict[str, int]:
        return {self.chip.name: self.num_chips}

    @property
    def usd_per_hour(self) -> float | None:
        return None if self.chip.usd_per_hour is None else self.num_chips * self.chip.usd_per_hour

    @property
    def requests_per_chip(self) -> float:
        return self.batch / self.num_chips

    @property
    def tgs(self) -> float:
        """Output tokens per chip and second."""
        return self.requests_per_chip / self.tpot_s

    @property
    def usd_per_mtok(self) -> float | None:
        price = self.chip.usd_per_hour
        return None if price is None else price / 3600 / self.tgs * 1e6


@dataclass(frozen=True, slots=True)
class ColocatedModel:
    """Colocated EP of the model and attention chip of `template`; its topology and streams are ignored.

    stages: pipeline stages, each of the given number of chips. They divide the weights, and leave a step as long as it
    is: while one stage computes its layers of a micro-batch, the others compute theirs of others.
    requests: whose prompts are computed in the same steps, each by one chip; None = elsewhere.
    """

    template: Deployment
    efficiency: Efficiency
    stages: int = 1
    requests: RequestShape | None = None

    def _servers(self, num_chips: int) -> Deployment:
        return self.template.replace(topology=Topology(max(1, num_chips // self.template.ranks_per_instance), 1))

    def times(self, num_chips: int, context: int, num_tokens: int) -> tuple[float, float]:
        """Compute and all-to-all of one micro-batch of `num_tokens` tokens per chip in one layer, seconds."""
        prefill = self._prefill(num_tokens)
        num_rows = num_tokens * self.template.drafts.rows + (0.0 if prefill is None else prefill.num_tokens)
        attention_s = attention_time(self._servers(num_chips), self.efficiency, context, num_tokens, prefill)
        ffn_s, transfer_s = self.ffn_times(num_chips, num_rows)
        return attention_s + ffn_s, transfer_s

    def ffn_times(self, num_chips: int, num_rows: float) -> tuple[float, float]:
        """FFN and all-to-all of `num_rows` rows per chip in one layer, seconds.

        Routed experts are spread over all chips (at least one each), the shared expert is whole on every chip, dense
        FFN layers are sliced over a server, whose collectives show as much as an FFN instance's. Rows to experts of the
        same server cross its interconnect, the others the NIC, at the same time. The fullest chip counts.
        """
        deployment, model, efficiency = self._servers(num_chips), self.template.model, self.efficiency
        chip, ranks, layers = deployment.attention_chip, deployment.ranks_per_instance, model.num_layers
        hidden, work = model.hidden, GemmWork(deployment.attention_chip)
        for group in model.ffn:
            fixed = group.layers * group.fixed_weights(hidden)
            if not group.experts:
                work.add(model.weights.shared, fixed / ranks, num_rows * ranks)
                continue
            work.add(model.weights.shared, fixed, num_rows)
            share = _held(group.experts, num_chips) / group.experts
            crowd = max(1.0, share * num_chips if num_chips <= group.experts else 1.0)  # beyond, experts have replicas
            rows = num_rows * group.top_k * crowd * efficiency.expert_imbalance
            weights = group.layers * group.expert_weights(hidden)
            work.add_experts(model.weights.routed, weights, share * group.experts_hit(num_rows * num_chips), rows)
        dense_share = sum(group.layers for group in model.ffn if not group.experts) / layers
        collective_s = dense_share * sum(collective_times(deployment, efficiency, num_rows * ranks))
        ffn_s = work.seconds(efficiency) / layers + efficiency.launch_s
        ffn_s += efficiency.collective_exposed * collective_s
        routed = sum(group.layers * group.top_k for group in model.ffn) / layers
        row_bytes = routed * num_rows * (dispatch_row_bytes(deployment) + 2 * hidden)
        remote_s = row_bytes * (num_chips - ranks) / num_chips / (chip.network_bytes_per_s * efficiency.network)
        link = chip.interconnect_bytes_per_s * efficiency.interconnect
        if num_chips <= chip.chips_per_domain:
            return ffn_s, row_bytes * (num_chips - 1) / num_chips / link
        return ffn_s, max(remote_s, row_bytes * (ranks - 1) / num_chips / link)

    def _prefill(self, num_tokens: float) -> Prefill | None:
        if self.requests is None:
            return None
        return self.requests.prefill_beside(num_tokens * self.template.drafts.emitted, 1)

    def tpot(self, num_chips: int, context: int, num_tokens: int, micro_batches: int) -> float:
        """Seconds per step of `micro_batches` micro-batches of `num_tokens` tokens on each of `num_chips` chips."""
        compute_s, transfer_s = self.times(num_chips, context, num_tokens)
        busy_s = compute_s + transfer_s if micro_batches == 1 else micro_batches * max(compute_s, transfer_s)
        drafts, servers = self.template.drafts, self._servers(num_chips)
        head_s = head_time(servers, self.efficiency, num_tokens * drafts.rows)
        head_s = micro_batches * (head_s + draft_time(servers, self.efficiency, context, num_tokens))
        layers_s = self.template.pipeline_layers * busy_s * self.efficiency.colocated_stretch
        prefill = self._prefill(num_tokens)
        rows = num_tokens * drafts.rows + (0.0 if prefill is None else prefill.num_tokens)
        hops_s = hops_time(self.template, self.efficiency, self.stages, micro_batches * rows)
        return (layers_s + head_s + hops_s) * (1.0 + self.efficiency.jitter) / drafts.emitted

    def capacity(self, num_chips: int, context: int) -> int:
        """Requests of `context` tokens one chip holds beside its weights."""
        template, model = self.template, self.template.model
        chip, ranks = template.attention_chip, template.ranks_per_instance
        weights = model.linear_weights * model.weights.linear
        for group in model.ffn:
            fixed = group.layers * group.fixed_weights(model.hidden) * model.weights.shared
            weights += fixed if group.experts else fixed / ranks
            held = _held(group.experts, num_chips)
            weights += group.layers * held * group.expert_weights(model.hidden) * model.weights.routed
        weights = weights / self.stages + model.embedding_weights * HEAD_BYTES / ranks
        free = chip.memory_bytes * self.efficiency.memory - weights - self.efficiency.workspace_bytes
        kv_bytes = model.kv_resident_bytes(context, template.kv_dtype.bytes_per_element)
        return max(0, int(free // kv_bytes)) if kv_bytes else MAX_BATCH

    def best(self, objective: Objective, sizes: Sequence[int]) -> Colocated | None:
        """The size with the most tokens per chip under the SLA, each at its largest batch; None when none holds it."""
        found = [self._at_size(objective, size, micro_batches) for size in sizes for micro_batches in MICRO_BATCHES]
        return max((c for c in found if c is not None), key=lambda c: c.tgs, default=None)

    def _at_size(self, objective: Objective, num_chips: int, micro_batches: int) -> Colocated | None:
        context = objective.context

        def tpot(batch: int) -> float:
            return self.tpot(num_chips, context, batch, micro_batches)

        held = self.capacity(num_chips, context) // micro_batches - (self.requests is not None)  # and a prompt
        most = min(MAX_BATCH, max(0, held))
        batch = largest(most, lambda num_tokens: tpot(num_tokens) <= objective.sla_tpot_s)
        if not batch:
            return None
        return Colocated(
            layout=layout_name(f"EP{num_chips}", self.stages),
            chip=self.template.attention_chip,
            num_chips=num_chips * self.stages,
            micro_batches=micro_batches,
            batch=micro_batches * batch * num_chips * self.stages,
            tpot_s=tpot(batch),
            **beside(
                self.template,
                self.requests,
                self._prefill(batch),
                micro_batches * num_chips * self.stages,
                tpot(batch),
            ),
        )


def beside(
    template: Deployment, requests: RequestShape | None, prefill: Prefill | None, places: int, tpot_s: float
) -> dict[str, float]:
    """What a `Colocated` says of its prompts. prefill: in one of its `places`, the micro-batches of all chips."""
    step_s = tpot_s * template.drafts.emitted
    if requests is None or prefill is None:
        return {"step_s": step_s}
    at_once = prefill.num_tokens / requests.prompt
    return {
        "step_s": step_s,
        "lanes": places * max(1.0, at_once),
        "prompt_s": step_s * max(1.0, 1.0 / at_once),
    }


def layout_name(inner: str, stages: int) -> str:
    """ "EP16", or "EP16 x PP2" with pipeline stages."""
    return inner if stages == 1 else f"{inner} x PP{stages}"


def stage_counts(num_chips: int, max_chips: int) -> Iterator[int]:
    """Numbers of pipeline stages of `num_chips` chips each within `max_chips`."""
    stages = 1
    while stages <= MAX_STAGES and stages * num_chips <= max_chips:
        yield stages
        stages *= 2


def hops_time(template: Deployment, efficiency: Efficiency, stages: int, num_tokens: float) -> float:
    """Seconds in which 16-bit rows go from stage to stage and from the last to the first, once a step."""
    if stages == 1:
        return 0.0
    link = template.attention_chip.network_bytes_per_s * efficiency.network
    return stages * (efficiency.wire_s + num_tokens * 2 * template.model.hidden / link)


def server_sizes(ranks_per_instance: int, max_chips: int) -> list[int]:
    """Whole servers up to `max_chips` chips."""
    return list(range(ranks_per_instance, max_chips + 1, ranks_per_instance))


def _held(experts: int, num_chips: int) -> int:
    return -(-experts // num_chips)

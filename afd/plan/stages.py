"""Stage times of one micro-batch in one layer, from rooflines and efficiency factors.

Times are averages over the layers ("a stage summed over all layers", report section 5): layers of different cost are
smoothed by the micro-batches in flight. `num_tokens` is always the micro-batch of one attention rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from afd.plan.attention import AttentionGroup
from afd.plan.deployment import Deployment
from afd.plan.efficiency import Efficiency
from afd.plan.hardware import Chip

SCALE_GROUP = 128
"""fp8 rows carry one float32 scale per 128 elements."""

EXPERT_META_BYTES = 8
"""Per selected expert: an int32 id and a float32 weight."""


@dataclass(frozen=True, slots=True)
class StageTimes:
    """Seconds per layer and micro-batch; head_s per micro-batch and step (LM head and sampling)."""

    attention_s: float
    ffn_s: float
    to_ffn_s: float
    to_attention_s: float
    head_s: float

    @property
    def transfer_s(self) -> float:
        """Both directions."""
        return self.to_ffn_s + self.to_attention_s


@dataclass(frozen=True, slots=True)
class Prefill:
    """Prefill rows of a micro-batch, beside its decodes. Numbers are means: any above 0.

    A decode reads the whole cache of its sequence for one row. A chunk of a prompt reads it once for all its rows, and
    computes with it for each of them.

    num_tokens: rows.
    context: tokens that one of them attends to.
    num_chunks: prompts that they are pieces of.
    span: cached tokens that a chunk attends to, its own included.
    """

    num_tokens: float
    context: float
    num_chunks: float
    span: float

    @classmethod
    def of_prompts(cls, num_tokens: float, prompt: float, chunk: float) -> Prefill:
        """The mean over all chunks of prompts of `prompt` tokens each, computed `chunk` at a time."""
        chunk = min(max(1.0, chunk), prompt)
        return cls(num_tokens, (prompt + 1) / 2, num_tokens / chunk, (prompt + chunk) / 2)

    def split(self, parts: int) -> Prefill:
        """One of `parts` equal shares."""
        return self.scaled(1 / parts)

    def scaled(self, factor: float) -> Prefill:
        """So many times as much of the same."""
        return Prefill(self.num_tokens * factor, self.context, self.num_chunks * factor, self.span)


class StageModel(Protocol):
    """The source of stage times: rooflines, or a calibration on top of them."""

    @property
    def jitter(self) -> float:
        """Share by which the mean TPOT exceeds the sum of the stages."""
        ...

    def times(
        self, deployment: Deployment, context: int, num_tokens: float, prefill: Prefill | None = None
    ) -> StageTimes:
        """Stage times of `num_tokens` decodes a rank with `context` cached tokens each, and of `prefill` beside them.

        Numbers are means, also over the kinds of ranks; the rows of both together are more than none.
        """
        ...


@dataclass(frozen=True, slots=True)
class RooflineStages:
    """StageModel from data sheets: each part takes its bytes or its FLOPs, whichever is slower, over a factor."""

    efficiency: Efficiency

    @property
    def jitter(self) -> float:
        return self.efficiency.jitter

    def times(
        self, deployment: Deployment, context: int, num_tokens: float, prefill: Prefill | None = None
    ) -> StageTimes:
        rows = num_tokens * deployment.drafts.rows + (0.0 if prefill is None else prefill.num_tokens)
        to_ffn_s, to_attention_s = transfer_times(deployment, self.efficiency, rows)
        attention_s = ffn_s = head_s = 0.0
        for view, load in deployment.attention_views():
            tokens, prompts = num_tokens * load, None if prefill is None else prefill.scaled(load)
            attention_s = max(attention_s, attention_time(view, self.efficiency, context, tokens, prompts))
            one_s = head_time(view, self.efficiency, tokens * deployment.drafts.rows)
            head_s = max(head_s, one_s + draft_time(view, self.efficiency, context, tokens))
        for view, load in deployment.ffn_views():
            ffn_s = max(ffn_s, ffn_time(view, self.efficiency, rows, load))
        return StageTimes(attention_s, ffn_s, to_ffn_s, to_attention_s, head_s)


def gemm_time(
    chip: Chip, efficiency: Efficiency, num_weights: float, flops: float, bytes_per_weight: float = 1.0
) -> float:
    """Seconds to stream the weights or to compute `flops`, whichever is longer (`Chip.flops_at`)."""
    read_s = num_weights * bytes_per_weight / chip.memory_bytes_per_s
    return max(read_s, flops / chip.flops_at(bytes_per_weight)) / efficiency.gemm


def core_time(
    chip: Chip,
    efficiency: Efficiency,
    group: AttentionGroup,
    context: int,
    num_tokens: float,
    kv_bytes: float | None,
    rows: int = 1,
) -> float:
    """Attention core of decodes, all layers of a group, one chip. A 16-bit cache computes at the 16-bit peak.

    rows: of one request, which read its cache together (drafts).
    """
    decodes = Prefill(num_tokens * rows, context, num_tokens, context)  # each a chunk
    return chunks_time(chip, efficiency, group, decodes, kv_bytes)


def chunks_time(
    chip: Chip,
    efficiency: Efficiency,
    group: AttentionGroup,
    prefill: Prefill,
    kv_bytes: float | None,
    ranks: int = 1,
    shards: int = 1,
) -> float:
    """Attention core of prefill chunks, all layers of a group: bytes of each chunk, FLOPs of each row.

    ranks: chips that share the heads.  shards: over which the cache is spread.
    """
    width = group.kv_bytes if kv_bytes is None else kv_bytes
    peak = chip.peak_flops if width <= 1 else chip.bf16_flops
    moved = prefill.num_chunks * group.moved_bytes(prefill.span, width)
    moved_s = moved / chip.memory_bytes_per_s / efficiency.core_bandwidth(width)
    flops = prefill.num_tokens * group.core_flops(prefill.context)
    return max(moved_s / shards, flops / ranks / peak / efficiency.core_flops)


def attention_time(
    deployment: Deployment, efficiency: Efficiency, context: int, num_tokens: float, prefill: Prefill | None = None
) -> float:
    """Core, projections, and the sum of the FFN instances' partial rows into the residual stream."""
    model, chip = deployment.model, deployment.attention_chip
    kv_bytes = deployment.kv_dtype.bytes_per_element
    each = deployment.drafts.rows
    core_s = sum(core_time(chip, efficiency, group, context, num_tokens, kv_bytes, each) for group in model.attention)
    num_tokens *= each
    if prefill is not None:
        core_s += sum(chunks_time(chip, efficiency, group, prefill, kv_bytes) for group in model.attention)
        num_tokens += prefill.num_tokens
    linear_s = gemm_time(chip, efficiency, model.linear_weights, num_tokens * model.linear_flops, model.weights.linear)
    rows = deployment.topology.num_ffn + 2  # partials read, residual read and written
    combine_s = num_tokens * 2 * model.hidden * rows / chip.memory_bytes_per_s / efficiency.core_16bit
    return (core_s + linear_s) / model.num_layers + combine_s + efficiency.launch_s


def ffn_time(deployment: Deployment, efficiency: Efficiency, num_tokens: float, load: float = 1.0) -> float:
    """A rank of the fullest FFN instance, plus what shows of the all-gather before and reduce-scatter after.

    num_tokens: rows of one attention rank.  load: the instance's share of experts and slices over the mean.

    Experts are whole in an instance and sliced over its ranks; what every token uses is sliced over all of them. Both
    collectives run over the server's interconnect beside other micro-batches' GEMMs; an instance can still not be
    faster than its busier direction.
    """
    model, chip, ranks = deployment.model, deployment.ffn_chip, deployment.ranks_per_instance
    batch = num_tokens * deployment.attention_ranks
    work = GemmWork(chip)
    for group in model.ffn:
        fixed, expert = group.fixed_weights(model.hidden), group.expert_weights(model.hidden)
        work.add(model.weights.shared, load * group.layers * fixed / deployment.ffn_ranks, batch)
        if group.experts:
            share = deployment.fullest_share(group.experts, load)
            rows = min(1.0, share * efficiency.expert_imbalance) * batch * group.top_k
            work.add_experts(
                model.weights.routed, group.layers * expert / ranks, share * group.experts_hit(batch), rows
            )
    gather_s, scatter_s = collective_times(deployment, efficiency, batch)
    busy_s = work.seconds(efficiency) / model.num_layers + efficiency.launch_s
    return max(busy_s + efficiency.collective_exposed * (gather_s + scatter_s), gather_s, scatter_s)


@dataclass(slots=True)
class GemmWork:
    """GEMMs that one chip runs one after the other: weights read, and what computing takes at the peaks."""

    chip: Chip
    num_bytes: float = 0.0
    computing_s: float = 0.0

    def add(self, width: float, num_weights: float, num_rows: float) -> None:
        """`num_rows` rows through weights of `width` bytes."""
        self.add_experts(width, num_weights, 1.0, num_rows)

    def add_experts(self, width: float, num_weights: float, num_hit: float, num_rows: float) -> None:
        """`num_hit` of several experts of `num_weights` each are read; `num_rows` go through one of them."""
        self.num_bytes += num_hit * num_weights * width
        self.computing_s += 2 * num_rows * num_weights / self.chip.flops_at(width)

    def seconds(self, efficiency: Efficiency) -> float:
        return max(self.num_bytes / self.chip.memory_bytes_per_s, self.computing_s) / efficiency.gemm


def collective_times(deployment: Deployment, efficiency: Efficiency, num_rows: float) -> tuple[float, float]:
    """All-gather of 8-bit rows and reduce-scatter of 16-bit rows inside an FFN instance."""
    ranks = deployment.ranks_per_instance
    row_bytes = num_rows * deployment.model.hidden * (ranks - 1) / ranks
    gather_s = row_bytes / (deployment.ffn_chip.interconnect_bytes_per_s * efficiency.interconnect)
    return gather_s, 2 * gather_s


def dispatch_row_bytes(deployment: Deployment) -> float:
    """One row to the FFN: 8-bit values, group scales, expert ids and weights."""
    hidden, top_k = deployment.model.hidden, deployment.model.max_top_k
    return hidden + 4 * -(-hidden // SCALE_GROUP) + EXPERT_META_BYTES * top_k


def transfer_times(deployment: Deployment, efficiency: Efficiency, num_tokens: float) -> tuple[float, float]:
    """Seconds to the FFN and back, set by the end of a pair that moves more; a link's directions do not compete."""
    topology = deployment.topology
    share = deployment.sent_share()
    per_row = 0.0
    for view, load in deployment.attention_views():
        link = _link_bytes_per_s(deployment, view.attention_chip, efficiency)
        per_row = max(per_row, load * topology.num_ffn / link)
    for view, _ in deployment.ffn_views():
        per_row = max(per_row, topology.num_attention / _link_bytes_per_s(deployment, view.ffn_chip, efficiency))
    seconds_per_byte = num_tokens * share * per_row
    return (
        efficiency.wire_s + seconds_per_byte * dispatch_row_bytes(deployment),
        efficiency.wire_s + seconds_per_byte * 2 * deployment.model.hidden,
    )


def _link_bytes_per_s(deployment: Deployment, chip: Chip, efficiency: Efficiency) -> float:
    if deployment.one_domain:
        return chip.interconnect_bytes_per_s * efficiency.interconnect
    return chip.network_bytes_per_s * efficiency.network


def head_time(deployment: Deployment, efficiency: Efficiency, num_tokens: float) -> float:
    """LM head, 16-bit, its vocabulary sliced over the ranks of an attention instance."""
    chip, weights = deployment.attention_chip, deployment.model.head_weights
    read_s = 2 * weights / deployment.ranks_per_instance / chip.memory_bytes_per_s
    return max(read_s, 2 * weights * num_tokens / chip.bf16_flops) / efficiency.gemm


def draft_time(deployment: Deployment, efficiency: Efficiency, context: int, num_tokens: float) -> float:
    """Drafting for `num_tokens` requests of one attention chip, once a step: one layer and one head after the other.

    A layer whose FFN is a mixture computes that on the FFN chips, as a layer of the pipeline (`pipeline_layers`). All
    rows of the last step run through it, one of them through its head.
    """
    draft, count = deployment.model.draft, deployment.drafts.count
    if draft is None or not count:
        return 0.0
    model, chip, rows = deployment.model, deployment.attention_chip, num_tokens * deployment.drafts.rows
    weights = draft.dense_weights(model.hidden)
    layer_s = gemm_time(chip, efficiency, weights, 2 * rows * weights, model.weights.linear) + efficiency.launch_s
    kv_bytes = deployment.kv_dtype.bytes_per_element
    layer_s += core_time(chip, efficiency, draft.attention, context, num_tokens, kv_bytes, deployment.drafts.rows)
    return count * (layer_s + head_time(deployment, efficiency, num_tokens))

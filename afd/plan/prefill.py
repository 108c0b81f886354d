"""Prefill on chips of its own (PD): how long a unit of a pool takes for a pass over several prompts.

A unit is expert parallel over whole servers, in two micro-batches that hide each other's transfers. Prompts are spread
over its chips, and their mean row sees half of its prompt. A row crosses the network once for each other server that
it goes to, and is copied there over the interconnect. MLA computes keys and values at full width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from afd.plan.colocated import ColocatedModel
from afd.plan.deployment import Deployment
from afd.plan.efficiency import Efficiency
from afd.plan.hardware import Chip
from afd.plan.stages import GemmWork, collective_times, dispatch_row_bytes, head_time

MAX_SERVERS = 8
"""Servers of a unit that are tried, in powers of two."""

MAX_ROWS = 1 << 14
"""Rows of a chip in one pass beyond which nothing is tried: one prompt, or this many."""


@dataclass(frozen=True)
class PrefillUnit:
    """`num_chips` chips, all of `template`'s attention chip, that compute `num_prompts` prompts in one pass."""

    template: Deployment
    efficiency: Efficiency
    num_chips: int
    num_prompts: int
    prompt: float

    @property
    def chip(self) -> Chip:
        return self.template.attention_chip

    @property
    def usd_per_hour(self) -> float | None:
        return None if self.chip.usd_per_hour is None else self.num_chips * self.chip.usd_per_hour

    @cached_property
    def pass_s(self) -> float:
        """Seconds of one pass."""
        rows = self.num_prompts * self.prompt / self.num_chips
        layers, efficiency = self.template.model.num_layers, self.efficiency
        layer_s = min(sum(self._layer(rows)), 2.0 * max(self._layer(rows / 2)))
        head_s = head_time(self.template, efficiency, self.num_prompts / self.num_chips)
        return (layers * layer_s * efficiency.colocated_stretch + head_s) * (1.0 + efficiency.jitter)

    @property
    def tokens_per_s(self) -> float:
        """Prompt tokens of one chip."""
        return self.num_prompts * self.prompt / self.pass_s / self.num_chips

    def fits(self) -> bool:
        """The unit holds its weights and the caches of one pass."""
        held = ColocatedModel(self.template, self.efficiency).capacity(self.num_chips, max(1, round(self.prompt)))
        return held * self.num_chips >= self.num_prompts

    def cache_s(self, receiver: Chip) -> float:
        """Seconds that one prompt's cache takes to the chip that decodes with it, at that chip's link."""
        num_bytes = self.template.model.kv_resident_bytes(round(self.prompt), self.template.kv_dtype.bytes_per_element)
        return num_bytes / (receiver.network_bytes_per_s * self.efficiency.network)

    def _layer(self, rows: float) -> tuple[float, float]:
        """Computing and moving `rows` rows a chip in one layer, the mean over the layers."""
        template, efficiency, chip = self.template, self.efficiency, self.chip
        model, ranks = template.model, template.ranks_per_instance
        work, core_s = GemmWork(chip), 0.0
        for attention in model.attention:
            width = template.kv_dtype.bytes_per_element or attention.kv_bytes
            core_s += (
                rows * attention.prefill_flops(self.prompt) / chip.flops_at(min(width, 2.0)) / efficiency.core_flops
            )
        work.add(model.weights.linear, model.linear_weights, rows)
        for group in model.ffn:
            fixed = group.layers * group.fixed_weights(model.hidden)
            if not group.experts:
                work.add(model.weights.shared, fixed / ranks, rows * ranks)
                continue
            work.add(model.weights.shared, fixed, rows)
            share = 1.0 / min(self.num_chips, group.experts)
            hit = share * group.experts_hit(rows * self.num_chips)
            weights = group.layers * group.expert_weights(model.hidden)
            work.add_experts(model.weights.routed, weights, hit, rows * group.top_k * efficiency.expert_imbalance)
        dense_share = sum(group.layers for group in model.ffn if not group.experts) / model.num_layers
        collective_s = dense_share * sum(collective_times(template, efficiency, rows * ranks))
        compute_s = (core_s + work.seconds(efficiency)) / model.num_layers + 2 * efficiency.launch_s
        compute_s += efficiency.collective_exposed * collective_s
        return compute_s, rows * self._moved_s_per_row()

    def _moved_s_per_row(self) -> float:
        """Seconds that one row and its results keep a chip's busier link, the mean over the layers."""
        template, efficiency, chip = self.template, self.efficiency, self.chip
        model, ranks = template.model, template.ranks_per_instance
        link = chip.interconnect_bytes_per_s * efficiency.interconnect
        nic, servers = chip.network_bytes_per_s * efficiency.network, max(1.0, self.num_chips / ranks)
        row_bytes, seconds = dispatch_row_bytes(template) + 2 * model.hidden, 0.0
        for group in model.ffn:
            copies = group.layers * group.top_k / model.num_layers
            if self.num_chips <= chip.chips_per_domain:
                seconds += row_bytes * copies * (self.num_chips - 1) / self.num_chips / link
                continue
            met = (servers - 1) * (1.0 - (1.0 - 1.0 / servers) ** group.top_k) * group.layers / model.num_layers
            seconds += row_bytes * max(met / nic, copies * (ranks - 1) / ranks / link)
        return seconds


def prefill_units(template: Deployment, efficiency: Efficiency, prompt: float, max_chips: int) -> Iterator[PrefillUnit]:
    """Units of 1, 2, 4 and 8 servers that hold the model, with passes of 1, 2, 4, ... prompts."""
    servers = 1
    while servers <= MAX_SERVERS and servers * template.ranks_per_instance <= max_chips:
        num_chips, num_prompts = servers * template.ranks_per_instance, 1
        while num_prompts == 1 or num_prompts * prompt <= MAX_ROWS * num_chips:
            unit = PrefillUnit(template, efficiency, num_chips, num_prompts, prompt)
            if not unit.fits():
                break
            yield unit
            num_prompts *= 2
        servers *= 2

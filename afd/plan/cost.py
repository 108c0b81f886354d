"""Theoretical cost of a decoded token (Step-3 report section 4, Tables 2, 3, 5, 6).

A floor, not a forecast: every chip at its peak, communication hidden, embedding and LM head left out (below 5 %).
Known bias of the method: projections of MLA and MFA may not be compute bound on fast chips, and the FFN of very
sparse models costs more than its FLOPs say.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from afd.plan.hardware import Chip
from afd.plan.models import ModelShape

MTOK = 1e6


@dataclass(frozen=True, slots=True)
class CostRow:
    """One model on one chip at one context; field names are the JSON keys of `afd plan cost --json`.

    USD per 1e6 decoded tokens; bytes and FLOPs per decoded token.
    """

    model: str
    chip: str
    context: int
    attention_usd_per_mtok: float
    ffn_usd_per_mtok: float
    total_usd_per_mtok: float
    kv_bytes: int
    attention_flops: float
    linear_flops: int
    ffn_flops: int


def attention_usd(model: ModelShape, chip: Chip, context: int) -> float:
    """USD per token: core at its roofline (bytes or FLOPs), projections compute bound."""
    core = max(model.attention_flops(context) * chip.usd_per_flop, model.kv_bytes(context) * chip.usd_per_byte)
    return core + model.linear_flops * chip.usd_per_flop_at(model.weights.linear)


def ffn_usd(model: ModelShape, chip: Chip) -> float:
    """USD per token, compute bound through batching."""
    shared = 2 * sum(group.layers * group.fixed_weights(model.hidden) for group in model.ffn)
    routed = model.ffn_flops - shared
    return shared * chip.usd_per_flop_at(model.weights.shared) + routed * chip.usd_per_flop_at(model.weights.routed)


def split_cost(model: ModelShape, attention: Chip, ffn: Chip, context: int) -> CostRow:
    """Attention on one chip, FFN on another; `chip` reads "h20" or "h20+h800"."""
    attention_cost, ffn_cost = attention_usd(model, attention, context) * MTOK, ffn_usd(model, ffn) * MTOK
    return CostRow(
        model=model.name,
        chip=attention.name if attention.name == ffn.name else f"{attention.name}+{ffn.name}",
        context=context,
        attention_usd_per_mtok=attention_cost,
        ffn_usd_per_mtok=ffn_cost,
        total_usd_per_mtok=attention_cost + ffn_cost,
        kv_bytes=round(model.kv_bytes(context)),
        attention_flops=model.attention_flops(context),
        linear_flops=model.linear_flops,
        ffn_flops=model.ffn_flops,
    )


def homogeneous_costs(models: Sequence[ModelShape], chips: Sequence[Chip], contexts: Sequence[int]) -> list[CostRow]:
    """Every model on every chip at every context, both parts on the same chip."""
    return [split_cost(m, c, c, context) for m in models for context in contexts for c in chips]


def cheapest_split(model: ModelShape, chips: Sequence[Chip], context: int) -> CostRow:
    """AFD with free choice of hardware: the cheapest chip for each part."""
    attention = min(chips, key=lambda chip: attention_usd(model, chip, context))
    ffn = min(chips, key=lambda chip: ffn_usd(model, chip))
    return split_cost(model, attention, ffn, context)


def arithmetic_intensity(model: ModelShape, context: int) -> float:
    """FLOPs of the attention core per KV byte moved; beside `Chip.ridge_flop_per_byte` it says what binds."""
    return model.attention_flops(context) / model.kv_bytes(context)

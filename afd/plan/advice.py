"""The whole answer to "which topology, and is AFD worth it": plans, the colocated alternative, break-even, TCP."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

from afd.plan.baselines import SideBySide, colocated_on, side_by_side
from afd.plan.colocated import Colocated
from afd.plan.deployment import Deployment, KvDtype, Part
from afd.plan.estimate import Estimate, Estimator, Objective
from afd.plan.memory import max_requests
from afd.plan.mixed import MixedSearch
from afd.plan.pipeline import analytic_ratio
from afd.plan.search import SearchSpace, rank, search
from afd.plan.tcp import TcpFallback, tcp_fallback
from afd.types import Topology

RANKS_TODAY = 1
"""Ranks of an instance that the workers can be started with so far."""

MAX_MISS_FFN = 64
"""FFN instances up to which the topology that misses the SLA by least is looked for."""

LEAST_SLOPE = 0.02
"""Share of the FFN's time that another attention instance must add to it for a ratio of both to mean anything."""

FIRST_CONTEXT, LAST_CONTEXT = 1024, 131072
"""The break-even is looked for at contexts doubling between these, as far as the model serves them."""


@dataclass(frozen=True, slots=True)
class ContextPoint:
    """Both designs at one context, colocated on the comparison's chip. tgs 0 = cannot hold the SLA; usd None = that, or
    a price is missing."""

    context: int
    topology: str | None
    afd_tgs: float
    afd_usd_per_mtok: float | None
    colocated_tgs: float
    colocated_usd_per_mtok: float | None

    @property
    def afd_ahead(self) -> bool:
        """Holds the SLA, and cheaper per token or as cheap (by chip-seconds where a price is missing)."""
        if not self.afd_tgs:
            return False
        if self.afd_usd_per_mtok is not None and self.colocated_usd_per_mtok is not None:
            return self.afd_usd_per_mtok <= self.colocated_usd_per_mtok
        return self.afd_tgs >= self.colocated_tgs


@dataclass(frozen=True, slots=True)
class Comparison:
    """AFD against the best colocated deployment of the same model under the same SLA.

    gain: AFD's tokens per USD (per chip and second without prices) over the colocated ones.
    batch_ratio, attention_share, step_ratio: its factors when both run on the same chip (FastAFD's identity); AFD pays
        when batch_ratio exceeds break_even_batch_ratio.
    break_even_context: smallest context of `curve` at which AFD is ahead; None = none.
    """

    colocated: Colocated
    gain: float
    batch_ratio: float
    attention_share: float
    step_ratio: float
    break_even_batch_ratio: float
    break_even_context: int | None
    curve: tuple[ContextPoint, ...]


@dataclass(frozen=True, slots=True)
class Advice:
    """What the planner recommends, and how it compares.

    plans: best first, empty when nothing holds the SLA, and then `reason` says how far off the closest is.
    today: what the software can start, best first: instances of one rank. Empty where nothing such holds the SLA.
    colocated: the cheapest per token of `baselines` (the fastest per chip without prices).
    baselines: without AFD on the same chips, by name.
    other_kv: the other width of the KV cache and AFD's gain with it; None where either side then misses the SLA.
    copies: of the best plan within the inventory; 0 without one.
    all_chips: the whole inventory without AFD.
    """

    plans: tuple[Estimate, ...]
    reason: str
    today: tuple[Estimate, ...]
    comparison: Comparison | None
    colocated: Colocated | None
    baselines: tuple[Colocated, ...]
    other_kv: tuple[KvDtype, float] | None
    copies: int
    all_chips: SideBySide | None
    analytic_ratio: float | None
    tcp: tuple[TcpFallback, ...]

    @property
    def inventory_gain(self) -> float | None:
        """Tokens per second of all chips of an inventory over theirs without AFD; None without either."""
        if not self.copies or self.all_chips is None:
            return None
        best = self.plans[0]
        return self.copies * best.deployment.num_chips * best.tgs / self.all_chips.tokens_per_s


def advise(space: SearchSpace, estimator: Estimator, objective: Objective) -> Advice:
    """Searches, and judges the winner. Pure."""
    plans = search(space, estimator, objective)
    mixed = [] if estimator.measured else MixedSearch(space, estimator, objective).plans(plans)
    plans = rank([*plans, *mixed], space) if mixed else plans
    baselines = [c for chip in space.chips for c in colocated_on(space, estimator, objective, chip)]
    baseline = _cheapest(baselines)
    best = plans[0] if plans else None
    return Advice(
        plans=tuple(plans),
        reason="" if best else _nearest_miss(space, estimator, objective),
        today=tuple(_today(space, estimator, objective, plans)),
        comparison=None if best is None or baseline is None else _compare(space, estimator, best, baseline),
        colocated=baseline,
        baselines=tuple(sorted(baselines, key=lambda c: -c.tgs)),
        other_kv=None if best is None or baseline is None else _with_other_kv(space, estimator, objective),
        copies=space.copies(best.deployment) if best and space.inventory else 0,
        all_chips=side_by_side(space, estimator, objective),
        analytic_ratio=None if best is None else closed_form_ratio(estimator, best),
        tcp=() if best is None else tuple(tcp_fallback(best, estimator)),
    )


def _today(
    space: SearchSpace, estimator: Estimator, objective: Objective, plans: Sequence[Estimate]
) -> Sequence[Estimate]:
    if plans and plans[0].deployment.ranks_per_instance == RANKS_TODAY:
        return [plan for plan in plans if not plan.deployment.mixed]
    return search(dataclasses.replace(space, ranks_per_instance=RANKS_TODAY), estimator, objective)


def _with_other_kv(space: SearchSpace, estimator: Estimator, objective: Objective) -> tuple[KvDtype, float] | None:
    """Which design is ahead may depend on the cache's width, so both are asked."""
    other = dataclasses.replace(space, kv_dtype=KvDtype.FP8 if space.kv_dtype is KvDtype.BF16 else KvDtype.BF16)
    plans = search(other, estimator, objective)
    baseline = _cheapest([c for chip in other.chips for c in colocated_on(other, estimator, objective, chip)])
    return (other.kv_dtype, _gain(plans[0], baseline)) if plans and baseline is not None else None


def _gain(plan: Estimate, baseline: Colocated) -> float:
    """Tokens per USD over the baseline's, or per chip and second without prices."""
    if plan.usd_per_mtok is not None and baseline.usd_per_mtok is not None:
        return baseline.usd_per_mtok / plan.usd_per_mtok
    return plan.tgs / baseline.tgs


def _cheapest(found: Sequence[Colocated]) -> Colocated | None:
    return min(found, key=lambda c: 1 / c.tgs if c.usd_per_mtok is None else c.usd_per_mtok, default=None)


def _compare(space: SearchSpace, estimator: Estimator, plan: Estimate, baseline: Colocated) -> Comparison:
    deployment = plan.deployment
    batch_ratio = plan.requests_per_chip / baseline.requests_per_chip
    attention_share = deployment.attention_ranks / deployment.num_chips
    step_ratio = baseline.tpot_s / plan.tpot_s
    curve = _curve(space, estimator, plan, baseline)
    return Comparison(
        colocated=baseline,
        gain=_gain(plan, baseline),
        batch_ratio=batch_ratio,
        attention_share=attention_share,
        step_ratio=step_ratio,
        break_even_batch_ratio=1.0 / (attention_share * step_ratio),
        break_even_context=next((point.context for point in curve if point.afd_ahead), None),
        curve=curve,
    )


def _curve(space: SearchSpace, estimator: Estimator, plan: Estimate, baseline: Colocated) -> tuple[ContextPoint, ...]:
    """Both designs over contexts: AFD on the winner's chips, colocated on the baseline's."""
    roles = (plan.deployment.attention_parts, plan.deployment.ffn_parts)
    attention, ffn = ([part.chip for part in parts] for parts in roles)
    narrowed = dataclasses.replace(space, attention_chips=attention, ffn_chips=ffn)
    points, context = [], min(FIRST_CONTEXT, space.model.max_context)
    while context <= LAST_CONTEXT:
        objective = plan.objective.at_context(context)
        if objective.longest > space.model.max_context:
            break
        plans = search(narrowed, estimator, objective)
        colocated = _cheapest(colocated_on(space, estimator, objective, baseline.chip))
        points.append(
            ContextPoint(
                context=context,
                topology=str(plans[0].deployment.topology) if plans else None,
                afd_tgs=plans[0].tgs if plans else 0.0,
                afd_usd_per_mtok=plans[0].usd_per_mtok if plans else None,
                colocated_tgs=colocated.tgs if colocated else 0.0,
                colocated_usd_per_mtok=colocated.usd_per_mtok if colocated else None,
            )
        )
        context *= 2
    return tuple(points)


def closed_form_ratio(estimator: Estimator, plan: Estimate) -> float | None:
    """r* of arXiv 2601.21351 at the plan's micro-batch: t_F linearised in the number of attention instances.

    None when another attention instance costs the FFN next to nothing (its weights are read anyway): no finite ratio is
    best.
    """
    deployment, y = plan.deployment, plan.deployment.topology.num_ffn
    if deployment.mixed:
        return None  # instances of different speed have no ratio
    one, two = (
        estimator.estimate(deployment.replace(topology=Topology(x * y, y)), plan.objective, plan.num_tokens).stage.ffn_s
        for x in (1, 2)
    )
    slope = two - one
    if slope < LEAST_SLOPE * one:
        return None
    link_s = max(plan.stage.to_ffn_s, plan.stage.to_attention_s)
    ratio = analytic_ratio(plan.stage.attention_s, link_s, one - slope, slope)
    return ratio if math.isfinite(ratio) else None


def _nearest_miss(space: SearchSpace, estimator: Estimator, objective: Objective) -> str:
    """One line: why nothing holds the SLA, from the fastest topology with one request per chip and micro-batch.

    One attention instance is the fastest for any number of FFN instances.
    """
    closest: Estimate | None = None
    for attention, ffn in space.pairs():
        ranks = space.deployment(attention, ffn, Topology(1, 1), space.streams[0]).ranks_per_instance
        for num_ffn in range(1, 1 + min(MAX_MISS_FFN, space.limit(ffn) // ranks, space.max_chips // ranks - 1)):
            for streams in space.streams:
                deployment = space.deployment(attention, ffn, Topology(1, num_ffn), streams)
                if max_requests(deployment, estimator.efficiency, objective.context) < streams:
                    continue
                miss = estimator.estimate(deployment, objective, 1)
                if closest is None or miss.tpot_s < closest.tpot_s:
                    closest = miss
    return _miss_text(space, closest, objective)


def _miss_text(space: SearchSpace, closest: Estimate | None, objective: Objective) -> str:
    where = f"no topology of up to {space.max_chips} chips"
    if closest is None:
        return f"{where} holds the weights of {space.model.name} and a request of {objective.context} tokens"
    return (
        f"{where} holds {objective.sla_tpot_s * 1e3:g} ms: the closest, {describe(closest.deployment)}, takes "
        f"{closest.tpot_s * 1e3:.1f} ms with one request per chip and micro-batch ({closest.bound} bound)"
    )


def describe(deployment: Deployment) -> str:
    """ "2A2F (A on H800, F on H20, 32 chips)"; "5A1F (A on 4 x H20 + 1 x H800, F on H800, 48 chips)"."""
    chips = f"A on {role_chips(deployment.attention_parts)}, F on {role_chips(deployment.ffn_parts)}"
    return f"{deployment.topology} ({chips}, {deployment.num_chips} chips)"


def role_chips(parts: Sequence[Part]) -> str:
    """ "H20"; "4 x H20 + 1 x H800" where there are several kinds."""
    return parts[0].chip.title if len(parts) == 1 else " + ".join(part.text for part in parts)

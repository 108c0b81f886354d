"""The whole answer to "which topology, and is AFD worth it": plans, the colocated alternative, break-even, TCP."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from afd.plan.colocated import Colocated, ColocatedModel, server_sizes
from afd.plan.deployment import Deployment
from afd.plan.estimate import Estimate, Estimator, Objective
from afd.plan.memory import max_requests
from afd.plan.pipeline import analytic_ratio, disaggregation_gain
from afd.plan.search import SearchSpace, search
from afd.plan.tcp import TcpFallback, tcp_fallback
from afd.types import Topology

FIRST_CONTEXT, LAST_CONTEXT = 1024, 131072
"""The break-even is looked for at contexts doubling between these, as far as the model serves them."""


@dataclass(frozen=True, slots=True)
class ContextPoint:
    """Both designs at one context. tgs 0 = cannot hold the SLA; usd None = that, or a price is missing."""

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
    """

    plans: tuple[Estimate, ...]
    reason: str
    comparison: Comparison | None
    colocated: Colocated | None
    analytic_ratio: float | None
    tcp: tuple[TcpFallback, ...]


def advise(space: SearchSpace, estimator: Estimator, objective: Objective) -> Advice:
    """Searches, and judges the winner. Pure."""
    plans = search(space, estimator, objective)
    baseline = _best_colocated(space, estimator, objective)
    if not plans:
        return Advice((), _nearest_miss(space, estimator, objective), None, baseline, None, ())
    best = plans[0]
    return Advice(
        plans=tuple(plans),
        reason="",
        comparison=None if baseline is None else _compare(space, estimator, best, baseline),
        colocated=baseline,
        analytic_ratio=closed_form_ratio(estimator, best),
        tcp=tuple(tcp_fallback(best, estimator)),
    )


def _best_colocated(space: SearchSpace, estimator: Estimator, objective: Objective) -> Colocated | None:
    """The best deployment on the named chip that is cheapest per token, or fastest per chip without prices."""
    found = []
    for chip in {chip.name: chip for chip in (*space.attention_chips, *space.ffn_chips)}.values():
        template = space.deployment(chip, chip, Topology(1, 1), streams=1)
        sizes = server_sizes(template.ranks_per_instance, space.max_chips)
        best = ColocatedModel(template, estimator.efficiency).best(objective, sizes)
        if best is not None:
            found.append(best)
    return min(found, key=lambda c: 1 / c.tgs if c.usd_per_mtok is None else c.usd_per_mtok, default=None)


def _compare(space: SearchSpace, estimator: Estimator, plan: Estimate, baseline: Colocated) -> Comparison:
    deployment = plan.deployment
    batch_ratio = plan.requests_per_chip / baseline.requests_per_chip
    attention_share = deployment.attention_ranks / deployment.num_chips
    step_ratio = baseline.tpot_s / plan.tpot_s
    if plan.usd_per_mtok is not None and baseline.usd_per_mtok is not None:
        gain = baseline.usd_per_mtok / plan.usd_per_mtok
    else:
        gain = disaggregation_gain(batch_ratio, attention_share, step_ratio)
    curve = _curve(space, estimator, plan)
    return Comparison(
        colocated=baseline,
        gain=gain,
        batch_ratio=batch_ratio,
        attention_share=attention_share,
        step_ratio=step_ratio,
        break_even_batch_ratio=1.0 / (attention_share * step_ratio),
        break_even_context=next((point.context for point in curve if point.afd_ahead), None),
        curve=curve,
    )


def _curve(space: SearchSpace, estimator: Estimator, plan: Estimate) -> tuple[ContextPoint, ...]:
    """Both designs over contexts, on the winner's chips."""
    attention, ffn = plan.deployment.attention_chip, plan.deployment.ffn_chip
    narrowed = dataclasses.replace(space, attention_chips=[attention], ffn_chips=[ffn])
    points, context = [], min(FIRST_CONTEXT, space.model.max_context)
    while context <= min(space.model.max_context, LAST_CONTEXT):
        objective = dataclasses.replace(plan.objective, context=context)
        plans = search(narrowed, estimator, objective)
        colocated = _best_colocated(narrowed, estimator, objective)
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

    None when another attention instance costs the FFN nothing (its weights are read anyway): no finite ratio is best.
    """
    deployment, y = plan.deployment, plan.deployment.topology.num_ffn
    one, two = (
        estimator.estimate(deployment.replace(topology=Topology(x * y, y)), plan.objective, plan.num_tokens).stage.ffn_s
        for x in (1, 2)
    )
    slope = two - one
    ratio = analytic_ratio(plan.stage.attention_s, plan.stage.transfer_s, one - slope, slope)
    return ratio if math.isfinite(ratio) else None


def _nearest_miss(space: SearchSpace, estimator: Estimator, objective: Objective) -> str:
    """One line: why nothing holds the SLA, from the fastest topology with one request per chip and micro-batch.

    One attention instance is the fastest for any number of FFN instances.
    """
    closest: Estimate | None = None
    for attention, ffn in space.pairs():
        ranks = space.deployment(attention, ffn, Topology(1, 1), space.streams[0]).ranks_per_instance
        for num_ffn in range(1, space.max_chips // ranks):
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
    """ "2A2F (A on H800, F on H20, 32 chips)"."""
    chips = f"A on {deployment.attention_chip.title}, F on {deployment.ffn_chip.title}"
    return f"{deployment.topology} ({chips}, {deployment.num_chips} chips)"

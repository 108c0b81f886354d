"""Can the data plane run without RDMA? What TCP at ordinary link rates does to a plan.

Bandwidth only: TCP also costs host copies and CPU time, so "holds" is necessary, not sufficient.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import msgspec

from afd.plan.deployment import Deployment
from afd.plan.estimate import Estimate, Estimator, Objective
from afd.plan.hardware import Chip
from afd.plan.limits import WIRE_BYTES_PER_ELEMENT

LINK_GBIT = (10.0, 25.0, 100.0, 400.0)
"""Ethernet per chip."""


@dataclass(frozen=True, slots=True)
class TcpFallback:
    """One link rate.

    holds: the plan's own batch keeps the SLA.
    micro_batch, tgs: the best that does (0 = none).

    link_rows: rows of one micro-batch that a link of this rate carries in its stage, before any protocol cost.
    """

    gbit_per_s: float
    holds: bool
    tpot_ms: float
    micro_batch: int
    tgs: float
    link_rows: int


def link_rows(gbit_per_s: float, hidden: int, num_layers: int, streams: int, tpot_s: float) -> int:
    """Rows of `hidden` elements, out and back in series, that a link moves within one stage of one layer."""
    stage_s = tpot_s / (streams * num_layers)
    return int(stage_s * gbit_per_s * 1e9 / 8 / (WIRE_BYTES_PER_ELEMENT * hidden))


def tcp_fallback(plan: Estimate, estimator: Estimator) -> list[TcpFallback]:
    """The plan's deployment with every chip behind an Ethernet link of each rate of LINK_GBIT."""
    return [_at_rate(plan, estimator, rate) for rate in LINK_GBIT]


def _at_rate(plan: Estimate, estimator: Estimator, rate: float) -> TcpFallback:
    slow, objective = _with_links(plan.deployment, rate), plan.objective
    same = estimator.estimate(slow, objective, plan.num_tokens)
    best = estimator.best(slow, objective)
    return TcpFallback(
        gbit_per_s=rate,
        holds=same.holds_sla,
        tpot_ms=same.tpot_s * 1e3,
        micro_batch=0 if best is None else best.micro_batch,
        tgs=0.0 if best is None else best.tgs,
        link_rows=_rows(slow, objective, rate),
    )


def _rows(deployment: Deployment, objective: Objective, rate: float) -> int:
    model = deployment.model
    return link_rows(rate, model.hidden, model.num_layers, deployment.streams, objective.sla_tpot_s)


def _with_links(deployment: Deployment, rate: float) -> Deployment:
    def slow(chip: Chip) -> Chip:
        return msgspec.structs.replace(chip, network_gbit_per_s=rate)

    return dataclasses.replace(
        deployment,
        attention_chip=slow(deployment.attention_chip),
        ffn_chip=slow(deployment.ffn_chip),
        attention_more=tuple(dataclasses.replace(part, chip=slow(part.chip)) for part in deployment.attention_more),
        ffn_more=tuple(dataclasses.replace(part, chip=slow(part.chip)) for part in deployment.ffn_more),
    )

"""One deployment at one context: times, throughput, cost, what binds; and its best batch under an SLA."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

from afd.errors import ConfigError
from afd.plan.deployment import Deployment
from afd.plan.efficiency import Efficiency
from afd.plan.memory import attention_memory, ffn_memory, max_requests, require_weights_fit
from afd.plan.pipeline import Bound, Cycle, PipelineKind, barrier_step_time, cycle, step_time
from afd.plan.stages import StageModel, StageTimes

MAX_BATCH = 1 << 14
"""Tokens per attention chip and micro-batch beyond which nothing is tried (tiny models, tiny contexts)."""

GRID_RATIO = 1.25
"""Spacing of the batch grid; edges between grid points are then found exactly by bisection."""


@dataclass(frozen=True, slots=True)
class Objective:
    """What a deployment has to serve.

    context: cached tokens per request.
    sla_tpot_s: bound of the mean TPOT, seconds.
    """

    context: int
    sla_tpot_s: float
    pipeline: PipelineKind = PipelineKind.OPTIMISTIC


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a deployment delivers with `num_tokens` tokens per attention chip and micro-batch.

    micro_batch: tokens of one micro-batch over all attention chips. batch: requests decoding at once. tgs: output
    tokens per chip and second, FFN chips counted.

    barrier_tpot_s: with a barrier after each step.
    """

    deployment: Deployment
    objective: Objective
    num_tokens: int
    stage: StageTimes
    cycle: Cycle
    bound: Bound
    tpot_s: float
    barrier_tpot_s: float

    @property
    def micro_batch(self) -> int:
        return self.num_tokens * self.deployment.attention_ranks

    @property
    def requests_per_chip(self) -> int:
        """Requests resident on one attention chip."""
        return self.num_tokens * self.deployment.streams

    @property
    def batch(self) -> int:
        return self.micro_batch * self.deployment.streams

    @property
    def tgs(self) -> float:
        return self.batch / (self.deployment.num_chips * self.tpot_s)

    @property
    def usd_per_mtok(self) -> float | None:
        """USD per 1e6 output tokens at full load; None when a price is missing."""
        usd_per_hour = self.deployment.usd_per_hour
        return None if usd_per_hour is None else usd_per_hour / 3600 * self.tpot_s / self.batch * 1e6

    @property
    def holds_sla(self) -> bool:
        return self.tpot_s <= self.objective.sla_tpot_s

    @property
    def headroom(self) -> float:
        """Share of the SLA that is left; negative = missed."""
        return 1.0 - self.tpot_s / self.objective.sla_tpot_s


class Estimator:
    """Prices deployments with one stage model and one set of factors. Pure: equal inputs, equal answers."""

    def __init__(self, stages: StageModel, efficiency: Efficiency):
        self._stages = stages
        self.efficiency = efficiency

    def estimate(self, deployment: Deployment, objective: Objective, num_tokens: int) -> Estimate:
        """The deployment at a given micro-batch, whether or not it fits or holds the SLA."""
        stage = self._stages.times(deployment, objective.context, num_tokens)
        beat = cycle(stage, deployment.streams, objective.pipeline)
        slack, layers = 1.0 + self._stages.jitter, deployment.model.num_layers
        return Estimate(
            deployment=deployment,
            objective=objective,
            num_tokens=num_tokens,
            stage=stage,
            cycle=beat,
            bound=beat.bound,
            tpot_s=step_time(stage, beat.seconds, deployment.streams, layers) * slack,
            barrier_tpot_s=barrier_step_time(stage, deployment.streams, layers) * slack,
        )

    def best(self, deployment: Deployment, objective: Objective) -> Estimate | None:
        """The batch with the highest throughput that fits memory and holds the SLA; None when not even one token does.

        TPOT rises with the batch, and throughput rises as long as the pipeline overlaps in the same way, so the best
        batch lies at an edge: where memory ends, where the SLA breaks, or where the overlap changes. The grid brackets
        the edges, bisection finds them.
        """
        capacity = max_requests(deployment, self.efficiency, objective.context) // deployment.streams
        largest = min(capacity, MAX_BATCH)
        if largest < 1:
            return None

        def at(num_tokens: int) -> Estimate:
            return self.estimate(deployment, objective, num_tokens)

        candidates = _edges(at, largest)
        best = max((e for e in candidates if e.holds_sla), key=lambda e: e.tgs, default=None)
        if best is not None and best.num_tokens == capacity and at(capacity + 1).holds_sla:
            return dataclasses.replace(best, bound=Bound.MEMORY)
        return best

    def at_batch(self, deployment: Deployment, objective: Objective, batch: int) -> Estimate:
        """The deployment with `batch` requests in all; ConfigError when they do not divide or do not fit."""
        lanes = deployment.streams * deployment.attention_ranks
        if batch < lanes or batch % lanes:
            raise ConfigError(
                f"batch {batch} must be a multiple of {lanes}: {deployment.streams} micro-batches on each of "
                f"{deployment.attention_ranks} attention chips"
            )
        require_weights_fit(deployment, self.efficiency)
        capacity = max_requests(deployment, self.efficiency, objective.context)
        per_chip = batch // deployment.attention_ranks
        if per_chip > capacity:
            raise ConfigError(
                f"batch {batch} puts {per_chip} requests of {objective.context} tokens on each attention chip; "
                f"{deployment.attention_chip.title} holds {capacity}"
            )
        return self.estimate(deployment, objective, batch // lanes)

    def memory_report(self, estimate: Estimate) -> dict[str, dict[str, float]]:
        """Bytes per chip of each role, as plain values."""
        deployment, context = estimate.deployment, estimate.objective.context
        roles = {
            "attention": attention_memory(deployment, self.efficiency, context, estimate.requests_per_chip),
            "ffn": ffn_memory(deployment, self.efficiency),
        }
        return {
            role: {
                "capacity_bytes": use.capacity_bytes,
                "weight_bytes": use.weight_bytes,
                "kv_bytes": use.kv_bytes,
                "free_bytes": use.free_bytes,
            }
            for role, use in roles.items()
        }


def _edges(at: Callable[[int], Estimate], largest: int) -> list[Estimate]:
    """Estimates on both sides of every change of pipeline kind or of SLA verdict, and at both ends."""
    grid = [1]
    while grid[-1] < largest:
        grid.append(min(largest, max(grid[-1] + 1, int(grid[-1] * GRID_RATIO))))
    low = at(1)
    found = [low]
    for point in grid[1:]:
        high = at(point)
        found += _bisect(at, low, high)
        if not high.holds_sla and high.cycle.kind is not PipelineKind.CONSERVATIVE:
            break  # no larger batch is faster; only a conservative pipeline may still turn into an optimistic one
        low = high
    return found


def _bisect(at: Callable[[int], Estimate], low: Estimate, high: Estimate) -> list[Estimate]:
    """The last estimate like `low` and the first unlike it, when `high` differs; else just `high`."""
    while _verdict(low) != _verdict(high) and high.num_tokens - low.num_tokens > 1:
        middle = at((low.num_tokens + high.num_tokens) // 2)
        if _verdict(middle) == _verdict(low):
            low = middle
        else:
            high = middle
    return [low, high]


def _verdict(estimate: Estimate) -> tuple[bool, PipelineKind]:
    return estimate.holds_sla, estimate.cycle.kind

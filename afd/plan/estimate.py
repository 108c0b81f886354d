"""One deployment at one context: times, throughput, cost, what binds; and its best batch under an SLA."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from afd.errors import ConfigError
from afd.plan.deployment import Deployment
from afd.plan.efficiency import Efficiency
from afd.plan.memory import attention_memory, ffn_memory, max_requests, require_weights_fit
from afd.plan.pipeline import Bound, Cycle, PipelineKind, barrier_step_time, cycle, step_time
from afd.plan.stages import RooflineStages, StageModel, StageTimes
from afd.sched.largest import largest

MAX_BATCH = 1 << 14
"""Tokens per attention chip and micro-batch beyond which nothing is tried (tiny models, tiny contexts)."""


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
    def stage_budget_s(self) -> float:
        """Seconds that a layer's longest stage may take for the SLA, heads and jitter left out."""
        step_s = self.objective.sla_tpot_s * self.deployment.drafts.emitted
        return step_s / self.deployment.streams / self.deployment.pipeline_layers

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
        self.measured = not isinstance(stages, RooflineStages)

    def estimate(self, deployment: Deployment, objective: Objective, num_tokens: int) -> Estimate:
        """The deployment at a given micro-batch, whether or not it fits or holds the SLA."""
        stage = self._stages.times(deployment, objective.context, num_tokens)
        beat = cycle(stage, deployment.streams, objective.pipeline)
        slack, layers = self._slack(deployment), deployment.pipeline_layers
        return Estimate(
            deployment=deployment,
            objective=objective,
            num_tokens=num_tokens,
            stage=stage,
            cycle=beat,
            bound=beat.bound,
            tpot_s=step_time(stage, deployment.streams, layers, objective.pipeline) * slack,
            barrier_tpot_s=barrier_step_time(stage, deployment.streams, layers) * slack,
        )

    def best(self, deployment: Deployment, objective: Objective) -> Estimate | None:
        """The batch with the highest throughput that fits memory and holds the SLA; None when not even one token does.

        TPOT and throughput rise with the batch, so it is the largest that fits and holds; bisection finds it.
        """
        capacity = max_requests(deployment, self.efficiency, objective.context) // deployment.streams

        def holds(num_tokens: int) -> bool:
            return self._tpot(deployment, objective, num_tokens) <= objective.sla_tpot_s

        batch = largest(min(capacity, MAX_BATCH), holds)
        if not batch:
            return None
        best = self.estimate(deployment, objective, batch)
        if batch == capacity and holds(capacity + 1):
            return dataclasses.replace(best, bound=Bound.MEMORY)
        return best

    def _tpot(self, deployment: Deployment, objective: Objective, num_tokens: int) -> float:
        stage = self._stages.times(deployment, objective.context, num_tokens)
        return self._slack(deployment) * step_time(
            stage, deployment.streams, deployment.pipeline_layers, objective.pipeline
        )

    def _slack(self, deployment: Deployment) -> float:
        """Mean seconds per token over those of a step of a peak minute."""
        return (1.0 + self._stages.jitter) / deployment.drafts.emitted

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

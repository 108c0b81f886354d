"""One deployment at one context: times, throughput, cost, what binds; and its best batch under an SLA."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from afd.errors import ConfigError
from afd.plan.deployment import Deployment
from afd.plan.efficiency import Efficiency
from afd.plan.memory import attention_memory, ffn_memory, max_requests, require_weights_fit
from afd.plan.pipeline import Bound, Cycle, PipelineKind, barrier_step_time, cycle, step_time
from afd.plan.request_rate import RequestShape
from afd.plan.stages import Prefill, RooflineStages, StageModel, StageTimes
from afd.sched.largest import largest

MAX_BATCH = 1 << 14
"""Tokens per attention chip and micro-batch beyond which nothing is tried (tiny models, tiny contexts)."""


@dataclass(frozen=True, slots=True)
class Objective:
    """What a deployment has to serve.

    context: cached tokens per request.
    sla_tpot_s: bound of the mean TPOT, seconds.
    requests: whose prompts are computed in the same steps; None = prefill happens elsewhere.
    """

    context: int
    sla_tpot_s: float
    pipeline: PipelineKind = PipelineKind.OPTIMISTIC
    requests: RequestShape | None = None

    @property
    def longest(self) -> int:
        """Tokens that a request has in the end."""
        return self.context if self.requests is None else round(self.requests.prompt + self.requests.output)

    def at_context(self, context: int) -> Objective:
        """The same at another context; longer contexts are longer prompts."""
        requests = self.requests
        if requests is not None:
            requests = dataclasses.replace(requests, prompt=max(1.0, context - requests.output / 2.0))
        return dataclasses.replace(self, context=context, requests=requests)


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a deployment delivers with `num_tokens` tokens per attention chip and micro-batch.

    micro_batch: tokens of one micro-batch over all attention chips. batch: requests decoding at once. tgs: output
    tokens per chip and second, FFN chips counted.

    barrier_tpot_s: with a barrier after each step.
    prefill: prompt rows of an attention chip and micro-batch, None = elsewhere.
    """

    deployment: Deployment
    objective: Objective
    num_tokens: int
    stage: StageTimes
    cycle: Cycle
    bound: Bound
    tpot_s: float
    barrier_tpot_s: float
    prefill: Prefill | None = None

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
    def step_s(self) -> float:
        """Seconds of one step of a micro-batch; with drafts it emits more than one token of a request."""
        return self.tpot_s * self.deployment.drafts.emitted

    @property
    def requests_per_s(self) -> float | None:
        """What the batch answers, and what is prefilled meanwhile; None when nothing is known of the requests."""
        requests = self.objective.requests
        return None if requests is None else self.batch / (requests.output - 1.0) / self.tpot_s

    @property
    def lanes(self) -> float:
        """Prompts that are computed at once: one or more in each stream of each attention instance."""
        return self.deployment.topology.num_attention * self.deployment.streams * max(1.0, self._prompts_per_step)

    @property
    def ttft_s(self) -> float:
        """Mean time to the first token with nobody waiting: the rest of a step, then as many as the prompt needs."""
        return self.step_s / 2.0 + whole_steps(self.prompt_s, self.step_s)

    @property
    def prompt_s(self) -> float:
        """Time of a lane that a prompt takes; what it leaves of its last step is the next one's."""
        return self.step_s * max(1.0, 1.0 / self._prompts_per_step)

    @property
    def _prompts_per_step(self) -> float:
        """Prompts that a step of one stream of one attention instance computes; its chips share a prompt's rows."""
        if self.prefill is None or self.objective.requests is None:
            return 0.0
        return self.prefill.num_tokens * self.deployment.ranks_per_instance / self.objective.requests.prompt

    @property
    def usd_per_hour(self) -> float | None:
        return self.deployment.usd_per_hour

    @property
    def chips(self) -> dict[str, int]:
        return self.deployment.chips

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


def whole_steps(seconds: float, step_s: float) -> float:
    """`seconds` up to the end of the step in which they end."""
    return math.ceil(seconds / step_s - 1e-9) * step_s


class Estimator:
    """Prices deployments with one stage model and one set of factors. Pure: equal inputs, equal answers."""

    def __init__(self, stages: StageModel, efficiency: Efficiency):
        self._stages = stages
        self.efficiency = efficiency
        self.measured = not isinstance(stages, RooflineStages)

    def estimate(self, deployment: Deployment, objective: Objective, num_tokens: int) -> Estimate:
        """The deployment at a given micro-batch, whether or not it fits or holds the SLA."""
        stage, prefill = self._times(deployment, objective, num_tokens)
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
            prefill=prefill,
        )

    def best(self, deployment: Deployment, objective: Objective) -> Estimate | None:
        """The batch with the highest throughput that fits memory and holds the SLA; None when not even one token does.

        TPOT and throughput rise with the batch, so it is the largest that fits and holds; bisection finds it.
        """
        capacity = self._capacity(deployment, objective) // deployment.streams

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
        stage, _ = self._times(deployment, objective, num_tokens)
        return self._slack(deployment) * step_time(
            stage, deployment.streams, deployment.pipeline_layers, objective.pipeline
        )

    def _times(
        self, deployment: Deployment, objective: Objective, num_tokens: float
    ) -> tuple[StageTimes, Prefill | None]:
        prefill = None
        if objective.requests is not None:
            emitted = num_tokens * deployment.drafts.emitted
            prefill = objective.requests.prefill_beside(emitted, deployment.ranks_per_instance)
        return self._stages.times(deployment, objective.context, num_tokens, prefill), prefill

    def prefill_share(self, estimate: Estimate) -> float:
        """What the prompts cost: of the tokens that it would decode if they were computed elsewhere."""
        if estimate.objective.requests is None:
            return 0.0
        alone = self.best(estimate.deployment, dataclasses.replace(estimate.objective, requests=None))
        return 0.0 if alone is None else max(0.0, 1.0 - estimate.tgs / alone.tgs)

    def _capacity(self, deployment: Deployment, objective: Objective) -> int:
        """Requests that decode on one attention chip; each stream of an instance also holds a prompt in the making."""
        held = max_requests(deployment, self.efficiency, objective.context)
        if objective.requests is None:
            return held
        return max(0, held - -(-deployment.streams // deployment.ranks_per_instance))

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
        capacity = self._capacity(deployment, objective)
        per_chip = batch // deployment.attention_ranks
        if per_chip > capacity:
            raise ConfigError(
                f"batch {batch} puts {per_chip} requests of {objective.context} tokens on each attention chip; "
                f"{deployment.attention_chip.title} holds {capacity}"
            )
        return self.estimate(deployment, objective, batch // lanes)

    def memory_report(self, estimate: Estimate) -> dict[str, dict[str, float]]:
        """Bytes per chip of each role, as plain values; of the fullest one where a role has several kinds."""
        deployment, context = estimate.deployment, estimate.objective.context
        requests = estimate.requests_per_chip
        attention = [
            attention_memory(view, self.efficiency, context, round(requests * load))
            for view, load in deployment.attention_views()
        ]
        ffn = [ffn_memory(view, self.efficiency, load) for view, load in deployment.ffn_views()]
        roles = {
            role: min(uses, key=lambda use: use.free_bytes) for role, uses in (("attention", attention), ("ffn", ffn))
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

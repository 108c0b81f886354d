"""What rate of requests a deployment serves: decodes, and in the same steps the prefill that feeds them. Pure.

In a steady state every answered request was prefilled, so rows of both kinds come in the proportion of the lengths.
"""

from __future__ import annotations

from dataclasses import dataclass

from afd.plan.deployment import Deployment
from afd.plan.efficiency import Efficiency
from afd.plan.memory import max_requests
from afd.plan.pipeline import Cycle, PipelineKind, cycle, step_time
from afd.plan.stages import Prefill, StageModel, StageTimes

FINENESS = 1e-3
"""Relative width at which the search for the largest batch ends."""


@dataclass(frozen=True, slots=True)
class RequestShape:
    """Mean tokens of a prompt and of an answer; both at least 1. The first token of an answer comes from prefill."""

    prompt: float
    output: float

    @property
    def prompt_rows(self) -> float:
        """Rows of prefill for each token that is decoded; an answer of one token has none of those."""
        return self.prompt / (self.output - 1.0)

    def prefill_beside(self, num_decoded: float, num_ranks: int) -> Prefill:
        """Prompt rows of one chip that keep up with `num_decoded` tokens; `num_ranks` chips share a prompt."""
        rows = num_decoded * self.prompt_rows
        return Prefill.of_prompts(rows, self.prompt, rows * num_ranks)

    @property
    def num_rows(self) -> float:
        """Rows that a request costs."""
        return self.prompt + self.output - 1.0

    @property
    def context(self) -> int:
        """Tokens that a decode attends to, on average."""
        return max(1, round(self.prompt + self.output / 2.0))


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """What one attention rank takes at once: sequences over all its streams, and rows of a micro-batch."""

    max_num_seqs: float
    max_step_tokens: float


@dataclass(frozen=True, slots=True)
class ServedRate:
    """The busiest steady state within the target.

    rate: requests/s.  num_rows, num_decodes: of one attention rank and micro-batch.  tpot_s: of the decodes in it.
    """

    rate: float
    num_rows: float
    num_decodes: float
    tpot_s: float
    stage: StageTimes
    cycle: Cycle


def served_rate(
    stages: StageModel,
    efficiency: Efficiency,
    deployment: Deployment,
    shape: RequestShape,
    limits: BatchLimits,
    sla_tpot_s: float,
    kind: PipelineKind = PipelineKind.OPTIMISTIC,
) -> ServedRate | None:
    """The largest rate at which memory, limits and the TPOT target hold; None where not one decode holds the target."""
    decoding = (shape.output - 1.0) / shape.num_rows
    room = min(limits.max_num_seqs, max_requests(deployment, efficiency, shape.context)) / deployment.streams
    high = min(limits.max_step_tokens, room / decoding) if decoding else limits.max_step_tokens
    low = min(high, 1.0 / deployment.attention_ranks)  # a row in all

    def at(num_rows: float) -> ServedRate:
        return _at(stages, deployment, shape, limits, num_rows, kind)

    def holds(state: ServedRate) -> bool:
        return not decoding or state.tpot_s <= sla_tpot_s

    if high <= 0.0 or not holds(at(low)):
        return None
    if holds(at(high)):
        return at(high)
    while high / low > 1.0 + FINENESS:  # TPOT rises with the rows
        middle = (low * high) ** 0.5
        low, high = (middle, high) if holds(at(middle)) else (low, middle)
    return at(low)


def _at(
    stages: StageModel,
    deployment: Deployment,
    shape: RequestShape,
    limits: BatchLimits,
    num_rows: float,
    kind: PipelineKind,
) -> ServedRate:
    """The steady state with so many rows on each attention rank and micro-batch.

    A prompt is computed in chunks as large as the decodes leave room for, one prompt of an instance after another.
    """
    num_decodes = num_rows * (shape.output - 1.0) / shape.num_rows
    ranks, num_layers = deployment.ranks_per_instance, deployment.model.num_layers
    chunk = max(1.0, ranks * (limits.max_step_tokens - num_decodes))
    prefill = Prefill.of_prompts(num_rows - num_decodes, shape.prompt, chunk)
    stage = stages.times(deployment, shape.context, num_decodes, prefill)
    tpot_s = step_time(stage, deployment.streams, num_layers, kind) * (1.0 + stages.jitter)
    rows_per_s = num_rows * deployment.streams * deployment.attention_ranks / tpot_s
    beat = cycle(stage, deployment.streams, kind)
    return ServedRate(rows_per_s / shape.num_rows, num_rows, num_decodes, tpot_s, stage, beat)

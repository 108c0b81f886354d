"""From stage times to a cycle: how often a micro-batch leaves a layer. Closed forms, each with its source.

Units: seconds per layer. A step of m micro-batches through L layers takes m * L cycles.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

from afd.plan.stages import StageTimes


class PipelineKind(StrEnum):
    """How far stages overlap (AIConfigurator's three models).

    SERIAL: nothing does. CONSERVATIVE: A and F overlap, each waits for its own transfer. OPTIMISTIC: transfers are a
    stage of their own; holds only with enough micro-batches and transfers that are not the longest part by far, and
    falls back to CONSERVATIVE otherwise.
    """

    SERIAL = "serial"
    CONSERVATIVE = "conservative"
    OPTIMISTIC = "optimistic"


class Bound(StrEnum):
    """What binds: a stage, or the attention chips' memory (no larger batch fits)."""

    ATTENTION = "attention"
    FFN = "ffn"
    NETWORK = "network"
    MEMORY = "memory"


@dataclass(frozen=True, slots=True)
class Cycle:
    """How often a micro-batch leaves a layer.

    seconds: per micro-batch and layer.
    kind: the model that held.
    min_streams: what OPTIMISTIC would need.
    """

    seconds: float
    kind: PipelineKind
    min_streams: float
    bound: Bound


def cycle(stage: StageTimes, streams: int, kind: PipelineKind = PipelineKind.OPTIMISTIC) -> Cycle:
    """The cycle of `streams` micro-batches under pipeline model `kind`; one micro-batch is always serial."""
    needed = min_streams(stage)
    if kind is PipelineKind.SERIAL or streams == 1:
        seconds = stage.attention_s + stage.ffn_s + stage.transfer_s
        return Cycle(seconds, PipelineKind.SERIAL, needed, _longest(stage))
    attention_s, ffn_s = stage.attention_s + stage.to_ffn_s, stage.ffn_s + stage.to_attention_s
    overlapped_s = max(stage.attention_s, stage.ffn_s, stage.transfer_s)
    if kind is PipelineKind.OPTIMISTIC and streams >= needed and overlapped_s <= max(attention_s, ffn_s):
        return Cycle(overlapped_s, PipelineKind.OPTIMISTIC, needed, _longest(stage))
    bound = Bound.ATTENTION if attention_s >= ffn_s else Bound.FFN
    return Cycle(max(attention_s, ffn_s), PipelineKind.CONSERVATIVE, needed, bound)


def min_streams(stage: StageTimes) -> float:
    """m >= 2 + t_C / max(t_A, t_F) hides both transfers (MegaScale-Infer: m >= 2 (1 + T_c/T_f), t_C = 2 T_c)."""
    return 2.0 + stage.transfer_s / max(stage.attention_s, stage.ffn_s)


def _longest(stage: StageTimes) -> Bound:
    longest = max(stage.attention_s, stage.ffn_s, stage.transfer_s)
    if longest == stage.attention_s:
        return Bound.ATTENTION
    return Bound.FFN if longest == stage.ffn_s else Bound.NETWORK


def step_time(stage: StageTimes, cycle_s: float, streams: int, num_layers: int) -> float:
    """Seconds of one step when the next one of a stream starts at once (no barrier between steps)."""
    return streams * (num_layers * cycle_s + stage.head_s)


def barrier_step_time(stage: StageTimes, streams: int, num_layers: int) -> float:
    """Seconds of a step that fills and drains the pipeline: (T_a + T_e + 2 T_c) + T_f (m L - 1), MegaScale-Infer."""
    longest = max(stage.attention_s, stage.ffn_s)
    first = stage.attention_s + stage.ffn_s + stage.transfer_s
    return first + longest * (streams * num_layers - 1) + streams * stage.head_s


def analytic_ratio(attention_s: float, transfer_s: float, ffn_base_s: float, ffn_slope_s: float) -> float:
    """Attention instances per FFN instance for the highest throughput per instance, no SLA (arXiv 2601.21351).

    r* = max((t_A - b_F) / (a_F B), (t_C - b_F) / (a_F B), sqrt(b_F / (a_F B))) with t_F = a_F r B + b_F.

    ffn_slope_s: a_F B, the FFN's seconds per attention instance's micro-batch; infinite ratio when it is 0.
    """
    if ffn_slope_s <= 0:
        return math.inf
    balance = max(attention_s, transfer_s) - ffn_base_s
    return max(balance / ffn_slope_s, math.sqrt(max(ffn_base_s, 0.0) / ffn_slope_s))


def disaggregation_gain(batch_ratio: float, attention_share: float, step_ratio: float) -> float:
    """Throughput per chip over the colocated deployment's (FastAFD's identity).

    batch_ratio: requests per attention chip over requests per colocated chip.
    attention_share: attention chips over all chips, M / (M + N).
    step_ratio: colocated step time over AFD step time.
    """
    return batch_ratio * attention_share * step_ratio

"""What stage times make of a step: how often a micro-batch leaves a layer, and what decides it (`afd.sched.cycle`).

Units: seconds per layer. A step of m micro-batches through L layers takes m * L cycles, and what heads add.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

from afd.plan.stages import StageTimes
from afd.sched.cycle import equal_streams_cycle_s


class PipelineKind(StrEnum):
    """What a transfer keeps from other work (AIConfigurator's names).

    SERIAL: everything; nothing overlaps. CONSERVATIVE: its sender. OPTIMISTIC: its direction of the link, nobody else.
    """

    SERIAL = "serial"
    CONSERVATIVE = "conservative"
    OPTIMISTIC = "optimistic"


class Bound(StrEnum):
    """What binds: a device that is never idle; the way of one micro-batch, which more streams would hide; memory."""

    ATTENTION = "attention"
    FFN = "ffn"
    NETWORK = "network"
    LATENCY = "latency"
    MEMORY = "memory"


@dataclass(frozen=True, slots=True)
class Cycle:
    """How often a micro-batch leaves a layer.

    seconds: per micro-batch and layer, heads not counted.
    kind: what a transfer keeps busy; SERIAL for one stream.
    min_streams: with which a device would never be idle.
    """

    seconds: float
    kind: PipelineKind
    min_streams: float
    bound: Bound


def cycle(stage: StageTimes, streams: int, kind: PipelineKind = PipelineKind.OPTIMISTIC) -> Cycle:
    """The cycle of `streams` micro-batches under pipeline model `kind`; one micro-batch is always serial."""
    devices, way_s = _devices(stage, kind), _way(stage)
    longest = max(devices, key=lambda name: devices[name])
    needed = way_s / devices[longest]
    if streams == 1 and kind is not PipelineKind.SERIAL:
        devices, kind = _devices(stage, PipelineKind.SERIAL), PipelineKind.SERIAL
    seconds = equal_streams_cycle_s(streams, list(devices.values()), way_s) / streams
    if kind is PipelineKind.SERIAL:
        longest = max(Bound.ATTENTION, Bound.FFN, Bound.NETWORK, key=lambda name: _shares(stage)[name])
    elif streams < needed:
        longest = Bound.LATENCY
    return Cycle(seconds, kind, needed, longest)


def step_time(stage: StageTimes, streams: int, num_layers: int, kind: PipelineKind = PipelineKind.OPTIMISTIC) -> float:
    """Seconds of one step when the next one of a stream starts at once (no barrier between steps)."""
    devices = list(_devices(stage, PipelineKind.SERIAL if streams == 1 else kind).values())
    return equal_streams_cycle_s(streams, devices, _way(stage), num_layers, stage.head_s)


def barrier_step_time(stage: StageTimes, streams: int, num_layers: int) -> float:
    """Seconds of a step that fills and drains the pipeline: (T_a + T_e + 2 T_c) + T_f (m L - 1), MegaScale-Infer."""
    longest = cycle(stage, streams).seconds
    return _way(stage) + longest * (streams * num_layers - 1) + streams * stage.head_s


def _devices(stage: StageTimes, kind: PipelineKind) -> dict[Bound, float]:
    """Seconds of one layer on what does one thing at a time, the attention side first."""
    if kind is PipelineKind.SERIAL:
        return {Bound.ATTENTION: _way(stage)}
    if kind is PipelineKind.CONSERVATIVE:
        return {Bound.ATTENTION: stage.attention_s + stage.to_ffn_s, Bound.FFN: stage.ffn_s + stage.to_attention_s}
    return _shares(stage)


def _shares(stage: StageTimes) -> dict[Bound, float]:
    """The slower direction stands for the network: the other one is never what binds."""
    slower_s = max(stage.to_ffn_s, stage.to_attention_s)
    return {Bound.ATTENTION: stage.attention_s, Bound.FFN: stage.ffn_s, Bound.NETWORK: slower_s}


def _way(stage: StageTimes) -> float:
    return stage.attention_s + stage.ffn_s + stage.transfer_s


def analytic_ratio(attention_s: float, transfer_s: float, ffn_base_s: float, ffn_slope_s: float) -> float:
    """Attention instances per FFN instance for the highest throughput per instance, no SLA (arXiv 2601.21351).

    r* = max((t_A - b_F) / (a_F B), (t_C - b_F) / (a_F B), sqrt(b_F / (a_F B))) with t_F = a_F r B + b_F.

    ffn_slope_s: a_F B, the FFN's seconds per attention instance's micro-batch; infinite ratio when it is 0.
    """
    if ffn_slope_s <= 0:
        return math.inf
    balance = max(attention_s, transfer_s) - ffn_base_s
    return max(balance / ffn_slope_s, math.sqrt(max(ffn_base_s, 0.0) / ffn_slope_s))

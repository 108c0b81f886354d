"""How well this attention worker's pipeline has run of late: what `afd status` and /metrics show. Any thread."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from afd.attention.stages import StageTotals
from afd.telemetry.recent import RecentSums


@dataclass(frozen=True, slots=True)
class AttentionPipeline:
    """bubble: share of the wall clock spent waiting with work in flight.  exposed: share of a step that is exposed
    transfer.  gang_size: attention workers in a batch, mean; 0 when nothing ran."""

    bubble: float
    exposed: float
    gang_size: float


class RecentAttention:
    """Over about the last `afd.telemetry.recent.WINDOW_S` seconds."""

    def __init__(self, totals: StageTotals, clock: Callable[[], float] = time.perf_counter):
        self._totals = totals
        self._recent = RecentSums(self._sums, clock)

    def look(self) -> AttentionPipeline:
        growth = self._recent.look()
        return AttentionPipeline(
            bubble=growth.rate("wait"),
            exposed=growth.ratio("step_exposed", "step"),
            gang_size=growth.ratio("members", "exchanges"),
        )

    def _sums(self) -> dict[str, float]:
        totals = self._totals
        return {
            "wait": totals.wait_s,
            "step": totals.step_s,
            "step_exposed": totals.step_exposed_s,
            "members": totals.num_gang_members,
            "exchanges": totals.num_exchanges,
        }

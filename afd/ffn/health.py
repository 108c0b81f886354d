"""How well this FFN worker's side of the pipeline has run lately: what `afd status` and /metrics show. Any thread."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from afd.ffn.engine import FFNEngine
from afd.ffn.lateness import straggler_scores
from afd.telemetry.recent import RecentSums


@dataclass(frozen=True, slots=True)
class FFNPipeline:
    """bubble: share of the wall clock spent waiting while a step was under way.
    gang_size: attention workers in a batch, mean; 0 when nothing ran.
    stragglers: score by attention rank (`afd.ffn.lateness`).
    """

    bubble: float
    gang_size: float
    stragglers: dict[int, float]


class RecentFFN:
    """Over about the last `afd.telemetry.recent.WINDOW_S` seconds."""

    def __init__(self, engine: FFNEngine, clock: Callable[[], float] = time.perf_counter):
        self._engine = engine
        self._recent = RecentSums(self._sums, clock)

    def look(self) -> FFNPipeline:
        growth = self._recent.look()
        return FFNPipeline(
            bubble=growth.rate("wait"),
            gang_size=growth.ratio("members", "batches"),
            stragglers=straggler_scores(growth),
        )

    def _sums(self) -> dict[str, float]:
        totals = self._engine.totals
        return {
            "wait": totals.wait_s,
            "members": totals.num_members,
            "batches": totals.num_batches,
            **self._engine.lateness.sums(),
        }

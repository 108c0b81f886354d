"""How this attention worker fares: what heartbeats, `afd status` and /metrics show. Any thread."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from afd.attention.engine import Engine
from afd.attention.stages import StageTotals
from afd.membership.port import SyncFields
from afd.sched.core import WorkerCore
from afd.telemetry.recent import RecentSums


@dataclass(frozen=True, slots=True)
class AttentionPipeline:
    """bubble: share of the wall clock spent waiting with work in flight.
    exposed: share of a step that is exposed transfer.
    gang_size: attention workers in a batch, mean; 0 when nothing ran.
    """

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


class AttentionHealth:
    """The worker's contribution to heartbeats. num_turns: of its main loop, which counts them."""

    def __init__(self, engine: Engine, core: WorkerCore, recent: RecentAttention):
        self._engine = engine
        self._core = core
        self._recent = recent
        self.num_turns = 0

    def fields(self) -> SyncFields:
        """What the next heartbeat says of this worker."""
        stages, scheduler, admission = self._engine.stages, self._core.scheduler, self._core.admission
        totals, recent = stages.totals, self._recent.look()
        return SyncFields(
            progress=self.num_turns,
            pending=self._engine.in_flight,
            stats={
                "running": float(scheduler.num_running),
                "waiting": float(scheduler.num_waiting),
                "kv_free": scheduler.pool.num_free / scheduler.pool.num_blocks,
                "busy_s": totals.attention_s + totals.head_s,
                "wait_s": totals.wait_s,
                "sampled": float(totals.num_sampled),
                "rows": float(totals.num_tokens),
                "attended": totals.num_attended,
                "step_ms": stages.step_s * 1e3,
                "cycle_ms": admission.cycle_s * 1e3,
                "streams": float(scheduler.num_streams),
                # With another policy they were only found to be beyond the SLA.
                "refused" if admission.policy == "enforce" else "over_sla": float(admission.num_refused),
                "gang_size": recent.gang_size,
                "bubble": recent.bubble,
                "exposed": recent.exposed,
            },
            costs=self._core.costs,
        )

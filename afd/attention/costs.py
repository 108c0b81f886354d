"""What an attention worker tells the coordinator of its pipeline: cost curves, load, waits, gang sizes. Pure."""

from __future__ import annotations

from dataclasses import replace

from afd.attention.stages import StageTotals
from afd.messages.membership import StepCosts
from afd.sched.latency import LatencyModel
from afd.sched.scheduler import Scheduler


class CostReporter:
    """Remembers the sums of the last report: waits and gang sizes are those since then. Main thread only."""

    def __init__(self, model: LatencyModel, scheduler: Scheduler):
        self._model = model
        self._scheduler = scheduler
        self._last = StageTotals()
        self._last_s: float | None = None
        self._gang_size = 1.0

    def report(self, totals: StageTotals, now: float) -> StepCosts:
        """totals: sums since start."""
        last, self._last = self._last, replace(totals)
        exchanges = totals.num_exchanges - last.num_exchanges
        if exchanges:  # else what is known of the gangs stays
            self._gang_size = max(1.0, (totals.num_gang_members - last.num_gang_members) / exchanges)
        passed_s = 0.0 if self._last_s is None else now - self._last_s
        self._last_s = now
        waited_s = totals.wait_s - last.wait_s
        model, load = self._model, self._scheduler.full_step()
        own, ffn = model.slowdowns(2)
        a0, a1, a2 = (own * value for value in model.attention.coefficients)
        h0, h1 = (own * value for value in model.head.coefficients)
        f0, f1 = (ffn * value for value in model.ffn.coefficients)
        return StepCosts(
            attention=(a0, a1, a2),
            head=(h0, h1),
            ffn=(f0, f1),
            transfer_s=model.transfer_s,
            num_steps=model.num_steps,
            num_seqs=self._scheduler.num_running,
            tokens=load.num_tokens,
            context=load.context_tokens,
            rows=load.num_samples,
            num_streams=self._scheduler.num_streams,
            gang_size=self._gang_size,
            wait_share=min(1.0, waited_s / passed_s) if passed_s > 0.0 else 0.0,
            corrections=model.corrections(load),
        )

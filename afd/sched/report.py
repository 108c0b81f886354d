"""What an attention worker says of itself: its load to the gateways, its pipeline's costs to the coordinator. Pure."""

from __future__ import annotations

from typing import Protocol

from afd.messages.membership import StageLines, StepCosts
from afd.messages.serving import WorkerStats
from afd.sched.latency import LatencyModel
from afd.sched.policy import Admission
from afd.sched.scheduler import Scheduler


class StepSums(Protocol):
    """What the engine has counted since its start."""

    num_exchanges: int
    """Round trips of a layer."""
    num_gang_members: int
    """Attention workers in the batches that answered, summed over the round trips."""
    wait_s: float
    """Seconds with work in flight and nothing to compute."""


def worker_stats(rank: int, scheduler: Scheduler, admission: Admission, *, draining: bool, ready: bool) -> WorkerStats:
    """The worker's load, as it is now. Its cost grows with the number of sequences."""
    outlook, pool = admission.outlook(), scheduler.pool
    return WorkerStats(
        rank=rank,
        num_running=scheduler.num_running,
        num_waiting=scheduler.num_waiting,
        kv_blocks_total=pool.num_blocks,
        kv_blocks_free=pool.num_free,
        draining=draining,
        places_s=list(outlook.places_s),
        prefix_hits=scheduler.prefix_hits,
        prefix_queries=scheduler.prefix_queries,
        num_preemptions=scheduler.num_preemptions,
        prefill_token_s=outlook.prefill_token_s,
        max_tokens=min(scheduler.config.max_context, pool.num_blocks * pool.block_size),
        ready=ready,
    )


class CostReporter:
    """Reports cost curves, load, waits and gang sizes."""

    def __init__(self, model: LatencyModel, scheduler: Scheduler, sums: StepSums):
        self._model = model
        self._scheduler = scheduler
        self._sums = sums
        self._num_exchanges = 0
        self._num_gang_members = 0
        self._wait_s = 0.0
        self._reported_s: float | None = None
        self._gang_size = 1.0

    def report(self, now: float) -> StepCosts:
        """What the coordinator is told now; waits and gang sizes are those since the last call."""
        sums = self._sums
        exchanges = sums.num_exchanges - self._num_exchanges
        if exchanges:  # else what is known of the gangs stays
            self._gang_size = max(1.0, (sums.num_gang_members - self._num_gang_members) / exchanges)
        passed_s = 0.0 if self._reported_s is None else now - self._reported_s
        waited_s = sums.wait_s - self._wait_s
        self._num_exchanges, self._num_gang_members = sums.num_exchanges, sums.num_gang_members
        self._wait_s, self._reported_s = sums.wait_s, now
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
            lines=_lines(model),
            link_row_s=model.link.row_s,
        )


def _lines(model: LatencyModel) -> StageLines:
    """The stages' lines, with several streams in flight like the curves."""
    own, ffn = model.slowdowns(2)
    a0, a1, a2 = (own * value for value in model.attention.trend.coefficients)
    h0, h1 = (own * value for value in model.head.trend.coefficients)
    f0, f1 = (ffn * value for value in model.ffn.trend.coefficients)
    return StageLines((a0, a1, a2), (h0, h1), (f0, f1))

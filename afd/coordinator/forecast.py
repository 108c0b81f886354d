"""What a number of streams will cost the whole cluster, from the attention workers' cost curves. Pure.

Each worker knows its own curves and load; only here are they together: the FFN computes the rows of all workers in a
gang, and a gang moves as its slowest member does.
"""

from __future__ import annotations

from collections.abc import Sequence

from afd.messages.membership import Forecast, StepCosts
from afd.sched.cycle import cycle_s

TRUSTED_STEPS = 64  # before a worker's curves and corrections are believed


def busy(costs: Sequence[StepCosts]) -> list[StepCosts]:
    """Costs of the workers that have work."""
    return [c for c in costs if c.tokens > 0]


def usable(costs: Sequence[StepCosts]) -> list[StepCosts]:
    """Costs of the workers that have work and have measured enough steps to be believed."""
    return [c for c in busy(costs) if c.num_steps >= TRUSTED_STEPS]


def forecast(workers: Sequence[StepCosts], num_streams: int, *, extra_tokens: float = 0.0) -> Forecast:
    """The cycle when each worker splits its load over `num_streams`, or over as many as it has sequences.

    cycle = max(the busiest worker's sum of A, sum of F over gangs, the longest stream's A + F + C), corrected.

    workers: `usable` ones, at least one.
    extra_tokens: of prefill that each worker has in one of its streams on top of its load.
    """
    streams = [min(num_streams, max(1, worker.num_seqs)) for worker in workers]
    own_s = [_attention_s(worker, m) for worker, m in zip(workers, streams, strict=True)]
    extra_s = [worker.attention[1] * extra_tokens for worker in workers]
    attention_s = max(own + extra for own, extra in zip(own_s, extra_s, strict=True))
    slowest_s = max(own / m + extra for own, m, extra in zip(own_s, streams, extra_s, strict=True))
    gang_size = min(float(len(workers)), max(1.0, _mean([worker.gang_size for worker in workers])))
    base_s, token_s = (_mean([worker.ffn[i] for worker in workers]) for i in (0, 1))
    rows = sum(worker.tokens for worker in workers)
    extra_rows = extra_tokens * len(workers)
    gangs = max(max(streams), sum(streams) / gang_size)  # of which each reads the FFN's weights once
    ffn_s = gangs * base_s + token_s * (rows + extra_rows)
    alone_s = base_s + token_s * (rows / gangs + extra_rows)
    latency_s = slowest_s + alone_s + _mean([worker.transfer_s for worker in workers])
    correction = _mean([_correction(worker, m) for worker, m in zip(workers, streams, strict=True)])
    return Forecast(
        num_streams=num_streams,
        cycle_s=correction * cycle_s([attention_s, ffn_s], [latency_s]),
        attention_s=attention_s,
        ffn_s=ffn_s,
        latency_s=latency_s,
        gang_size=gang_size,
        num_workers=len(workers),
    )


def _attention_s(worker: StepCosts, num_streams: int) -> float:
    """A of all its streams, head included: every stream pays the bases."""
    base_s, token_s, context_s = worker.attention
    head_s, row_s = worker.head
    return num_streams * (base_s + head_s) + token_s * worker.tokens + context_s * worker.context + row_s * worker.rows


def _correction(worker: StepCosts, num_streams: int) -> float:
    """Measured over modelled cycle of that number of streams, or of the nearest one that was measured."""
    known = worker.corrections
    if not known:
        return 1.0
    return known[min(known, key=lambda measured: (abs(measured - num_streams), measured))]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)

"""Online model of step times: what a step of a given size will take, learnt from the steps that ran. Pure.

Three curves (`afd.sched.curves`): attention t_A(tokens, context), head t_H(rows) and FFN t_F(gang tokens); and the
transfer time t_C, what an exchange takes beyond the FFN's computing. From them the cycle: the time in which every
stream makes one step, which is the TPOT of every sequence in them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import msgspec

from afd.sched.curves import OUTLIER, TRUSTED, Curve
from afd.sched.cycle import cycle_s
from afd.sched.link import LinkCost
from afd.sched.sequence import MicroBatch

COLD_STEPS = 2  # a process's first steps touch weights and KV for the first time: they tell nothing of later ones
CORRECTION_EMA = 0.1
CORRECTION_LIMITS = (0.5, 4.0)
TRANSFER_FALL, TRANSFER_RISE = 0.3, 0.1
SHORTEST_S = 1e-6


class StepLoad(msgspec.Struct, frozen=True):
    """Size of one stream's step; fractions stand for an even split over streams.

    num_tokens: rows computed.
    context_tokens: KV entries read, one for each pair of a row and a position that it attends to.
    num_samples: rows that go through the head.
    """

    num_tokens: float
    context_tokens: float
    num_samples: float

    @classmethod
    def of(cls, batch: MicroBatch) -> StepLoad:
        num_tokens = num_samples = 0
        context = 0.0
        for item in batch.items:
            num_tokens += item.num_new
            num_samples += item.samples
            context += attended(item.start, item.num_new)
        return cls(num_tokens, context, num_samples)

    @classmethod
    def chunk(cls, start: float, num_new: float) -> StepLoad:
        """`num_new` prefill tokens from position `start` on, the last of which samples."""
        return cls(num_new, attended(start, num_new), 1)

    def plus(self, other: StepLoad) -> StepLoad:
        return StepLoad(
            self.num_tokens + other.num_tokens,
            self.context_tokens + other.context_tokens,
            self.num_samples + other.num_samples,
        )

    def split(self, parts: int) -> StepLoad:
        """One of `parts` equal shares."""
        return StepLoad(self.num_tokens / parts, self.context_tokens / parts, self.num_samples / parts)


def attended(start: float, num_new: float) -> float:
    """KV entries that `num_new` tokens from position `start` on read (causal, themselves included)."""
    return num_new * start + num_new * (num_new + 1) / 2


@dataclass(frozen=True, slots=True)
class StepSample:
    """One finished step of one stream, in seconds summed over its layers.

    exchange_s: dispatch sent to combine seen; ffn_s of it the slowest FFN rank computed.
    took_s: first to last stage.
    gang_tokens: rows of the merged batch, of all attention workers.
    in_flight: streams at work at any time of it.
    """

    stream: int
    load: StepLoad
    attention_s: float
    head_s: float
    ffn_s: float
    exchange_s: float
    gang_tokens: float
    took_s: float
    in_flight: Collection[int]


class _Costs:
    """The three curves of one way to run.

    The first guesses are those of a slow machine: a worker that has measured nothing takes few requests, and has
    measured after the first one.
    """

    def __init__(self) -> None:
        self.attention = Curve(4e-3, 2e-4, 2e-7)
        self.head = Curve(1e-3, 1e-4)
        self.ffn = Curve(4e-3, 2e-4)
        self.num_steps = 0  # that ran this way

    def begin_from(self, other: _Costs, own_factor: float, ffn_factor: float) -> None:
        """Know what the other way to run has taught, so many times as long."""
        self.attention = other.attention.scaled(own_factor)
        self.head = other.head.scaled(own_factor)
        self.ffn = other.ffn.scaled(ffn_factor)


class LatencyModel:
    """Curves of one attention worker and of the FFN side as seen from it. Main thread only.

    overlap: the FFN computes beside this worker (False in one process: topology mono).
    alone, ffn_alone: times as many threads compute a single stream (`threads_alone`) as one of several, here and at
    the FFN workers. Where these are more, its steps are learnt apart. What several would take follows from them, as if
    all computing were shared out; from the TRUSTED-th on their own steps correct that, so that a few of them, perhaps
    all of one size, need not teach what another size takes.
    """

    def __init__(self, *, overlap: bool = True, alone: float = 1.0, ffn_alone: float = 1.0):
        self._overlap = overlap
        self._speedups = (alone, ffn_alone)
        self._shared = _Costs()
        self._alone = _Costs() if max(self._speedups) > 1.0 else self._shared
        self.transfer_s = 2e-3 if overlap else 0.0
        self.link = LinkCost()
        self._num_cold = 0
        self._others = 0.0  # rows of other attention workers in our gangs
        self._loads: dict[int, StepLoad] = {}
        self._corrections: dict[int, float] = {}

    def observe(self, sample: StepSample) -> None:
        """Learn from one finished step."""
        if self._num_cold < COLD_STEPS:
            self._num_cold += 1
            return
        load = sample.load
        costs = self._learning(len(sample.in_flight))
        costs.num_steps += 1
        costs.attention.add(sample.attention_s, 1.0, load.num_tokens, load.context_tokens)
        if load.num_samples:
            costs.head.add(sample.head_s, 1.0, load.num_samples)
        if sample.gang_tokens:
            costs.ffn.add(sample.ffn_s, 1.0, sample.gang_tokens)
            self._others += 0.1 * (max(0.0, sample.gang_tokens - load.num_tokens) - self._others)
            self._observe_transfer(max(0.0, sample.exchange_s - sample.ffn_s), alone=len(sample.in_flight) <= 1)
        self._loads = {s: kept for s, kept in self._loads.items() if s in sample.in_flight}
        self._loads[sample.stream] = load
        if len(self._loads) >= len(sample.in_flight):  # else a stream beside it has not said yet what it computes
            self._observe_cycle(sample.took_s)
            if sample.gang_tokens:
                self._observe_link(sample)

    @property
    def num_steps(self) -> int:
        """Steps observed."""
        return sum(costs.num_steps for costs in {self._alone, self._shared})

    @property
    def attention(self) -> Curve:
        """The curve of several streams, and of a single one until several were seen; so are `head` and `ffn`."""
        return self._costs(2).attention

    @property
    def head(self) -> Curve:
        return self._costs(2).head

    @property
    def ffn(self) -> Curve:
        return self._costs(2).ffn

    def _learning(self, num_streams: int) -> _Costs:
        """The costs that a step beside so many streams, itself included, corrects."""
        own, known = self._own(num_streams), self._costs(num_streams)
        if known is not own:
            own.begin_from(known, *self.slowdowns(num_streams))
        return own

    def _own(self, num_streams: int) -> _Costs:
        """What steps of so many streams have taught."""
        return self._alone if num_streams == 1 else self._shared

    def _costs(self, num_streams: int) -> _Costs:
        """What is known of so many streams, or else of other numbers."""
        own = self._own(num_streams)
        other = self._shared if own is self._alone else self._alone
        return own if own.num_steps >= TRUSTED or other.num_steps < TRUSTED else other

    def step_s(self, load: StepLoad, num_streams: int = 1) -> tuple[float, float]:
        """(attention worker's time, FFN's time) of one stream's step, one of num_streams in flight."""
        costs = self._costs(num_streams)
        own_factor, ffn_factor = self.slowdowns(num_streams)
        own = costs.attention(1.0, load.num_tokens, load.context_tokens)
        if load.num_samples:
            own += costs.head(1.0, load.num_samples)
        if costs.num_steps and not costs.ffn.num_samples:
            return own_factor * own, 0.0  # an engine without FFN
        return own_factor * own, ffn_factor * costs.ffn(1.0, load.num_tokens + self._others)

    def slowdowns(self, num_streams: int) -> tuple[float, float]:
        """(attention, FFN): how many times longer so many streams take than the curves that stand for them say."""
        if self._costs(num_streams) is self._own(num_streams):
            return 1.0, 1.0
        own, ffn = self._speedups
        return (1.0 / own, 1.0 / ffn) if num_streams == 1 else (own, ffn)

    def cycle_s(self, loads: Iterable[StepLoad]) -> float:
        """Seconds in which each of these streams makes one step; 0 for none.

        max(sum of A, sum of F, the longest stream's A + F + C), corrected by what such cycles took lately.
        """
        loads = [load for load in loads if load.num_tokens]
        return self._ideal_cycle_s(loads) * self.correction(len(loads)) if loads else 0.0

    def correction(self, num_streams: int) -> float:
        """Measured / modelled cycle with so many streams; of the nearest number that was measured, else 1."""
        if not self._corrections:
            return 1.0
        nearest = min(self._corrections, key=lambda measured: (abs(measured - num_streams), measured))
        return self._corrections[nearest]

    def corrections(self, load: StepLoad) -> dict[int, float]:
        """All that were measured, by number of streams, for readers who know the curves of several streams only.

        load: one step of all sequences, at which a single stream's own curves are compared with those.
        """
        found = {}
        for m, correction in self._corrections.items():
            loads = [load.split(m)] * m
            ideal_s = self._ideal_cycle_s(loads, 2)
            found[m] = correction * self._ideal_cycle_s(loads) / ideal_s if ideal_s > 0.0 else correction
        return found

    def forget_correction(self, num_streams: int) -> None:
        """Measure that number of streams anew."""
        self._corrections.pop(num_streams, None)

    def _ideal_cycle_s(self, loads: Sequence[StepLoad], num_streams: int = 0) -> float:
        """num_streams: whose costs are taken, by default those of as many streams as there are loads."""
        known = {id(load): self.step_s(load, num_streams or len(loads)) for load in {id(x): x for x in loads}.values()}
        steps = [known[id(load)] for load in loads]  # an even split is one load, several times
        sum_a, sum_f = sum(a for a, _ in steps), sum(f for _, f in steps)
        if not self._overlap:
            return sum_a + sum_f
        return cycle_s([sum_a, sum_f], [a + f + self.transfer_s for a, f in steps])

    def _observe_transfer(self, seconds: float, *, alone: bool) -> None:
        """Learn a transfer time. With other streams at work an answer waits for them too: an upper bound."""
        if seconds < self.transfer_s:
            self.transfer_s += TRANSFER_FALL * (seconds - self.transfer_s)
        elif alone:
            self.transfer_s += TRANSFER_RISE * (min(seconds, OUTLIER * self.transfer_s + 1e-3) - self.transfer_s)

    def _observe_link(self, sample: StepSample) -> None:
        if self.num_steps < TRUSTED:
            return
        loads = list(self._loads.values())
        sides = [self.step_s(load, len(loads)) for load in loads]
        busiest_s = max(sum(own for own, _ in sides), sum(ffn for _, ffn in sides))
        seconds = max(SHORTEST_S, sample.exchange_s - sample.ffn_s)
        self.link.observe(sample.load.num_tokens, seconds, self.cycle_s(loads), len(loads), busiest_s)

    def _observe_cycle(self, took_s: float) -> None:
        loads = list(self._loads.values())
        ideal = self._ideal_cycle_s(loads)
        if ideal <= 0.0 or self.num_steps < TRUSTED:
            return
        known = self._corrections.get(len(loads))
        ratio = took_s / ideal
        if known is None:
            known = min(ratio, OUTLIER)
        else:
            known += CORRECTION_EMA * (min(ratio, OUTLIER * known) - known)
        low, high = CORRECTION_LIMITS
        self._corrections[len(loads)] = min(high, max(low, known))

"""What other numbers of attention and FFN workers would do, from what steps of the present ones cost. Pure.

How busy a worker is does not tell it: an FFN worker reads its weights whatever the batch, so it is busy long before it
is full. Here the load is spread over a candidate's workers, and the pipeline's closed form says what cycle comes of it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from afd.messages.membership import StepCosts
from afd.sched.cycle import cycle_s
from afd.sched.link import SLOWER
from afd.types import Topology

TRUSTED_STEPS = 200  # of a worker, before its costs are believed
IDLE_WEIGHT = 0.01  # of a worker that runs nothing now, in sequences: it still knows what steps cost
CORRECTIONS = (0.5, 2.0)
FINENESS = 1e-3  # relative, of a capacity
FFN_FIXED = 0.3  # share of a step that more FFN workers do not shorten: launches, and rows that each of them receives
MOST = 1e12  # tokens/s: where a model without any cost for a token ends


@dataclass(frozen=True, slots=True)
class TokenWork:
    """What each output token costs in rows computed and KV entries read, prefill of the prompts included."""

    rows: float = 1.0
    attended: float = 0.0


@dataclass(frozen=True, slots=True)
class StepLine:
    """Seconds of a stage for a step: base, and for each row."""

    base_s: float
    row_s: float

    def __call__(self, rows: float) -> float:
        return self.base_s + self.row_s * rows


@dataclass(frozen=True, slots=True)
class Bounds:
    """How long a cycle may take, and how many sequences an attention worker can hold."""

    tpot_s: float
    most_seqs: float = math.inf


@dataclass(frozen=True, slots=True)
class CostModel:
    """What the three parts of a step cost on a cluster of `size`, in seconds summed over layers, and what of it moves.

    attention_s, attention_seq_s: for each stream of an attention worker, and for each of its sequences, head included.
    ffn: of a gang, by number of FFN workers: the present one, and others that were seen.
    link_row_s: both ways of each row of one attention worker; None = not known.
    rows: of a sequence in a cycle: its decode, and its share of prefill.
    streams: numbers that a worker may use; it takes the best.
    correction: measured cycle over the one predicted here.
    """

    size: Topology
    attention_s: float
    attention_seq_s: float
    ffn: Mapping[int, StepLine]
    link_row_s: float | None
    rows: float = 1.0
    streams: range = range(1, 2)
    correction: float = 1.0

    @classmethod
    def of(cls, costs: Sequence[StepCosts], size: Topology, work: TokenWork, streams: range) -> CostModel | None:
        """The mean of the workers' costs, by their sequences; None where no worker has measured enough steps."""
        known = [each for each in costs if each.lines is not None and each.num_steps >= TRUSTED_STEPS]
        if not known:
            return None
        weights = [each.num_seqs + IDLE_WEIGHT for each in known]
        lines = [each.lines for each in known if each.lines is not None]

        def mean(values: Sequence[float]) -> float:
            return sum(weight * value for weight, value in zip(weights, values, strict=True)) / sum(weights)

        model = cls(
            size=size,
            attention_s=mean([line.attention[0] + line.head[0] for line in lines]),
            attention_seq_s=mean(
                [work.rows * line.attention[1] + work.attended * line.attention[2] + line.head[1] for line in lines]
            ),
            ffn={size.num_ffn: StepLine(*(mean([line.ffn[idx] for line in lines]) for idx in (0, 1)))},
            link_row_s=max((each.link_row_s for each in known if each.link_row_s is not None), default=None),
            rows=work.rows,
            streams=streams,
        )
        return replace(model, correction=mean([model._correction(each) for each in known]))

    def blended(self, older: CostModel, weight: float) -> CostModel:
        """The mean with what was measured before on the same cluster; `weight` is that of the newer one."""

        def mean(new: float, old: float) -> float:
            return weight * new + (1.0 - weight) * old

        num = self.size.num_ffn
        new, old = self.ffn[num], older.ffn[num]
        return replace(
            self,
            attention_s=mean(self.attention_s, older.attention_s),
            attention_seq_s=mean(self.attention_seq_s, older.attention_seq_s),
            ffn={num: StepLine(mean(new.base_s, old.base_s), mean(new.row_s, old.row_s))},
            correction=mean(self.correction, older.correction),
        )

    def cycle_s(self, size: Topology, num_seqs: float) -> float:
        """Seconds in which each of so many sequences, spread evenly over the workers of `size`, gets a token."""
        return self.correction * min(_cycle_s(self.parts(size, num_seqs, streams)) for streams in self.streams)

    def parts(self, size: Topology, num_seqs: float, num_streams: int) -> dict[str, float]:
        """Seconds of a cycle for which each device works, and of one stream's way: the longest is the cycle.

        An FFN worker of fewer holds more of the weights and computes more of each row. A link carries a row to every
        FFN worker at one end, and the rows of every attention worker at the other.
        """
        own = max(1.0, num_seqs / size.num_attention)
        streams = min(float(num_streams), own)
        attention_s = streams * self.attention_s + own * self.attention_seq_s
        ffn_s = streams * self.ffn_of(size.num_ffn)(max(num_seqs, size.num_attention) * self.rows / streams)
        ends = num_ends(size) / num_ends(self.size)
        bytes_s = ends * own * self.rows * (self.link_row_s or 0.0)
        way_s = (attention_s + ffn_s + bytes_s) / streams
        return {"attention": attention_s, "FFN": ffn_s, "network": SLOWER * bytes_s, "latency": way_s}

    def bound(self, size: Topology, num_seqs: float) -> str:
        """Which part makes the cycle."""
        best = min((self.parts(size, num_seqs, streams) for streams in self.streams), key=_cycle_s)
        return max(best, key=lambda name: best[name])

    def serves(self, size: Topology, tokens_per_s: float, bounds: Bounds) -> bool:
        """Whether `size` gives so many tokens/s within the bounds.

        Throughput rises with the sequences, so it is enough to look at the most that the bounds allow: those with which
        a cycle as long as the target gives that throughput.
        """
        num_seqs, most = max(1.0, tokens_per_s * bounds.tpot_s), bounds.most_seqs * size.num_attention
        if num_seqs <= most:
            return self.cycle_s(size, num_seqs) <= bounds.tpot_s
        return most >= 1.0 and tokens_per_s * self.cycle_s(size, most) <= most

    def capacity(self, size: Topology, bounds: Bounds) -> float:
        """Most tokens/s that `size` serves within the bounds."""
        low, high = 0.0, 1.0
        while self.serves(size, high, bounds) and high < MOST:
            low, high = high, 2.0 * high
        while high - low > FINENESS * high and high > FINENESS:
            middle = (low + high) / 2.0
            low, high = (middle, high) if self.serves(size, middle, bounds) else (low, middle)
        return low

    def ffn_of(self, num_ffn: int) -> StepLine:
        """A step of so many FFN workers.

        What of it divides is known where two numbers were seen. Else it is guessed with caution: most for more workers,
        all for fewer.
        """
        here = self.size.num_ffn
        line = self.ffn[num_ffn if num_ffn in self.ffn else here]
        if num_ffn in self.ffn:
            return line
        if len(self.ffn) > 1:
            there = min((num for num in self.ffn if num != here), key=lambda num: (abs(num - num_ffn), num))
            other = self.ffn[there]
            return StepLine(
                _divided_s(here, line.base_s, there, other.base_s, num_ffn),
                _divided_s(here, line.row_s, there, other.row_s, num_ffn),
            )
        share = here / num_ffn
        if share < 1.0:
            share = FFN_FIXED + (1.0 - FFN_FIXED) * share
        return StepLine(share * line.base_s, share * line.row_s)

    def _correction(self, costs: StepCosts) -> float:
        """Measured cycle of a worker over what is predicted here for its present load.

        It says how long cycles are beside its own model, of two sides and a latency; a link that binds is a part here.
        """
        known, m = costs.corrections, costs.num_streams
        if not known or not costs.num_seqs:
            return 1.0
        parts = self.parts(self.size, costs.num_seqs * self.size.num_attention, m)
        streams = min(float(m), costs.num_seqs)
        way_s = (parts["attention"] + parts["FFN"]) / streams + costs.transfer_s
        own_s = known[min(known, key=lambda seen: (abs(seen - m), seen))] * cycle_s(
            [parts["attention"], parts["FFN"]], [way_s]
        )
        low, high = CORRECTIONS
        return min(high, max(low, own_s / _cycle_s(parts)))


def _divided_s(a: int, a_s: float, b: int, b_s: float, num: int) -> float:
    """seconds(n) = fixed + divided / n through two points, neither part negative, at `num`."""
    divided_s = min(max(0.0, (a_s - b_s) / (1.0 / a - 1.0 / b)), a * a_s)
    return a_s + divided_s * (1.0 / num - 1.0 / a)


def num_ends(size: Topology) -> int:
    """Times that a row's bytes pass the busier end of its link."""
    return max(size.num_attention, size.num_ffn)


def _cycle_s(parts: dict[str, float]) -> float:
    *devices_s, way_s = parts.values()
    return cycle_s(devices_s, [way_s])

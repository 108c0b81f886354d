"""What came out: counted while it happens, summed up at the end."""

from __future__ import annotations

from array import array
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from afd.ffn.gang import GangBatch
from afd.simulate.outcomes import Outcome


@dataclass(frozen=True, slots=True)
class Spread:
    """Mean and percentiles of a time, in milliseconds, by nearest rank; 0 where nothing was measured."""

    mean_ms: float
    p50_ms: float
    p90_ms: float
    p99_ms: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Spread:
        if not seconds:
            return cls(0.0, 0.0, 0.0, 0.0)
        ordered = sorted(seconds)
        p50, p90, p99 = (
            1e3 * ordered[min(len(ordered) - 1, int(share * len(ordered)))] for share in (0.50, 0.90, 0.99)
        )
        return cls(1e3 * sum(ordered) / len(ordered), p50, p90, p99)


@dataclass(frozen=True, slots=True)
class Report:
    """The result of a simulation.

    duration_s: first arrival to the end of the last request (answered, refused or lost), simulated.
    num_good: answered within both targets.
    cached_tokens: of the answered requests' prompts, found in a prefix cache.
    e2el: from a request's arrival to its last token.
    attention_workers: that were there, on average.
    attention_busy, ffn_busy: share of the time in which workers were there.
    attention_bubble, ffn_bubble: idle share while a step was in flight on that worker, or anywhere.
    gang_size: attention workers a batch.
    gang_tokens: its rows.
    lockstep_loss: share by which a gang's slowest member exceeds its mean.
    imbalance: busiest attention worker over the mean.
    timeline: (seconds, what happened to the cluster).
    """

    duration_s: float
    num_requests: int
    num_answered: int
    num_good: int
    refused: dict[str, int]
    lost: dict[str, int]
    input_tokens: int
    cached_tokens: int
    output_tokens: int
    request_throughput: float
    output_throughput: float
    request_goodput: float
    ttft: Spread
    tpot: Spread
    e2el: Spread
    attention_workers: float
    attention_busy: float
    attention_bubble: float
    ffn_busy: float
    ffn_bubble: float
    gang_size: float
    gang_tokens: float
    lockstep_loss: float
    imbalance: float
    max_queue: int
    max_live: int
    migrated: int
    preempted: int
    timeline: tuple[tuple[float, str], ...]

    def payload(self) -> dict[str, Any]:
        """The values as JSON, under the names of `afd bench --json` where it has them."""
        values = asdict(self)
        for name in ("ttft", "tpot", "e2el"):
            spread = values.pop(name)
            values[f"mean_{name}_ms"], values[f"median_{name}_ms"] = spread["mean_ms"], spread["p50_ms"]
            values[f"p90_{name}_ms"], values[f"p99_{name}_ms"] = spread["p90_ms"], spread["p99_ms"]
        return values


class Results:
    """Books of a simulation: 24 bytes a finished request, the rest does not grow."""

    def __init__(self, tpot_s: float, ttft_s: float):
        self._tpot_s, self._ttft_s = tpot_s, ttft_s
        self._ttfts, self._tpots, self._e2els = array("d"), array("d"), array("d")
        self._refused: Counter[str] = Counter()
        self._lost: Counter[str] = Counter()
        self._num_good = 0
        self._num_failed = 0
        self._input_tokens = 0
        self._cached_tokens = 0
        self._output_tokens = 0
        self._ended_at = 0.0
        self._attention_busy_s: defaultdict[int, float] = defaultdict(float)  # by rank
        self._joined_at: dict[str, float] = {}  # attention workers that are there, by key
        self._worker_s = 0.0  # of those that are gone
        self._flying_s = 0.0
        self._since: dict[int, float] = {}
        self._any_flying_s = 0.0
        self._any_since = 0.0
        self.ffn_busy_s = 0.0  # of one rank, on average
        self._num_batches = 0
        self._num_members = 0
        self._num_rows = 0
        self._slowest_s = 0.0
        self._mean_s = 0.0
        self._timeline: list[tuple[float, str]] = []
        self._max_queue = 0
        self._max_live = 0
        self.num_arrived = 0
        self.num_news = 0  # arrivals and ends; `Simulation.run` looks at it after every event

    @property
    def num_ended(self) -> int:
        return len(self._ttfts) + self._num_failed

    # -- requests -----------------------------------------------------------------------------------------

    def arrived(self) -> None:
        self.num_news += 1
        self.num_arrived += 1
        self._max_live = max(self._max_live, self.num_arrived - self.num_ended)

    def ended(self, outcome: Outcome, now: float) -> None:
        self.num_news += 1
        self._ended_at = now
        if outcome.ending != "answered":
            self._num_failed += 1
            (self._refused if outcome.ending == "refused" else self._lost)[outcome.reason] += 1
            return
        ttft_s, tpot_s = outcome.ttft_s or 0.0, outcome.tpot_s or 0.0
        self._ttfts.append(ttft_s)
        self._e2els.append(outcome.e2el_s)
        if outcome.tpot_s is not None:
            self._tpots.append(tpot_s)
        self._num_good += ttft_s <= self._ttft_s and tpot_s <= self._tpot_s
        self._input_tokens += outcome.input_len
        self._cached_tokens += outcome.cached_tokens
        self._output_tokens += outcome.output_len

    def queued(self, num_sequences: int) -> None:
        """Sequences in the gateway's queue now."""
        if num_sequences > self._max_queue:
            self._max_queue = num_sequences

    def note(self, at_s: float, text: str) -> None:
        """Something happened to the cluster."""
        self._timeline.append((round(at_s, 3), text))

    # -- workers ------------------------------------------------------------------------------------------

    def took_off(self, rank: int, now: float) -> None:
        """An attention worker has work in flight again."""
        if not self._since:
            self._any_since = now
        self._since[rank] = now

    def landed(self, rank: int, now: float) -> None:
        """The worker has no step in flight any more."""
        self._flying_s += now - self._since.pop(rank)
        if not self._since:
            self._any_flying_s += now - self._any_since

    def joined(self, key: str, now: float) -> None:
        """An attention worker serves from now on."""
        self._joined_at[key] = now

    def left(self, key: str, now: float) -> None:
        """It is gone."""
        self._worker_s += now - self._joined_at.pop(key)

    def attention_busy(self, rank: int, seconds: float) -> None:
        self._attention_busy_s[rank] += seconds

    def gang(self, batch: GangBatch, attention_s: Sequence[float], weight: int = 1) -> None:
        """One merged batch, of `weight` layers. attention_s: of one layer, by member."""
        self._num_batches += weight
        self._num_members += weight * len(attention_s)
        self._num_rows += weight * batch.num_tokens
        self._slowest_s += weight * max(attention_s)
        self._mean_s += weight * sum(attention_s) / len(attention_s)

    # -- the end ------------------------------------------------------------------------------------------

    def report(self, *, migrated: int, preempted: int) -> Report:
        duration_s = self._ended_at or 1.0
        num_batches = max(1, self._num_batches)
        busy_s = self._attention_busy_s.values()
        mean_busy_s = sum(busy_s) / max(1, len(busy_s))
        worker_s = self._worker_s + sum(max(0.0, self._ended_at - at_s) for at_s in self._joined_at.values())
        return Report(
            duration_s=self._ended_at,
            num_requests=self.num_arrived,
            num_answered=len(self._ttfts),
            num_good=self._num_good,
            refused=dict(self._refused),
            lost=dict(self._lost),
            input_tokens=self._input_tokens,
            cached_tokens=self._cached_tokens,
            output_tokens=self._output_tokens,
            request_throughput=len(self._ttfts) / duration_s,
            output_throughput=self._output_tokens / duration_s,
            request_goodput=self._num_good / duration_s,
            ttft=Spread.of(self._ttfts),
            tpot=Spread.of(self._tpots),
            e2el=Spread.of(self._e2els),
            attention_workers=worker_s / duration_s,
            attention_busy=sum(busy_s) / worker_s if worker_s else 0.0,
            attention_bubble=max(0.0, 1.0 - sum(busy_s) / self._flying_s) if self._flying_s else 0.0,
            ffn_busy=self.ffn_busy_s / duration_s,
            ffn_bubble=max(0.0, 1.0 - self.ffn_busy_s / self._any_flying_s) if self._any_flying_s else 0.0,
            gang_size=self._num_members / num_batches,
            gang_tokens=self._num_rows / num_batches,
            lockstep_loss=self._slowest_s / self._mean_s - 1.0 if self._mean_s else 0.0,
            imbalance=max(busy_s) / mean_busy_s if mean_busy_s else 1.0,
            max_queue=self._max_queue,
            max_live=self._max_live,
            migrated=migrated,
            preempted=preempted,
            timeline=tuple(self._timeline),
        )

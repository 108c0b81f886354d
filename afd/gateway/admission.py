"""The gateway's queue: sequences that no worker has room for yet, by priority then age, with deadlines; and the
forecast of how long one waits in it. Pure."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Collection, Sequence

from afd.gateway.sequence import ClientSequence
from afd.messages.serving import PLACE_RANKS, WorkerStats

# Nobody is let in to wait for nothing: the prediction may take this share of the time there is, less the age of reports
# and probes.
PLANNED = 0.7
STALENESS_S = 0.1
LEARN = 0.2  # weight of the newest wait in the correction of forecasts
CORRECTION_LIMITS = (0.2, 5.0)


def predicted_wait_s(workers: Collection[WorkerStats], num_ahead: int, *, at_least_s: float = 0.0) -> float:
    """Seconds until a sequence with `num_ahead` others before it gets a place at one of the workers, by their reports.

    A worker that reports no places to come has room now.
    at_least_s: a bound that somebody gave who knows better than the reports.
    """
    if not all(stats.places_s for stats in workers):
        return at_least_s
    moments = sorted(place_s for stats in workers for place_s in stats.places_s)
    if not moments:
        return at_least_s
    num = float(num_ahead + 1)
    num_told = _num_places(workers, moments[-1])
    if num_told >= num:
        wait_s = moments[bisect_left(moments, num, key=lambda moment_s: _num_places(workers, moment_s))]
    else:
        wait_s = moments[-1] + (num - num_told) / sum(1.0 / _interval_s(stats.places_s) for stats in workers)
    return max(at_least_s, wait_s)


def _num_places(workers: Collection[WorkerStats], until_s: float) -> float:
    """How many requests find a place at these workers until then; beyond what one tells, as many a second as before."""
    total = 0.0
    for stats in workers:
        idx = bisect_right(stats.places_s, until_s)
        if idx == len(stats.places_s):
            total += PLACE_RANKS[idx - 1] + 1 + (until_s - stats.places_s[-1]) / _interval_s(stats.places_s)
        else:
            total += PLACE_RANKS[idx]
    return total


def _interval_s(places_s: Sequence[float]) -> float:
    """Between two places, on average of those that are told."""
    first_s, last_s, last = places_s[0], places_s[-1], PLACE_RANKS[len(places_s) - 1]
    interval_s: float = (last_s - first_s) / last if last_s > first_s else last_s / (last + 1)
    return interval_s if interval_s > 1e-6 else 1e-6


def is_too_long(wait_s: float, patience_s: float) -> bool:
    """True when a newcomer would probably not get its place within `patience_s`."""
    return wait_s > 0.0 and wait_s + STALENESS_S > PLANNED * patience_s


def prefill_s(workers: Collection[WorkerStats], num_prompt: int) -> float:
    """Seconds from a place to the first token, at the quickest worker."""
    return num_prompt * min((stats.prefill_token_s for stats in workers), default=0.0)


class Correction:
    """Corrects predicted times by what things took lately, compared with what had been predicted for them.

    caution: 0.5 = on average; nearer to 1: so that few take longer, for what has to be over in time.
    """

    def __init__(self, caution: float = 0.5) -> None:
        self._factor = 1.0
        self._learn_up, self._learn_down = 2 * LEARN * caution, 2 * LEARN * (1 - caution)

    def apply(self, predicted_s: float) -> float:
        """The time to be expected where `predicted_s` is predicted."""
        return self._factor * predicted_s

    def took(self, took_s: float, predicted_s: float) -> None:
        """Something took so long that had been predicted to take `predicted_s`."""
        low, high = CORRECTION_LIMITS
        ratio = (took_s + STALENESS_S) / (predicted_s + STALENESS_S)
        ratio = min(high, max(low, ratio))
        self._factor += (self._learn_up if ratio > self._factor else self._learn_down) * (ratio - self._factor)

    def took_longer(self, than_s: float, predicted_s: float) -> None:
        """Something was given up after so long."""
        if than_s > self.apply(predicted_s):
            self.took(than_s, predicted_s)


class AdmissionQueue:
    """Pure. At most a thousand or so entries, so plain sorting beats a heap with lazy removal."""

    def __init__(self, max_sequences: int):
        self.max_sequences = max_sequences
        self._waiting: dict[str, ClientSequence] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def room_for(self, num_sequences: int) -> bool:
        return len(self._waiting) + num_sequences <= self.max_sequences

    def push(self, sequence: ClientSequence) -> None:
        """Add one. Sequences that come back (refused, migrating) keep their age and may exceed the bound."""
        self._waiting[sequence.req_id] = sequence

    def in_order(self) -> list[ClientSequence]:
        """All, first in line first."""
        return sorted(self._waiting.values(), key=lambda sequence: (sequence.priority, sequence.order))

    def num_ahead(self, priority: int, order: int | None = None) -> int:
        """How many come before a sequence of that priority and order (None: a new one)."""
        return sum(
            (other.priority, other.order) < (priority, order) if order is not None else other.priority <= priority
            for other in self._waiting.values()
        )

    def discard(self, sequence: ClientSequence) -> None:
        """Take one out of line, if it is there."""
        self._waiting.pop(sequence.req_id, None)

    def take_expired(self, now: float) -> list[ClientSequence]:
        """Take out all whose deadline has passed."""
        late = [sequence for sequence in self._waiting.values() if sequence.deadline <= now]
        for sequence in late:
            self.discard(sequence)
        return late

    def take_all(self) -> list[ClientSequence]:
        """Take out all, first in line first."""
        sequences = self.in_order()
        self._waiting.clear()
        return sequences

"""The gateway's queue: sequences that no worker has room for yet, by priority then age, with deadlines; and the
forecast of how long one waits in it. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection

from afd.gateway.sequence import Sequence
from afd.messages.serving import WorkerStats

# Whoever is let in shall not wait in vain: the prediction may take this share of the time there is, less what reports
# and probes are old.
PLANNED = 0.7
STALENESS_S = 0.1
WINDOW_S = 5.0  # over which the line's pace is measured
ENOUGH = 4  # starts, and
SETTLED_S = 0.5  # seconds of waiting, that make a pace
KEPT_S = 10.0  # a pace measured so long ago still tells more than a worker's guess
LEARN = 0.2  # weight of the newest wait in the correction of forecasts
CORRECTION_LIMITS = (0.2, 3.0)


def predicted_wait_s(workers: Collection[WorkerStats], num_ahead: int, *, first_s: float | None = None) -> float:
    """Until a sequence with `num_ahead` others before it gets a place at one of the workers, as these tell.

    first_s: when the first place is free, if somebody knows better than the workers' last reports.
    """
    if first_s is None:
        first_s = min((stats.predicted_wait_s for stats in workers), default=0.0)
    places_per_s = sum(1.0 / stats.place_interval_s for stats in workers if stats.place_interval_s > 0.0)
    return first_s + (num_ahead / places_per_s if places_per_s else 0.0)


def is_too_long(wait_s: float, patience_s: float) -> bool:
    """True when a newcomer would probably not get its place within `patience_s`."""
    return wait_s > 0.0 and wait_s + STALENESS_S > PLANNED * patience_s


def prefill_s(workers: Collection[WorkerStats], num_prompt: int) -> float:
    """From a place to the first token, at the quickest worker."""
    return num_prompt * min((stats.prefill_token_s for stats in workers), default=0.0)


class WaitForecast:
    """How long a sequence waits in line: by the line's own pace while it moves, before that by the workers' reports.

    Both are multiplied by what waits took of late beside what had been forecast for them.
    """

    def __init__(self) -> None:
        self._waiting_since: float | None = None
        self._starts: deque[float] = deque()
        self._interval_s = 0.0
        self._measured_at = float("-inf")
        self.correction = 1.0

    def note_line(self, is_empty: bool, now: float) -> None:
        """Call whenever the line may have become empty, or is empty no longer."""
        if is_empty:
            self._measure(now)
            self._waiting_since = None
            self._starts.clear()
        elif self._waiting_since is None:
            self._waiting_since = now

    def started(self, now: float) -> None:
        """A sequence got its first token."""
        if self._waiting_since is not None:
            self._starts.append(now)

    def waited(self, took_s: float, forecast_s: float) -> None:
        """A sequence of the line got its place after `took_s`; `forecast_s` had been forecast, corrected as it was."""
        low, high = CORRECTION_LIMITS
        ratio = (took_s + STALENESS_S) / (forecast_s + STALENESS_S)
        target = min(high, max(low, self.correction * ratio))
        self.correction += LEARN * (target - self.correction)

    def waited_in_vain(self, waited_s: float, forecast_s: float) -> None:
        """A sequence left the line without a place after `waited_s`: its wait would have been longer than that."""
        if waited_s > forecast_s:
            self.waited(waited_s, forecast_s)

    def wait_s(
        self, workers: Collection[WorkerStats], num_ahead: int, now: float, *, first_s: float | None = None
    ) -> float:
        """Seconds until a sequence with `num_ahead` others before it gets its place; see `predicted_wait_s`."""
        self._measure(now)
        if now - self._measured_at <= KEPT_S:
            return self.correction * (num_ahead + 1) * self._interval_s
        return self.correction * predicted_wait_s(workers, num_ahead, first_s=first_s)

    def _measure(self, now: float) -> None:
        if self._waiting_since is None:
            return
        begun_at = max(self._waiting_since, now - WINDOW_S)
        while self._starts and self._starts[0] < begun_at:
            self._starts.popleft()
        if len(self._starts) >= ENOUGH and now - begun_at >= SETTLED_S:
            self._interval_s, self._measured_at = (now - begun_at) / len(self._starts), now


class AdmissionQueue:
    """Pure. At most a thousand or so entries, so plain sorting beats a heap with lazy removal."""

    def __init__(self, max_sequences: int):
        self.max_sequences = max_sequences
        self._waiting: dict[str, Sequence] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def room_for(self, num_sequences: int) -> bool:
        return len(self._waiting) + num_sequences <= self.max_sequences

    def push(self, sequence: Sequence) -> None:
        """Add one. Sequences that come back (refused, migrating) keep their age and may exceed the bound."""
        self._waiting[sequence.req_id] = sequence

    def in_order(self) -> list[Sequence]:
        """All, first in line first."""
        return sorted(self._waiting.values(), key=lambda sequence: (sequence.priority, sequence.order))

    def num_ahead(self, priority: int, order: int | None = None) -> int:
        """How many come before a sequence of that priority and order (None: a new one)."""
        return sum(
            (other.priority, other.order) < (priority, order) if order is not None else other.priority <= priority
            for other in self._waiting.values()
        )

    def discard(self, sequence: Sequence) -> None:
        """Take one out of line, if it is there."""
        self._waiting.pop(sequence.req_id, None)

    def take_expired(self, now: float) -> list[Sequence]:
        """Take out all whose deadline has passed."""
        late = [sequence for sequence in self._waiting.values() if sequence.deadline <= now]
        for sequence in late:
            self.discard(sequence)
        return late

    def take_all(self) -> list[Sequence]:
        """Take out all, first in line first."""
        sequences = self.in_order()
        self._waiting.clear()
        return sequences

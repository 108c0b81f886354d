"""What steps of a given size take, learnt from those that ran: a line, held between bounds that follow from what was
seen. Pure.

A device that runs more rows at once never takes less time, and never more time a row: below some number of rows the
weights' bytes bound a step (a plateau), above it the arithmetic does (proportional). So a step of n rows takes at least
what a smaller one took, and at most n / n' times what one of n' < n rows took. Between the sizes that were seen lately,
and a little beyond, a line is fitted; farther out nothing is believed but that second bound.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from operator import mul, truediv

from afd.sched.trend import Trend

MEASURED = 0.15  # standard deviation of a measured step, relative to it
DRIFT = 0.01  # of a coefficient, per step
FLOOR = 0.1  # and at least so much of what the first step alone would make of it
MOST = 5.0
TRUSTED = 4  # samples after which a curve may call a sample an outlier
OUTLIER = 2.5  # a longer step than so many times the expected one counts as that: a hiccup is not a cost
SMALLEST_S = 1e-5
GROWTH = 1.15  # sizes so many times the largest one seen are still believed to be on the line,
FEW = 4.0  # and so many more rows: few rows never fill a device
TOLERANCE = 0.1  # share of a step by which what was seen of one size may contradict the line
CONFIRMED = 2  # steps of about one size that show how long it takes at least: a hiccup is longer, none is shorter
MEMORY = 200  # steps after which a size that did not come again is forgotten
HICCUP = 1.4  # a step longer than so many times what its size took counts as that
RECENT = 0.3  # weight of the newest step of a size
BUCKETS = 4  # sizes to an octave that are told apart


class Curve:
    """seconds = line(size) + slope * (further feature), learnt by a Kalman filter; no coefficient is negative.

    Features: the constant 1, the size (rows), and optionally one that adds to the time by itself (KV entries read). A
    measurement is uncertain by MEASURED of the expected time; a coefficient by what the first step alone would make of
    it, and by another DRIFT of its value with every step, since machines change. What no step tells (all of the same
    size, or a slope smaller than the noise) therefore stays as it was known, and is no slope before one was seen.
    """

    def __init__(self, *guess: float):
        """guess: coefficients until the first step has been measured. The further feature's may be MOST times its
        guess, as far as is known at first."""
        self._values = list(guess)
        self._most = [MOST * value for value in guess]
        self._scale = list(guess)
        self._covariance: list[list[float]] = []
        self._seen = SeenSizes()
        self.trend = Trend(len(guess))  # for readers who look farther than the next steps
        self.num_samples = 0

    @property
    def coefficients(self) -> tuple[float, ...]:
        """Coefficients of the line and of the further feature."""
        return tuple(self._values)

    def __call__(self, *features: float) -> float:
        """Predicted seconds."""
        size, others_s, largest = features[1], self._others_s(features), self._seen.largest
        if not largest:
            return self._line_s(size) + others_s
        reach = max(largest + FEW, GROWTH * largest)
        low_s, high_s = self._seen.bounds_s(min(size, reach), self._slope)
        own_s = min(high_s, max(low_s, self._line_s(min(size, reach))))
        return own_s * max(1.0, size / reach) + others_s

    def add(self, seconds: float, *features: float) -> None:
        """Learn from one measured step."""
        if not self.num_samples:
            self._begin(seconds, features)
        expected_s = math.fsum(map(mul, self._values, features))
        if self.num_samples >= TRUSTED:
            seconds = min(seconds, OUTLIER * max(expected_s, self(*features)))
        self.num_samples += 1
        self.trend.add(seconds, features, max(SMALLEST_S, expected_s))
        self._correct(seconds - expected_s, expected_s, features)
        self._seen.add(features[1], seconds, features[2] if len(features) > 2 else 0.0)

    def scaled(self, factor: float) -> Curve:
        """What is known of work that takes `factor` times as long."""
        other = Curve(*(factor * most / MOST for most in self._most))
        other._values = [factor * value for value in self._values]
        other._scale = [factor * value for value in self._scale]
        other._covariance = [[factor * factor * entry for entry in row] for row in self._covariance]
        other._seen = self._seen.scaled(factor)
        other.trend = self.trend.scaled(factor)
        other.num_samples = self.num_samples
        return other

    def _line_s(self, size: float) -> float:
        return self._values[0] + self._values[1] * size

    @property
    def _slope(self) -> float:
        """Seconds for each of the further feature."""
        return self._values[2] if len(self._values) > 2 else 0.0

    def _others_s(self, features: tuple[float, ...]) -> float:
        return self._slope * features[2] if len(features) > 2 else 0.0

    def _begin(self, seconds: float, features: tuple[float, ...]) -> None:
        """The first step: all of it may be constant, or any feature's."""
        self._scale = [max(seconds, SMALLEST_S) / max(1.0, feature) for feature in features]
        self._scale[2:] = map(min, self._scale[2:], self._most[2:])
        self._values = [seconds, *(0.0 for _ in features[1:])]
        size = range(len(features))
        self._covariance = [[self._scale[i] ** 2 if i == j else 0.0 for j in size] for i in size]

    def _correct(self, error_s: float, expected_s: float, features: tuple[float, ...]) -> None:
        covariance = self._covariance
        spread = [sum(map(mul, row, features)) for row in covariance]
        variance = sum(map(mul, spread, features)) + (MEASURED * max(expected_s, SMALLEST_S)) ** 2
        for i, value in enumerate(self._values):
            gain = spread[i] / variance
            value = self._values[i] = max(0.0, value + gain * error_s)
            row = covariance[i]
            for j, other in enumerate(spread):
                row[j] -= gain * other
            row[i] += (DRIFT * max(value, FLOOR * self._scale[i])) ** 2
        self._bound()

    def _bound(self) -> None:
        """No coefficient gets less certain than it was at first."""
        for i, row in enumerate(self._covariance):
            limit = max(self._values[i], self._scale[i]) ** 2
            if row[i] > limit:
                shrink = math.sqrt(limit / row[i])
                for j in range(len(row)):
                    row[j] *= shrink
                    self._covariance[j][i] *= shrink


class SeenSizes:
    """What steps of each size took lately, and what that says of others.

    largest: the largest size of the last MEMORY steps, or so; 0 = none yet.
    """

    def __init__(self) -> None:
        self._entries: dict[int, _Seen] = {}
        self._num_steps = 0
        self._tables: _Tables | None = None
        self.largest = 0.0

    def add(self, size: float, seconds: float, further: float) -> None:
        """One step of so many rows, and so much of the further feature; a size of 0 says nothing."""
        if size <= 0.0:
            return
        self._num_steps += 1
        bucket = round(BUCKETS * math.log2(size))
        entry = self._entries.get(bucket)
        if entry is None:
            entry = self._entries[bucket] = _Seen()
        entry.add(size, seconds, further, self._num_steps)
        if self._num_steps % MEMORY == 0:
            oldest = self._num_steps - MEMORY
            self._entries = {key: seen for key, seen in self._entries.items() if seen.step >= oldest}
            self.largest = max(seen.size for seen in self._entries.values())
        self._tables = None
        self.largest = max(self.largest, size)

    def bounds_s(self, size: float, slope: float) -> tuple[float, float]:
        """Least and most seconds that so many rows can take, if the steps that were seen are right to TOLERANCE.

        slope: seconds that go to each of the further feature; it changes with each step only.
        """
        if self._tables is None:
            self._tables = _Tables.of(sorted(self._entries.values(), key=lambda seen: seen.size), slope)
        return self._tables.bounds_s(size)

    def scaled(self, factor: float) -> SeenSizes:
        """The same of work that takes `factor` times as long."""
        other = SeenSizes()
        other._num_steps, other.largest = self._num_steps, self.largest
        other._entries = {
            bucket: replace(seen, seconds=factor * seen.seconds) for bucket, seen in self._entries.items()
        }
        return other


@dataclass(slots=True)
class _Seen:
    """Moving averages of the steps of about one size. step: the last one of them."""

    size: float = 0.0
    seconds: float = 0.0
    further: float = 0.0
    step: int = 0
    num_steps: int = 0

    def add(self, size: float, seconds: float, further: float, step: int) -> None:
        if self.num_steps:
            seconds = min(seconds, HICCUP * self.seconds)
        self.num_steps += 1
        weight = max(RECENT, 1.0 / self.num_steps)
        self.size += weight * (size - self.size)
        self.seconds += weight * (seconds - self.seconds)
        self.further += weight * (further - self.further)
        self.step = step


@dataclass(frozen=True, slots=True)
class _Tables:
    """Bounds by bisection in what a size takes at least and at most.

    Of the sizes below each place: the largest least, the smallest most for each row; of those from it on: the smallest
    most, the largest least for each row.
    """

    sizes: list[float]
    least_below_s: list[float]
    most_rate_below_s: list[float]
    most_above_s: list[float]
    least_rate_above_s: list[float]

    @classmethod
    def of(cls, entries: Sequence[_Seen], slope: float) -> _Tables:
        sizes = [seen.size for seen in entries]
        at_least, at_most = [], []
        for seen in entries:
            rows_s, unsure_s = max(0.0, seen.seconds - slope * seen.further), TOLERANCE * seen.seconds
            at_most.append(rows_s + unsure_s)
            at_least.append(max(0.0, rows_s - unsure_s) if seen.num_steps >= CONFIRMED else 0.0)
        most_rates, least_rates = list(map(truediv, at_most, sizes)), list(map(truediv, at_least, sizes))
        return cls(
            sizes,
            list(accumulate(at_least, max, initial=0.0)),
            list(accumulate(most_rates, min, initial=math.inf)),
            list(accumulate(reversed(at_most), min, initial=math.inf))[::-1],
            list(accumulate(reversed(least_rates), max, initial=0.0))[::-1],
        )

    def bounds_s(self, size: float) -> tuple[float, float]:
        """(least, most) seconds of a step of that size."""
        place = bisect_left(self.sizes, size)
        return (
            max(self.least_below_s[place], size * self.least_rate_above_s[place]),
            min(self.most_above_s[place], size * self.most_rate_below_s[place]),
        )

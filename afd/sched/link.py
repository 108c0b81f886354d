"""What the bytes of a row cost on the way to the FFN workers and back, learnt whether or not the link binds. Pure.

A step's stages tell what an exchange took beyond the FFN's computing. That is the way itself where nobody stood in it:
with one stream in flight, or where neither side is busy for all of a cycle. Where one is, the rows also waited for that
side: such steps only bound what a row can cost, the largest of them closely.
"""

from __future__ import annotations

import math

SLOWER = 2 / 3
"""Share of the slower direction: rows go out in 8 bits and come back in 16."""
BUSY = 0.85  # share of a cycle from which a side counts as what binds
ENOUGH = 32  # steps without hindrance
FORGETTING = 1.001  # of the least seen for a row, with each step
KEPT = 0.998  # of older steps in the mean, with each newer one


class LinkCost:
    """The mean of the steps that nobody hindered, and no more than any step leaves for a row. Latency is part of it."""

    def __init__(self) -> None:
        self._num_free = 0
        self._seconds = self._rows = 0.0
        self._most_row_s = math.inf

    @property
    def row_s(self) -> float | None:
        """Seconds of one row, both directions together, summed over the layers; None = no step has shown anything."""
        if not math.isfinite(self._most_row_s):
            return None
        return min(self._seconds / self._rows, self._most_row_s) if self._num_free >= ENOUGH else self._most_row_s

    def observe(self, rows: float, seconds: float, cycle_s: float, num_streams: int, busiest_s: float) -> None:
        """One step of so many rows. seconds: its exchanges less the FFN's computing.

        cycle_s: what a step of each of `num_streams` takes, on average; of it, the busier side computes for busiest_s.
        A link cannot be busier than all the time: each stream has it for cycle_s / num_streams at most.
        """
        self._most_row_s = min(FORGETTING * self._most_row_s, seconds / rows)
        if num_streams > 1:
            seconds = min(seconds, cycle_s / (SLOWER * num_streams))
        if num_streams == 1 or busiest_s <= BUSY * cycle_s:
            self._num_free += 1
            self._seconds = KEPT * self._seconds + seconds
            self._rows = KEPT * self._rows + rows

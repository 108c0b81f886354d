"""Whether a wait should begin with busy polling. Pure.

Polling shared memory saves a sleep and a wake-up (tens of microseconds) when the answer comes within the budget, and
costs the budget when it does not: on a host whose cores are all busy it even keeps the peer from its core. So a
rank polls for as long as that pays: after a miss it skips polling for a while, after every further miss twice as long.
"""

from __future__ import annotations

_MOST_SKIPPED = 63  # waits: one try in 64 costs next to nothing and notices when things change


class SpinPolicy:
    """Remembers how polling has gone."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._skip = 0  # waits to let pass after the next miss
        self._left = 0  # waits still to let pass

    def budget_s(self) -> float:
        """How long to poll in this wait; 0.0 for not at all. To be followed by `result` unless 0.0."""
        if self._left > 0:
            self._left -= 1
            return 0.0
        return self._limit_s

    def result(self, found: bool) -> None:
        """Polling has found something in time, or not."""
        self._skip = 0 if found else min(2 * self._skip + 1, _MOST_SKIPPED)
        self._left = self._skip

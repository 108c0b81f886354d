"""Whether a wait should begin with busy polling, and for how long. Pure.

Polling saves a sleep and a wake-up (tens of microseconds) when the answer comes within the budget, and
costs the budget when it does not: on a host whose cores are all busy it even keeps the peer from its core. So a rank
polls for as long as that pays:

- A wait that ended soon after its polling did would have been worth a little more: the budget doubles, up to eight
  times the limit. (Two ranks that both sleep answer each other in two wake-ups: with the first budget alone neither
  would ever catch the other awake.)
- After a wait that took much longer polling pauses for a while, after every further one twice as long.
"""

from __future__ import annotations

_GROWTH = 8  # the largest budget, in limits
_MOST_SKIPPED = 63  # waits: one try in 64 costs next to nothing and notices when things change


class SpinPolicy:
    """Remembers how polling has gone."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._budget_s = limit_s
        self._skip = 0  # waits to let pass after the next miss
        self._left = 0  # waits still to let pass

    def budget_s(self) -> float:
        """How long to poll in this wait; 0.0 for not at all. To be followed by `hit` or `missed` unless 0.0."""
        if self._left > 0:
            self._left -= 1
            return 0.0
        return self._budget_s

    def hit(self) -> None:
        """Polling has found something in time."""
        self._skip = 0

    def missed(self, waited_s: float) -> None:
        """Polling has found nothing; the whole wait took `waited_s`."""
        if waited_s <= _GROWTH * self._limit_s and self._budget_s < _GROWTH * self._limit_s:
            self._budget_s *= 2
            return
        self._budget_s = self._limit_s
        self._skip = min(2 * self._skip + 1, _MOST_SKIPPED)
        self._left = self._skip

"""Whose turn it is to try requests that may have ended an FFN worker. Pure.

All attention workers lose their steps with an FFN worker, and those steps are suspected alike. If two workers tried a
suspect at the same time, an innocent one would be lost beside the guilty one, and take the blame. They have no common
clock, but they see the FFN worker come back at about the same moment, and take turns from then on.
"""

from __future__ import annotations

TURN_S = 0.5
"""Length of each worker's turn. Trials begin in its first half: the last one is over before the next worker's turn."""


class TrialTurn:
    """The turns of one worker; always its own where it is the only one."""

    def __init__(self) -> None:
        self._place, self._num_workers = 0, 1
        self._begun_s = 0.0

    def follow(self, place: int, num_workers: int) -> None:
        """How many workers there are, and how many come before this one."""
        self._place, self._num_workers = place, max(1, num_workers)

    def begin(self, now: float) -> None:
        """All FFN workers can be reached again."""
        self._begun_s = now

    def is_open(self, now: float) -> bool:
        """Whether this worker may begin a trial."""
        if self._num_workers == 1:
            return True
        phase_s = (now - self._begun_s) % (self._num_workers * TURN_S) - self._place * TURN_S
        return 0.0 <= phase_s < TURN_S / 2

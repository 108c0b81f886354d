"""Simulated time: a queue of actions, each at its moment. Ties run in the order in which they were planned."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Any


class EventQueue:
    """Actions in the order of their times. An action is called with the arguments it was planned with.

    now: seconds since the start.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self._heap: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._num_planned = 0

    def __len__(self) -> int:
        return len(self._heap)

    def at(self, time_s: float, action: Callable[..., None], *arguments: Any) -> None:
        """Plan an action; not before now."""
        assert time_s >= self.now, f"an event at {time_s} s, planned at {self.now} s"
        self._num_planned += 1
        heapq.heappush(self._heap, (time_s, self._num_planned, action, arguments))

    def after(self, delay_s: float, action: Callable[..., None], *arguments: Any) -> None:
        self.at(self.now + delay_s, action, *arguments)

    def run(self, until: Callable[[], bool], limit_s: float) -> bool:
        """Run actions until `until()` holds: True. False: none was left, or time went past `limit_s`."""
        heap, pop = self._heap, heapq.heappop
        while not until():
            if not heap or heap[0][0] > limit_s:
                return False
            self.now, _, action, arguments = pop(heap)
            action(*arguments)
        return True

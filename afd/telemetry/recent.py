"""Growth of sums that only grow: ratios over a recent window, not since start. No clock of its own.

Side threads look (heartbeat, /metrics); the hot loop only adds to its sums and knows nothing of it.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

WINDOW_S = 10.0
"""Some hundred steps: a single slow step does not show, a change of load does within seconds."""
SPACING_S = 0.5  # between two readings that are kept

Sums = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Growth:
    """The growth within `seconds`; both 0 before there are two readings."""

    seconds: float
    added: Sums

    def of(self, name: str) -> float:
        return self.added.get(name, 0.0)

    def rate(self, name: str) -> float:
        """Added per second of the window: of a sum of seconds, its share of the wall clock."""
        return self.of(name) / self.seconds if self.seconds > 0.0 else 0.0

    def ratio(self, name: str, to: str) -> float:
        """One sum's growth over another's; 0 where that did not grow."""
        return self.of(name) / self.of(to) if self.of(to) > 0.0 else 0.0


class RecentSums:
    """Growth of `read()` over about the last WINDOW_S. Any thread.

    The window reaches back to the newest reading that is at least WINDOW_S old, or to the first one. Readings are taken
    when somebody looks; if nobody does for longer than WINDOW_S, the next window is as long as that.
    """

    def __init__(self, read: Callable[[], Sums], clock: Callable[[], float], window_s: float = WINDOW_S):
        self._read = read
        self._clock = clock
        self._window_s = window_s
        self._lock = threading.Lock()
        self._readings: deque[tuple[float, Sums]] = deque([(clock(), read())])

    def look(self) -> Growth:
        """Take a reading and compare it with the window's begin."""
        with self._lock:
            now, sums = self._clock(), self._read()
            readings = self._readings
            while len(readings) > 1 and readings[1][0] <= now - self._window_s:
                readings.popleft()
            begin_s, begin = readings[0]
            if now - readings[-1][0] >= SPACING_S:
                readings.append((now, sums))
        return Growth(now - begin_s, {name: value - begin.get(name, 0.0) for name, value in sums.items()})

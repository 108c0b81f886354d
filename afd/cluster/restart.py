"""When a dead child is started again: a growing delay, and an end to it. Pure: time is an argument."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from afd.cluster.launch import EXIT_CONFIG, EXIT_OK

MAX_RESTARTS = 3
WINDOW_S = 60.0
BACKOFF_S = (0.2, 1.0, 3.0)


class RestartPolicy:
    """One child's history: at most MAX_RESTARTS in WINDOW_S seconds.

    backoff_s: delay of each, the last one repeats.
    """

    def __init__(self, backoff_s: Sequence[float] = BACKOFF_S) -> None:
        self._backoff_s = backoff_s
        self._restarts: deque[float] = deque()

    def next_start(self, now: float) -> float | None:
        """The child died at `now`: when to start it again; None = too often, give up."""
        while self._restarts and now - self._restarts[0] > WINDOW_S:
            self._restarts.popleft()
        if len(self._restarts) >= MAX_RESTARTS:
            return None
        delay = self._backoff_s[min(len(self._restarts), len(self._backoff_s) - 1)]
        self._restarts.append(now)
        return now + delay


def worth_restarting(exit_code: int) -> bool:
    """A clean exit was asked for; a configuration error comes back each time. Signals are negative."""
    return exit_code not in (EXIT_OK, EXIT_CONFIG)

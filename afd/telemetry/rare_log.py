"""Log lines about what strangers can cause as often as they like: one at once, then one per interval, counted."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

INTERVAL_S = 10.0


class RareLog:
    """Warnings of one kind: the first is logged, those that follow within the interval are counted. Any thread."""

    def __init__(
        self, log: logging.Logger, interval_s: float = INTERVAL_S, clock: Callable[[], float] = time.monotonic
    ):
        self._log = log
        self._interval_s = interval_s
        self._clock = clock
        self._lock = threading.Lock()
        self._next_at = float("-inf")
        self._num_silent = 0

    def warn(self, message: str) -> None:
        """Log one line, with the number of events that were not logged since the last one."""
        with self._lock:
            now = self._clock()
            if now < self._next_at:
                self._num_silent += 1
                return
            self._next_at = now + self._interval_s
            num_silent, self._num_silent = self._num_silent, 0
        self._log.warning("%s%s", message, f" (and {num_silent} more since the last such line)" if num_silent else "")

"""Load reports that go on while the main thread is busy: to a gateway, silence means that the worker is lost."""

from __future__ import annotations

import threading
import time

from afd.attention.gateway_link import GatewayLink

LOOK_S = 0.25
OVERDUE_S = 0.75  # the main loop reports twice a second: it is in the midst of a long stage


class ReportRepeater:
    """A side thread that repeats the newest reports in the main loop's place, from its making until `close`.

    patience_s: a main loop that has not turned for so long may hang: then the reports end, and the gateways give the
    worker up.
    """

    def __init__(self, link: GatewayLink, patience_s: float):
        self._link = link
        self._patience_s = patience_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="load reports", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread. Idempotent."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        repeated_at = 0.0
        while not self._stop.wait(LOOK_S):
            now = time.monotonic()
            if is_due(now - max(self._link.reported_at, repeated_at), now - self._link.received_at, self._patience_s):
                repeated_at = now
                self._link.repeat_reports()


def is_due(silent_s: float, stalled_s: float, patience_s: float) -> bool:
    """Whether to repeat reports.

    silent_s: since the newest was sent.
    stalled_s: since the main loop turned.
    """
    return silent_s >= OVERDUE_S and stalled_s <= patience_s

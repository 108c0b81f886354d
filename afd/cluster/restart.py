"""When a dead child is started again: after a delay that grows while it does not live. Pure: time is an argument."""

from __future__ import annotations

from afd.cluster.launch import EXIT_CONFIG, EXIT_OK

FIRST_DELAY_S = 0.1
MAX_DELAY_S = 30.0
FORGIVEN_S = 2.0


class RestartPolicy:
    """One child's history. Each death doubles the delay, up to `max_delay_s`; every FORGIVEN_S that it had been ready
    before a death makes one earlier death forgotten. It is started again for ever: other workers serve meanwhile.

    first_delay_s: before the first new start.
    """

    def __init__(self, first_delay_s: float = FIRST_DELAY_S, max_delay_s: float = MAX_DELAY_S) -> None:
        self._first_delay_s = first_delay_s
        self._max_delay_s = max_delay_s
        self._num_deaths = 0
        self._ready_since: float | None = None

    def ready(self, now: float) -> None:
        """The child has loaded what it needs, and works."""
        if self._ready_since is None:
            self._ready_since = now

    def next_start(self, now: float) -> float:
        """The child died at `now`: when to start it again."""
        if self._ready_since is not None:
            self._num_deaths = max(0, self._num_deaths - int((now - self._ready_since) / FORGIVEN_S))
            self._ready_since = None
        doublings = min(self._num_deaths, 16)
        self._num_deaths += 1
        return now + min(self._max_delay_s, self._first_delay_s * 2.0**doublings)


def worth_restarting(exit_code: int) -> bool:
    """A clean exit was asked for; a configuration error comes back each time. Signals are negative."""
    return exit_code not in (EXIT_OK, EXIT_CONFIG)

"""Whether there is somebody to wait for while no attention worker serves. Pure."""

from __future__ import annotations


class Outage:
    """The time in which no worker serves although one did before: its return, or its successor's, is waited for.

    patience_s: how long. Before the first worker has ever served nothing is waited for: models may load for minutes.
    """

    def __init__(self, patience_s: float):
        self._patience_s = patience_s
        self._has_served = False
        self._since: float | None = None

    def look(self, serving: bool, now: float) -> None:
        """Whether any worker serves at `now`."""
        if serving:
            self._has_served, self._since = True, None
        elif self._since is None:
            self._since = now

    def passes(self, now: float) -> bool:
        """Nobody serves, and somebody may again before long: who comes now can wait for that."""
        return self._has_served and self._since is not None and not self.is_hopeless(now)

    def is_hopeless(self, now: float) -> bool:
        """Nobody has served for so long that nobody need wait any longer."""
        return self._since is not None and now - self._since >= self._patience_s

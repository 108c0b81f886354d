"""The order in which a cluster stops: who gets which signal when. Pure: time is an argument, signals are results.

The gateway first (it lets running streams finish), then the workers, then the coordinator. Each phase has a deadline,
after which its processes are killed.
"""

from __future__ import annotations

import signal
from collections.abc import Iterable
from dataclasses import dataclass

GATEWAY_MARGIN_S = 3.0
WORKER_STOP_S = 5.0
COORDINATOR_STOP_S = 3.0


@dataclass(frozen=True, slots=True)
class Phase:
    """Roles that stop together, and how long they may take."""

    roles: tuple[str, ...]
    limit_s: float


def phases(drain_s: float) -> tuple[Phase, ...]:
    """The stop order of a cluster."""
    return (
        Phase(("gateway",), drain_s + GATEWAY_MARGIN_S),
        Phase(("attention", "ffn"), WORKER_STOP_S),
        Phase(("coordinator",), COORDINATOR_STOP_S),
    )


class StopSequence:
    """Walks through the phases. `step` is called whenever a child ended or time passed."""

    def __init__(self, order: tuple[Phase, ...]):
        self._order = order
        self._phase_idx = -1
        self._deadline = 0.0
        self._killing = False

    @property
    def killing(self) -> bool:
        """True once every process is being killed at once."""
        return self._killing

    def step(self, alive: Iterable[tuple[str, str]], now: float) -> list[tuple[str, signal.Signals]]:
        """The signals to send now.

        alive: (name, role) of each living child.
        """
        alive = list(alive)
        if self._killing:
            return []
        while True:
            current = [name for name, role in alive if self._phase_idx >= 0 and role in self._phase.roles]
            if current:
                if now < self._deadline:
                    return []
                self._deadline = now + COORDINATOR_STOP_S
                return [(name, signal.SIGKILL) for name in current]
            if self._phase_idx + 1 == len(self._order):
                return []
            self._phase_idx += 1
            self._deadline = now + self._phase.limit_s
            begun = [(name, signal.SIGTERM) for name, role in alive if role in self._phase.roles]
            if begun:
                return begun

    def kill(self, alive: Iterable[tuple[str, str]]) -> list[tuple[str, signal.Signals]]:
        """Out of patience: everything ends now."""
        self._killing = True
        return [(name, signal.SIGKILL) for name, _ in alive]

    @property
    def _phase(self) -> Phase:
        return self._order[self._phase_idx]

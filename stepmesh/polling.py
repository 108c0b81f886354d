"""The polling that a wait begins with: in one call of the native twin where all channels can be watched from there."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

from stepmesh.native import native
from stepmesh.spin import SpinPolicy
from stepmesh.transports.base import Channel


class Spinner:
    """Polls the channels of one rank, for as long as its policy says. `now`: monotonic seconds."""

    def __init__(self, limit_s: float, now: Callable[[], float]) -> None:
        policy = SpinPolicy(limit_s)
        self.budget_s = policy.budget_s
        self.missed = policy.missed
        self._hit = policy.hit
        self._now = now
        self._signs: tuple[object, ...] = ()  # empty: only polling tells

    def watch(self, channels: Sequence[Channel]) -> None:
        """These are up from now on."""
        signs = [channel.sign for channel in channels]
        self._signs = () if native is None or None in signs else tuple(dict.fromkeys(signs))

    def spin(self, budget_s: float, deadline: float, poll: Callable[[], object]) -> bool:
        """Poll until `poll` brings something; False when nothing came within the budget.

        Bytes of a frame that is not complete begin it anew, until the deadline: the others are on their way.
        """
        until = min(self._now() + budget_s, deadline)
        # Whoever else wants this core gets it between two looks (as in `await_any`): where ranks share cores the
        # answer came sooner so, and with a core for every rank no difference was seen (docs/stepmesh.md, Numbers).
        while (left_s := until - self._now()) > 0.0:
            if not self._signs:
                os.sched_yield()
            elif not native.await_any(self._signs, left_s):
                return False
            if poll():
                self._hit()
                return True
            if self._signs:
                until = min(self._now() + budget_s, deadline)
        return False

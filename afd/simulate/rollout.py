"""A role's workers are replaced one after the other, as a StatefulSet does."""

from __future__ import annotations

from functools import partial

from afd.simulate.events import EventQueue
from afd.simulate.loading import LoadTimes
from afd.simulate.members import Members


class Rollout:
    """One run of it: the highest rank first, the next one when the successor serves.

    An attention worker drains before it goes. An FFN rank, which takes part in every layer, cannot: everybody pauses.
    """

    def __init__(self, role: str, members: Members, events: EventQueue, load: LoadTimes):
        self._role = role
        self._members = members
        self._events = events
        self._load_s = load.of_role(role)

    def begin(self) -> None:
        """Replace all that are there now."""
        self._members.note(f"rollout of {self._role} begins")
        self._replace(self._members.size(self._role) - 1)

    def _replace(self, rank: int) -> None:
        if rank < 0:
            self._members.note(f"rollout of {self._role} is over")
        elif self._role == "attention":
            self._members.drain(rank, partial(self._gone, rank))
        else:
            self._members.lose_ffn(rank)
            self._gone(rank)

    def _gone(self, rank: int) -> None:
        self._events.after(self._load_s, self._back, rank)

    def _back(self, rank: int) -> None:
        if self._role == "attention":
            self._members.return_attention(rank)
        else:
            self._members.return_ffn(rank)
        self._replace(rank - 1)

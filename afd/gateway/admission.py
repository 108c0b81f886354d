"""The gateway's queue: sequences that no worker has room for yet. Bounded, by priority then age, with deadlines."""

from __future__ import annotations

from afd.gateway.sequence import Sequence


class AdmissionQueue:
    """Pure. At most a thousand or so entries, so plain sorting beats a heap with lazy removal."""

    def __init__(self, max_sequences: int):
        self.max_sequences = max_sequences
        self._waiting: dict[str, Sequence] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def room_for(self, num_sequences: int) -> bool:
        return len(self._waiting) + num_sequences <= self.max_sequences

    def push(self, sequence: Sequence) -> None:
        """Add one. Sequences that come back (refused, migrating) keep their age and may exceed the bound."""
        self._waiting[sequence.req_id] = sequence

    def in_order(self) -> list[Sequence]:
        """All, first in line first."""
        return sorted(self._waiting.values(), key=lambda sequence: (sequence.priority, sequence.order))

    def discard(self, sequence: Sequence) -> None:
        """Take one out of line, if it is there."""
        self._waiting.pop(sequence.req_id, None)

    def take_expired(self, now: float) -> list[Sequence]:
        """Take out all whose deadline has passed."""
        late = [sequence for sequence in self._waiting.values() if sequence.deadline <= now]
        for sequence in late:
            self.discard(sequence)
        return late

    def take_all(self) -> list[Sequence]:
        """Take out all, first in line first."""
        sequences = self.in_order()
        self._waiting.clear()
        return sequences

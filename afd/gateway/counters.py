"""What a dispatcher has counted since its start. Pure."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class DispatchCounters:
    """Cumulative, for /metrics."""

    placed: int = 0
    refused: int = 0  # by a worker
    migrated: int = 0
    workers_lost: int = 0
    gaps: int = 0
    stale_chunks: int = 0
    rejected_queue_full: int = 0
    rejected_ttft: int = 0

    @property
    def num_taken(self) -> int:
        """Sequences that a worker took, each once, wherever it ran afterwards."""
        return self.placed - self.refused - self.migrated

    @property
    def num_turned_away(self) -> int:
        """Requests for which no place was free in time."""
        return self.rejected_queue_full + self.rejected_ttft

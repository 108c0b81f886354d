"""Ring of per-stage timestamps: what a run is explained from. Bounded, cheap to add to, dumped on demand."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

RING_CAPACITY = 50_000


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage of one micro-batch. Times in seconds of this process's monotonic clock.

    name: "attention", "exchange", "head", "wait" (attention worker) | "ffn", "gang_wait" (FFN worker).
    layer: -1 where a stage is not tied to one.
    """

    name: str
    start_s: float
    end_s: float
    stream: int
    layer: int
    num_tokens: int
    step: int = 0


class TraceRing:
    """The newest stages of this process. Appending is one deque operation, so any thread may take a snapshot."""

    def __init__(self, capacity: int = RING_CAPACITY):
        self._ring: deque[Stage] = deque(maxlen=capacity)

    def add(self, stage: Stage) -> None:
        self._ring.append(stage)

    def snapshot(self, since_s: float = 0.0) -> list[Stage]:
        """Stages that ended after `since_s`, oldest first."""
        for _ in range(8):  # the hot thread may append while we iterate
            try:
                return [stage for stage in list(self._ring) if stage.end_s >= since_s]
            except RuntimeError:
                continue
        return []

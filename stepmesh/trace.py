"""A ring of the last transfers' timestamps, for explaining a run. Recording is one append; reading copies."""

from __future__ import annotations

from collections import deque
from enum import IntEnum
from typing import NamedTuple

from stepmesh.types import RankId


class Stage(IntEnum):
    """Where a transfer is."""

    DISPATCH_POSTED = 1
    DISPATCH_ARRIVED = 2
    COMBINE_POSTED = 3
    COMBINE_ARRIVED = 4
    PEER_UP = 5
    PEER_DOWN = 6


class TraceEvent(NamedTuple):
    """time_ns is the rank's monotonic clock."""

    time_ns: int
    stage: Stage
    peer: RankId
    stream: int
    layer: int
    seq: int


class Trace:
    """Bounded: the oldest events fall out. size 0 switches it off."""

    def __init__(self, size: int) -> None:
        # Plain tuples of a TraceEvent's fields: half the price, and few are ever looked at.
        self._ring: deque[tuple[int, Stage, RankId, int, int, int]] = deque(maxlen=size)
        self.enabled = size > 0

    def record(self, time_ns: int, stage: Stage, peer: RankId, stream: int, layer: int, seq: int) -> None:
        self._ring.append((time_ns, stage, peer, stream, layer, seq))

    def dump(self) -> list[dict[str, object]]:
        """Plain values, oldest first: one JSON line each."""
        events = [TraceEvent._make(fields) for fields in self._ring]
        return [{**event._asdict(), "stage": event.stage.name.lower(), "peer": str(event.peer)} for event in events]

"""A ring of the last transfers' timestamps, for explaining a run. Recording is one append; reading copies."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from enum import IntEnum

from stepmesh.types import RankId


class Stage(IntEnum):
    """Where a transfer is."""

    DISPATCH_POSTED = 1
    DISPATCH_ARRIVED = 2
    COMBINE_POSTED = 3
    COMBINE_ARRIVED = 4
    PEER_UP = 5
    PEER_DOWN = 6


# When (seconds of the rank's monotonic clock), stage, peer, stream, layer, seq.
Record = tuple[float, Stage, RankId, int, int, int]


class Trace:
    """Bounded: the oldest events fall out. size 0 switches it off."""

    def __init__(self, size: int) -> None:
        # Plain tuples: the cheapest to make, and few are ever looked at.
        self._ring: deque[Record | Callable[[], Iterable[Record]]] = deque(maxlen=size)
        self.record: Callable[[Record], None] = self._ring.append
        # Many at once, made when somebody looks: they count as one.
        self.record_later: Callable[[Callable[[], Iterable[Record]]], None] = self._ring.append

    def dump(self) -> list[dict[str, object]]:
        """Plain values, oldest first: one JSON line each."""
        records = [r for item in self._ring.copy() for r in (item() if callable(item) else (item,))]
        return [
            {
                "time_ns": round(now * 1e9),
                "stage": stage.name.lower(),
                "peer": str(peer),
                "stream": stream,
                "layer": layer,
                "seq": seq,
            }
            for now, stage, peer, stream, layer, seq in records
        ]

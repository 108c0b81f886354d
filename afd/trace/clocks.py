"""How far each worker's clock is from ours. Pure: pings in, offsets with their error out.

A ping tells that the remote clock was read between `sent_s` and `received_s` of ours, so the offset (ours = remote +
offset) lies between `sent_s - remote_s` and `received_s - remote_s`. Every ping holds, so the offset lies in the
intersection: never wider than the fastest round trip. The error stated is half the width: a bound, not an estimate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from afd.trace.errors import TraceError


class Ping(NamedTuple):
    """One request to /clock. Seconds: `sent_s` and `received_s` of our clock, `remote_s` of the worker's."""

    sent_s: float
    received_s: float
    remote_s: float


@dataclass(frozen=True, slots=True)
class Bounds:
    """The offset lies in [low_s, high_s]."""

    low_s: float
    high_s: float

    @property
    def offset_s(self) -> float:
        return (self.low_s + self.high_s) / 2

    @property
    def error_s(self) -> float:
        return (self.high_s - self.low_s) / 2

    def meet(self, other: Bounds) -> Bounds | None:
        """What both allow; None when they contradict each other."""
        low_s, high_s = max(self.low_s, other.low_s), min(self.high_s, other.high_s)
        return Bounds(low_s, high_s) if low_s <= high_s else None


@dataclass(frozen=True, slots=True)
class Offset:
    """How far a worker's clock is from ours.

    measured: by ping.
    used: after `agree`; narrower where processes read one clock.
    """

    measured: Bounds
    used: Bounds


def bounds_of(pings: Sequence[Ping]) -> Bounds:
    """The intersection; the fastest ping's bounds where a clock was stepped in between. TraceError without a ping."""
    if not pings:
        raise TraceError("no clock reading")
    fastest = min(pings, key=lambda ping: ping.received_s - ping.sent_s)
    best = _bounds(fastest)
    for ping in pings:
        narrower = best.meet(_bounds(ping))
        if narrower is None:
            return _bounds(fastest)
        best = narrower
    return best


def _bounds(ping: Ping) -> Bounds:
    return Bounds(ping.sent_s - ping.remote_s, ping.received_s - ping.remote_s)


def agree(measured: Mapping[str, Bounds], machines: Mapping[str, str], here: str) -> dict[str, Offset]:
    """Worker -> offset. Workers of one machine (`afd.telemetry.ring.machine_id`) read one clock and share one offset.

    here: our own machine, whose offset is zero.  A machine whose workers contradict each other is not believed.
    """
    shared: dict[str, Bounds | None] = {here: Bounds(0.0, 0.0)} if here else {}
    for worker, bounds in measured.items():
        machine = machines[worker]
        if machine:
            before = shared.get(machine, bounds)
            shared[machine] = None if before is None else before.meet(bounds)
    return {
        worker: Offset(bounds, (shared.get(machines[worker]) if machines[worker] else None) or bounds)
        for worker, bounds in measured.items()
    }

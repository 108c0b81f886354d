"""Counters of a mesh, cheap enough to be always on. Read with `Mesh.stats`, which gives plain values."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class PeerStats:
    """One peer, over all its generations. Times in ns, sizes in payload bytes."""

    transport: str = ""
    transport_reason: str = ""
    generation: int = 0
    up: bool = False
    last_down_reason: str = ""
    sent_messages: int = 0
    sent_bytes: int = 0
    received_messages: int = 0
    received_bytes: int = 0
    answers_waited_ns: int = 0  # attention: sum of dispatch -> combine times
    superseded: int = 0  # combines dropped because a newer dispatch had taken their place
    rejected_frames: int = 0
    connects: int = 0  # generations that came up
    losses: int = 0  # generations that ended other than by membership or close

    def sent(self, messages: int, num_bytes: int) -> None:
        self.sent_messages += messages
        self.sent_bytes += num_bytes

    def received(self, messages: int, num_bytes: int) -> None:
        self.received_messages += messages
        self.received_bytes += num_bytes


@dataclass(slots=True)
class MeshStats:
    """The whole rank."""

    blocked_ns: int = 0  # time `progress` spent blocked
    polls: int = 0  # times it looked at its descriptors
    turned_away: int = 0  # connections closed before they were part of a pair
    peers: dict[str, PeerStats] = field(default_factory=dict)

    def peer(self, name: str) -> PeerStats:
        return self.peers.setdefault(name, PeerStats())

    def snapshot(self) -> dict[str, Any]:
        """Plain values. Any thread: a counter may be a moment old."""
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "peers"}
        return {**own, "peers": {name: dataclasses.asdict(peer) for name, peer in self.peers.copy().items()}}

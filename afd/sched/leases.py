"""Which gateways live: each renews a lease; the requests of one whose lease ended are aborted. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterator

MAX_LEASE_S = 60.0
FIRST_S = 5.0  # of a gateway that has said something, but sent no lease yet
PAUSE_S = 0.5  # between two looks: this process stood still


class Leases:
    """Lease ends by gateway. What a gateway asks for is bounded, so no gateway is remembered for ever."""

    def __init__(self) -> None:
        self._end_s: dict[bytes, float] = {}
        self._looked_s = math.inf

    def __iter__(self) -> Iterator[bytes]:
        """Gateways whose lease lasts."""
        return iter(tuple(self._end_s))

    def renew(self, gateway: bytes, ttl_s: float, now: float) -> None:
        """The gateway's lease ends `ttl_s` from now; NaN counts as 0."""
        self._end_s[gateway] = now + min(max(0.0, ttl_s), MAX_LEASE_S)

    def met(self, gateway: bytes, now: float) -> None:
        """The gateway has said something: it lives for a while even if it has not sent a lease yet."""
        self._end_s.setdefault(gateway, now + FIRST_S)

    def ended(self, now: float) -> list[bytes]:
        """Forget the gateways that went silent -> which.

        Look many times a second: time in which this process stood still is nobody's silence.
        """
        gap_s, self._looked_s = now - self._looked_s, now
        if gap_s > PAUSE_S:
            self._end_s = {gateway: end_s + gap_s for gateway, end_s in self._end_s.items()}
        ended = [gateway for gateway, end_s in self._end_s.items() if end_s < now]
        for gateway in ended:
            del self._end_s[gateway]
        return ended

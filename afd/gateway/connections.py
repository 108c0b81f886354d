"""Which connections are open, how many may be, and which one goes when another comes. Pure; the event loop's thread."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

PATIENCE_S = 0.5
"""How long a connection is safe in its client's turn: a request that was sent at once must not be too late."""


class Evictable(Protocol):
    def evict(self) -> None:
        """Close at once; `Connections.closed` follows soon."""


class Connections:
    """Open connections, at most `limit`: those that wait for their client, by how long, and those that are served.

    on_room: called when a newcomer that found no room should try again.
    clock: in seconds.
    """

    def __init__(self, limit: int, clock: Callable[[], float]):
        self.limit = limit
        self.on_room: Callable[[], None] = lambda: None
        self._clock = clock
        self._waiting: dict[Evictable, float] = {}  # since when; longest first
        self._served: set[Evictable] = set()
        self._wanted = False  # a newcomer found no room

    def __len__(self) -> int:
        return len(self._waiting) + len(self._served)

    def opened(self, connection: Evictable) -> None:
        self._waiting[connection] = self._clock()

    def waits(self, connection: Evictable) -> None:
        """The connection waits for its client from now on: to send a head or a body, or to close."""
        self._served.discard(connection)
        self._waiting.pop(connection, None)
        self._waiting[connection] = self._clock()
        self._try_again()

    def served(self, connection: Evictable) -> None:
        """A whole request of the connection is being answered: nobody takes its place."""
        self._waiting.pop(connection, None)
        self._served.add(connection)

    def closed(self, connection: Evictable) -> None:
        self._waiting.pop(connection, None)
        self._served.discard(connection)
        self._try_again()

    def has_room(self, num_opening: int) -> bool:
        """Whether one more may come, beside `num_opening` that are being opened; if not, `on_room` follows."""
        self._wanted = len(self) + num_opening >= self.limit
        return not self._wanted

    def make_room(self) -> float | None:
        """Evict the connection that has waited for its client longest.

        Returns None when that was done or nobody waits, otherwise in how many seconds it may be done.
        """
        for connection, since in self._waiting.items():
            left_s = since + PATIENCE_S - self._clock()
            if left_s > 0.0:
                return left_s
            connection.evict()
            break
        return None

    def _try_again(self) -> None:
        if self._wanted:
            self._wanted = False
            self.on_room()

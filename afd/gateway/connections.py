"""Which connections are open, how many may be, and which one goes when another comes. Pure; the event loop's thread."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol


class Evictable(Protocol):
    def evict(self) -> None:
        """Close at once; `Connections.closed` follows soon."""


class Connections:
    """Open connections, at most `limit`: those that wait for their client, by how long, and those that are served."""

    def __init__(self, limit: int, on_room: Callable[[], None] = lambda: None):
        """on_room: called when a newcomer that found no room should try again."""
        self.limit = limit
        self.on_room = on_room
        self._waiting: dict[Evictable, None] = {}  # longest first
        self._served: set[Evictable] = set()
        self._wanted = False  # a newcomer found no room

    def __len__(self) -> int:
        return len(self._waiting) + len(self._served)

    def opened(self, connection: Evictable) -> None:
        self._waiting[connection] = None

    def waits(self, connection: Evictable) -> None:
        """From now on it is the client's turn: to send a head, a body, or to close."""
        self._served.discard(connection)
        self._waiting.pop(connection, None)
        self._waiting[connection] = None
        self._try_again()

    def served(self, connection: Evictable) -> None:
        """A whole request is being answered: nobody takes its place."""
        self._waiting.pop(connection, None)
        self._served.add(connection)

    def closed(self, connection: Evictable) -> None:
        self._waiting.pop(connection, None)
        self._served.discard(connection)
        self._try_again()

    def room(self, num_opening: int) -> bool:
        """Whether one more may come, beside `num_opening` that are being opened.

        If not, the one that has waited for its client longest is evicted, and `on_room` is called when there is room,
        or somebody else to evict.
        """
        if len(self) + num_opening < self.limit:
            return True
        self._wanted = True
        if self._waiting:
            next(iter(self._waiting)).evict()
        return False

    def _try_again(self) -> None:
        if self._wanted:
            self._wanted = False
            self.on_room()

"""Places for few, given to clients in turn: who asks often waits for itself. Event-loop thread only."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from afd.errors import UnavailableError


class FairQueue:
    """`async with queue.place(client, size)`: at most `num_places` at a time, clients in turn, each by age.

    At most `max_size` waits. Where more comes, the client that has most waiting loses its newest.
    """

    def __init__(self, num_places: int, max_size: int, patience_s: float):
        self._num_free = num_places
        self._max_size = max_size
        self._patience_s = patience_s
        # Sizes of those that wait, oldest first, by client; clients in the order of their next turn.
        self._waiting: dict[str, dict[asyncio.Future[None], int]] = {}

    @property
    def waiting_size(self) -> int:
        return sum(map(self._size_of, self._waiting))

    @contextlib.asynccontextmanager
    async def place(self, client: str, size: int) -> AsyncIterator[None]:
        """UnavailableError when there is no place in time, or no room to wait for one."""
        await self._enter(client, size)
        try:
            yield
        finally:
            self._leave()

    async def _enter(self, client: str, size: int) -> None:
        if self._num_free:
            self._num_free -= 1
            return
        self._make_room(client, size)
        turn = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(client, {})[turn] = size
        try:
            async with asyncio.timeout(self._patience_s):
                await turn
        except BaseException as error:
            if turn.done() and not turn.cancelled() and turn.exception() is None:
                self._leave()  # the place came, but too late
            else:
                self._forget(client, turn)
            if isinstance(error, TimeoutError):
                raise _busy() from error
            raise

    def _make_room(self, client: str, size: int) -> None:
        """UnavailableError when nobody has more waiting than `client` would have."""
        while self.waiting_size + size > self._max_size:
            longest = max(self._waiting, key=self._size_of, default=client)
            if self._size_of(longest) <= self._size_of(client) + size:
                raise _busy()
            newest, _ = self._waiting[longest].popitem()
            newest.set_exception(_busy())

    def _size_of(self, client: str) -> int:
        return sum(self._waiting.get(client, {}).values())

    def _leave(self) -> None:
        while self._waiting:
            client, turns = next(iter(self._waiting.items()))
            del self._waiting[client]
            if not turns:
                continue
            turn = next(iter(turns))
            del turns[turn]
            if turns:
                self._waiting[client] = turns  # behind the others
            if not turn.done():
                turn.set_result(None)
                return
        self._num_free += 1

    def _forget(self, client: str, turn: asyncio.Future[None]) -> None:
        turns = self._waiting.get(client)
        if turns is not None:
            turns.pop(turn, None)
            if not turns:
                del self._waiting[client]


def _busy() -> UnavailableError:
    return UnavailableError("too many requests are being read; retry later", code="overloaded")

"""Places for few, given to clients in turn: who asks often waits for itself. Event-loop thread only."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator

from afd.errors import UnavailableError


class FairQueue:
    """`async with queue.place(client)`: at most `num_places` at a time, clients in turn, each by age.

    At most `max_waiting` wait. Where one more comes, the client that has most waiting loses its newest.
    """

    def __init__(self, num_places: int, max_waiting: int, patience_s: float):
        self._num_free = num_places
        self._max_waiting = max_waiting
        self._patience_s = patience_s
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}  # clients in the order of their next turn

    @property
    def num_waiting(self) -> int:
        return sum(map(len, self._waiting.values()))

    @contextlib.asynccontextmanager
    async def place(self, client: str) -> AsyncIterator[None]:
        """UnavailableError when there is no place in time."""
        await self._enter(client)
        try:
            yield
        finally:
            self._leave()

    async def _enter(self, client: str) -> None:
        if self._num_free:
            self._num_free -= 1
            return
        if self.num_waiting >= self._max_waiting:
            longest = max(self._waiting, key=lambda other: len(self._waiting[other]))
            if len(self._waiting[longest]) <= len(self._waiting.get(client, ())) + 1:
                raise _busy()
            self._waiting[longest].pop().set_exception(_busy())
        turn = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(client, deque()).append(turn)
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

    def _leave(self) -> None:
        while self._waiting:
            client, turns = next(iter(self._waiting.items()))
            del self._waiting[client]
            turn = turns.popleft()
            if turns:
                self._waiting[client] = turns  # behind the others
            if not turn.done():
                turn.set_result(None)
                return
        self._num_free += 1

    def _forget(self, client: str, turn: asyncio.Future[None]) -> None:
        turns = self._waiting.get(client)
        if turns is not None:
            with contextlib.suppress(ValueError):
                turns.remove(turn)
            if not turns:
                del self._waiting[client]


def _busy() -> UnavailableError:
    return UnavailableError("too many long requests are being read; retry later", code="overloaded")

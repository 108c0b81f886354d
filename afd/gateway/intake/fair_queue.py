"""Places for few, given to clients in turn: who asks often waits for itself. Event-loop thread only."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from afd.errors import UnavailableError


class FairQueue:
    """`async with queue.place(client)`: at most `num_places` at a time, clients in turn, each by age.

    What may wait here is bounded elsewhere, by `afd.gateway.body.BodyRoom`.
    """

    def __init__(self, num_places: int, patience_s: float):
        self._num_free = num_places
        self._patience_s = patience_s
        # Who waits, oldest first, by client; clients in the order of their next turn.
        self._waiting: dict[str, dict[asyncio.Future[None], None]] = {}

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
        turn = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(client, {})[turn] = None
        try:
            async with asyncio.timeout(self._patience_s):
                await turn
        except BaseException as error:
            if turn.done() and not turn.cancelled():
                self._leave()  # the place came, but too late
            else:
                self._forget(client, turn)
            if isinstance(error, TimeoutError):
                raise UnavailableError("too many requests are being read; retry later", code="overloaded") from error
            raise

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

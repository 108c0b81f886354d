"""Who reads a request: the event loop itself when that takes a few milliseconds, else a process with a free place."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Mapping

import msgspec

from afd.config import GatewayConfig
from afd.errors import UnavailableError
from afd.gateway.intake.fair_queue import FairQueue
from afd.gateway.intake.process import ReaderProcess
from afd.gateway.intake.protocol import Setup
from afd.gateway.intake.reader import Prepared, RawRequest, RequestReader
from afd.gateway.served_model import ServedModel

log = logging.getLogger(__name__)

INLINE_BYTES = 8_192
INLINE_VALUES = 512  # objects, lists and texts of a body
JOB_HEADERS = ("x-sla-ttft-ms", "x-sla-tpot-ms")
PATIENCE_S = 10.0


def is_short(body: bytes) -> bool:
    """Reading it takes milliseconds at most, whatever is in it."""
    return len(body) <= INLINE_BYTES and sum(map(body.count, (b"{", b"[", b'"'))) <= 2 * INLINE_VALUES


class Intake:
    """Event-loop thread only. Processes start when they are first needed, or by `warm_up`; `close` ends them.

    Long requests have all processes but one, so that a short one never waits for them.
    """

    def __init__(self, model: ServedModel, limits: GatewayConfig):
        self._reader = RequestReader(model, limits)
        self._model_is_foreign = model.is_foreign
        setup = msgspec.msgpack.encode(Setup.of(model, limits))
        self._idle = [ReaderProcess(setup) for _ in range(limits.reader_processes)]
        self._all = list(self._idle)
        self._places = FairQueue(len(self._all), PATIENCE_S)
        self._long = FairQueue(max(1, len(self._all) - 1), PATIENCE_S)
        self._warming: asyncio.Task[None] | None = None

    def warm_up(self) -> None:
        """Start the first process in the background."""
        self._warming = asyncio.get_running_loop().create_task(self._start_one(), name="request reader")

    async def read(
        self,
        route: str,
        body: bytes,
        headers: Mapping[str, str],
        max_context: int,
        client: str,
        on_turn: Callable[[], None] = lambda: None,
    ) -> Prepared:
        """RequestError, UnavailableError.

        client: who asks; clients take turns.
        on_turn: called when the wait for a turn ends.
        """
        given = {name: headers[name] for name in JOB_HEADERS if name in headers}
        request = RawRequest(route, body, given, max_context)
        templated = self._model_is_foreign and route in ("chat", "tokenize")
        short = is_short(body)
        if short and not templated:
            return self._reader.read(request)
        async with contextlib.AsyncExitStack() as places:
            for queue in (self._places,) if short else (self._long, self._places):
                await places.enter_async_context(queue.place(client))
            on_turn()
            process = self._idle.pop()
            try:
                return await process.read(request)
            finally:
                self._idle.append(process)

    async def close(self) -> None:
        """Kill the processes; requests that are being read fail."""
        if self._warming is not None:
            self._warming.cancel()
            await asyncio.gather(self._warming, return_exceptions=True)
        for process in self._all:
            process.close()

    async def _start_one(self) -> None:
        async with self._places.place(""):
            process = self._idle.pop()
            try:
                await process.start()
            except UnavailableError as error:
                log.error("%s; the next long request tries again", error)
            finally:
                self._idle.append(process)

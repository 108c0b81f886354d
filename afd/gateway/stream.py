"""Turns a running generation into bytes on the connection: one JSON answer, or server-sent events.

Headers are held back until the first output, so that a refusal is still a proper HTTP error; after that an error is an
event, followed by [DONE]. A client that goes away aborts everything.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator

from starlette.types import Receive, Scope, Send

from afd.errors import AfdError
from afd.gateway.dialect import Choice, ResponseFormat, usage_of
from afd.gateway.errors import describe, error_event, error_response
from afd.gateway.generation import ClientGoneError, Generation
from afd.gateway.metrics import GatewayMetrics

log = logging.getLogger(__name__)

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"
_SSE_START = {
    "type": "http.response.start",
    "status": 200,
    "headers": [
        (b"content-type", b"text/event-stream; charset=utf-8"),
        (b"cache-control", b"no-cache"),
        (b"x-accel-buffering", b"no"),
    ],
}


class GenerationResponse:
    """An ASGI response that owns its generation: whatever happens, the generation is closed at the end."""

    def __init__(
        self,
        generation: Generation,
        response_format: ResponseFormat,
        metrics: GatewayMetrics,
        *,
        num_choices: int,
        stream: bool,
        include_usage: bool = False,
        continuous_usage: bool = False,
    ):
        """num_choices: per prompt.
        include_usage: one more event with the usage, and null in the others.
        """
        self._generation = generation
        self._format = response_format
        self._metrics = metrics
        self._num_choices = num_choices
        self._stream = stream
        self._include_usage = include_usage
        self._continuous_usage = continuous_usage
        self._started = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._watched(receive):
            try:
                await (self._send_events(send) if self._stream else self._send_answer(send))
            except ClientGoneError:
                self._metrics.disconnect()
            except AfdError as error:
                await self._send_error(error, scope, receive, send)

    async def _send_answer(self, send: Send) -> None:
        choices = [Choice(index) for index in range(len(self._generation.sequences))]
        while not self._generation.finished:
            for delta in await self._generation.next():
                choices[delta.choice_idx].add(delta, self._format.logprobs(delta))
        body = self._format.body(choices, self._usage())
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        self._started = True
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def _send_events(self, send: Send) -> None:
        generation, chunk = self._generation, self._format.chunk
        while True:
            deltas = await generation.next()
            usage = self._usage() if self._continuous_usage else None
            events = b"".join([chunk(delta, usage) for delta in deltas]) if deltas else KEEP_ALIVE
            if generation.finished:
                break
            if events:
                await self._send_event_bytes(send, events, more=True)
        if self._include_usage:
            events += self._format.usage_chunk(self._usage())
        await self._send_event_bytes(send, events + DONE, more=False)

    async def _send_event_bytes(self, send: Send, events: bytes, *, more: bool) -> None:
        if not self._started:
            self._started = True
            await send(_SSE_START)
        await send({"type": "http.response.body", "body": events, "more_body": more})

    async def _send_error(self, error: AfdError, scope: Scope, receive: Receive, send: Send) -> None:
        status, body, _ = describe(error)
        self._metrics.failure(body.code or str(status))
        log.warning("request %s failed: %s", scope.get("state", {}).get("request_id", "?"), error)
        if self._started:
            await self._send_event_bytes(send, error_event(error), more=False)
        else:
            self._started = True
            await error_response(error)(scope, receive, send)

    @contextlib.asynccontextmanager
    async def _watched(self, receive: Receive) -> AsyncIterator[None]:
        """Fail the generation when the client disconnects; close it in any case."""
        watcher = asyncio.get_running_loop().create_task(self._watch(receive))
        try:
            yield
        finally:
            watcher.cancel()
            self._generation.close()

    async def _watch(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._generation.fail(ClientGoneError("the client closed the connection"))
        self._generation.close()  # free the workers at once; the writer may be stuck in a dead connection

    def _usage(self) -> dict[str, object]:
        return usage_of(self._generation.sequences, self._num_choices)

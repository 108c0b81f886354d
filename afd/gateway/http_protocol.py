"""uvicorn's HTTP/1.1 protocol, made strict: n requests in, n answers out, and no state that lasts for ever.

Where a message ends is never in doubt, or the connection is closed: an offer to upgrade is ignored and its body framed
like any other, an answer before the body's end is the last one, nothing behind a bad request is read. Each state that
waits for the client has a limit in time, and everything that llhttp collects has one in bytes.
"""

from __future__ import annotations

import asyncio
import enum
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import httptools
from starlette.types import Message, Receive, Scope, Send
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from afd.errors import RequestError
from afd.gateway.closing_transport import WRITE_STALL_S, ClosingTransport
from afd.gateway.connections import Connections
from afd.gateway.errors import ApiError, describe
from afd.gateway.http_head import check_head, framing_head

HEAD_TIMEOUT_S = 20.0
BODY_TIMEOUT_S = 60.0
MAX_HEAD_BYTES = 64 << 10
MAX_PIPELINED = 64


class _Turn(enum.Enum):
    """Whose turn it is on a connection."""

    IDLE = "the client's, which may leave it at that"
    HEAD = "the client's, to send a whole head"
    BODY = "the client's, to send the rest of a body"
    SERVER = "ours, to answer"


@dataclass(frozen=True, slots=True)
class HttpEdge:
    """What the connections of one server share. on_refused: called with the error and the client's address."""

    connections: Connections
    on_refused: Callable[[RequestError, str], None]


class StrictHttpProtocol(HttpToolsProtocol):
    """One per connection, on the event loop's thread. Overrides callbacks of uvicorn's class only."""

    transport: ClosingTransport

    def __init__(self, edge: HttpEdge, config: Config, server_state: ServerState, app_state: dict[str, Any]):
        super().__init__(config, server_state, app_state, asyncio.get_running_loop())
        self._edge = edge
        self._application = self.app
        self.app = self._serve
        self._cycles: list[RequestResponseCycle] = []  # requests without a complete answer, oldest first
        self._reading = True  # False: whatever else comes is dropped
        self._in_head = True  # between requests, or inside a request's head
        self._begun = False  # some of the head is here
        self._reframing = False  # callbacks are those of `framing_head`
        self._progress = False  # llhttp came to the end of a head or message, or had some of a body, in this piece
        self._part_bytes = 0  # given to llhttp since then
        self._header_bytes = 0  # names and values of this head, or trailers
        self._fault: RequestError | None = None  # what a callback found
        self._refusal: bytes | None = None  # the last answer, to be sent when those before it are complete
        self._turn: tuple[_Turn, object] | None = None
        self._turn_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None

    # --- the connection -------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(ClosingTransport(transport, self.loop))
        self._edge.connections.opened(self)
        self._begun = True  # a head is expected at once
        self._take_turn()

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel_turn_timer()
        self._cancel_write_timer()
        super().connection_lost(exc)
        self.transport.lost()
        self._edge.connections.closed(self)
        for cycle in self._cycles:  # uvicorn tells only the newest of pipelined requests, which has not even begun
            _hang_up(cycle)
        self._cycles.clear()

    def eof_received(self) -> bool:  # type: ignore[override]
        """The client has closed its direction: it has gone, as far as we can tell."""
        if self.transport.is_closing():
            return False  # the loop closes: there is nothing to linger for any more
        self.transport.linger = False
        self.transport.close()
        return True  # closed by ourselves, with a limit in time

    def evict(self) -> None:
        self.transport.abort()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._write_timer is None:
            self._write_timer = self.loop.call_later(WRITE_STALL_S, self.transport.abort)

    def resume_writing(self) -> None:
        self._cancel_write_timer()
        super().resume_writing()

    # --- bytes in -------------------------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        view = memoryview(data)
        while view and self._reading and not self.transport.is_closing():
            # No piece reaches beyond the largest head, so a larger one is never parsed to its end.
            view = view[self._parse(view[: MAX_HEAD_BYTES - self._part_bytes]) :]
        self._take_turn()

    def _parse(self, piece: memoryview) -> int:
        """How many bytes of the piece are done with."""
        self._progress = False
        num_bytes = len(piece)
        try:
            try:
                self.parser.feed_data(piece)
            except httptools.HttpParserUpgrade as offer:
                num_bytes = offer.args[0]
                self._ignore_offer()
        except httptools.HttpParserError:
            if self._reading:
                self._refuse(self._fault or _invalid("this is not a valid HTTP/1.1 request"))
            return num_bytes
        self._part_bytes = 0 if self._progress else self._part_bytes + num_bytes
        if self._part_bytes >= MAX_HEAD_BYTES:
            self._refuse(_head_too_large())
        return num_bytes

    def _ignore_offer(self) -> None:
        """Go on behind a head with `Upgrade`, where llhttp ends the message; RFC 9110, 7.8: it may be ignored."""
        self.parser = httptools.HttpRequestParser(self)
        self._reframing = True
        try:
            self.parser.feed_data(framing_head(self.headers))
        finally:
            self._reframing = False

    # --- llhttp's callbacks ---------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        if self._reframing:
            return
        if not self._reading:
            raise ValueError("nothing more is read")
        super().on_message_begin()
        self._begun = True
        self._header_bytes = 0

    def on_url(self, url: bytes) -> None:
        if not self._reframing:
            self._count(len(url))
            super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._reframing:
            return
        self._count(len(name) + len(value) + 4)
        if self._in_head:
            super().on_header(name, value.strip(b" \t"))
        # else: trailers, which must not become headers (RFC 9110, 6.5.1)

    def on_headers_complete(self) -> None:
        if self._reframing:
            return
        version = self.parser.get_http_version()
        try:
            check_head(self.parser.get_method(), self.url, version, self.headers)
        except RequestError as error:
            self._fault = error
            raise
        if version == "1.0":
            self.expect_100_continue = False  # its client would take "100 Continue" for the answer
        self._in_head = False
        self._header_bytes = 0
        self._progress = True
        super().on_headers_complete()
        self._drop_answered()
        self._cycles.append(self.cycle)
        if len(self._cycles) > MAX_PIPELINED:
            self._reading = False
            self.transport.close()
            raise ValueError("too many requests before the first answer")

    def on_body(self, body: bytes) -> None:
        self._progress = True
        if self._reading:
            super().on_body(body)

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade():
            return  # llhttp believes so; see `_ignore_offer`
        super().on_message_complete()
        self._in_head = True
        self._begun = False
        self._header_bytes = 0
        self._progress = True
        if not self.cycle.keep_alive:
            self._reading = False

    # --- answers --------------------------------------------------------------------------------------------------

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The application, between a request and its answer."""
        cycle = next((cycle for cycle in self._cycles if cycle.scope is scope), None)
        if cycle is None:
            return  # refused before it began

        async def last_if_early(message: Message) -> None:
            if message["type"] == "http.response.start" and cycle.more_body:
                # Whether the rest of the body comes is not known: what comes is not read as a request.
                self._reading = cycle.keep_alive = False
                self.transport.linger = True
            await send(message)

        await self._application(scope, receive, last_if_early)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._unset_keepalive_if_required()  # our own timer counts
        self._drop_answered()
        self._refuse_if_due()
        self._take_turn()

    def _refuse(self, error: RequestError) -> None:
        """Read nothing more; answer with the error behind the answers that are due, and close."""
        self._reading = False
        self._edge.on_refused(error, self.client[0] if self.client else "")
        if not self._in_head:  # the newest request's body is bad, or late: its handler hears that the client has gone
            at_fault = self.cycle
            self.pipeline = type(self.pipeline)(entry for entry in self.pipeline if entry[0] is not at_fault)
            _hang_up(at_fault)
            at_fault.response_complete = True
        self._drop_answered()
        status, body, _ = describe(error)
        self._refusal = _plain_response(status, body)
        self._refuse_if_due()

    def _refuse_if_due(self) -> None:
        if self._refusal is not None and not self._cycles:
            self.transport.write(self._refusal)
            self._refusal = None
            self.transport.linger = True
            self.transport.close()

    def _drop_answered(self) -> None:
        self._cycles = [cycle for cycle in self._cycles if not cycle.response_complete]

    # --- whose turn it is -----------------------------------------------------------------------------------------

    def _take_turn(self) -> None:
        """See whose turn it is, and give the client its time when it has just become the client's."""
        turn = self._whose_turn()
        if turn == self._turn:
            return
        self._turn = turn
        self._cancel_turn_timer()
        if turn[0] is _Turn.SERVER:
            self._edge.connections.served(self)
            return
        self._edge.connections.waits(self)
        limit_s = {
            _Turn.IDLE: float(self.timeout_keep_alive),
            _Turn.HEAD: HEAD_TIMEOUT_S,
            _Turn.BODY: BODY_TIMEOUT_S,
        }[turn[0]]
        self._turn_timer = self.loop.call_later(limit_s, self._too_slow, turn[0], limit_s)

    def _whose_turn(self) -> tuple[_Turn, object]:
        """Who must do something next, and for which request: each request has a time of its own."""
        if self._cycles:
            oldest = self._cycles[0]
            return (_Turn.BODY if oldest.more_body and self._reading else _Turn.SERVER), oldest
        return (_Turn.HEAD if self._begun or self._part_bytes else _Turn.IDLE), self.cycle

    def _too_slow(self, turn: _Turn, limit_s: float) -> None:
        self._turn_timer = None
        if turn is _Turn.IDLE:
            self.transport.close()
        elif not self.transport.is_closing():
            what = "head" if turn is _Turn.HEAD else "body"
            self._refuse(
                RequestError(f"the request's {what} did not arrive within {limit_s:g} s", status=408, code="timeout")
            )

    def _cancel_turn_timer(self) -> None:
        if self._turn_timer is not None:
            self._turn_timer.cancel()
            self._turn_timer = None

    def _cancel_write_timer(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def _count(self, num_bytes: int) -> None:
        self._header_bytes += num_bytes
        if self._header_bytes > MAX_HEAD_BYTES:
            self._fault = _head_too_large()
            raise self._fault


def _hang_up(cycle: RequestResponseCycle) -> None:
    """Let the application see a client that has gone."""
    if not cycle.response_complete:
        cycle.disconnected = True
        cycle.message_event.set()


def _plain_response(status: int, body: ApiError) -> bytes:
    content = body.json()
    head = b"content-type: application/json\r\nconnection: close\r\ncontent-length: %d\r\n\r\n" % len(content)
    return STATUS_LINE[status] + head + content


def _invalid(message: str) -> RequestError:
    return RequestError(message, code="invalid_http")


def _head_too_large() -> RequestError:
    return RequestError(f"the request's head is larger than {MAX_HEAD_BYTES} bytes", status=431, code="head_too_large")

"""uvicorn's HTTP/1.1 protocol with the bounds it lacks: head size and time, unread output, pipelined requests.

uvicorn itself bounds only idle keep-alive connections. Without these, a client that never finishes its headers
or never reads its stream holds a connection, and with it memory, for ever.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from afd.errors import RequestError
from afd.gateway.api.errors import ApiError, describe

HEAD_TIMEOUT_S = 20.0
MAX_HEAD_BYTES = 64 << 10
MAX_PIPELINED = 64
WRITE_STALL_S = 30.0


class BoundedHttpProtocol(HttpToolsProtocol):
    """One per connection, on the event loop's thread. Overrides callbacks of uvicorn's class only."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._in_head = True  # between requests, or inside a request's head
        self._head_bytes = 0
        self._head_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._cycles: list[RequestResponseCycle] = []  # requests without a complete answer, oldest first

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._arm_head_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel_head_timer()
        self._cancel_write_timer()
        super().connection_lost(exc)
        for cycle in self._cycles:  # uvicorn tells only the newest of pipelined requests, which has not even begun
            _hang_up(cycle)
        self._cycles.clear()

    def data_received(self, data: bytes) -> None:
        if self._in_head:
            self._arm_head_timer()
            self._head_bytes += len(data)
        super().data_received(data)
        if self._in_head and self._head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
            self._refuse(
                RequestError(
                    f"the request's head is larger than {MAX_HEAD_BYTES} bytes", status=431, code="head_too_large"
                )
            )

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._in_head:  # trailers behind a chunked body
            self._head_bytes += len(name) + len(value)
            if self._head_bytes > MAX_HEAD_BYTES:
                raise ValueError("trailers are too large")  # httptools turns it into a parser error: 400
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._head_bytes = 0
        self._cancel_head_timer()
        super().on_headers_complete()
        self._cycles = [cycle for cycle in self._cycles if not cycle.response_complete]
        if self.cycle is not None and self.cycle not in self._cycles:
            self._cycles.append(self.cycle)
        if len(self._cycles) > MAX_PIPELINED:
            raise ValueError("too many requests before the first answer")  # becomes a parser error: closed

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._in_head = True

    def send_400_response(self, msg: str) -> None:
        """uvicorn's answer to a request that it cannot parse, in our error shape."""
        self._refuse(RequestError(msg, code="invalid_http"))

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._write_timer is None:
            self._write_timer = self.loop.call_later(WRITE_STALL_S, self.transport.abort)

    def resume_writing(self) -> None:
        self._cancel_write_timer()
        super().resume_writing()

    def _refuse(self, error: RequestError) -> None:
        """Answer and close. Not answered when that would be taken for the answer to an earlier request."""
        status, body, _ = describe(error)
        waiting = [cycle for cycle in self._cycles if not cycle.response_complete]
        # A request whose body is bad; None: the one at fault has no head yet.
        at_fault = waiting[-1] if waiting and waiting[-1].more_body else None
        if not waiting or (waiting == [at_fault] and not waiting[0].response_started):
            self.transport.write(_plain_response(status, body))
        if at_fault is not None:
            _hang_up(at_fault)  # its body will never be complete
        self.transport.close()

    def _arm_head_timer(self) -> None:
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(HEAD_TIMEOUT_S, self._head_too_slow)

    def _cancel_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _cancel_write_timer(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def _head_too_slow(self) -> None:
        self._head_timer = None
        if not self.transport.is_closing():
            self._refuse(RequestError("the request's head did not arrive in time", status=408, code="timeout"))


def _hang_up(cycle: RequestResponseCycle) -> None:
    """As far as the application can tell, the client has gone."""
    if not cycle.response_complete:
        cycle.disconnected = True
        cycle.message_event.set()


def _plain_response(status: int, body: ApiError) -> bytes:
    content = body.json()
    head = b"content-type: application/json\r\nconnection: close\r\ncontent-length: %d\r\n\r\n" % len(content)
    return STATUS_LINE[status] + head + content

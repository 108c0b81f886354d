"""A lean HTTP/1.1 client: keep-alive connections on which one request at a time runs, its body pushed to a sink.

An `asyncio.Protocol` rather than streams: a streamed answer then costs no task switch per chunk, only one per request.
That matters because the client shares its cores with the server under test. Nothing is ever sent twice: a request that
fails has failed. Event-loop thread only.
"""

from __future__ import annotations

import asyncio
import os
import ssl
import time
from dataclasses import dataclass
from typing import Protocol
from urllib.parse import urlsplit

import httptools

from afd.errors import AfdError, ConfigError

MAX_HEAD_BYTES = 64 << 10
CONNECT_TIMEOUT_S = 10.0
CLOSE_TIMEOUT_S = 2.0
# Servers close idle connections after some seconds (uvicorn: 5). One that idled longer than this is not used again, so
# that a close that crosses a request on the wire is not taken for a fault of the server.
MAX_IDLE_S = 1.0


class TransferError(AfdError):
    """The exchange failed below the level of HTTP status codes."""


class ConnectError(TransferError):
    """No connection: nobody listens, name unknown, TLS refused."""


class DisconnectError(TransferError):
    """The server closed the connection before the answer was whole."""


class ProtocolError(TransferError):
    """The answer is not what was asked for: not HTTP, too large, not the promised format."""


class Sink(Protocol):
    """Receives one response. May raise ProtocolError: the exchange then fails with it."""

    def on_response(self, status: int, headers: dict[str, str]) -> None:
        """Once, before any body. Header names in lower case."""
        ...

    def on_body(self, data: bytes, now: float) -> None:
        """Some bytes of the body; now: `time.perf_counter()` when they were read."""
        ...


@dataclass(frozen=True, slots=True)
class ServerUrl:
    """http(s)://host[:port][/prefix]; a trailing /v1 is dropped, since every path here has its own."""

    host: str
    port: int
    tls: bool
    prefix: str

    @classmethod
    def parse(cls, text: str) -> ServerUrl:
        """ConfigError when it is not such a URL."""
        try:
            parts = urlsplit(text if "://" in text else f"http://{text}")
            port = parts.port
        except ValueError as error:
            raise ConfigError(f"--url {text!r}: {error}") from None
        if parts.scheme not in ("http", "https") or not parts.hostname or not text.isprintable() or " " in text:
            raise ConfigError(f"--url {text!r} is not of the form http://host:port")
        tls = parts.scheme == "https"
        prefix = parts.path.rstrip("/").removesuffix("/v1")
        return cls(parts.hostname, port or (443 if tls else 80), tls, prefix)

    @property
    def authority(self) -> str:
        """host:port as the Host header wants it."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


class _Exchange:
    """One response on its way in: the parser's callbacks, and how far it has come."""

    def __init__(self, sink: Sink):
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.num_bytes = 0
        self.keep_alive = True
        self._sink = sink
        self._parser = httptools.HttpResponseParser(self)
        self._headers: dict[str, str] = {}
        self._pieces: list[bytes] = []
        self._in_body = False
        self._complete = False

    def feed(self, data: bytes, now: float) -> bool:
        """Parse and pass on to the sink; True once the response is whole. Raises ProtocolError."""
        self.num_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserCallbackError as error:
            raise error.__context__ or error from None
        except httptools.HttpParserUpgrade:
            raise ProtocolError("the server wants to upgrade the connection") from None
        except httptools.HttpParserError as error:
            raise ProtocolError(f"the server does not speak HTTP/1.1: {error}") from None
        if not self._in_body and self.num_bytes > MAX_HEAD_BYTES:
            raise ProtocolError(f"response headers of more than {MAX_HEAD_BYTES} bytes")
        if self._pieces:
            body = self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces)
            self._pieces.clear()
            self._sink.on_body(body, now)
        return self._complete

    def whole_at_close(self) -> bool:
        """HTTP/1.0 framing: neither a length nor chunks, so the body ends where the connection does."""
        return self._in_body and "content-length" not in self._headers and "transfer-encoding" not in self._headers

    # --- httptools callbacks ----------------------------------------------------------------------------

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        if status < 200:
            return  # an interim response: the real one follows
        if self._complete:
            raise ProtocolError("two responses to one request")
        self._in_body = True
        self._sink.on_response(status, self._headers)

    def on_body(self, data: bytes) -> None:
        self._pieces.append(data)

    def on_message_complete(self) -> None:
        if self._in_body:
            self._complete = True
            self.keep_alive = bool(self._parser.should_keep_alive())
        else:
            self._headers.clear()  # the interim response's


class Connection(asyncio.Protocol):
    """One connection. `exchange` runs one request; afterwards `reusable` says whether another may follow."""

    def __init__(self) -> None:
        self.idle_since = 0.0
        self.reusable = True
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._transport: asyncio.Transport | None = None
        self._exchange: _Exchange | None = None

    async def exchange(self, request: bytes, sink: Sink) -> None:
        """Send a request and wait for the whole answer. Raises TransferError; cancelling aborts the connection."""
        assert self._exchange is None and self._transport is not None
        if self._transport.is_closing():
            raise DisconnectError("the server closed the connection before the request was sent")
        exchange = self._exchange = _Exchange(sink)
        self._transport.write(request)
        try:
            await exchange.done
        except BaseException:
            self.abort()
            raise
        finally:
            self._exchange = None
            self.idle_since = time.perf_counter()
            self.reusable = self.reusable and exchange.keep_alive

    def abort(self) -> None:
        """Close at once, dropping what is unsent."""
        self.reusable = False
        if self._transport is not None:
            self._transport.abort()

    # --- asyncio.Protocol -------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]  # uvloop's is no asyncio.Transport by class

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        exchange = self._exchange
        if exchange is None or exchange.done.done():
            self.abort()  # bytes that nobody asked for
            return
        try:
            complete = exchange.feed(data, now)
        except ProtocolError as error:
            exchange.done.set_exception(error)
            self.abort()
        else:
            if complete:
                exchange.done.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        self.reusable = False
        if not self.closed.done():
            self.closed.set_result(None)
        exchange = self._exchange
        if exchange is None or exchange.done.done():
            return
        if exchange.whole_at_close():
            exchange.done.set_result(None)
            return
        where = f"after {exchange.num_bytes} bytes" if exchange.num_bytes else "before it answered"
        reason = f" ({exc})" if exc is not None else ""
        exchange.done.set_exception(DisconnectError(f"the server closed the connection {where}{reason}"))


class HttpClient:
    """Connections to one server, at most as many as there are requests at a time."""

    def __init__(self, url: ServerUrl, *, api_key: str = ""):
        if not api_key.isprintable() or not api_key.isascii():
            raise ConfigError("the API key has characters that an HTTP header cannot carry")
        self._url = url
        self._idle: list[Connection] = []
        self._open: set[Connection] = set()
        self._tls = ssl.create_default_context() if url.tls else None
        authorization = f"Authorization: Bearer {api_key}\r\n" if api_key else ""
        self._head = f"Host: {url.authority}\r\nUser-Agent: afd-bench\r\nAccept: */*\r\n{authorization}"

    async def get(self, path: str, sink: Sink) -> None:
        """GET; raises TransferError."""
        await self._run(f"GET {self._url.prefix}{path} HTTP/1.1\r\n{self._head}\r\n".encode(), sink)

    async def post(self, path: str, body: bytes, sink: Sink) -> None:
        """POST a JSON body; raises TransferError. No deadline of its own: the caller sets one."""
        head = (
            f"POST {self._url.prefix}{path} HTTP/1.1\r\n{self._head}"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        await self._run(head.encode() + body, sink)

    async def close(self) -> None:
        """Close every connection and wait, up to CLOSE_TIMEOUT_S, until the loop has let go of them."""
        open_connections = list(self._open)
        self._idle.clear()
        self._open.clear()
        for connection in open_connections:
            connection.abort()
        if open_connections:
            await asyncio.wait([connection.closed for connection in open_connections], timeout=CLOSE_TIMEOUT_S)

    async def _run(self, request: bytes, sink: Sink) -> None:
        connection = self._take_idle() or await self._connect()
        try:
            await connection.exchange(request, sink)
        finally:
            if connection.reusable:
                self._idle.append(connection)
            else:
                connection.abort()

    def _take_idle(self) -> Connection | None:
        """The connection used last: the others may grow old."""
        while self._idle:
            connection = self._idle.pop()
            if connection.reusable and time.perf_counter() - connection.idle_since < MAX_IDLE_S:
                return connection
            connection.abort()
        return None

    async def _connect(self) -> Connection:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                _, connection = await loop.create_connection(Connection, self._url.host, self._url.port, ssl=self._tls)
        except TimeoutError:
            raise ConnectError(f"no connection to {self._url.authority} within {CONNECT_TIMEOUT_S:g} s") from None
        except OSError as error:
            raise ConnectError(f"no connection to {self._url.authority}: {_reason(error)}") from None
        self._open.add(connection)
        connection.closed.add_done_callback(lambda _: self._open.discard(connection))
        return connection


def _reason(error: OSError) -> str:
    """asyncio's own text only repeats the address; errors of TLS and name resolution carry theirs."""
    if isinstance(error, ConnectionError) and error.errno:
        return os.strerror(error.errno)
    return error.strerror or str(error)

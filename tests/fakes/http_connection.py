"""One connection of the gateway's HTTP protocol without a socket: bytes in, requests and answers out."""

from __future__ import annotations

import asyncio
import http.client
import io
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import msgspec
from uvicorn.config import Config
from uvicorn.server import ServerState

from afd.errors import RequestError
from afd.gateway.connections import Connections
from afd.gateway.http_protocol import HttpEdge, StrictHttpProtocol

MAX_TURNS = 300


class Reading(NamedTuple):
    """One request as somebody understood it."""

    method: str
    target: str
    body: bytes


class Answer(NamedTuple):
    status: int
    body: bytes


class FakeTransport(asyncio.Transport):
    """Keeps what is written. The client goes on reading and closes when it sees our end."""

    def __init__(self) -> None:
        super().__init__()
        self.written = bytearray()
        self.protocol: StrictHttpProtocol
        self.paused = False
        self.closing = False

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return default

    def is_closing(self) -> bool:
        return self.closing

    def write(self, data: bytes | bytearray | memoryview) -> None:
        assert not self.closing
        self.written += data

    def get_write_buffer_size(self) -> int:
        return 0

    def pause_reading(self) -> None:
        self.paused = True

    def resume_reading(self) -> None:
        self.paused = False

    def write_eof(self) -> None:
        asyncio.get_running_loop().call_soon(self.see_eof)

    def see_eof(self) -> None:
        """What the event loop does when the client closes its direction."""
        if not self.closing and not self.protocol.eof_received():
            self.close()

    def close(self) -> None:
        if not self.closing:
            self.closing = True
            asyncio.get_running_loop().call_soon(self.protocol.connection_lost, None)

    abort = close


@dataclass
class HttpConnection:
    """A client's end. Requests to /early are answered before their body is read, all others after it."""

    requests: list[Reading] = field(default_factory=list)
    refusals: list[RequestError] = field(default_factory=list)
    connections: Connections = field(default_factory=lambda: Connections(10, time.monotonic))

    def __post_init__(self) -> None:
        self._state = ServerState()
        config = Config(
            self._application,
            interface="asgi3",
            http=StrictHttpProtocol,
            ws="none",
            lifespan="off",
            log_config=None,
            proxy_headers=False,
        )
        edge = HttpEdge(self.connections, lambda error, client: self.refusals.append(error))
        self.transport = FakeTransport()
        self.protocol = StrictHttpProtocol(edge, config, self._state, {})
        self.transport.protocol = self.protocol
        self.protocol.connection_made(self.transport)

    @property
    def closed(self) -> bool:
        return self.transport.closing

    @property
    def answers(self) -> list[Answer]:
        """Interim answers are left out."""
        return answers_in(bytes(self.transport.written), [request.method for request in self.requests])

    async def send(self, pieces: Iterable[bytes]) -> HttpConnection:
        """Pieces, each when the one before has been dealt with and the server reads."""
        for piece in pieces:
            await self._settle()
            if self.closed:
                break
            assert not self.transport.paused, "not read although there is nothing to wait for"
            self.protocol.data_received(piece)
        await self._settle()
        return self

    async def leave(self) -> None:
        self.transport.see_eof()
        await self._settle()
        assert not self._state.tasks

    async def _settle(self) -> None:
        """Let the server do whatever it can do now: it answers in a few turns of the loop."""
        quiet, before = 0, -1
        for _ in range(MAX_TURNS):
            await asyncio.sleep(0)
            now = len(self.transport.written) + len(self.requests) + self.closed
            quiet, before = (quiet + 1, now) if now == before else (0, now)
            if quiet == 3:
                return
        raise AssertionError("does not come to rest")

    async def _application(self, scope: Any, receive: Any, send: Any) -> None:
        body, more = b"", scope["path"] != "/early"
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body, more = body + message["body"], message["more_body"]
        target = scope["raw_path"] + (b"?" + scope["query_string"] if scope["query_string"] else b"")
        request = Reading(scope["method"], target.decode("latin-1"), body)
        self.requests.append(request)
        content = msgspec.json.encode(request)
        headers = [(b"content-length", str(len(content)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": content})


async def answered(*pieces: bytes) -> HttpConnection:
    """A connection that was sent these pieces."""
    return await HttpConnection().send(pieces)


def answers_in(data: bytes, methods: list[str]) -> list[Answer]:
    """All answers in what a server sent; methods: of the requests, for HEAD has no content."""
    file = _Rewound(data)
    found: list[Answer] = []
    while file.tell() < len(data):
        method = methods[len(found)] if len(found) < len(methods) else "GET"
        response = http.client.HTTPResponse(_Socket(file), method=method)  # type: ignore[arg-type]
        try:
            response.begin()  # skips 100 Continue
        except http.client.RemoteDisconnected:
            break  # there was nothing behind it
        found.append(Answer(response.status, response.read()))
    return found


class _Rewound(io.BytesIO):
    """http.client closes its file behind every answer; this one stays open."""

    def close(self) -> None:
        pass


class _Socket(NamedTuple):
    file: _Rewound

    def makefile(self, mode: str) -> _Rewound:
        return self.file

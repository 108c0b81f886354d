"""An ASGI client without a socket: any path, header and body, and a hang-up at any moment."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.types import ASGIApp, Message

LIMIT_S = 20.0  # a request that takes longer hangs


@dataclass
class Answer:
    """What came back. status 0: nothing before the client hung up."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    complete: bool = False

    def json(self) -> Any:
        return json.loads(self.body)


async def call(
    app: ASGIApp,
    method: str,
    path: str,
    chunks: Sequence[bytes] = (b"",),
    headers: Sequence[tuple[bytes, bytes]] = (),
    *,
    hang_up_after: int | None = None,
) -> Answer:
    """One request. hang_up_after: the client is gone once so many messages came back (0: before the first)."""
    answer = Answer()
    gone = asyncio.Event()
    sending = [*chunks]
    num_messages = 0
    if hang_up_after == 0:
        gone.set()

    async def receive() -> Message:
        if sending and not gone.is_set():
            return {"type": "http.request", "body": sending.pop(0), "more_body": bool(sending)}
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        nonlocal num_messages
        if gone.is_set():
            return  # as a server does: what is sent to nobody is dropped
        num_messages += 1
        if message["type"] == "http.response.start":
            answer.status = message["status"]
            answer.headers = {name.decode(): value.decode() for name, value in message["headers"]}
        else:
            answer.body += message.get("body", b"")
            answer.complete = not message.get("more_body", False)
        if num_messages == hang_up_after:
            gone.set()
        await asyncio.sleep(0)

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [*headers, (b"host", b"localhost")],  # the first one counts
        "server": ("gateway", 80),
        "client": ("127.0.0.1", 1),
    }
    async with asyncio.timeout(LIMIT_S):
        await app(scope, receive, send)
    return answer

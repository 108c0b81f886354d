"""A scripted OpenAI-compatible server on a loopback port: every byte of its answers is up to the test.

Run as a program it serves tokens at a fixed pace, for measuring a client: python -m tests.fakes.openai_server.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field


@dataclass
class Request:
    method: str
    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def json(self):
        return json.loads(self.body)


Script = Callable[[Request, "Reply"], Awaitable[None]]


class Reply:
    """The answering side of one request. Writes raw bytes, or HTTP with the helpers."""

    def __init__(self, writer: asyncio.StreamWriter):
        self._writer = writer
        self.keep_alive = True

    async def raw(self, data: bytes) -> None:
        self._writer.write(data)
        await self._writer.drain()

    async def json(self, value: object, status: int = 200, headers: str = "") -> None:
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        head = f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n{headers}\r\n"
        await self.raw(head.encode() + body)

    async def start_stream(self) -> None:
        await self.raw(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\n")
        await self.raw(b"Transfer-Encoding: chunked\r\n\r\n")

    async def chunk(self, data: bytes) -> None:
        await self.raw(b"%x\r\n%s\r\n" % (len(data), data))

    async def event(self, value: object) -> None:
        await self.chunk(b"data: " + (value if isinstance(value, bytes) else json.dumps(value).encode()) + b"\n\n")

    async def end_stream(self) -> None:
        await self.event(b"[DONE]")
        await self.raw(b"0\r\n\r\n")

    def disconnect(self) -> None:
        """Drop the connection (after what was written)."""
        self.keep_alive = False


def text_event(text: str, finish: str | None = None) -> dict:
    return {"id": "c", "choices": [{"index": 0, "text": text, "finish_reason": finish}], "usage": None}


def chat_event(delta: dict, finish: str | None = None) -> dict:
    return {"id": "c", "choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}


def usage_event(num_prompt: int, num_output: int, num_cached: int = 0) -> dict:
    usage = {"prompt_tokens": num_prompt, "completion_tokens": num_output}
    return {"choices": [], "usage": usage | {"prompt_tokens_details": {"cached_tokens": num_cached}}}


async def completion(request: Request, reply: Reply, interval_s: float = 0.0) -> None:
    """A good answer: max_tokens chunks of one token, usage, [DONE]."""
    num_tokens = request.json["max_tokens"]
    await reply.start_stream()
    for token_idx in range(num_tokens):
        if interval_s:
            await asyncio.sleep(interval_s)
        await reply.event(text_event(f" {token_idx}", "length" if token_idx == num_tokens - 1 else None))
    await reply.event(usage_event(len(request.json["prompt"]), num_tokens))
    await reply.end_stream()


@dataclass
class FakeServer:
    """Requests seen, and the scripts that answer: `get` by path, `script` for posts."""

    script: Script = completion
    get: dict[str, object] = field(default_factory=lambda: {"/v1/models": {"data": [{"id": "m", "vocab_size": 1000}]}})
    requests: list[Request] = field(default_factory=list)
    url: str = ""
    num_connections: int = 0
    num_open: int = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        self.num_open += 1
        try:
            keep_alive = True
            while keep_alive and (request := await _read_request(reader)) is not None:
                self.requests.append(request)
                reply = Reply(writer)
                if request.method == "POST":
                    await self.script(request, reply)
                elif request.path in self.get:
                    await reply.json(self.get[request.path])
                else:
                    await reply.json({"detail": "Not Found"}, 404)
                keep_alive = reply.keep_alive
        except ConnectionError:
            pass  # the client left
        finally:
            self.num_open -= 1
            writer.close()
            with suppress(ConnectionError):
                await writer.wait_closed()


async def _read_request(reader: asyncio.StreamReader) -> Request | None:
    try:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
    except asyncio.IncompleteReadError:
        return None
    first, *lines = head.rstrip().split("\r\n")
    method, path, _ = first.split()
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return Request(method, path, headers, await reader.readexactly(int(headers.get("content-length", 0))))


@asynccontextmanager
async def fake_server(script: Script = completion, **get: object) -> AsyncIterator[FakeServer]:
    """Serve on a free port until the block ends; then nothing is left. get: overrides, such as version={...}."""
    fake = FakeServer(script=script)
    fake.get |= {f"/{name}": value for name, value in get.items()}
    tasks: set[asyncio.Task] = set()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.add(asyncio.current_task())
        try:
            await fake.serve(reader, writer)
        except asyncio.CancelledError:
            writer.transport.abort()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    fake.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield fake
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=5)
        await server.wait_closed()


async def _serve_forever(port: int, interval_s: float) -> None:
    async def paced(request: Request, reply: Reply) -> None:
        await completion(request, reply, interval_s)

    fake = FakeServer(script=paced)
    server = await asyncio.start_server(fake.serve, "127.0.0.1", port)
    print("port", server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--interval", type=float, default=0.02, help="seconds per token")
    args = parser.parse_args()
    with suppress(KeyboardInterrupt):
        asyncio.run(_serve_forever(args.port, args.interval))


if __name__ == "__main__":
    main()

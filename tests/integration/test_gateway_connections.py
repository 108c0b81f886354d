"""More connections than the gateway has files for: clients that hold them, and clients that only want an answer."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.fakes.async_test import async_test

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 30.0
OPEN_FILES = 168
NUM_PLACES = 40  # that the gateway has then
GATEWAY = """
import asyncio, resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[1]),) * 2)
from tests.fakes.gateway import served_gateway
from tests.fakes.text_model import text_model
from afd.telemetry.log import setup_logging
setup_logging("gateway")
async def main():
    async with served_gateway(text_model()) as rig:
        print(rig.url, flush=True)
        rig.worker.hold()
        loop = asyncio.get_running_loop()
        while word := (await loop.run_in_executor(None, sys.stdin.readline)).strip():
            rig.worker.run_freely() if word == "answer" else rig.worker.hold()
asyncio.run(main())
"""
GET = b"GET /livez HTTP/1.1\r\nHost: localhost\r\n"
HOLDERS = {
    "answered, body unfinished": GET + b"Content-Length: 10\r\n\r\nx",
    "answered, chunks unfinished": GET + b"Transfer-Encoding: chunked\r\n\r\n5\r\nx",
    "not found, body unfinished": b"POST /nothing HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10\r\n\r\nx",
    "body unfinished": b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10\r\n\r\n{",
    "head unfinished": GET,
    "nothing": b"",
    "kept alive": GET + b"\r\n",
}


class Client:
    """A raw connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter):
        self.reader = reader
        self.writer = writer

    async def ask(self, request: bytes) -> bytes:
        """The whole answer with its body; b"" when the connection is closed instead."""
        try:
            self.writer.write(request)
            async with asyncio.timeout(LIMIT_S):
                head = await self.reader.readuntil(b"\r\n\r\n")
                return head + await self.reader.readexactly(int(head.lower().split(b"content-length: ")[1].split()[0]))
        except (ConnectionError, asyncio.IncompleteReadError):
            return b""


class Gateway:
    """The gateway's process, and clients of it."""

    def __init__(self, process: asyncio.subprocess.Process):
        self.port = 0
        self._process = process
        self._clients: list[Client] = []

    @classmethod
    @contextlib.asynccontextmanager
    async def started(cls) -> AsyncIterator[Gateway]:
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", GATEWAY, str(OPEN_FILES), cwd=ROOT, stdin=pipe, stdout=pipe, stderr=pipe
        )
        gateway = cls(process)
        try:
            assert process.stdout is not None
            async with asyncio.timeout(60):
                url = (await process.stdout.readline()).decode().strip()
            gateway.port = int(url.rpartition(":")[2])
            yield gateway
        finally:
            if process.returncode is None:
                process.kill()
            await process.communicate()
            await gateway.leave()

    async def connect(self) -> Client:
        async with asyncio.timeout(LIMIT_S):
            client = Client(*await asyncio.open_connection("127.0.0.1", self.port))
        self._clients.append(client)
        return client

    def tell(self, word: str) -> None:
        """ "answer" or "hold": what the worker does with its requests."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{word}\n".encode())

    async def leave(self) -> None:
        """Close all connections."""
        for client in self._clients:
            client.writer.close()
            with contextlib.suppress(ConnectionError):
                await client.writer.wait_closed()
        self._clients.clear()

    async def end(self) -> str:
        """Its log."""
        await self.leave()
        _, errors = await self._process.communicate(b"")
        assert self._process.returncode == 0, errors
        return errors.decode()


def completion(text: str) -> bytes:
    body = json.dumps({"prompt": text, "max_tokens": 1}).encode()
    return b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)


@async_test
async def test_connections_that_are_held_keep_nobody_out() -> None:
    async with Gateway.started() as gateway:
        working = await gateway.connect()
        answer = asyncio.create_task(working.ask(completion("hello")))
        for what, request in HOLDERS.items():
            for _ in range(3 * NUM_PLACES):
                (await gateway.connect()).writer.write(request)
            for _ in range(5):
                got = await (await gateway.connect()).ask(GET + b"\r\n")
                assert got.startswith(b"HTTP/1.1 200"), what
        assert not answer.done()
        gateway.tell("answer")
        assert (await answer).startswith(b"HTTP/1.1 200")  # what is being answered keeps its place
        log = await gateway.end()
    assert f"{NUM_PLACES} connections are open, the limit" in log
    assert log.count("connections are open") <= 12  # one in ten seconds
    assert "cannot accept" not in log and "Traceback" not in log


@async_test
async def test_more_requests_than_places_are_all_answered() -> None:
    async with Gateway.started() as gateway:

        async def ask(number: int) -> bytes:
            return await (await gateway.connect()).ask(completion(f"no {number}"))

        answers = [asyncio.create_task(ask(number)) for number in range(4 * NUM_PLACES)]
        gateway.tell("answer")
        assert {(await answer)[:12] for answer in answers} == {b"HTTP/1.1 200"}
        log = await gateway.end()
    assert "connections are open" in log


@async_test
@pytest.mark.parametrize("bad", [b"\x16\x03\x01\x02\r\n\r\n", GET + b"Host: b\r\n\r\n"])
async def test_bad_heads_are_counted_and_logged_now_and_then(bad: bytes) -> None:
    async with Gateway.started() as gateway:
        for _ in range(200):
            assert (await (await gateway.connect()).ask(bad)).startswith(b"HTTP/1.1 400")
        metrics = await (await gateway.connect()).ask(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n")
        log = await gateway.end()
    assert b'afd_gateway_http_requests_total{path="invalid",status="400"} 200.0' in metrics
    lines = [line for line in log.splitlines() if "refused what" in line]
    assert 1 <= len(lines) <= 4
    assert "Invalid HTTP request" not in log

"""Request smuggling at the gateway, bare and behind real reverse proxies that share connections between clients.

A stranger's body holds a request, behind every offer to upgrade and framing; nobody else may get its answer, or have
a request of his own completed by it.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import logging
import random
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.fakes.async_test import async_test
from tests.fakes.gateway import served_gateway
from tests.fakes.reverse_proxy import PROXIES, path_of, reverse_proxy, version_of
from tests.fakes.text_model import text_model

MODEL = text_model()
NUM_ANSWERS = 1_000  # that victims get, in front of each proxy
NUM_VICTIMS = NUM_ATTACKERS = 4
LIMIT_S = 20.0
OFFERS = (
    "Connection: Upgrade\r\nUpgrade: foo\r\n",
    "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: MDEyMzQ1Njc4OWFiY2RlZg==\r\n",
    "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA\r\n",
    "",
)
SMUGGLED = (
    b"GET /version HTTP/1.1\r\nHost: localhost\r\nX-Ignore: ",  # the next one's request line ends up in a header
    b"GET /version HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b'POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: 19\r\n\r\n{"prompt": "stolen"',
    b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: 500\r\n\r\n",  # the next one is its body
)
TARGETS = ("GET /metrics", "POST /tokenize", "POST /v1/completions", "GET /nothing", "PUT /livez")


class Victim:
    """A client with one connection at a time, kept alive; each of its requests has an answer of its own."""

    def __init__(self, port: int, number: int):
        self._port = port
        self._number = number
        self.astray: list[bytes] = []

    async def run(self, num_answers: int) -> None:
        for i in range(num_answers // 20):
            async with _connected(self._port) as (reader, writer):
                for j in range(20):
                    await self._ask(reader, writer, f"{self._number}.{i}.{j}")

    async def _ask(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, name: str) -> None:
        body = json.dumps({"prompt": name}).encode()
        head = (
            f"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nX-Request-Id: {name}\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        writer.write(head.encode() + body)
        head_got, body_got = await _answer(reader)
        assert MODEL.tokenizer is not None
        own = head_got.startswith(b"HTTP/1.1 200") and b"x-request-id: %s\r\n" % name.encode() in head_got.lower()
        if not own or json.loads(body_got)["tokens"] != MODEL.tokenizer.encode(name):
            self.astray.append(head_got + body_got)


async def attack(rng: random.Random, port: int, offer: str) -> None:
    """One request whose body holds another, which leaves a moment later, and what a patient attacker reads."""
    smuggled, target = rng.choice(SMUGGLED), rng.choice(TARGETS)
    filler = b"x" * rng.choice((0, 54, 6000))
    head = f"{target} HTTP/1.1\r\nHost: localhost\r\n{offer}"
    if rng.random() < 0.3:
        parts = [b"%x\r\n%s\r\n" % (len(part), part) for part in (filler, smuggled) if part]
        first, second = (
            f"{head}Transfer-Encoding: chunked\r\n\r\n".encode() + b"".join(parts[:-1]),
            parts[-1] + b"0\r\n\r\n",
        )
    else:
        length = len(filler) + len(smuggled) + rng.choice((0, 0, 0, 5))
        first, second = f"{head}Content-Length: {length}\r\n\r\n".encode() + filler, smuggled
    async with _connected(port) as (reader, writer):
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, TimeoutError):
            writer.write(first)
            await asyncio.sleep(rng.uniform(0.0, 0.004))
            writer.write(second)
            async with asyncio.timeout(0.2):
                await _answer(reader)
                extra, _ = await _answer(reader)
                assert not extra, f"two answers to one request: {head} {extra!r}"


@contextlib.asynccontextmanager
async def _connected(port: int) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        yield reader, writer
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


async def _answer(reader: asyncio.StreamReader) -> tuple[bytes, bytes]:
    async with asyncio.timeout(LIMIT_S):
        head = await reader.readuntil(b"\r\n\r\n")
        if b"content-length: " not in head.lower():
            return head, b""
        return head, await reader.readexactly(int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0]))


async def campaign(port: int) -> list[bytes]:
    """Victims and attackers at once; the answers that were not the victim's own."""
    victims = [Victim(port, number) for number in range(NUM_VICTIMS)]
    done = asyncio.gather(*(victim.run(NUM_ANSWERS // NUM_VICTIMS) for victim in victims))

    async def attacker(number: int) -> None:
        rng = random.Random(number)
        for offer in itertools.cycle(OFFERS):
            if done.done():
                return
            await attack(rng, port, offer)

    async with asyncio.timeout(100):
        await asyncio.gather(done, *(attacker(number) for number in range(NUM_ATTACKERS)))
    return [answer for victim in victims for answer in victim.astray]


@async_test
@pytest.mark.parametrize("proxy", [None, *PROXIES])
async def test_no_answer_goes_astray(proxy: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if proxy is not None and path_of(proxy) is None:
        pytest.skip(f"{proxy} is not installed (apt-get install {proxy})")
    monkeypatch.setattr(logging.getLogger("afd"), "level", logging.ERROR)
    async with served_gateway(MODEL) as rig, contextlib.AsyncExitStack() as stack:
        port = int(rig.url.rpartition(":")[2])
        if proxy is not None:
            print(version_of(proxy))
            port = stack.enter_context(reverse_proxy(proxy, port, tmp_path))
        astray = await campaign(port)
        assert not astray, (len(astray), astray[:3])

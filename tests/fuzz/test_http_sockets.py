"""Hostile connections to the real server: whatever comes back is sound HTTP in the error shape, and nothing stays.

The campaign opens connections that never finish, read slowly, write slowly, pipeline, lie about lengths and hang up
at any byte, several at a time; honest requests in between must work throughout.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import io
import json
import logging
import random
import re
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from afd.gateway import http_protocol
from tests.fakes.async_test import async_test
from tests.fakes.gateway import Rig, served_gateway
from tests.fakes.text_model import text_model
from tests.fuzz.bodies import BODIES, mutated
from tests.fuzz.campaign import MemoryGauge, generator, nothing_left, volume
from tests.fuzz.mutations import mutate_bytes

MODEL = text_model(max_context=4096)
AT_ONCE = 16
PATIENCE_S = 0.2
LIMIT_S = 30.0  # for one connection; the server's own limits are set below that
SOUND = (200, 400, 404, 405, 408, 413, 417, 421, 431, 501, 505)

Attack = Callable[[random.Random, "Connection"], Awaitable[None]]


class Connection:
    """A raw client socket; what it received is checked at the end."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._loop = asyncio.get_running_loop()
        self.received = bytearray()

    @classmethod
    async def open(cls, address: tuple[str, int], *, receive_buffer: int = 0) -> Connection:
        sock = socket.socket()
        if receive_buffer:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        sock.setblocking(False)
        try:
            await asyncio.get_running_loop().sock_connect(sock, address)
        except BaseException:
            sock.close()
            raise
        return cls(sock)

    async def send(self, data: bytes) -> None:
        """As much as the server takes: it may have closed."""
        with contextlib.suppress(OSError):
            await self._loop.sock_sendall(self._sock, data)

    async def read(self, most: int = 1 << 16) -> bytes:
        """b"" at the end, also at an abrupt one."""
        try:
            data = await self._loop.sock_recv(self._sock, most)
        except ConnectionError:
            return b""
        self.received += data
        return data

    async def read_all(self, patience_s: float = PATIENCE_S, *, enough: int = 1 << 30) -> None:
        """Until the end, until nothing has come for a while, or until there is enough."""
        with contextlib.suppress(TimeoutError):
            while len(self.received) < enough:
                async with asyncio.timeout(patience_s):
                    if not await self.read():
                        return

    def close(self, *, abruptly: bool = False) -> None:
        if abruptly:
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._sock.close()


def request(path: str, body: bytes, *, extra: str = "", length: str | None = None, method: str = "POST") -> bytes:
    length = str(len(body)) if length is None else length
    head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n{extra}\r\n"
    return head.encode() + body


def chunked(rng: random.Random, path: str, body: bytes) -> bytes:
    """A chunked request, right or wrong."""
    pieces = [b"POST %s HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n" % path.encode()]
    while body:
        size = rng.randrange(1, 200)
        piece, body = body[:size], body[size:]
        pieces.append(b"%x%s\r\n%s\r\n" % (len(piece), rng.choice((b"", b"", b";ext=1")), piece))
    pieces.append(b"0\r\n" + rng.choice((b"", b"X-Trailer: 1\r\n")) + b"\r\n")
    return b"".join(pieces)


def some_request(rng: random.Random) -> bytes:
    path, value = rng.choice(BODIES)
    return request(path, json.dumps(value).encode())


# --- attacks --------------------------------------------------------------------------------------------------


async def half_open(rng: random.Random, connection: Connection) -> None:
    """Part of a request, and then nothing until the server gives up."""
    data = some_request(rng)
    await connection.send(data[: rng.randrange(len(data))])
    if rng.random() < 0.5:
        await connection.read_all(10.0)
        assert connection.received.startswith(b"HTTP/1.1 4")


async def slow_sender(rng: random.Random, connection: Connection) -> None:
    data = some_request(rng)
    while data:
        size = rng.randrange(1, 60)
        await connection.send(data[:size])
        data = data[size:]
        await asyncio.sleep(0)
    await connection.read_all()


async def slow_reader(rng: random.Random, connection: Connection) -> None:
    body = {"prompt": [1], "max_tokens": 2000, "logprobs": 5, "stream": rng.random() < 0.8}
    await connection.send(request("/v1/completions", json.dumps(body).encode()))
    for _ in range(rng.randrange(20)):
        await connection.read(rng.randrange(1, 400))
        await asyncio.sleep(0.001)


async def leaver(rng: random.Random, connection: Connection) -> None:
    """Hangs up at some byte of the stream."""
    body = {"prompt": [1], "max_tokens": 500, "stream": True}
    await connection.send(request("/v1/completions", json.dumps(body).encode()))
    wanted = rng.choice((0, 1, 20, 300, 3000, 30_000))
    await connection.read_all(enough=wanted)


async def pipelining(rng: random.Random, connection: Connection) -> None:
    requests = [some_request(rng) for _ in range(rng.randrange(2, 6))]
    if rng.random() < 0.3:
        requests += [b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n"] * rng.randrange(300)
    if rng.random() < 0.4:
        requests.insert(rng.randrange(len(requests)), mutate_bytes(rng, some_request(rng)))
    await connection.send(b"".join(requests))
    await connection.read_all()


async def large_head(rng: random.Random, connection: Connection) -> None:
    kinds = (
        b"GET /livez HTTP/1.1\r\nX-Large: " + b"x" * (1 << 20),
        b"GET /livez HTTP/1.1\r\n" + b"X-Many: y\r\n" * 100_000,
        b"GET /" + b"x" * (1 << 20),
        b"x" * (1 << 20),
        b"POST /tokenize HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n" + b"X-T: y\r\n" * 100_000,
    )
    await connection.send(rng.choice(kinds))
    await connection.read_all()


async def lying_length(rng: random.Random, connection: Connection) -> None:
    lengths = (
        "0",
        "-1",
        "+5",
        "1e9",
        "0x10",
        "9" * 18,
        "9" * 400,
        "",
        " 7",
        "5, 5",
        "5\r\nContent-Length: 6",
        "1048576000",
    )
    path, value = rng.choice(BODIES)
    body = json.dumps(value).encode()
    extra = rng.choice(
        ("", "", "Transfer-Encoding: chunked\r\n", "Expect: 100-continue\r\n", "Connection: Upgrade\r\n")
    )
    await connection.send(request(path, body, length=rng.choice(lengths), extra=extra))
    await connection.read_all()


async def bad_chunks(rng: random.Random, connection: Connection) -> None:
    data = chunked(rng, *mutated(rng))
    if rng.random() < 0.8:
        start = data.index(b"\r\n\r\n") + 4
        data = data[:start] + mutate_bytes(rng, data[start:])
    await connection.send(data)
    await connection.read_all()


async def raw_bytes(rng: random.Random, connection: Connection) -> None:
    kinds = (
        mutate_bytes(rng, some_request(rng), most=8),
        rng.randbytes(rng.randrange(2000)),
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(40),
        bytes.fromhex("16030100c8010000c40303") + rng.randbytes(200),
        b"GET / HTTP/0.9\r\n\r\n",
        b"GET /\r\n",
        b"CONNECT a:1 HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET http://[ HTTP/1.1\r\nHost: [\r\n\r\n",
        b"GET /%ff%00%zz?\xff#x HTTP/1.1\r\nHost: \xff\r\n\r\n",
        b"GET /chat HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
    )
    await connection.send(rng.choice(kinds))
    await connection.read_all()


ATTACKS: tuple[Attack, ...] = (
    half_open,
    slow_sender,
    slow_reader,
    leaver,
    pipelining,
    large_head,
    lying_length,
    bad_chunks,
    raw_bytes,
    raw_bytes,
)


# --- what must hold -------------------------------------------------------------------------------------------


class Received:
    """What http.client reads from: the bytes that came back on one connection."""

    def __init__(self, data: bytes) -> None:
        self.file = io.BytesIO(data)

    def makefile(self, mode: str) -> io.BytesIO:
        return Unclosable(self.file)


class Unclosable(io.BytesIO):
    """One stream for the answers that follow each other on a connection."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file.getvalue())
        self._file = file
        self.seek(file.tell())

    def close(self) -> None:
        self._file.seek(self.tell())


def check_answers(data: bytes, what: str) -> int:
    """Parse all answers; each is sound. The last one may be cut off. Returns how many there were."""
    received, count = Received(data), 0
    while received.file.tell() < len(data):
        start = received.file.tell()
        response = http.client.HTTPResponse(received)  # type: ignore[arg-type]
        try:
            response.begin()
            body = response.read()
            response.close()
        except (http.client.IncompleteRead, http.client.RemoteDisconnected, ConnectionError):
            return count
        except http.client.BadStatusLine:
            assert b"\r\n" not in data[start:], (what, data[start : start + 300])
            return count
        received.file.seek(max(received.file.tell(), start + 1))
        if response.status in (100, 101):
            continue
        assert response.status in SOUND, (what, response.status, body[:300])
        if response.status >= 400 and body:
            assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}, (what, body)
        count += 1
    return count


async def attack(rng: random.Random, address: tuple[str, int], counts: dict[str, int]) -> None:
    kind = rng.choice(ATTACKS)
    connection = await Connection.open(address, receive_buffer=2048 if kind is slow_reader else 0)
    try:
        async with asyncio.timeout(LIMIT_S):
            await kind(rng, connection)
    finally:
        connection.close(abruptly=rng.random() < 0.4)
    counts[kind.__name__] = counts.get(kind.__name__, 0) + check_answers(bytes(connection.received), kind.__name__)


@contextlib.asynccontextmanager
async def connected(rig: Rig) -> AsyncIterator[Connection]:
    host, port = rig.url.removeprefix("http://").split(":")
    connection = await Connection.open((host, int(port)))
    try:
        yield connection
    finally:
        connection.close()


async def at_rest(rig: Rig) -> None:
    """No request runs at the gateway or the worker."""
    async with asyncio.timeout(LIMIT_S):
        while "afd_gateway_running_sequences 0.0" not in (await rig.client.get("/metrics")).text:
            await asyncio.sleep(0.02)
        while rig.worker.num_running:
            await asyncio.sleep(0.02)


def test_hostile_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_protocol, "HEAD_TIMEOUT_S", 0.4)
    monkeypatch.setattr(http_protocol, "WRITE_STALL_S", 0.4)
    monkeypatch.setattr("afd.gateway.http_protocol.BODY_TIMEOUT_S", 0.6)
    for name in ("afd", "uvicorn.error"):
        monkeypatch.setattr(logging.getLogger(name), "level", logging.CRITICAL)
    asyncio.run(once())  # what is made once per process is made here
    with nothing_left():
        asyncio.run(campaign())


async def once() -> None:
    async with served_gateway(MODEL) as rig:
        await honest(rig)


async def campaign() -> None:
    num_cases = volume(2_000, 48)
    rng = generator("connections", num_cases)
    counts: dict[str, int] = {}
    async with served_gateway(MODEL, limits={"max_body_bytes": 1 << 18}) as rig:
        host, port = rig.url.removeprefix("http://").split(":")
        rig.worker.tokens_per_chunk = 50
        gauge = MemoryGauge(num_cases // AT_ONCE)
        for _ in range(num_cases // AT_ONCE):
            seeds = [rng.getrandbits(64) for _ in range(AT_ONCE)]
            async with asyncio.TaskGroup() as group:
                for seed in seeds:
                    group.create_task(attack(random.Random(seed), (host, int(port)), counts))
                group.create_task(honest(rig))
            rig.worker.received.clear()
            for req_id in [req_id for req_id, run in rig.worker._runs.items() if run.finish is not None]:
                del rig.worker._runs[req_id]
            gauge.step()
        await at_rest(rig)
        gauge.check()
        await honest(rig)
    print(counts)
    assert sum(counts.values()) > num_cases // 4, counts


async def honest(rig: Rig) -> None:
    """A request among the others; on a busy machine the campaign's short limits may hit it, too."""
    for _ in range(5):
        answer = await rig.complete([1, 2], max_tokens=2, stream=True)
        if answer.status_code != 408:
            break
    assert answer.status_code == 200
    assert answer.text.endswith("data: [DONE]\n\n")


@async_test
async def test_chunks_that_are_none_are_a_400() -> None:
    """Before an answer has begun the client is told what was wrong with its body."""
    async with served_gateway(MODEL) as rig:
        for garbage in (b"zz\r\n", b"5\r\nabcdefgh\r\n", b"-1\r\n", b"f" * 18 + b"\r\n", b"\x00\xff\r\n"):
            async with connected(rig) as connection:
                head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
                await connection.send(head + garbage)
                await connection.read_all(5.0)
                assert connection.received.startswith(b"HTTP/1.1 400 ")
                assert check_answers(bytes(connection.received), "chunks") == 1
                assert json.loads(connection.received.partition(b"\r\n\r\n")[2])["error"]["code"] == "invalid_http"


@async_test
async def test_garbage_behind_a_request_is_not_its_answer() -> None:
    async with served_gateway(MODEL) as rig, connected(rig) as connection:
        rig.worker.hold()
        await connection.send(request("/v1/completions", b'{"prompt": [1], "max_tokens": 2}') + b"\x00garbage\r\n\r\n")
        await rig.worker.wait_submits(1)
        assert connection.received == b""
        rig.worker.run_freely()
        await connection.read_all(5.0)
        assert re.findall(rb"HTTP/1.1 (\d+)", connection.received) == [b"200", b"400"]
        await at_rest(rig)


@async_test
async def test_a_pipeline_without_end_is_closed() -> None:
    async with served_gateway(MODEL) as rig, connected(rig) as connection:
        rig.worker.hold()
        await connection.send(request("/v1/completions", b'{"prompt": [1], "max_tokens": 2}'))
        await connection.send(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n" * 5000)
        async with asyncio.timeout(5):
            assert await connection.read() == b""
        await at_rest(rig)


@async_test
async def test_leaving_with_requests_in_the_pipeline_ends_the_one_that_runs() -> None:
    async with served_gateway(MODEL) as rig:
        rig.worker.hold()
        async with connected(rig) as connection:
            await connection.send(request("/v1/completions", b'{"prompt": [1], "max_tokens": 50}') * 3)
            await rig.worker.wait_submits(1)
        await rig.worker.wait_until(lambda: len(rig.worker.aborted) == 1)
        await at_rest(rig)
        assert len(rig.worker.submits()) == 1  # the others never began

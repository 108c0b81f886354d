"""n requests in, n answers out, each for its own: over generated framings, sound and damaged, in pieces of any size.

What our end understood is compared with an independent reading (h11, in Python): where both take a message, they agree
about it; where we take fewer, the connection is closed. Cut in other pieces, the same bytes mean the same.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
from collections import Counter

import h11
import pytest

from tests.fakes.http_connection import HttpConnection, Reading
from tests.fuzz.campaign import MemoryGauge, generator, volume
from tests.fuzz.mutations import mutate_bytes

METHODS = ("GET", "POST", "PUT", "DELETE", "OPTIONS", "HEAD", "PATCH")
INNOCENT = (
    "Accept: */*",
    "X-Empty:",
    "Connection: keep-alive",
    "Connection: Upgrade",
    "Connection: upgrade, HTTP2-Settings",
    "Upgrade: h2c",
    "Upgrade: websocket",
    "Upgrade: foo/2, h2c",
    "HTTP2-Settings: AAMAAABkAAQAAP__",
    "Sec-WebSocket-Key: x",
    "Connection: Keep-Alive, Upgrade",
    "Expect: 100-continue",
    "X-Note: GET /smuggled HTTP/1.1",
    "TE: trailers",
)
DOUBTFUL = (
    "Transfer-Encoding: chunked",
    "Transfer-Encoding: identity, chunked",
    "Transfer-Encoding: Chunked, identity",
    "Transfer-Encoding: xchunked",
    "Transfer-Encoding:\x0bchunked",
    "Transfer-Encoding : chunked",
    "transfer-encoding: CHUNKED ",
    "Transfer-Encoding: gzip",
    "Content-Length: 0",
    "Content-Length: 7",
    "Content-Length: 7, 7",
    "Content-Length: 007",
    "Content-Length: +7",
    "Content-Length:\t7 ",
    "Content-Length: 7\r\n 0",
    "Content_Length: 7",
    "Host: b",
    "Connection: close",
    "Connection: Transfer-Encoding, Content-Length",
    "Expect: anything",
    "Proxy-Connection: close",
)
TAILS = (b"", b"x", b"smuggled=1", b"0\r\n\r\n", b"GET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n", b"\r\n\r\n", b"\x00" * 9)
EXTENSIONS = (b"", b"", b";a", b";a=b", b';a="b"')
SIZES = (b"%x", b"%X", b"0%x", b"%04x")


def chunked(rng: random.Random, body: bytes) -> bytes:
    data = b""
    while body:
        size = rng.randrange(1, len(body) + 1)
        data += rng.choice(SIZES) % size + rng.choice(EXTENSIONS) + b"\r\n" + body[:size] + b"\r\n"
        body = body[size:]
    trailers = rng.sample(
        (b"X-T: 1\r\n", b"Connection: Upgrade\r\n", b"Upgrade: h2c\r\n", b"Host: b\r\n"), rng.randrange(3)
    )
    return data + rng.choice((b"0", b"000")) + rng.choice(EXTENSIONS) + b"\r\n" + b"".join(trailers) + b"\r\n"


def sound(rng: random.Random, number: int) -> tuple[bytes, Reading]:
    """One request, and what it says."""
    method, target = rng.choice(METHODS), f"/{number}"
    body = b"".join(rng.choices(TAILS, k=rng.randrange(3)))
    headers = ["Host: a", *rng.sample(INNOCENT, rng.randrange(5))]
    kind = rng.choice(("length", "chunked", "none"))
    if kind == "length":
        headers.append(f"Content-Length: {len(body)}")
    elif kind == "chunked":
        headers.append("Transfer-Encoding: chunked")
    else:
        body = b""
    rng.shuffle(headers)
    head = "\r\n".join([f"{method} {target} HTTP/1.1", *headers, "", ""]).encode()
    return head + (chunked(rng, body) if kind == "chunked" else body), Reading(method, target, body)


def damaged(rng: random.Random, data: bytes) -> bytes:
    """A message with something in it that another end might take differently."""
    head, _, body = data.partition(b"\r\n\r\n")
    lines = head.split(b"\r\n")
    kind = rng.randrange(6)
    if kind < 2:
        lines.insert(rng.randrange(1, len(lines) + 1), rng.choice(DOUBTFUL).encode())
    elif kind == 2:
        lines[0] = lines[0].replace(
            b"HTTP/1.1", rng.choice((b"HTTP/1.0", b"HTTP/0.9", b"HTTP/1.2", b"HTTP/2.0", b"", b"http/1.1"))
        )
    elif kind == 3:
        body = mutate_bytes(rng, body) if body else rng.choice(TAILS)
    elif kind == 4:
        return mutate_bytes(rng, data)
    end = rng.choice((b"\r\n",) * 6 + (b"\n", b"\r", b"\r\r\n", b"\r\n ")) if kind == 5 else b"\r\n"
    return end.join(lines) + b"\r\n\r\n" + body


def pieces(rng: random.Random, data: bytes) -> list[bytes]:
    kind = rng.randrange(4)
    if kind == 0:
        return [data]
    if kind == 1:
        cut = rng.randrange(len(data) + 1)
        return [data[:cut], data[cut:]]
    most = 1 if kind == 2 and len(data) < 400 else rng.randrange(2, 60)
    found = []
    while data:
        size = rng.randrange(1, most + 1)
        found.append(data[:size])
        data = data[size:]
    return found


def read_by_h11(data: bytes) -> list[Reading]:
    """All requests up to the first that h11 refuses, that is not whole, or that closes."""
    found: list[Reading] = []
    while data:
        connection, body = h11.Connection(h11.SERVER), b""
        connection.receive_data(data)
        while True:
            try:
                event = connection.next_event()
            except h11.RemoteProtocolError:
                return found
            if isinstance(event, h11.Request):
                request = event
            elif isinstance(event, h11.Data):
                body += bytes(event.data)
            elif isinstance(event, h11.EndOfMessage):
                break
            else:
                return found
        found.append(Reading(request.method.decode(), request.target.decode("latin-1"), body))
        if connection.their_state is h11.MUST_CLOSE:
            return found
        data = connection.trailing_data[0]
    return found


async def read_by_us(parts: list[bytes]) -> tuple[list[Reading], list[int], bool]:
    """Requests, statuses and whether the connection was closed; every answer is for its own request."""
    client = await HttpConnection().send(parts)
    answers, closed = client.answers, client.closed
    assert len(answers) == len(client.requests) + len(client.refusals)
    for request, answer in zip(client.requests, answers, strict=False):
        assert answer.status == 200
        assert request.method == "HEAD" or json.loads(answer.body)[:2] == [request.method, request.target]
    assert [error.status for error in client.refusals] == [answer.status for answer in answers[len(client.requests) :]]
    assert closed or not client.refusals
    await client.leave()
    return client.requests, [answer.status for answer in answers], closed


def test_no_framing_is_read_in_two_ways(caplog: pytest.LogCaptureFixture) -> None:
    asyncio.run(campaign())
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


async def campaign() -> None:
    num_framings = volume(100_000, 1_500)
    rng = generator("framings", num_framings)
    counts: Counter[str] = Counter()
    gauge = MemoryGauge(num_framings // 3)
    while counts["framings"] < num_framings:
        await one_connection(random.Random(rng.getrandbits(64)), counts)
        gauge.step()
    gauge.check()
    print(dict(counts))
    for name in ("sound", "refused", "both read"):
        assert counts[name] > num_framings // 20, counts


async def one_connection(rng: random.Random, counts: Counter[str]) -> None:
    messages = [sound(rng, number) for number in range(rng.randrange(1, 5))]
    counts["framings"] += len(messages)
    data, wanted = b"".join(message for message, _ in messages), [reading for _, reading in messages]
    if rng.random() < 0.6:
        idx = rng.randrange(len(messages))
        data = b"".join(damaged(rng, message) if i == idx else message for i, (message, _) in enumerate(messages))
        wanted = []
    requests, statuses, closed = await read_by_us(pieces(rng, data))
    if wanted:
        assert (requests, closed) == (wanted, False), data
        counts["sound"] += 1
    counts["refused"] += any(status >= 400 for status in statuses)
    others = read_by_h11(data)
    for ours, theirs in zip(requests, others, strict=False):
        assert ours == theirs, data
        counts["both read"] += 1
    assert closed or len(requests) >= len(others), data
    if rng.random() < 0.2:
        assert await read_by_us(pieces(rng, data)) == (requests, statuses, closed), data

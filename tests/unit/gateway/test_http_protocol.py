"""Requests in, answers out, over every framing; what ends a connection; whose turn it is. Without sockets."""

import asyncio
import json

import pytest

from afd.gateway import closing_transport, http_protocol
from tests.fakes.async_test import async_test
from tests.fakes.http_connection import HttpConnection, Reading, answered

BODY = b"GET /no HTTP/1.1\r\n\r\n"
SMUGGLED = b"GET /version HTTP/1.1\r\nHost: a\r\nX-Request-Id: smug\r\n\r\n"
OFFERS = [
    "",
    "Connection: Upgrade\r\nUpgrade: foo\r\n",
    "Connection: keep-alive, UPGRADE\r\nUpgrade: websocket\r\nSec-WebSocket-Key: x\r\n",
    "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA\r\n",
    "Upgrade: TLS/1.0, h2c\r\nConnection: keep-alive\r\nConnection: upgrade\r\n",
    "Connection: Upgrade\r\n",
    "Upgrade: h2c\r\n",
    "HTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA\r\nConnection: HTTP2-Settings\r\n",
]


def message(method="POST", path="/x", headers="", body=b"", *, chunks=(), trailers="", version="1.1"):
    """A sound request: a body with its length, or in chunks of these sizes (the last takes the rest)."""
    head = f"{method} {path} HTTP/{version}\r\nHost: a\r\n{headers}"
    if not chunks:
        return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
    data, start = f"{head}Transfer-Encoding: chunked\r\n\r\n".encode(), 0
    for size in chunks:
        piece = body[start : start + size]
        data += b"%x\r\n%s\r\n" % (len(piece), piece)
        start += size
    assert start >= len(body)
    return data + b"0\r\n" + trailers.encode() + b"\r\n"


def every_split(data):
    yield [data]
    yield [data[idx : idx + 1] for idx in range(len(data))]
    yield from ([data[:cut], data[cut:]] for cut in range(1, len(data)))


@async_test
@pytest.mark.parametrize("offer", OFFERS)
@pytest.mark.parametrize("chunks", [(), (3, 100)])
async def test_an_offer_to_upgrade_changes_nothing(offer, chunks):
    data = message("POST", "/first", offer, BODY, chunks=chunks) + SMUGGLED + message("PUT", "/third", offer, b"z")
    wanted = [Reading("POST", "/first", BODY), Reading("GET", "/version", b""), Reading("PUT", "/third", b"z")]
    for pieces in every_split(data):
        client = await answered(*pieces)
        assert client.requests == wanted
        assert [json.loads(answer.body)[1] for answer in client.answers] == ["/first", "/version", "/third"]
        assert not client.closed and not client.refusals
        await client.leave()


@async_test
@pytest.mark.parametrize("offer", OFFERS)
async def test_a_request_inside_a_body_is_never_one(offer):
    """The attack: the head and a part of the body first, the rest of the body later."""
    body = b"x" * 100 + SMUGGLED
    client = await answered(message("POST", "/tokenize", offer, body)[: -len(SMUGGLED)], SMUGGLED)
    assert client.requests == [Reading("POST", "/tokenize", body)]
    assert len(client.answers) == 1
    await client.leave()


@async_test
@pytest.mark.parametrize("offer", OFFERS)
async def test_an_answer_before_the_end_of_the_body_is_the_last(offer):
    client = await answered(message("GET", "/early", offer, b"x" * 9 + SMUGGLED)[: -len(SMUGGLED)], SMUGGLED, SMUGGLED)
    assert client.requests == [Reading("GET", "/early", b"")]
    assert [answer.status for answer in client.answers] == [200]
    assert b"connection: close" in client.transport.written
    assert client.closed
    await client.leave()


@async_test
async def test_trailers_are_no_headers_and_a_request_follows_them():
    trailers = "Authorization: Bearer x\r\nConnection: Upgrade\r\nUpgrade: h2c\r\nHost: b\r\n"
    data = message("POST", "/x", "", BODY, chunks=(5, 100), trailers=trailers)
    for pieces in every_split(data + SMUGGLED):
        client = await answered(*pieces)
        assert client.requests == [Reading("POST", "/x", BODY), Reading("GET", "/version", b"")]
        await client.leave()


HEADS = {
    "GET / HTTP/1.1\r\n\r\n": 400,
    "GET / HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n": 400,
    "GET / HTTP/1.0\r\nHost: a\r\nhost: b\r\n\r\n": 400,
    "GET / HTTP/1.1\r\nHost: a b\r\n\r\n": 400,
    "GET / HTTP/1.1\r\nHost: a/b\r\n\r\n": 400,
    "GET / HTTP/1.1\r\nHost: a@b\r\n\r\n": 400,
    "GET http://b/ HTTP/1.1\r\nHost: a\r\n\r\n": 400,
    "GET / HTTP/0.9\r\nHost: a\r\n\r\n": 505,
    "GET / HTTP/2.0\r\nHost: a\r\n\r\n": 505,
    "GET /\r\n\r\n": 505,
    "CONNECT a:1 HTTP/1.1\r\nHost: a:1\r\n\r\n": 400,
    "POST / HTTP/1.1\r\nHost: a\r\nExpect: anything\r\nContent-Length: 0\r\n\r\n": 417,
    "POST / HTTP/1.1\r\nHost: a\r\nExpect: 100-continue, x\r\nContent-Length: 0\r\n\r\n": 417,
    "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: identity, chunked\r\n\r\n": 501,
    "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip, chunked\r\n\r\n": 501,
    "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n\r\n": 501,
    "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n": None,
    "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked, chunked\r\n\r\n": None,
    "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: identity\r\n\r\n": None,
    "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding:\r\n\r\n": None,
    "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: \x0bchunked\r\n\r\n": None,
    "POST / HTTP/1.0\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n": 400,
    "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n": 400,
    "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nContent-Length: 5\r\n\r\n": 400,
    "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5, 5\r\n\r\n": 400,
    "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: +5\r\n\r\n": 400,
    "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 0x5\r\n\r\n": 400,
    "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 9999999999999999999\r\n\r\n": 400,
    "POST / HTTP/1.1\r\nHost: a\r\nContent-Length:\r\n\r\n": 400,
    "POST / HTTP/1.1\r\nHost: a\r\nContent-Length : 5\r\n\r\n": 400,
    "POST / HTTP/1.1\r\nHost: a\r\nX: y\r\n Content-Length: 5\r\n\r\n": 400,
    "POST / HTTP/1.1\nHost: a\nContent-Length: 5\n\n": 400,
    "POST / HTTP/1.1\r\nHost: a\r\nX: y\rContent-Length: 5\r\n\r\n": 400,
    "POST / HTTP/1.1\r\nHost: a\r\nX\x00: y\r\n\r\n": 400,
    "POST / HTTP/1.1\r\nHost: a\r\n: y\r\n\r\n": 400,
    "\x16\x03\x01\x00": 400,
}


@async_test
@pytest.mark.parametrize(("head", "status"), HEADS.items())
async def test_what_can_be_read_in_two_ways_is_refused_and_closes(head, status):
    data = head.encode("latin-1")
    for before in ([], [Reading("GET", "/ok", b"")]):
        for offer in ("", "Connection: Upgrade\r\nUpgrade: foo\r\n"):
            bad = data.replace(b"Host: a\r\n", b"Host: a\r\n" + offer.encode(), 1)
            first = b"GET /ok HTTP/1.1\r\nHost: a\r\n\r\n" * len(before)
            for pieces in ([first + bad + SMUGGLED], [first, bad, SMUGGLED]):
                client = await answered(*pieces)
                assert client.requests == before
                statuses = [answer.status for answer in client.answers]
                assert statuses[:-1] == [200] * len(before)
                assert statuses[-1] == status or (status is None and statuses[-1] in (400, 501))
                assert set(json.loads(client.answers[-1].body)["error"]) == {"message", "type", "param", "code"}
                assert client.closed and len(client.refusals) == 1
                await client.leave()


@async_test
@pytest.mark.parametrize(
    "chunks", ["zz\r\n", "-1\r\nx", "5\nabcde\r\n", "5\r\nabcdeX", "5\r\nabcde\n0\r\n\r\n", "5 \r\nabcde\r\n", "f" * 17]
)
async def test_a_bad_chunk_is_a_400_behind_the_answers_before_it(chunks):
    head = b"POST /x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
    client = await answered(SMUGGLED + head + chunks.encode() + SMUGGLED)
    assert client.requests == [Reading("GET", "/version", b"")]
    assert [answer.status for answer in client.answers] == [200, 400]
    assert client.closed
    await client.leave()


@async_test
@pytest.mark.parametrize("header", ["Connection: close\r\n", "Connection: close, Upgrade\r\nUpgrade: h2c\r\n"])
async def test_nothing_is_read_behind_a_request_that_closes(header):
    for data in (message("POST", "/x", header, BODY), message("POST", "/x", header, BODY, version="1.0")):
        client = await answered(data + SMUGGLED)
        assert client.requests == [Reading("POST", "/x", BODY)]
        assert client.closed and not client.refusals
        await client.leave()


@async_test
async def test_a_client_is_told_to_continue_once_and_never_with_http_1_0():
    head, body = message("POST", "/x", "Expect: 100-Continue\r\n", BODY)[: -len(BODY)], BODY
    client = await answered(head)
    assert bytes(client.transport.written) == b"HTTP/1.1 100 Continue\r\n\r\n"
    await client.send([body + SMUGGLED])
    assert [request.target for request in client.requests] == ["/x", "/version"]
    assert len(client.answers) == 2
    await client.leave()
    client = await answered(head.replace(b"HTTP/1.1", b"HTTP/1.0"), body)
    assert client.transport.written.startswith(b"HTTP/1.1 200")
    await client.leave()


@async_test
@pytest.mark.parametrize("parts", [1, 2, 17])
async def test_the_largest_head(parts):
    for excess, status in ((0, 200), (1, 431)):
        head = b"GET /x HTTP/1.1\r\nHost: a\r\nX: "
        head += b"x" * (http_protocol.MAX_HEAD_BYTES + excess - len(head) - 4) + b"\r\n\r\n"
        size = -(-len(head) // parts)
        for before in (b"", SMUGGLED):
            client = await answered(
                *filter(None, [before]), *(head[at : at + size] for at in range(0, len(head), size))
            )
            assert client.answers[-1].status == status, (excess, before)
            await client.leave()
    client = await answered(b"GET / HTTP/1.1\r\nHost: a\r\n" + b"X:" + b" " * 100_000 + b"y\r\n\r\n")
    assert client.answers[-1].status == 431
    await client.leave()


@async_test
@pytest.mark.parametrize(
    "endless", [b"5;x=" + b"y" * 200_000, b"0\r\nX: " + b"y" * 200_000, b"0\r\n" + b"X: y\r\n" * 20_000]
)
async def test_what_goes_with_chunks_is_bounded(endless):
    head = b"POST /x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
    client = await answered(head, *(endless[at : at + 9999] for at in range(0, len(endless), 9999)))
    assert [answer.status for answer in client.answers] == [431]
    assert client.closed
    await client.leave()


@async_test
async def test_every_state_that_waits_for_the_client_ends(monkeypatch):
    for name in ("HEAD_TIMEOUT_S", "BODY_TIMEOUT_S"):
        monkeypatch.setattr(http_protocol, name, 0.02)
    monkeypatch.setattr(closing_transport, "LINGER_S", 0.02)
    whole = message("POST", "/x", "", BODY)
    for pieces, statuses in (
        ([], [408]),
        ([b"GE"], [408]),
        ([b"\r\n"], [408]),
        ([whole[:-1]], [408]),
        ([whole[: -len(BODY)]], [408]),
        ([whole + b"GE"], [200, 408]),
        ([whole, b"\r\n"], [200, 408]),
        ([whole + whole[:-1]], [200, 408]),
        ([whole, message("POST", "/x", OFFERS[1], BODY)[:-1]], [200, 408]),
        ([message("POST", "/x", "", BODY, chunks=(100,))[:-1]], [408]),
    ):
        client = await answered(*pieces)
        async with asyncio.timeout(10):
            while not client.closed:
                await asyncio.sleep(0.005)
        assert [answer.status for answer in client.answers] == statuses, pieces
        await client.leave()


@async_test
async def test_an_early_answer_does_not_keep_the_connection(monkeypatch):
    """The client neither closes nor sends the rest of its body, but something now and then."""
    monkeypatch.setattr(closing_transport, "LINGER_S", 0.05)
    client = HttpConnection()
    monkeypatch.setattr(client.transport, "write_eof", lambda: None)
    await client.send([message("POST", "/early", "", BODY)[:-3]])
    async with asyncio.timeout(10):
        while not client.closed:
            client.protocol.data_received(b"x")
            await asyncio.sleep(0.005)
    assert [answer.status for answer in client.answers] == [200]
    await client.leave()

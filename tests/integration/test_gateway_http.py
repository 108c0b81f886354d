"""The whole gateway process on a real socket: clients that leave, do not read, do not finish; draining; leaks."""

import asyncio
import contextlib
import gc
import json
import os
import socket
import threading

import httpx
import pytest

from afd.config import ClusterConfig, GatewayConfig
from afd.errors import ConfigError
from afd.gateway import http_protocol
from afd.gateway.serve import bind, run_gateway, url_of
from tests.fakes.async_test import async_test
from tests.fakes.gateway import SECRET, events, served_gateway, text_of
from tests.fakes.text_model import text_model
from tests.fakes.worker import counting_tokens

MODEL = text_model()


def expected_text(prompt_ids, count):
    return MODEL.tokenizer.decode([counting_tokens(prompt_ids, idx) for idx in range(count)])


def request_bytes(body, *, path="/v1/completions", extra=""):
    payload = json.dumps(body).encode()
    return (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(payload)}\r\n{extra}\r\n".encode() + payload
    )


@contextlib.asynccontextmanager
async def connection(rig, **options):
    host, port = rig.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port), **options)
    try:
        yield reader, writer
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


async def answer_of(reader):
    """(status, body) of a response that ends with the connection or has a length."""
    async with asyncio.timeout(10):
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        status = int(head.split()[1])
        length = int(head.split("content-length: ")[1].split("\r\n")[0])
        return status, json.loads(await reader.readexactly(length))


async def gone(rig, count=1):
    """Until the worker has been told to stop so many requests, and nothing runs."""
    await rig.worker.wait_until(lambda: len(rig.worker.aborted) >= count)
    assert rig.worker.num_running == 0


@async_test
@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves_frees_the_worker(stream):
    async with served_gateway(MODEL) as rig:
        rig.worker.hold()
        async with connection(rig) as (reader, writer):
            writer.write(request_bytes({"prompt": [1, 2], "max_tokens": 50, "n": 2, "stream": stream}))
            await rig.worker.wait_submits(2)
            if stream:
                rig.worker.allow(4)
                await reader.readuntil(b"data: ")
        await gone(rig, 2)
        metrics = (await rig.client.get("/metrics")).text
    assert "afd_gateway_disconnects_total 1.0" in metrics
    assert "afd_gateway_running_sequences 0.0" in metrics


@async_test
async def test_a_client_that_leaves_before_its_request_is_complete():
    async with served_gateway(MODEL) as rig:
        for cut in (10, 60, -1):
            async with connection(rig) as (_, writer):
                writer.write(request_bytes({"prompt": [1, 2]})[:cut])
                await writer.drain()
        assert (await rig.complete([1, 2], max_tokens=1)).status_code == 200
        assert len(rig.worker.submits()) == 1


@async_test
async def test_bodies_that_do_not_come_to_their_end_have_one_bound():
    """Each within its own bound and time; together they are too many, and the oldest are told so and closed."""
    limits = {"max_body_bytes": 1 << 20, "max_waiting_bytes": 2 << 20}
    async with served_gateway(MODEL, limits=limits) as rig, contextlib.AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(connection(rig)) for _ in range(4)]
        for _, writer in clients:
            writer.write(b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1048576\r\n\r\n")
            writer.write(b" " * 1_000_000)
            await writer.drain()
        answered = {asyncio.ensure_future(answer_of(reader)) for reader, _ in clients}
        first, waiting = await asyncio.wait(answered, return_when=asyncio.FIRST_COMPLETED, timeout=10)
        while len(first) < 2:
            more, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED, timeout=10)
            first |= more
        for status, body in (task.result() for task in first):
            assert (status, body["error"]["code"]) == (503, "overloaded")
            assert "gateway.max_waiting_bytes" in body["error"]["message"]
        assert len(waiting) == 2
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        short = await rig.client.post("/tokenize", json={"prompt": "hello"})
        assert short.status_code == 200


@async_test
async def test_a_client_that_does_not_read_is_cut_off(monkeypatch):
    monkeypatch.setattr(http_protocol, "WRITE_STALL_S", 0.3)
    async with served_gateway(text_model(max_context=1 << 17)) as rig:
        rig.worker.tokens_per_chunk = 1000
        rig.worker.hold()
        body = {"prompt": [1], "max_tokens": 40_000, "logprobs": 2, "stream": True}
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.setblocking(False)
        loop = asyncio.get_running_loop()
        try:
            host, port = rig.url.removeprefix("http://").split(":")
            await loop.sock_connect(sock, (host, int(port)))
            await loop.sock_sendall(sock, request_bytes(body))
            await rig.worker.wait_submits()
            rig.worker.allow(30)  # about 5 MB of events: more than the sockets buffer
            await gone(rig)
        finally:
            sock.close()
        rig.worker.run_freely()
        assert (await rig.complete([1, 2], max_tokens=1)).status_code == 200


@async_test
async def test_a_head_that_does_not_come_is_a_408(monkeypatch):
    monkeypatch.setattr(http_protocol, "HEAD_TIMEOUT_S", 0.1)
    async with served_gateway(MODEL) as rig:
        for begun in (b"", b"POST /v1/comp", b"GET / HTTP/1.1\r\nHost: localhost\r\n"):
            async with connection(rig) as (reader, writer):
                writer.write(begun)
                status, body = await answer_of(reader)
                assert (status, body["error"]["code"]) == (408, "timeout")
                assert await reader.read() == b""


@async_test
async def test_heads_that_are_too_large_or_no_http():
    async with served_gateway(MODEL) as rig:
        large = b"GET /livez HTTP/1.1\r\nX-Large: " + b"x" * (1 << 20)
        many = b"GET /livez HTTP/1.1\r\n" + b"X-Many: y\r\n" * 20_000
        long_path = b"GET /" + b"x" * (1 << 20)
        for head, status in ((large, 431), (many, 431), (long_path, 431), (b"\x16\x03\x01 nonsense\r\n\r\n", 400)):
            async with connection(rig) as (reader, writer):
                writer.write(head)
                got, body = await answer_of(reader)
                assert got == status
                assert set(body["error"]) == {"message", "type", "param", "code"}
        trailers = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n"
        async with connection(rig) as (reader, writer):
            writer.write(trailers + b"X-T: " + b"y" * 1000 + b"\r\n")
            writer.write(b"".join(b"X-%d: " % i + b"y" * 1000 + b"\r\n" for i in range(200)))
            async with asyncio.timeout(10):
                with contextlib.suppress(ConnectionError):
                    await reader.read()
        assert (await rig.client.get("/livez")).status_code == 200


@async_test
async def test_one_connection_many_requests_also_pipelined():
    async with served_gateway(MODEL) as rig, connection(rig) as (reader, writer):
        for _ in range(3):
            writer.write(request_bytes({"prompt": [1, 2], "max_tokens": 3}))
            status, body = await answer_of(reader)
            assert (status, body["choices"][0]["text"]) == (200, expected_text([1, 2], 3))
        writer.write(b"".join(request_bytes({"prompt": [1, 2], "max_tokens": count}) for count in (1, 2, 3)))
        for count in (1, 2, 3):
            _, body = await answer_of(reader)
            assert body["choices"][0]["text"] == expected_text([1, 2], count)


@async_test
async def test_sixty_four_streams_at_once():
    async with served_gateway(MODEL, num_workers=2) as rig:
        answers = await asyncio.gather(*(rig.complete([1, i], max_tokens=20, stream=True) for i in range(64)))
        assert sorted(len(worker.submits()) for worker in rig.workers) == [32, 32]
    for i, answer in enumerate(answers):
        assert text_of(events(answer.text)) == expected_text([1, i], 20)


@async_test
async def test_stopping_lets_running_streams_finish():
    async with served_gateway(MODEL) as rig:
        rig.worker.hold()
        request = asyncio.ensure_future(rig.complete([1, 2], max_tokens=8, stream=True))
        await rig.worker.wait_submits()
        rig.stop.set()
        await rig.membership.wait_ready(False)
        refused = await rig.client.get("/readyz")
        assert (refused.status_code, refused.json()["error"]["message"]) == (503, "the gateway is shutting down")
        assert (await rig.complete([1])).status_code == 503
        rig.worker.run_freely()
        assert text_of(events((await request).text)) == expected_text([1, 2], 8)


@async_test
async def test_stopping_ends_what_does_not_finish_in_time():
    async with served_gateway(MODEL, limits={"drain_s": 0.2}) as rig:
        rig.worker.hold()
        request = asyncio.ensure_future(rig.complete([1, 2], max_tokens=8, stream=True))
        await rig.worker.wait_submits()
        rig.worker.allow(1)
        rig.stop.set()
        text = (await request).text
        await gone(rig)
    error = events(text)[-1]["error"] if text.startswith("data") else json.loads(text)["error"]
    assert error["code"] == "shutdown"


@async_test
async def test_a_cluster_that_shuts_down_stops_the_gateway():
    async with served_gateway(MODEL) as rig:
        rig.membership.publish([rig.worker.member()], shutdown=True)
        async with asyncio.timeout(10):
            while True:
                try:
                    await rig.client.get("/livez")
                except httpx.TransportError:  # refused, or closed in the middle of the request
                    break


@async_test
async def test_nothing_is_left_behind():
    async def once():
        async with served_gateway(MODEL) as rig:
            await rig.complete([1, 2], max_tokens=2, stream=True)
            async with connection(rig) as (_, writer):
                writer.write(b"GET /")

    await once()  # what is made once per process (thread pool, ...) is made here
    gc.collect()
    before = len(os.listdir("/proc/self/fd")), threading.active_count()
    await once()
    gc.collect()
    assert (len(os.listdir("/proc/self/fd")), threading.active_count()) == before


def test_a_port_in_use_is_named():
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        config = ClusterConfig(gateway=GatewayConfig(port=port))
        with pytest.raises(ConfigError, match=f"127.0.0.1:{port}.*in use"):
            run_gateway(config, None, SECRET, print, threading.Event(), MODEL)


def test_an_unreadable_key_file_is_named(tmp_path):
    path = tmp_path / "keys"
    for content in (None, "# nothing\n"):
        if content is not None:
            path.write_text(content)
        config = ClusterConfig(gateway=GatewayConfig(port=0, api_keys_file=str(path)))
        with pytest.raises(ConfigError, match="keys"):
            run_gateway(config, None, SECRET, print, threading.Event(), MODEL)


@pytest.mark.parametrize(("host", "shown"), [("127.0.0.1", "127.0.0.1"), ("0.0.0.0", "localhost"), ("::1", "[::1]")])
def test_urls(host, shown):
    with contextlib.closing(bind(host, 0)) as listener:
        assert url_of(listener) == f"http://{shown}:{listener.getsockname()[1]}"


@async_test
async def test_pages_of_other_sites_are_refused_by_a_gateway_without_keys():
    async with served_gateway(MODEL) as rig:
        body = {"prompt": [1, 2], "max_tokens": 1}
        for headers, status, code in (
            ({"Host": "evil.example"}, 421, "unknown_host"),
            ({"Origin": "http://evil.example", "Content-Type": "text/plain"}, 403, "cross_site"),
            ({"Sec-Fetch-Site": "same-origin"}, 200, None),
        ):
            answer = await rig.client.post("/v1/completions", json=body, headers=headers)
            assert answer.status_code == status
            assert code is None or answer.json()["error"]["code"] == code
        assert len(rig.worker.submits()) == 1
        page = await rig.client.get("/")
        assert "frame-ancestors 'none'" in page.headers["content-security-policy"]
        assert (await rig.client.get("/favicon.ico")).status_code == 204

"""What is dropped on the way between a gateway and its workers is counted, and stands in /metrics."""

import asyncio

import zmq
import zmq.asyncio
from prometheus_client import CollectorRegistry, generate_latest

from afd.gateway.metrics import DispatchCollector
from afd.gateway.sla import SlaWindow
from afd.gateway.worker_client import WorkerClient
from afd.messages.codec import encode
from afd.messages.serving import Abort, Tokens
from afd.messages.serving_sockets import server_socket
from tests.fakes.async_test import async_test
from tests.fakes.dispatch_scene import Scene

SECRET = b"a secret for tests, long enough"
LIMIT_S = 10


@async_test
async def test_dropped_messages_are_counted():
    heard = asyncio.Queue()
    client = WorkerClient(SECRET, b"gateway", lambda key, message: heard.put_nowait(message))
    registry = CollectorRegistry()
    registry.register(DispatchCollector(Scene().dispatcher, client.counters, "m", SlaWindow(0.05, 1.0), block_size=32))
    with zmq.asyncio.Context() as context, server_socket(context, SECRET, 1 << 20) as worker:
        port = worker.bind_to_random_port("tcp://127.0.0.1")
        client.send("a", Abort(["1"]))  # no link yet
        client.connect("a", f"tcp://127.0.0.1:{port}")
        client.send("a", Abort(["2"]))
        async with asyncio.timeout(LIMIT_S):
            gateway, _ = await worker.recv_multipart()
            for frame in (b"nonsense", encode(Abort(["3"])), encode(Tokens([]))):
                await worker.send_multipart([gateway, frame])
            assert await heard.get() == Tokens([])
        await client.close()
    page = generate_latest(registry).decode()
    assert "afd_gateway_messages_unsent_total 1.0" in page
    assert "afd_gateway_messages_unreadable_total 2.0" in page

"""A gateway under test: fake membership and workers around the real service, in process or behind a real socket."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from afd.config import ClusterConfig, CoordinatorConfig, GatewayConfig, SlaConfig, TopologyConfig
from afd.gateway.api_keys import ApiKeys
from afd.gateway.app import build_app
from afd.gateway.serve import run_gateway
from afd.gateway.served_model import ServedModel
from afd.gateway.service import GatewayService
from tests.fakes.membership import FakeMembership
from tests.fakes.text_model import text_model
from tests.fakes.worker import FakeWorker

SECRET = b"a secret for tests, long enough"


@dataclass
class Rig:
    """What a test handles. service is None behind a real socket."""

    client: httpx.AsyncClient
    membership: FakeMembership
    workers: list[FakeWorker]
    service: GatewayService | None = None
    url: str = ""
    stop: threading.Event | None = None

    @property
    def worker(self) -> FakeWorker:
        return self.workers[0]

    def publish(self, workers: Sequence[FakeWorker] | None = None) -> None:
        members = [worker.member() for worker in (self.workers if workers is None else workers)]
        self.membership.publish(members, num_attention=len(self.workers))

    async def wait_until(self, condition: Callable[[], bool]) -> None:
        """Wait for a condition that messages of the workers bring about."""
        async with asyncio.timeout(10):
            while not condition():
                await asyncio.sleep(0.005)

    async def chat(self, content: str = "hi", **fields: Any) -> httpx.Response:
        body = {"messages": [{"role": "user", "content": content}], **fields}
        return await self.client.post("/v1/chat/completions", json=body)

    async def complete(self, prompt: Any, **fields: Any) -> httpx.Response:
        return await self.client.post("/v1/completions", json={"prompt": prompt, **fields})


@contextlib.asynccontextmanager
async def gateway(
    model: ServedModel | None = None,
    *,
    num_workers: int = 1,
    keys: Sequence[str] = (),
    limits: dict[str, Any] | None = None,
    sla: dict[str, Any] | None = None,
    recovery_timeout_s: float = 60.0,
    stall_timeout_s: float = 5.0,
) -> AsyncIterator[Rig]:
    """The application in this loop, called without a socket; ready on entry."""
    config = ClusterConfig(
        cluster=TopologyConfig(recovery_timeout_s=recovery_timeout_s),
        coordinator=CoordinatorConfig(stall_timeout_s=stall_timeout_s),
        gateway=GatewayConfig(port=0, **(limits or {})),
        sla=SlaConfig(**(sla or {})),
    )
    membership = FakeMembership()
    workers = [FakeWorker(SECRET, rank) for rank in range(num_workers)]
    service = GatewayService(config, model or text_model(), membership, SECRET)  # type: ignore[arg-type]
    transport = httpx.ASGITransport(build_app(service, ApiKeys(list(keys))), raise_app_exceptions=False)
    client = httpx.AsyncClient(transport=transport, base_url="http://localhost")
    rig = Rig(client, membership, workers, service)
    try:
        service.start()
        if workers:
            rig.publish()
            await membership.wait_ready()
            await rig.wait_until(lambda: _num_serving(service) >= num_workers)
        yield rig
    finally:
        await client.aclose()
        await service.close()
        for worker in workers:
            await worker.close()


@contextlib.asynccontextmanager
async def served_gateway(
    model: ServedModel | None = None, *, num_workers: int = 1, limits: dict[str, Any] | None = None
) -> AsyncIterator[Rig]:
    """The whole process function on a real socket, in a thread of its own; ready on entry."""
    config = ClusterConfig(gateway=GatewayConfig(port=0, **(limits or {})))
    loop = asyncio.get_running_loop()
    membership = FakeMembership()
    workers = [FakeWorker(SECRET, rank) for rank in range(num_workers)]
    stop, announced = threading.Event(), loop.create_future()

    def on_ready(url: str) -> None:
        loop.call_soon_threadsafe(announced.set_result, url)

    served = model or text_model()
    serving = asyncio.ensure_future(
        asyncio.to_thread(run_gateway, config, membership, SECRET, on_ready, stop, served)  # type: ignore[arg-type]
    )
    try:
        await asyncio.wait({serving, announced}, return_when=asyncio.FIRST_COMPLETED, timeout=10)
        if serving.done():
            serving.result()
        url = announced.result()
        async with httpx.AsyncClient(base_url=url, timeout=10) as client:
            rig = Rig(client, membership, workers, url=url, stop=stop)
            rig.publish()
            await membership.wait_ready()
            yield rig
    finally:
        stop.set()
        assert await serving == 0
        for worker in workers:
            await worker.close()


def _num_serving(service: GatewayService) -> int:
    return sum(worker.serving for worker in service.dispatcher.workers.values())


def events(text: str) -> list[dict[str, Any]]:
    """The JSON events of a stream that must end with [DONE]; comments are left out."""
    blocks = [block for block in text.split("\n\n") if block and not block.startswith(":")]
    assert blocks[-1] == "data: [DONE]", blocks[-1:]
    return [json.loads(block.removeprefix("data: ")) for block in blocks[:-1]]


def text_of(stream: list[dict[str, Any]], index: int = 0) -> str:
    """The text of one choice of a chat or completion stream."""
    pieces = []
    for event in stream:
        for choice in event.get("choices", []):
            if choice["index"] == index:
                pieces.append(choice["delta"].get("content", "") if "delta" in choice else choice["text"])
    return "".join(pieces)


def saying(model: ServedModel, text: str, *, end: bool = True) -> Any:
    """A worker's script that says a text (and then the end token, over and over)."""
    assert model.tokenizer is not None
    ids = model.tokenizer.encode(text)
    return lambda prompt_ids, idx: ids[idx] if idx < len(ids) else model.eos_token_ids[0] if end else ids[-1]

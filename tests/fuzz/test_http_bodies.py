"""Mutated requests into the gateway's application: an answer or an error of the one shape, never a 500, never a hang,
and nothing left running."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import random
from collections.abc import Iterator
from contextlib import contextmanager

from afd.gateway.templating import ChatTemplate
from tests.fakes.async_test import async_test
from tests.fakes.gateway import Rig, gateway
from tests.fakes.text_model import text_model
from tests.fuzz.asgi import Answer, call
from tests.fuzz.bodies import BODIES, mutated
from tests.fuzz.campaign import MemoryGauge, generator, nothing_left, volume
from tests.fuzz.mutations import mutate_bytes

CHEERFUL = (200, 400, 404, 413, 421)  # what a client may hear of a body
# Writes out whatever it is given, as templates with tools do.
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}:{{ m.content }}{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}"
    "{% for t in m.tool_calls %}{{ t.function.name + '' }}{% endfor %}\n{% endfor %}"
    "{{ mode | upper }}{{ depth | tojson }}{% if add_generation_prompt %}assistant:{% endif %}"
)
MODEL = dataclasses.replace(text_model(max_context=1024), template=ChatTemplate({"default": TEMPLATE}))
HEADERS = (b"x-request-id", b"authorization", b"x-sla-ttft-ms", b"x-sla-tpot-ms", b"content-type", b"host")
PATHS = (
    "/",
    "/v1/models",
    "/v1/models/",
    "/v1/models/tiny",
    "/metrics",
    "/cluster",
    "/livez",
    "/version",
    "/docs",
    "//",
)
METHODS = ("GET", "HEAD", "OPTIONS", "DELETE", "PUT", "PATCH", "TRACE", "X")


def check(answer: Answer, what: object) -> None:
    """The contract of every answer."""
    assert answer.complete, what
    if answer.status == 200 and answer.headers["content-type"].startswith("text/event-stream"):
        blocks = answer.body.decode().split("\n\n")
        assert blocks[-2:] == ["data: [DONE]", ""], (what, answer.body[-300:])
        for block in blocks[:-2]:
            assert block.startswith(("data: ", ":")), (what, block)
            if block.startswith("data: "):
                assert "error" not in json.loads(block.removeprefix("data: ")), (what, block)
    elif answer.status >= 400:
        error = answer.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}, (what, error)
        assert error["message"], what
        assert len(answer.body) < 8192, (what, "an error must not send the request back")
    assert answer.headers["x-request-id"]


async def at_rest(rig: Rig) -> None:
    """Nothing runs or waits, at the gateway and at the worker."""
    assert rig.service is not None
    async with asyncio.timeout(10):
        while rig.worker.num_running or rig.service.num_requests_running:
            await asyncio.sleep(0.005)
    assert rig.service.dispatcher.num_running == 0
    assert len(rig.service.dispatcher.queue) == 0
    assert all(
        not worker.active and worker.outstanding_tokens == 0 for worker in rig.service.dispatcher.workers.values()
    )


async def tasks_end(num_tasks: int) -> None:
    """Cancelled tasks need a few turns of the loop to end."""
    async with asyncio.timeout(5):
        while len(asyncio.all_tasks()) > num_tasks:
            await asyncio.sleep(0)


def forget(rig: Rig) -> None:
    """The fake worker keeps a record of everything."""
    rig.worker.received.clear()
    rig.worker.aborted.clear()
    for req_id in [req_id for req_id, run in rig.worker._runs.items() if run.finish is not None]:
        del rig.worker._runs[req_id]


def fields(rng: random.Random) -> list[tuple[bytes, bytes]]:
    """A few headers with odd values."""
    values = (
        b"",
        b"1",
        b"nan",
        b"-1",
        b"1e308",
        b"inf",
        b"9" * 5000,
        b"\xff\xfe",
        b"Bearer x",
        b"[",
        b"[::1",
        b"a:b:c",
    )
    return [(rng.choice(HEADERS), rng.choice((*values, rng.randbytes(9)))) for _ in range(rng.choice((0, 0, 0, 1, 2)))]


@contextmanager
def quiet_log() -> Iterator[None]:
    """Thousands of refused requests are no news."""
    logger = logging.getLogger("afd")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


@async_test
async def test_mutated_bodies() -> None:
    num_cases = volume(10_000, 500)
    rng = generator("bodies", num_cases)
    counts: dict[int, int] = {}
    with quiet_log(), nothing_left():
        async with gateway(MODEL, limits={"max_body_bytes": 1 << 18}) as rig:
            app = rig.client._transport.app  # type: ignore[attr-defined]
            num_tasks = len(asyncio.all_tasks())
            gauge = MemoryGauge(num_cases)
            for number in range(num_cases):
                path, body = mutated(rng)
                cut = rng.randrange(len(body) + 1) if rng.random() < 0.1 else len(body)
                answer = await call(app, "POST", path, [body[:cut], body[cut:]], fields(rng))
                counts[answer.status] = counts.get(answer.status, 0) + 1
                assert answer.status in CHEERFUL, (path, body[:500], answer)
                check(answer, (path, body[:500]))
                gauge.step()
                if number % 100 == 0:
                    forget(rig)
            await at_rest(rig)
            forget(rig)
            gauge.check()
            await tasks_end(num_tasks)
            assert (await rig.complete([1, 2], max_tokens=1)).status_code == 200
    print(counts)
    assert counts[200] > num_cases // 20
    assert counts[400] > num_cases // 4


@async_test
async def test_any_path_method_and_header() -> None:
    num_cases = volume(3_000, 200)
    rng = generator("paths", num_cases)
    async with gateway(MODEL) as rig:
        app = rig.client._transport.app  # type: ignore[attr-defined]
        for _ in range(num_cases):
            path = rng.choice((*PATHS, *(path for path, _ in BODIES)))
            if rng.random() < 0.5:
                path = "/" + mutate_bytes(rng, path.encode()[1:]).decode(errors="replace")
            method = rng.choice((*METHODS, "GET"))
            answer = await call(app, method, path, [rng.randbytes(9)], fields(rng))
            assert answer.status in (200, 204, 400, 403, 404, 405, 421), (method, path, answer)
            check(answer, (method, path))
        await at_rest(rig)


@async_test
async def test_hang_ups_at_every_stage() -> None:
    """A client that goes away after any number of messages leaves nothing running anywhere."""
    num_cases = volume(2_000, 120)
    rng = generator("hang-ups", num_cases)
    with nothing_left():
        async with gateway(MODEL) as rig:
            app = rig.client._transport.app  # type: ignore[attr-defined]
            num_tasks = len(asyncio.all_tasks())
            for number in range(num_cases):
                path, body = rng.choice(BODIES[:5])
                rig.worker.delay_s = rng.choice((0.0, 0.0, 0.001))
                content = json.dumps({**body, "max_tokens": 20, "stream": rng.random() < 0.7}).encode()
                chunks = [content] if rng.random() < 0.7 else [content[: rng.randrange(len(content))]] * 2
                await call(app, "POST", path, chunks, hang_up_after=rng.randrange(12))
                if number % 20 == 0:
                    await at_rest(rig)
                    forget(rig)
            await at_rest(rig)
            await tasks_end(num_tasks)
            assert (await rig.complete([1, 2], max_tokens=1)).status_code == 200

"""Mutated ZeroMQ frames into the gateway, from a worker that turned evil: dropped, or taken as what they say, and every
request still ends; no handler raises, no client sees a token that the model does not have, or more of them than it
asked for.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
from typing import Any

import httpx
import pytest

from afd.messages.codec import encode
from afd.messages.serving import Refused, Submit, TokenChunk, Tokens, WorkerStats
from tests.fakes.async_test import async_test
from tests.fakes.gateway import Rig, events, gateway
from tests.fakes.text_model import text_model
from tests.fuzz.campaign import MemoryGauge, generator, nothing_left, volume
from tests.fuzz.serving_messages import frame, worker_message
from tests.fuzz.test_http_bodies import at_rest, forget

MODEL = text_model()
MAX_TOKENS = 6
NUM_CLIENTS = 4
BURST = 40
GENTLE = (200, 400, 500, 503, 504)  # 500: only as the worker's own word that the request failed


async def request(rig: Rig, rng: random.Random) -> None:
    """One client's request, whose answer must be sound whatever the worker says."""
    stream = rng.random() < 0.5
    body: dict[str, Any] = {
        "max_tokens": MAX_TOKENS,
        "stream": stream,
        "return_token_ids": True,
        "n": rng.choice((1, 2)),
    }
    if rng.random() < 0.4:
        body["stop"] = ["zz", "q"]
    if rng.random() < 0.5:
        body["logprobs"] = 2
    answer = await rig.complete([1, 2, 3], **body)
    assert answer.status_code in GENTLE, answer.text
    check(answer, stream=stream)


def check(answer: httpx.Response, *, stream: bool) -> None:
    ids: dict[int, list[int]] = {}
    if answer.status_code != 200:
        assert answer.json()["error"]["code"] != "internal_error", answer.text
    elif not stream:
        choices = answer.json()["choices"]
        ids = {choice["index"]: choice["token_ids"] for choice in choices}
        usage = answer.json()["usage"]
        assert usage["completion_tokens"] == sum(map(len, ids.values()))
        assert 0 <= usage["prompt_tokens_details"]["cached_tokens"] <= usage["prompt_tokens"]
    else:
        for event in events(answer.text):
            if "error" in event:
                assert event["error"]["code"] != "internal_error", event
            for choice in event.get("choices", []):
                ids.setdefault(choice["index"], []).extend(choice["token_ids"])
    for tokens in ids.values():
        assert len(tokens) <= MAX_TOKENS
        assert all(0 <= token < MODEL.vocab_size for token in tokens)
    json.dumps(answer.text, allow_nan=False)


async def evil(rig: Rig, raw: bytes) -> None:
    for identity in rig.worker._gateways:
        await rig.worker._socket.send_multipart([identity, raw])


async def taken(rig: Rig, mark: int) -> None:
    """Until the gateway has handled all that was sent."""
    assert rig.service is not None
    (worker,) = rig.service.dispatcher.workers.values()
    await evil(rig, encode(WorkerStats(0, mark, 0, 100, 50)))
    async with asyncio.timeout(10):
        while worker.stats is None or worker.stats.num_running != mark:
            await asyncio.sleep(0)


class Alarm(logging.Handler):
    """Errors that the gateway logged: its own bugs, here."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.raised: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.raised.append(self.format(record))


@pytest.fixture
def alarm() -> Any:
    logger, handler = logging.getLogger("afd"), Alarm()
    logger.addHandler(handler)
    level, propagate = logger.level, logger.propagate
    logger.setLevel(logging.ERROR)
    logger.propagate = False
    yield handler
    logger.removeHandler(handler)
    logger.setLevel(level)
    logger.propagate = propagate


@pytest.mark.parametrize("policy", ["off", "enforce"])
@async_test
async def test_mutated_frames(alarm: Alarm, policy: str) -> None:
    num_cases = volume(25_000, 1_600)
    rng = generator(f"frames to a gateway, sla {policy}", num_cases)
    gauge = MemoryGauge(num_cases // BURST)
    clients: set[asyncio.Task[None]] = set()
    num_requests = 0
    with nothing_left():
        async with gateway(MODEL, sla={"policy": policy}) as rig:
            rig.worker.hold()
            rig.worker.mute = True  # only the campaign speaks
            least = num_cases // BURST
            for burst in range(10 * least):
                if burst >= least and num_requests > NUM_CLIENTS:
                    break  # where the machine is busy, requests are read more slowly than frames are sent
                for task in [task for task in clients if task.done()]:
                    clients.discard(task)
                    task.result()
                while len(clients) < NUM_CLIENTS:
                    num_requests += 1
                    clients.add(asyncio.ensure_future(request(rig, rng)))
                await asyncio.sleep(0.001)
                assert rig.service is not None
                (worker,) = rig.service.dispatcher.workers.values()
                submits = [sequence.submit_message(0.0) for sequence in worker.active.values()]
                for _ in range(BURST):
                    submit = rng.choice(submits) if submits else None
                    await evil(rig, frame(rng, worker_message(rng, submit, MODEL.vocab_size)))
                await taken(rig, 1000 + burst)
                assert alarm.raised == []
                gauge.step()
                if burst % 20 == 0:
                    forget_old(rig, set(worker.active))
            rig.worker.mute = False
            rig.worker.run_freely()
            async with asyncio.timeout(20):
                await asyncio.gather(*clients)
            await at_rest(rig)
            forget(rig)
            gauge.check()
            rig.worker._gate = None
            assert (await rig.complete([1, 2], max_tokens=1)).status_code == 200
    assert alarm.raised == []
    assert num_requests > NUM_CLIENTS


def forget_old(rig: Rig, live: set[str]) -> None:
    """The fake worker keeps a record of everything."""
    rig.worker.received.clear()
    for req_id in [req_id for req_id in rig.worker._runs if req_id not in live]:
        rig.worker._abort(req_id)
    rig.worker.aborted.clear()


BAD_CHUNKS: dict[str, dict[str, Any]] = {
    "ids outside the vocabulary": {"ids": [10**6]},
    "negative ids": {"ids": [-1]},
    "more tokens than asked for": {"ids": [40] * 100},
    "a negative index": {"first_idx": -5, "ids": [40, 41]},
}


@pytest.mark.parametrize("name", BAD_CHUNKS)
@async_test
async def test_chunks_that_cannot_be_true_fail_the_request_at_once(alarm: Alarm, name: str) -> None:
    async with gateway(MODEL) as rig:
        rig.worker.hold()
        pending = asyncio.ensure_future(rig.complete([1, 2], max_tokens=3))
        await rig.worker.wait_submits()
        (submit,) = rig.worker.submits()
        fields = {"req_id": submit.req_id, "attempt": 0, "first_idx": 0, "ids": [40]} | BAD_CHUNKS[name]
        await evil(rig, encode(Tokens([TokenChunk(**fields)])))
        async with asyncio.timeout(5):
            answer = await pending
        assert (answer.status_code, answer.json()["error"]["code"]) == (500, "worker_error")
        assert "attention worker 0" in answer.json()["error"]["message"]
        await rig.worker.wait_until(lambda: submit.req_id in rig.worker.aborted)
        await at_rest(rig)
    assert alarm.raised == []


@pytest.mark.parametrize("value", [float("inf"), float("nan"), -1.0, 1e300])
@async_test
async def test_waits_without_end_are_no_500(alarm: Alarm, value: float) -> None:
    """A worker's forecast, or its refusal, names a time that is none."""
    async with gateway(MODEL, sla={"policy": "enforce", "ttft_ms": 500}) as rig:

        def refuse(submit: Submit) -> Refused:
            return Refused(submit.req_id, submit.attempt, "capacity", "full", value)

        rig.worker.refuse = refuse
        async with asyncio.timeout(5):
            answer = await rig.complete([1, 2], max_tokens=3)
        assert answer.status_code == 503, answer.text
        assert int(answer.headers["retry-after"]) >= 1
        rig.worker.refuse = lambda submit: None
        rig.worker.places_s = [value, 0.1]
        await rig.worker.send_stats()
        await asyncio.sleep(0)
        async with asyncio.timeout(5):
            answer = await rig.complete([1, 2], max_tokens=3)
        assert answer.status_code in (200, 503), answer.text
        assert (await rig.client.get("/metrics")).status_code == 200
        assert (await rig.client.get("/cluster")).status_code == 200
    assert alarm.raised == []

"""Mutated bodies and raw bytes: never a 500, never a crash, and nothing left running."""

import asyncio
import json
import os
import random

from tests.fakes.async_test import async_test
from tests.fakes.gateway import gateway, served_gateway
from tests.fakes.text_model import text_model

MODEL = text_model()
NUM_BODIES = int(os.environ.get("AFD_FUZZ_BODIES", "400"))
NUM_CONNECTIONS = int(os.environ.get("AFD_FUZZ_CONNECTIONS", "60"))

SEEDS = [
    (
        "/v1/chat/completions",
        {
            "model": "tiny",
            "messages": [
                {"role": "user", "content": "hi"},
                {"role": "user", "content": [{"type": "text", "text": "x"}]},
            ],
            "max_tokens": 3,
            "temperature": 0.5,
            "top_p": 0.9,
            "n": 2,
            "stop": ["a", "b"],
            "stream": True,
            "stream_options": {"include_usage": True},
            "logprobs": True,
            "top_logprobs": 2,
            "logit_bias": {"5": 1},
            "seed": 3,
        },
    ),
    (
        "/v1/completions",
        {"prompt": [1, 2, 3], "max_tokens": 3, "logprobs": 1, "echo": False, "min_tokens": 1, "stop_token_ids": [4]},
    ),
    ("/v1/completions", {"prompt": ["one", "two"], "max_tokens": 2, "n": 2, "return_token_ids": True}),
    ("/tokenize", {"prompt": "hello", "return_token_strs": True}),
    ("/detokenize", {"tokens": [1, 2, 3]}),
]
ODD_VALUES = [
    None, True, False, 0, -1, 1, 2**31, 2**63, -(2**63), 10**30, 0.0, -0.5, 1e308, "", "x", "\x00", "日" * 50,
    "x" * 5000, [], [[]], [None], [1, "a"], ["a", 1], [[1], 2], {}, {"a": {}}, {"type": "text"}, [{}],
    [{"role": "user"}],
]  # fmt: skip


def mutate(rng, value, depth=0):
    """Change a JSON value somewhere."""
    if depth > 3 or (depth and rng.random() < 0.25) or not isinstance(value, dict | list) or not value:
        return rng.choice(ODD_VALUES)
    if isinstance(value, list):
        at = rng.randrange(len(value))
        return [*value[:at], mutate(rng, value[at], depth + 1), *value[at + 1 :]]
    key = rng.choice(sorted(value))
    if rng.random() < 0.1:
        return {k: v for k, v in value.items() if k != key}
    return {**value, key: mutate(rng, value[key], depth + 1)}


def mutated_body(rng):
    path, value = rng.choice(SEEDS)
    for _ in range(rng.randrange(3)):
        value = mutate(rng, value) if isinstance(value, dict) else value
    body = json.dumps(value).encode()
    if rng.random() < 0.2:
        at = rng.randrange(len(body) + 1)
        body = body[:at] + rng.randbytes(rng.randrange(4)) + body[at + rng.randrange(4) :]
    return path, body


@async_test
async def test_mutated_bodies():
    rng = random.Random(20)
    counts = {}
    async with gateway(MODEL) as rig:
        for _ in range(NUM_BODIES):
            path, body = mutated_body(rng)
            answer = await rig.client.post(path, content=body)
            counts[answer.status_code] = counts.get(answer.status_code, 0) + 1
            assert answer.status_code in (200, 400, 404), (path, body[:300], answer.text)
            if answer.status_code != 200:
                assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
        assert rig.service.num_requests_running == 0
        assert rig.service.dispatcher.num_running == 0
        assert len(rig.service.dispatcher.queue) == 0
    assert counts[200] > NUM_BODIES // 20
    assert counts[400] > NUM_BODIES // 4


@async_test
async def test_raw_bytes_on_the_socket():
    rng = random.Random(21)
    path, value = SEEDS[0]
    body = json.dumps(value).encode()
    whole = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
    async with served_gateway(MODEL) as rig:
        host, port = rig.url.removeprefix("http://").split(":")

        async def attack():
            data = bytearray(whole)
            for _ in range(rng.randrange(1, 5)):
                data[rng.randrange(min(len(data), 80))] = rng.randrange(256)
            _, writer = await asyncio.open_connection(host, int(port))
            writer.write(bytes(data[: rng.randrange(1, len(data))]))
            await writer.drain()
            writer.close()

        await asyncio.gather(*(attack() for _ in range(NUM_CONNECTIONS)))
        assert (await rig.complete([1, 2], max_tokens=1)).status_code == 200
        async with asyncio.timeout(10):
            while "afd_gateway_running_sequences 0.0" not in (await rig.client.get("/metrics")).text:
                await asyncio.sleep(0.02)
        assert rig.worker.num_running == 0

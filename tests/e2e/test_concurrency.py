"""Many requests at once: what each gets, that gangs form, and that text answers are right."""

from __future__ import annotations

import random

import httpx

from tests.e2e.conftest import SMOLLM2, STEP3_TINY
from tests.e2e.local_cluster import LocalCluster


def test_the_capital_of_france(tmp_path):
    """The README's first request, on the default model in its default dtype, plain and streamed."""
    body = {
        "model": SMOLLM2,
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
        "temperature": 0,
    }
    with LocalCluster(tmp_path, cold=True) as cluster:
        assert cluster.started_s < 60
        answer = httpx.post(f"{cluster.url}/v1/chat/completions", json=body, timeout=60).json()
        assert answer["choices"][0]["message"]["content"] == "The capital of France is Paris."
        assert answer["choices"][0]["finish_reason"] == "stop"
        assert answer["usage"]["completion_tokens"] == 8
        text = ""
        request = httpx.stream("POST", f"{cluster.url}/v1/chat/completions", json={**body, "stream": True}, timeout=60)
        with request as stream:
            for line in stream.iter_lines():
                if line.startswith("data: {"):
                    choices = httpx.Response(200, text=line.removeprefix("data: ")).json()["choices"]
                    text += choices[0]["delta"].get("content") or "" if choices else ""
        assert text == "The capital of France is Paris."


def test_64_streams_of_mixed_lengths_get_what_they_get_alone_and_gangs_form(tmp_path, reference):
    """Two attention workers under load: gangs of two most of the time, and results do not depend on it."""
    rng = random.Random(3)
    attention, _ = reference.halves(STEP3_TINY)
    vocab = attention.spec.vocab_size
    prompts = [[rng.randrange(vocab) for _ in range(rng.randrange(1, 90))] for _ in range(64)]
    lengths = [rng.randrange(16, 48) for _ in prompts]
    with LocalCluster(tmp_path, "--model", STEP3_TINY, "--topology", "2A1F", "--dtype", "float32") as cluster:
        outputs = cluster.greedy_ids_of_all(prompts, lengths, workers=64)
        ffn = cluster.metrics("ffn")
    for prompt, length, output in zip(prompts, lengths, outputs, strict=True):
        reference.check(STEP3_TINY, prompt, output, length)
    share = 2 * ffn["afd_gang_full_batches_total"] / ffn["afd_gang_members_total"]
    print(f"\n{share:.0%} of the dispatches were computed in gangs of two")
    assert share > 0.5

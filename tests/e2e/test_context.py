"""The context that users have: the least of the model's, the configured one and the smallest KV cache."""

from __future__ import annotations

import io
from pathlib import Path

import httpx
import pytest

from afd.gateway.chat_client import run_chat
from tests.e2e.local_cluster import LocalCluster
from tests.fakes.gateway import events
from tests.fakes.long_model import CONTEXT, KV_BYTES_PER_TOKEN, write_long_llama

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


def max_model_len(cluster: LocalCluster) -> int:
    return httpx.get(cluster.url + "/v1/models").json()["data"][0]["max_model_len"]


def assert_answers_everybody(cluster: LocalCluster) -> None:
    """Without max_tokens and with far too many; as the page asks, and `afd chat`."""
    chat = "/v1/chat/completions"
    for wish in ({}, {"max_tokens": 1_000_000}, {"max_completion_tokens": 1_000_000}):
        answer = httpx.post(cluster.url + chat, json={"messages": QUESTION, "temperature": 0, **wish}, timeout=30)
        assert answer.status_code == 200, answer.text
        assert answer.json()["choices"][0]["finish_reason"] == "stop"
    page = httpx.post(cluster.url + chat, json={"messages": QUESTION, "stream": True}, timeout=30)
    assert events(page.text)[-1]["choices"][0]["finish_reason"] == "stop"
    lines, out = iter(["What is the capital of France?", "/exit"]), io.StringIO()
    assert run_chat(cluster.url, read_line=lambda prompt: next(lines), out=out) == 0
    assert "error" not in out.getvalue()


def assert_says_both_numbers(cluster: LocalCluster, max_tokens: int, max_context: int) -> None:
    (line,) = [line for line in cluster.lines if "the KV cache holds no more" in line]
    assert str(max_tokens) in line and str(max_context) in line and "--kv-cache-gib" in line


@pytest.mark.timeout(120)
@pytest.mark.parametrize("args", [(), ("--kv-cache-gib", "0.05")], ids=["all defaults", "small"])
def test_a_kv_cache_below_the_context(args: tuple[str, ...], tmp_path: Path):
    model = write_long_llama(tmp_path / "model")
    gib = float(args[-1]) if args else 2.0
    with LocalCluster(tmp_path, "--model", str(model), *args) as cluster:
        length = max_model_len(cluster)
        assert length == int(gib * 2**30) // KV_BYTES_PER_TOKEN // 32 * 32 < CONTEXT
        assert_says_both_numbers(cluster, length, CONTEXT)
        assert_answers_everybody(cluster)
        answer = httpx.post(cluster.url + "/v1/completions", json={"prompt": [5] * length, "max_tokens": 1})
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "context_length_exceeded")
        assert str(length) in answer.json()["error"]["message"]

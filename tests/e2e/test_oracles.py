"""The served models against independent implementations: transformers, and another engine's golden file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from afd.model.loading import resolve_model
from afd.model.tokenizer_files import load_tokenizer
from tests.e2e.conftest import SMOLLM2, STEP3_TINY
from tests.e2e.local_cluster import LocalCluster
from tests.oracles.hf import hf_greedy_along, load_hf_llama

TEXTS = [
    "The capital of France is",
    "1, 2, 3, 4,",
    "Once upon a time there was a little girl who lived in a village near the forest.",
    "def fibonacci(n):\n    ",
    "Water boils at 100 degrees Celsius. Ice melts at",
    "Q: Who wrote Hamlet?\nA:",
    "The quick brown fox jumps over the lazy dog. " * 6,
    "In 1969, two astronauts walked on the Moon. " * 12,
    "Zürich, 東京, Москва and São Paulo are",
    "a",
]
NUM_TOKENS = 32


@pytest.mark.timeout(600)  # 20 s where nothing else runs
def test_smollm2_equals_transformers(tmp_path):
    """Ten prompts of different lengths, 32 tokens each, float32."""
    tokenizer = load_tokenizer(resolve_model(SMOLLM2)).tokenizer
    prompts = [tokenizer.encode(text, add_special_tokens=False).ids for text in TEXTS]
    with LocalCluster(tmp_path, "--topology", "1A1F", "--dtype", "float32", "--streams", "1") as cluster:
        outputs = cluster.greedy_ids_of_all(prompts, NUM_TOKENS)
    model = load_hf_llama(resolve_model(SMOLLM2).path)
    excused = 0
    for prompt, output in zip(prompts, outputs, strict=True):
        assert len(output) == NUM_TOKENS
        oracle = hf_greedy_along(model, prompt, output)
        different = [i for i, (a, b) in enumerate(zip(oracle.token_ids, output, strict=True)) if a != b]
        if different:
            assert oracle.top2_gaps[different[0]] <= 1e-3, f"differs at {different[0]} of {len(prompt)} tokens"
            excused += 1
    assert excused <= 1, "the equality rule's excuse must stay the exception"


@pytest.mark.parametrize("topology", ["1A1F", "1A2F", "2A3F"])
def test_step3_tiny_equals_the_golden_file(topology, tmp_path):
    """Greedy tokens equal, top log-probabilities within 1e-3, through /v1/completions with token ids."""
    cases = json.loads((Path(STEP3_TINY) / "golden.json").read_text())["cases"]
    with LocalCluster(tmp_path, "--model", STEP3_TINY, "--topology", topology, "--dtype", "float32") as cluster:
        for case in cases:
            wanted = case["greedy_token_ids"]
            answer = cluster.complete(case["prompt_token_ids"], len(wanted), logprobs=8, ignore_eos=True)
            [choice] = answer["choices"]
            assert choice["token_ids"] == wanted
            for got, want in zip(choice["logprobs"]["top_logprobs"], case["top_logprobs"], strict=True):
                for token, logprob in want.items():
                    assert got[token] == pytest.approx(logprob, abs=1e-3)

"""Greedy float32 output through real processes equals the in-process reference, whatever the topology.

`make test` runs a pairwise cover of the options with small models and a few combinations with the default model,
`make test-matrix` every combination.
"""

from __future__ import annotations

import itertools
import random

import pytest

from tests.e2e.conftest import SMOLLM2, STEP3_TINY
from tests.e2e.cover import pairwise_cover
from tests.e2e.local_cluster import LocalCluster

OPTIONS = {
    "topology": ["1A1F", "2A1F", "1A2F", "2A2F"],
    "transport": ["shm", "tcp"],
    "streams": [1, 2, 3],
    "prefix_cache": [True, False],
    "max_step_tokens": [128, 12],
    "ffn_parallel": ["hybrid", "tp"],
    "model": ["step3-tiny", "llama-tiny", "smollm2"],
}
MODELS = {"step3-tiny": STEP3_TINY, "llama-tiny": "dummy:llama-tiny", "smollm2": SMOLLM2}


EVERYTHING = list(itertools.product(*OPTIONS.values()))
SMALL = [combination for combination in EVERYTHING if combination[-1] != "smollm2"]
COVER = pairwise_cover(SMALL)
LARGE = [("2A2F", "tcp", 2, True, 128, "tp", "smollm2"), ("1A2F", "shm", 3, False, 12, "hybrid", "smollm2")]


def cases():
    for combination in EVERYTHING:
        marks = [] if combination in COVER or combination in LARGE else [pytest.mark.matrix]
        yield pytest.param(
            dict(zip(OPTIONS, combination, strict=True)), marks=marks, id="-".join(map(str, combination))
        )


def workload(vocab_size: int, *, large: bool) -> tuple[list[list[int]], list[int]]:
    """Prompts of mixed lengths, some with a shared prefix of two blocks, and how many tokens each wants.

    large: half as much would do for a model whose float32 weights are half a gigabyte, read in each step.
    """
    rng = random.Random(7)
    shared = [rng.randrange(10, vocab_size) for _ in range(40 if large else 33)]
    prompts = [[rng.randrange(10, vocab_size) for _ in range(length)] for length in (1, 3, 17, 60 if large else 20)]
    prompts += [[*shared, *(rng.randrange(10, vocab_size) for _ in range(length))] for length in (1, 9)]
    return prompts, [12, 20, 8, 16, 10, 5] if large else [6, 9, 4, 8, 5, 3]


def test_the_cover_is_small_and_complete():
    assert 12 <= len(COVER) <= 16
    for first, second in itertools.combinations(range(len(OPTIONS)), 2):
        wanted = {(c[first], c[second]) for c in SMALL}
        assert {(c[first], c[second]) for c in COVER} == wanted


@pytest.mark.parametrize("case", list(cases()))
def test_equals_the_reference(case, tmp_path, reference):
    model = MODELS[case["model"]]
    toml = f"""
        [model]
        name = "{model}"
        dtype = "float32"
        [cluster]
        topology = "{case["topology"]}"
        transport = "{case["transport"]}"
        ffn_parallel = "{case["ffn_parallel"]}"
        [attention]
        streams = {case["streams"]}
        prefix_cache = {str(case["prefix_cache"]).lower()}
        max_step_tokens = {case["max_step_tokens"]}
        min_chunk_tokens = 4
        block_size = 16
        kv_cache_gib = 0.25
    """
    attention, _ = reference.halves(model)
    prompts, lengths = workload(attention.spec.vocab_size, large=case["model"] != "smollm2")
    with LocalCluster(tmp_path, toml=toml) as cluster:
        for _ in range(2):  # the second round meets the prefix cache and settled gangs
            outputs = cluster.greedy_ids_of_all(prompts, lengths)
            for prompt, length, output in zip(prompts, lengths, outputs, strict=True):
                reference.check(model, prompt, output, length)

"""Every family through real processes: greedy float32 tokens equal the reference over several topologies."""

from __future__ import annotations

import random
import re

import pytest

from tests.e2e.cover import pairwise_cover
from tests.e2e.local_cluster import LocalCluster

TOPOLOGIES, STREAMS = ("1A1F", "2A1F", "1A2F", "2A3F"), (1, 2, 3)
CUTS = {  # of the FFN layers of each family: (ffn_parallel, dispatch)
    "with a shared expert": (("hybrid", "broadcast"), ("tp", "broadcast"), ("ep", "broadcast"), ("ep", "sparse")),
    "routed experts only": (
        *(("hybrid", "broadcast"), ("tp", "broadcast"), ("ep", "broadcast")),
        *(("hybrid", "sparse"), ("ep", "sparse")),
    ),
    "dense": (("hybrid", "broadcast"), ("tp", "broadcast"), ("ep", "broadcast")),
}
FAMILIES = {
    "step3-tiny": "with a shared expert",
    "step3.5-flash-tiny": "with a shared expert",
    "deepseek-v3-tiny": "with a shared expert",
    "ernie-4.5-moe-tiny": "with a shared expert",
    "qwen3-moe-tiny": "routed experts only",
    "qwen3-tiny": "dense",
}
QUICK = {  # of each family's cover; the rest of it only in `make test-matrix`
    "step3-tiny": [],
    "step3.5-flash-tiny": [("1A2F", "ep", "sparse", 3)],
    "deepseek-v3-tiny": [("2A3F", "ep", "sparse", 2)],
    "ernie-4.5-moe-tiny": [("1A2F", "hybrid", "broadcast", 2)],
    "qwen3-moe-tiny": [("2A3F", "hybrid", "sparse", 3)],
    "qwen3-tiny": [("1A2F", "tp", "broadcast", 2)],
}


def everything(preset: str) -> list[tuple[str, str, str, int]]:
    """All combinations that make sense for a family."""
    return [(t, *cut, s) for t in TOPOLOGIES for cut in CUTS[FAMILIES[preset]] for s in STREAMS]


def cases():
    for preset, quick in QUICK.items():
        for case in pairwise_cover(everything(preset), quick):
            marks = [] if case in quick else [pytest.mark.matrix]
            yield pytest.param(preset, *case, marks=marks, id="-".join(map(str, (preset, *case))))


def workload() -> tuple[list[list[int]], list[int]]:
    """Prompts shorter and longer than the tiny models' window of 24, two with a shared prefix."""
    rng = random.Random(3)
    prompts = [[rng.randrange(10, 500) for _ in range(length)] for length in (1, 5, 31, 70)]
    shared = [rng.randrange(10, 500) for _ in range(40)]
    prompts += [[*shared, rng.randrange(10, 500)], [*shared, rng.randrange(10, 500), 11]]
    return prompts, [16, 10, 12, 8, 10, 14]


@pytest.mark.parametrize(("preset", "topology", "parallel", "dispatch", "streams"), list(cases()))
def test_equals_the_reference(preset, topology, parallel, dispatch, streams, tmp_path, reference):
    toml = f"""
        [model]
        name = "dummy:{preset}"
        dtype = "float32"
        [cluster]
        topology = "{topology}"
        ffn_parallel = "{parallel}"
        dispatch = "{dispatch}"
        [attention]
        streams = {streams}
        max_step_tokens = 32
        min_chunk_tokens = 4
        kv_cache_gib = 0.05
    """
    prompts, lengths = workload()
    with LocalCluster(tmp_path, toml=toml) as cluster:
        for _ in range(2):  # the second round meets the prefix cache and settled gangs
            outputs = cluster.greedy_ids_of_all(prompts, lengths)
            for prompt, length, output in zip(prompts, lengths, outputs, strict=True):
                reference.check(f"dummy:{preset}", prompt, output, length)


@pytest.mark.parametrize(
    ("wire", "weights"), [("fp8", "auto"), ("bf16", "auto"), ("auto", "int8"), ("auto", "int8-all")]
)
def test_quantised_clusters_stay_close(wire, weights, tmp_path, reference):
    """Rounding changes few tokens: most first ones are the reference's, and every answer is whole."""
    flags = ["--topology", "1A2F", "--dtype", "float32", "--model", "dummy:step3-tiny", "--set", f"cluster.wire={wire}"]
    prompts, lengths = workload()
    with LocalCluster(tmp_path, *flags, "--set", f"model.weights={weights}") as cluster:
        outputs = cluster.greedy_ids_of_all(prompts, lengths)
    assert [len(output) for output in outputs] == lengths
    pairs = zip(prompts, outputs, strict=True)
    first_equal = [reference.shortfalls("dummy:step3-tiny", tuple(p), (o[0],)) == [0.0] for p, o in pairs]
    assert sum(first_equal) >= len(prompts) - 2


def test_expert_metrics_add_up_over_the_ranks(tmp_path):
    """Every token of every step goes to top_k experts of each MoE layer, whatever rank has them."""
    with LocalCluster(tmp_path, "--topology", "1A2F", "--dtype", "float32", "--model", "dummy:step3-tiny") as cluster:
        cluster.greedy_ids([5, 6, 7, 8, 9], 20)
        samples = [cluster.metrics("ffn", rank) for rank in (0, 1)]
    tokens = {1: 0.0, 2: 0.0, 3: 0.0}
    for name, value in ((n, v) for rank in samples for n, v in rank.items()):
        match = re.match(r'afd_expert_tokens_total\{expert="\d+",layer="(\d+)"\}', name)
        if match:
            tokens[int(match[1])] += value
    assert set(tokens.values()) == {3.0 * (5 + 19)}
    assert any(name.startswith("afd_expert_output_rms") for name in samples[0])

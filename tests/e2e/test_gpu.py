"""`afd up --device cuda` through real processes equals the in-process reference on the CPU. Needs a GPU: `-m gpu`."""

from __future__ import annotations

import pytest

from tests.e2e.conftest import SMOLLM2, STEP3_TINY
from tests.e2e.local_cluster import LocalCluster
from tests.e2e.test_topologies import workload
from tests.fakes.real_gpu import skip_without_gpu

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module", autouse=True)
def _needs_gpu():
    skip_without_gpu()


@pytest.mark.timeout(300)
@pytest.mark.parametrize("topology", ["1A1F", "2A2F", "mono"])
@pytest.mark.parametrize("model", [STEP3_TINY, SMOLLM2], ids=["step3-tiny", "smollm2"])
def test_equals_the_reference(tmp_path, reference, model, topology):
    toml = """
        [model]
        dtype = "float32"
        [attention]
        streams = 2
        max_step_tokens = 128
        kv_cache_gib = 0.25
    """
    attention, _ = reference.halves(model)
    prompts, lengths = workload(attention.spec.vocab_size, large=True)
    arguments = ("--model", model, "--topology", topology, "--device", "cuda")
    with LocalCluster(tmp_path, *arguments, toml=toml) as cluster:
        outputs = cluster.greedy_ids_of_all(prompts, lengths)
        for prompt, length, output in zip(prompts, lengths, outputs, strict=True):
            reference.check(model, prompt, output, length)

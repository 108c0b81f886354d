"""What an attention worker can come to hold, and the warning where that does not fit."""

import logging

import pytest

from afd.attention.memory import MemoryBudget, budget_of, tell
from afd.config import AttentionConfig, ClusterConfig, ModelConfig, TopologyConfig
from afd.model.inspect import attention_bytes, ffn_bytes
from afd.model.loading import resolve_model
from afd.model.sharding import ShardSpec

GIB = 2**30


@pytest.mark.parametrize(
    ("topology", "streams", "num_streams"), [("1A1F", 0, 4), ("2A2F", 2, 2), ("mono", 0, 1), ("mono", 3, 3)]
)
def test_every_stream_keeps_room_for_its_largest_batch_of_logits(topology, streams, num_streams):
    spec = resolve_model("dummy:step3-tiny").spec
    for max_num_seqs, max_step_tokens, rows in ((64, 256, 64), (512, 128, 128)):
        section = AttentionConfig(max_num_seqs=max_num_seqs, max_step_tokens=max_step_tokens, streams=streams)
        model = ModelConfig(name="dummy:step3-tiny", dtype="bfloat16", weights="int8-all")
        config = ClusterConfig(cluster=TopologyConfig(topology=topology), attention=section, model=model)
        budget = budget_of(config, spec, 7)
        weights = attention_bytes(spec, "bfloat16", "int8-all")
        if topology == "mono":
            weights += ffn_bytes(spec, ShardSpec(), "bfloat16", "int8-all")
        assert budget == (weights, 7, num_streams * rows * spec.vocab_size * 4)


def test_a_shortage_names_the_figures_and_the_keys(caplog):
    budget = MemoryBudget(GIB, 2 * GIB, GIB // 2)
    with caplog.at_level(logging.INFO):
        tell(budget, 7 * GIB // 2)
    (record,) = caplog.records
    assert record.getMessage() == "memory: weights 1.00 GiB, KV cache 2.00 GiB, logits up to 0.50 GiB"
    caplog.clear()
    tell(budget, 3 * GIB)
    text = caplog.records[-1].getMessage()
    assert caplog.records[-1].levelno == logging.WARNING
    assert "3.50 GiB (weights 1.00 GiB" in text and "there are 3.00 GiB" in text
    assert "attention.kv_cache_gib" in text and "attention.max_num_seqs" in text

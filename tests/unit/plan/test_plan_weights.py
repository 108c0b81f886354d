"""Widths of weights: what a checkpoint's config says, and what a width does to bytes, arithmetic and memory."""

import pytest

from afd.errors import ConfigError
from afd.plan.catalog import find_model, load_chips, load_models
from afd.plan.cost import ffn_usd
from afd.plan.deployment import Deployment
from afd.plan.efficiency import Efficiency
from afd.plan.hf_config import shape_from_hf_config
from afd.plan.memory import attention_memory, ffn_memory
from afd.plan.weights import BYTES_OF, WeightBytes
from afd.types import Topology
from tests.unit.plan.hf_configs import BY_NAME, GPT_OSS, MIXTRAL

CHIPS = load_chips()
INT4 = {"num_bits": 4, "group_size": 32, "type": "int"}


def weights(config, **quantised):
    changed = {**config, "torch_dtype": "bfloat16", **({"quantization_config": quantised} if quantised else {})}
    return shape_from_hf_config(changed, name="x", where="config.json").weights


@pytest.mark.parametrize(
    ("quantised", "expected"),
    [
        ({}, WeightBytes(2, 2, 2)),  # bfloat16, as the checkpoint is
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, WeightBytes(1, 1, 1)),
        (
            {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]},
            WeightBytes(2, 0.53125, 0.53125),
        ),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"group_0": {"weights": INT4}},
                "ignore": ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*"],
            },
            WeightBytes(2, 2, 0.5625),
        ),
        ({"quant_method": "awq", "bits": 4, "group_size": 128}, WeightBytes.all(0.5 + 2 / 128)),
        ({"quant_method": "gptq", "bits": 8, "group_size": -1}, WeightBytes.all(1.0)),
        ({"quant_method": "modelopt", "quantization": {"quant_algo": "NVFP4"}}, WeightBytes.all(0.5625)),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, WeightBytes.all(0.5625)),
    ],
)
def test_what_a_quantization_config_says(quantised, expected):
    assert weights(MIXTRAL, **quantised) == expected


@pytest.mark.parametrize("quantised", [{"quant_method": "quark"}, {"quant_method": "awq"}, {"bits": 4}])
def test_what_is_not_understood_is_named(quantised):
    with pytest.raises(ConfigError, match=r"quantization_config .*(--weight-dtype|number of bits)"):
        weights(MIXTRAL, **quantised)


def test_a_config_that_says_nothing_is_served_in_8_bit():
    assert shape_from_hf_config(MIXTRAL, name="x", where="config.json").weights == WeightBytes(1, 1, 1)


def test_gpt_oss_in_mxfp4_is_not_priced_as_fp8():
    """Its experts are widened to 16 bit: 2 x 36 x 4 x 3 x 2880 x 2880 FLOPs at 9.89e14 and 2 USD an hour."""
    sparse = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
    config = {**GPT_OSS, "torch_dtype": "bfloat16", "quantization_config": sparse}
    model = shape_from_hf_config(config, name="gpt-oss", where="config.json")
    flops = 2 * 36 * 4 * 3 * 2880 * 2880
    assert ffn_usd(model, CHIPS["h800"]) == pytest.approx(flops * 2.0 / 3600 / 9.89e14)


def test_4_bit_experts_of_deepseek_fit_a_machine_with_512_gb():
    """58 layers of 256 experts of 3 x 7168 x 2048, at 4.5 bits: 367.8 GB; the rest of the FFN at 4.5 bits: 2.2 GB."""
    model = load_models()["deepseek-v3"].weighted("int4")
    chip = CHIPS["h800"]
    one = Deployment(model=model, attention_chip=chip, ffn_chip=chip, topology=Topology(1, 1), ranks_per_instance=1)
    routed = 58 * 256 * 3 * 7168 * 2048
    shared = 58 * 3 * 7168 * 2048 + 3 * 3 * 7168 * 18432
    assert BYTES_OF["int4"] == 4.5 / 8
    assert ffn_memory(one, Efficiency()).weight_bytes == pytest.approx((routed + shared) * 4.5 / 8)
    assert ffn_memory(one, Efficiency()).weight_bytes / 1e9 == pytest.approx(370, abs=1)
    head = 2 * model.embedding_weights
    assert attention_memory(one, Efficiency(), 1, 0).weight_bytes == model.linear_weights * 4.5 / 8 + head


UNMODELLED = {
    "DeepSeek-V3.2": {"index_topk": 2048, "index_n_heads": 64, "index_head_dim": 128},
    "GLM-5": {"index_topk": 2048, "indexer_types": ["full"]},
    "DeepSeek-V4": {"compress_ratios": [4, 128]},
    "Qwen3-Next": {"full_attention_interval": 4, "linear_num_value_heads": 32},
    "Jamba": {"attn_layer_period": 8, "attn_layer_offset": 4, "expert_layer_period": 2},
    "experts by a rule alone": {"expert_layer_period": 2},
    "Nemotron-H": {"hybrid_override_pattern": "M-M*"},
    "Falcon-H1": {"mamba_d_state": 128},
    "LFM2": {"conv_L_cache": 3},
    "Kimi Linear": {"linear_attn_config": {"kda_layers": [1, 2]}},
    "Gemma 3n": {"num_kv_shared_layers": 15},
    "Hunyuan": {"cla_share_factor": 2, "use_cla": True},
    "MiMo-V2": {"swa_num_key_value_heads": 8},
    "LongCat": {"zero_expert_num": 256},
    "MiniMax-M3": {"sparse_attention_config": {"topk": 16}},
    "RecurrentGemma": {"lru_width": 2560},
    "values narrower than keys": {"head_dim": 192, "v_head_dim": 128},
    "a stride of mixtures": {"moe_every_n_layers": 2},
}


@pytest.mark.parametrize("name", UNMODELLED)
def test_what_changes_the_cost_and_is_not_modelled_is_refused_by_its_key(name):
    change = UNMODELLED[name]
    with pytest.raises(ConfigError, match="does not model") as caught:
        shape_from_hf_config({**MIXTRAL, **change}, name="x", where="config.json")
    assert any(key in str(caught.value) for key in change)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change", [{"index_topk": None}, {"use_cla": False}, {"zero_expert_num": 0}, {"block_types": []}]
)
def test_a_feature_that_is_off_is_none(change):
    assert shape_from_hf_config({**MIXTRAL, **change}, name="x", where="config.json").num_layers == 32


@pytest.mark.parametrize(
    ("config", "change", "expected"),
    [
        (MIXTRAL, {"moe_layer_freq": [0] + [1] * 31}, {(1, 0), (31, 8)}),
        (MIXTRAL, {"mlp_layer_types": ["dense"] * 2 + ["sparse"] * 30}, {(2, 0), (30, 8)}),
    ],
)
def test_mixtures_that_a_list_names(config, change, expected):
    model = shape_from_hf_config({**config, **change}, name="x", where="config.json")
    assert {(g.layers, g.experts) for g in model.ffn} == expected


def test_windows_by_family():
    base = {**BY_NAME["qwen3-32b"], "num_hidden_layers": 8, "sliding_window": 4096}
    gemma = shape_from_hf_config({**base, "model_type": "gemma2"}, name="x", where="config.json")
    assert {(g.layers, g.window) for g in gemma.attention} == {(4, 4096), (4, 0)}
    late = {**base, "use_sliding_window": True, "max_window_layers": 6}
    qwen = shape_from_hf_config(late, name="x", where="config.json")
    assert {(g.layers, g.window) for g in qwen.attention} == {(6, 0), (2, 4096)}


def test_one_kv_head_for_all_is_said_in_more_than_one_way():
    config = {key: value for key, value in MIXTRAL.items() if key != "num_key_value_heads"}
    for change in ({"multi_query": True}, {"num_kv_heads": 1}):
        model = shape_from_hf_config({**config, **change}, name="x", where="config.json")
        assert model.kv_resident_bytes(1, kv_bytes=1) == 32 * 2 * 128


@pytest.mark.parametrize(
    ("file", "change", "name"),
    [
        ("cfg.json", {}, "cfg"),
        ("cfg/config.json", {"_name_or_path": "acme/Mix-1"}, "Mix-1"),
        ("mix-2/config.json", {}, "mix-2"),
    ],
)
def test_what_a_config_is_called(tmp_path, file, change, name):
    import json

    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({**MIXTRAL, **change}))
    assert find_model({}, str(path)).name == name

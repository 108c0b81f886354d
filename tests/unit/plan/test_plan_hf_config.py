"""Any Hugging Face config.json becomes a shape: published configs give the same counts as the shipped data file."""

import json

import pytest

from afd.errors import ConfigError
from afd.plan.attention import Gqa
from afd.plan.catalog import find_model
from afd.plan.hf_config import shape_from_hf_config
from tests.unit.plan.hf_configs import BY_NAME, GEMMA3, GPT2, GPT_OSS, MIXTRAL


def shape(config):
    return shape_from_hf_config(config, name="x", where="config.json")


@pytest.mark.parametrize("name", BY_NAME)
def test_published_config_counts_as_the_data_file(models, name):
    ours, shipped = shape(BY_NAME[name]), models[name]
    assert (ours.hidden, ours.vocab, ours.num_layers) == (shipped.hidden, shipped.vocab, shipped.num_layers)
    assert ours.linear_weights == shipped.linear_weights
    assert (ours.ffn_weights, ours.ffn_active_weights) == (shipped.ffn_weights, shipped.ffn_active_weights)
    assert (ours.tied, ours.sparsity) == (shipped.tied, shipped.sparsity)
    for context in (1, 600, 8192, 32768):
        assert ours.attention_flops(context) == shipped.attention_flops(context)
        assert ours.kv_bytes(context, kv_bytes=1) == shipped.kv_bytes(context, kv_bytes=1)


def test_mixtral(models):
    model = shape(MIXTRAL)
    assert model.total_params / 1e9 == pytest.approx(46.7, rel=0.002)
    assert model.active_params / 1e9 == pytest.approx(12.8, rel=0.01)
    assert len(model.attention) == len(model.ffn) == 1


def test_gpt_oss_alternates_windows_and_has_no_shared_expert():
    model = shape(GPT_OSS)
    assert model.total_params / 1e9 == pytest.approx(116.8, rel=0.005)
    assert [(g.layers, g.window) for g in model.attention] == [(18, 128), (18, 0)]
    assert not model.has_shared_expert


def test_gemma3_has_one_full_layer_in_six():
    assert {(g.layers, g.window) for g in shape(GEMMA3).attention} == {(29, 1024), (5, 0)}


def test_gpt2_has_no_gate_in_its_ffn():
    assert shape(GPT2).ffn_weights == 12 * 2 * 768 * 3072
    assert shape(GPT2).total_params / 1e6 == pytest.approx(123.5, rel=0.002)


def test_a_window_without_layer_types_covers_every_layer():
    model = shape({**MIXTRAL, "sliding_window": 4096})
    assert [g.window for g in model.attention] == [4096]
    assert [g.window for g in shape({**MIXTRAL, "sliding_window": 4096, "use_sliding_window": False}).attention] == [0]


def test_qwen_style_sparse_step_and_dense_layers():
    config = {
        **BY_NAME["qwen3-235b-a22b"],
        "num_hidden_layers": 8,
        "decoder_sparse_step": 2,
        "mlp_only_layers": [1],
    }
    model = shape(config)
    assert {(g.layers, g.experts) for g in model.ffn} == {(3, 128), (5, 0)}


def test_step3_without_a_layer_list_is_moe_after_layer_0():
    text = {k: v for k, v in BY_NAME["step3"]["text_config"].items() if k != "moe_layers_enum"}
    assert {(g.layers, g.experts) for g in shape(text).ffn} == {(1, 0), (60, 48)}


def test_deepseek_v2_lite_projects_queries_directly():
    config = {**BY_NAME["deepseek-v3"], "q_lora_rank": None}
    assert shape(config).linear_weights > shape(BY_NAME["deepseek-v3"]).linear_weights


def test_a_folder_or_a_file_can_be_named(models, tmp_path):
    folder = tmp_path / "mixtral-8x7b"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(MIXTRAL))
    assert find_model(models, str(folder)).name == "mixtral-8x7b"
    assert find_model(models, str(folder / "config.json")).hidden == 4096


def test_the_tiny_step3_fixture_is_mfa_with_shared_experts(models):
    model = find_model(models, "tests/fixtures/step3-tiny")
    assert model.num_layers == 5
    assert model.has_shared_expert
    assert model.kv_resident_bytes(1, kv_bytes=1) == 5 * 64


def test_squared_relu_has_no_gate():
    """Nemotron-4 340B, as it is called: 96 layers of 2 x 18432 x 73728."""
    nemotron = {
        "model_type": "nemotron",
        "hidden_size": 18432,
        "num_attention_heads": 96,
        "num_key_value_heads": 8,
        "num_hidden_layers": 96,
        "intermediate_size": 73728,
        "max_position_embeddings": 4096,
        "vocab_size": 256000,
        "hidden_act": "relu2",
    }
    assert shape(nemotron).total_params / 1e9 == pytest.approx(341, rel=0.002)


def test_hunyuan_lists_experts_by_layer():
    hunyuan = {
        "model_type": "hunyuan_v1_moe",
        "hidden_size": 4096,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_hidden_layers": 32,
        "head_dim": 128,
        "intermediate_size": 3072,
        "moe_intermediate_size": [3072] * 32,
        "moe_topk": [8] * 32,
        "num_shared_expert": [1] * 32,
        "num_experts": 64,
        "use_cla": False,
        "max_position_embeddings": 32768,
        "vocab_size": 128167,
        "tie_word_embeddings": True,
    }
    assert shape(hunyuan).total_params / 1e9 == pytest.approx(80.4, rel=0.005)
    assert shape(hunyuan).active_params / 1e9 == pytest.approx(13.0, rel=0.05)


def test_letters_name_local_and_global_layers():
    config = {**GEMMA3, "sliding_window_pattern": "LLLG", "num_hidden_layers": 32}
    assert {(g.layers, g.window) for g in shape(config).attention} == {(24, 1024), (8, 0)}


def test_draft_layers_by_the_name_that_minimax_gives_them():
    config = {**MIXTRAL, "num_mtp_modules": 3}
    assert shape(config).draft.count == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parallel_attn_mlp_res": True}, "parallel_attn_mlp_res = True means a dense FFN beside the experts"),
        ({"sliding_window": 9, "sliding_window_pattern": "LX"}, "sliding_window_pattern must be a number"),
        ({"layer_types": ["linear_attention"] * 32}, "attention kind 'linear_attention' of 'mixtral' is not modelled"),
        ({"layer_types": ["full_attention"]}, "layer_types must list 32 layers"),
        ({"hidden_size": None}, "needs hidden_size or n_embd"),
        ({"num_hidden_layers": "32"}, "num_hidden_layers must be a number"),
        ({"num_attention_heads": 0}, "num_attention_heads must be positive"),
        ({"num_experts_per_tok": 9}, "top_k 9"),
        ({"moe_layers_enum": "1,x"}, "expected a list of layer indices"),
        ({"max_position_embeddings": None}, "needs max_position_embeddings"),
    ],
)
def test_bad_configs_name_the_file_and_the_key(change, message):
    with pytest.raises(ConfigError, match=message) as caught:
        shape({**MIXTRAL, **change})
    assert "config.json" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_zero_layers_are_refused():
    with pytest.raises(ConfigError, match=r"config\.json: 0 attention layers"):
        shape({**MIXTRAL, "num_hidden_layers": 0})


@pytest.mark.parametrize(("content", "message"), [("{", "not JSON"), ("[]", "expected a JSON object")])
def test_files_that_are_not_configs(models, tmp_path, content, message):
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        find_model(models, str(path))


def test_unknown_model_lists_what_is_known(models, tmp_path):
    with pytest.raises(ConfigError, match=r"unknown model 'gpt-9': known are .*step3.*config.json works too"):
        find_model(models, "gpt-9")
    with pytest.raises(ConfigError, match="No such file"):
        find_model(models, str(tmp_path / "config.json"))


def test_window_of_a_gqa_group_is_kept():
    group = shape(GPT_OSS).attention[0]
    assert isinstance(group, Gqa)
    assert group.moved_bytes(100_000) == group.moved_bytes(128)

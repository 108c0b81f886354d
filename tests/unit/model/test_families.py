"""config.json -> ModelSpec: the layouts that families publish, and what is refused."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from afd.errors import ModelError
from afd.model.families import family_of_config
from afd.model.families.config_reader import ConfigReader
from afd.model.inventory import Half, count_parameters, inventory
from afd.model.loading import resolve_model
from afd.model.presets import PRESETS
from afd.model.spec import AttentionKind, FfnKind, ModelSpec, RopeScaling


def parse(config: dict[str, Any]) -> ModelSpec:
    reader = ConfigReader(config, "config.json")
    return family_of_config(reader).parse(reader, "m")


def step3(**changes: Any) -> ModelSpec:
    return parse({**PRESETS["step3-tiny"], **changes})


def llama(**changes: Any) -> ModelSpec:
    return parse({**PRESETS["llama-tiny"], **changes})


def test_step3_spec() -> None:
    spec = step3()
    attention = spec.layers[0].attention
    assert attention.kind is AttentionKind.MFA
    assert (attention.num_heads, attention.num_kv_heads, attention.head_dim, attention.q_rank) == (4, 1, 32, 64)
    assert [layer.ffn.kind for layer in spec.layers] == [FfnKind.DENSE] + [FfnKind.MOE] * 3 + [FfnKind.DENSE]
    router = spec.layers[1].ffn.router
    assert router is not None and router.dtype == "activation" and not router.renormalise
    assert (spec.max_top_k, spec.num_experts, spec.max_context) == (3, 8, 2048)


def test_step3_full_size_has_the_published_figures() -> None:
    """316 B parameters, 38 B active; 512 KV elements per token and layer; 31,232 at one byte over 61 layers."""
    spec = resolve_model("dummy:step3").spec
    counts = count_parameters(spec)
    assert f"{counts.total / 1e9:.1f} {counts.active / 1e9:.1f}" == "316.3 37.9"
    assert spec.kv_elements_per_token() == 31232
    assert spec.kv_bytes_per_token("bfloat16") == 2 * 31232
    assert counts.attention + counts.ffn == counts.total


@pytest.mark.parametrize("value", ["1,2,3", " 1, 2,3 ,", [1, 2, 3], (3, 2, 1, 1)])
def test_moe_layers_enum_is_a_string_or_a_list(value: object) -> None:
    assert step3(moe_layers_enum=value) == step3()


def test_without_moe_layers_enum_every_layer_but_the_first_is_moe() -> None:
    kinds = [layer.ffn.kind for layer in step3(moe_layers_enum=None).layers]
    assert kinds == [FfnKind.DENSE] + [FfnKind.MOE] * 4


@pytest.mark.parametrize("value", ["1,2,5", [-1], "1,two", {"a": 1}, 3])
def test_a_wrong_moe_layers_enum_is_named(value: object) -> None:
    with pytest.raises(ModelError, match=r"config\.json: moe_layers_enum: "):
        step3(moe_layers_enum=value)


def test_a_layer_that_does_not_exist_is_named() -> None:
    with pytest.raises(ModelError, match="names layer 5, but the model has layers 0 to 4"):
        step3(moe_layers_enum="1,2,5")


def test_llama_spec_and_defaults() -> None:
    spec = llama(num_key_value_heads=None, eos_token_id=[2, 7])
    attention = spec.layers[0].attention
    assert (attention.num_kv_heads, attention.head_dim, attention.rope.rotary_dim) == (4, 16, 16)
    assert spec.eos_token_ids == (2, 7) and spec.max_top_k == 0
    spec = llama(bos_token_id=-1, eos_token_id=-1)  # as converters write "none"
    assert spec.bos_token_id is None and spec.eos_token_ids == ()
    assert llama(head_dim=32).layers[0].attention.head_dim == 32


def test_rope_from_either_layout() -> None:
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 8192}  # fmt: skip
    old = llama(rope_theta=5e5, rope_scaling=scaling).layers[0].attention.rope
    new = llama(rope_theta=None, rope_parameters={**scaling, "rope_theta": 5e5}).layers[0].attention.rope
    assert old == new
    assert old.theta == 5e5 and old.scaling == RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": None}, "hidden_size: missing"),
        ({"hidden_size": "64"}, "hidden_size: expected a positive integer, found '64'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers: expected a positive integer"),
        ({"num_key_value_heads": 3}, "num_key_value_heads: 3 does not divide 4"),
        ({"mlp_bias": True}, "mlp_bias: True is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act: 'gelu' is not supported"),
        ({"rope_scaling": {"rope_type": "dynamic"}}, "type 'dynamic' is not supported"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "rope_scaling: low_freq_factor: missing"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "beta_slow": -1.0}}, "beta_slow: expected a number of"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 0}}, "factor: expected a number above 0"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 1e300}}, "a context of 8.192e+303 tokens is not believed"),
        (
            {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "beta_fast": 3}},
            "beta_fast: 3 is not known to rotary",
        ),
        ({"rope_scaling": {"factor": 2.0}}, "rope_scaling: factor: 2.0 is not known to rotary type 'default'"),
        ({"rope_scaling": {"type": "linear", "rope_type": "yarn"}}, "type: 'linear' contradicts rope_type, 'yarn'"),
        ({"rope_scaling": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor: 0.5 is not supported"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: 0.5 is not supported"),
        ({"rope_parameters": {"rope_theta": 5.0}, "rope_scaling": {"rope_theta": 6.0}}, "rope_theta 5.0 contradicts"),
        ({"rope_theta": 10**400}, "rope_theta: expected a finite number, found a number of more than 80 digits"),
        ({"rope_theta": math.inf}, "rope_theta: expected a finite number, found inf"),
        ({"rope_theta": 0}, "rope_theta: expected a number above 0"),
        ({"rms_norm_eps": math.nan}, "rms_norm_eps: expected a finite number"),
        ({"num_hidden_layers": 10**6}, "num_hidden_layers: 1000000 is more than 1000, the most that is believed"),
        ({"vocab_size": 2**40}, "vocab_size: 1099511627776 is more than 16777216"),
        ({"head_dim": 15}, "head_dim: 15 of 15 dimensions cannot rotate in pairs"),
        ({"layer_types": ["full_attention", "sliding_attention", "full_attention"]}, "layer 1 is 'sliding_attention'"),
        ({"sliding_window": 64}, "sliding_window: 64 is not known to family llama"),
        ({"logit_scale": 0.5}, "logit_scale: 0.5 is not supported"),
        ({"a_key_of_tomorrow": [1, 2]}, "a_key_of_tomorrow: [1, 2] is not known to family llama, so it might change"),
        ({"x\ny": 1}, r"'x\ny': 1 is not known"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope_scaling: factor: missing"),
        ({"eos_token_id": "x"}, "eos_token_id: expected token ids"),
        ({"eos_token_id": [2, -2]}, "eos_token_id: expected token ids"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps: expected a number"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings: expected true or false"),
    ],
)
def test_a_wrong_config_names_file_and_key(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=r"^config\.json") as error:
        llama(**changes)
    assert message in str(error.value)


def test_keys_without_a_part_in_the_numbers_are_let_through() -> None:
    harmless = {
        "_name_or_path": "x", "transformers_version": "5", "attention_dropout": 0.1, "initializer_range": 0.5,
        "top_p": 0.3, "use_cache": False, "pretraining_tp": 2, "unsloth_version": "1", "pad_token_id": 7,
        "head_dim": None, "attention_bias": False, "logit_scale": 1.0, "is_causal": True, "num_nextn_predict_layers": 1,
        "torch_dtype": "float32",
        "some_setting_that_is_off": None, "per_layer_config": {}, "layer_types": ["full_attention"] * 3,
    }  # fmt: skip
    assert llama(**harmless) == replace(llama(), torch_dtype="float32")


@pytest.mark.parametrize(
    ("top", "inner", "context"),
    [
        ({"max_position_embeddings": 512}, {"factor": 4.0, "original_max_position_embeddings": 512}, 2048),
        ({"max_position_embeddings": 40960}, {"factor": 4.0, "original_max_position_embeddings": 32768}, 131072),
        ({"max_position_embeddings": 2048}, {"factor": None, "original_max_position_embeddings": 512}, 2048),
        ({"max_position_embeddings": 512}, {"factor": 4.0}, 2048),
        ({"max_position_embeddings": 512, "original_max_position_embeddings": 64}, {"factor": 4.0}, 256),
        (
            {"max_position_embeddings": 512, "original_max_position_embeddings": 64},
            {"factor": 4.0, "original_max_position_embeddings": 128},
            256,
        ),
    ],
)
def test_the_context_of_yarn_is_its_factor_times_the_original(
    top: dict[str, Any], inner: dict[str, Any], context: int
) -> None:
    spec = llama(**top, rope_scaling={"rope_type": "yarn", **inner})
    scaling = spec.layers[0].attention.rope.scaling
    assert spec.max_context == context
    assert scaling is not None and scaling.original_max_position * scaling.factor == context


def test_yarn_turns_of_0_are_the_defaults() -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    assert llama(rope_scaling={**yarn, "beta_fast": 0, "beta_slow": 0}) == llama(rope_scaling=yarn)


def test_top_k_beyond_the_experts_is_refused() -> None:
    with pytest.raises(ModelError, match="moe_top_k: 9 is more than moe_num_experts, 8"):
        step3(moe_top_k=9)


def test_an_unknown_architecture_lists_the_known_ones() -> None:
    with pytest.raises(ModelError, match=r"unknown architecture: model_type 'mamba'.*step3_text"):
        parse({"model_type": "mamba"})


def test_the_architecture_name_is_enough() -> None:
    config = {**PRESETS["llama-tiny"], "architectures": ["LlamaForCausalLM"]}
    del config["model_type"]
    assert parse(config) == llama()


@pytest.mark.parametrize("preset", PRESETS)
def test_halves_divide_the_inventory(preset: str) -> None:
    tensors = inventory(resolve_model(f"dummy:{preset}").spec)
    assert len({(t.part, t.layer) for t in tensors}) == len(tensors)
    assert {t.half for t in tensors} == {Half.ATTENTION, Half.FFN}


def _family(preset: str, **changes: Any) -> ModelSpec:
    return parse({**PRESETS[preset], **changes})


PUBLISHED = {  # total and active parameters in billions (without the input embedding), KV elements per token
    "step3.5-flash": ("197.0", "11.5", 45 * 2048),
    "deepseek-v3": ("671.0", "36.6", 61 * 576),
    "qwen3-235b-a22b": ("235.1", "21.6", 94 * 1024),
    "ernie-4.5-300b-a47b": ("298.6", "47.1", 54 * 2048),
}


@pytest.mark.parametrize("preset", PUBLISHED)
def test_full_sizes_have_the_published_figures(preset: str) -> None:
    spec = resolve_model(f"dummy:{preset}").spec
    counts = count_parameters(spec)
    total, active = f"{counts.total / 1e9:.1f}", f"{counts.active / 1e9:.1f}"
    assert (total, active, spec.kv_elements_per_token()) == PUBLISHED[preset]


def test_step3p5_layers() -> None:
    """Window, heads, rotary share and scaling by layer; clamps in the last layers only."""
    spec = _family("step3.5-flash")
    full, sliding = spec.layers[0].attention, spec.layers[1].attention
    assert (full.num_heads, full.window, full.rope.rotary_dim, full.rope.theta) == (64, 0, 64, 5e6)
    assert (sliding.num_heads, sliding.window, sliding.rope.rotary_dim, sliding.rope.theta) == (96, 512, 128, 1e4)
    assert full.rope.scaling == RopeScaling("llama3", 2.0, 1.0, 32.0, 131072) and sliding.rope.scaling is None
    assert [layer.ffn.limit for layer in spec.layers[-3:]] == [0.0, 7.0, 7.0]
    assert [layer.ffn.shared_limit for layer in spec.layers[-3:]] == [0.0, 0.0, 16.0]
    assert [layer.ffn.kind for layer in spec.layers[:4]] == [FfnKind.DENSE] * 3 + [FfnKind.MOE]


def test_step3p5_as_transformers_writes_it() -> None:
    """rope_parameters by layer type, mlp_layer_types, and transformers' names for counts."""
    public = PRESETS["step3.5-flash-tiny"]
    own = ("rope_theta", "rope_scaling", "partial_rotary_factors", "moe_layers_enum", "attention_other_setting",
           "moe_num_experts", "moe_top_k", "num_attention_groups")  # fmt: skip
    config = {key: value for key, value in public.items() if key not in own}
    config |= {
        "rope_parameters": {
            "full_attention": {**public["rope_scaling"], "rope_theta": 5e6, "partial_rotary_factor": 0.5},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
        "mlp_layer_types": ["dense"] + ["sparse"] * 5,
        "num_sliding_attention_heads": 6,
        "n_routed_experts": 12,
        "num_experts_per_tok": 3,
        "num_key_value_heads": 2,
    }
    assert parse(config) == _family("step3.5-flash-tiny")


def test_deepseek_caches_the_latent_only() -> None:
    attention = _family("deepseek-v3").layers[0].attention
    assert (attention.cached_k_dim, attention.cached_v_dim, attention.num_kv_heads) == (576, 0, 1)
    assert attention.scale == pytest.approx(192**-0.5 * (0.1 * math.log(40) + 1) ** 2)
    assert attention.rope.scaling is not None and attention.rope.scaling.attention_factor == 1.0


@pytest.mark.parametrize(
    ("preset", "changes", "message"),
    [
        ("step3.5-flash-tiny", {"layer_types": ["full_attention"]}, "layer_types: expected a list with an entry for"),
        ("step3.5-flash-tiny", {"layer_types": ["linear"] * 6}, "layer 0 is 'linear'"),
        ("step3.5-flash-tiny", {"moe_layers_enum": "1,6"}, "names layer 6"),
        ("step3.5-flash-tiny", {"moe_router_activation": "tanh"}, "'tanh' is not supported"),
        ("step3.5-flash-tiny", {"sliding_window": None}, "sliding_window: missing"),
        ("step3.5-flash-tiny", {"sink": True}, "sink: True is not supported"),
        ("step3.5-flash-tiny", {"gating": "per-value"}, "gating: 'per-value' is not supported"),
        ("step3.5-flash-tiny", {"n_routed_experts": 6}, "n_routed_experts: 6 contradicts moe_num_experts, 12"),
        ("step3.5-flash-tiny", {"mlp_layer_types": ["sparse"] * 6}, "mlp_layer_types: contradicts moe_layers_enum"),
        ("step3.5-flash-tiny", {"rope_parameters": {"rope_theta": 1.0}}, "expected an object for each layer type"),
        ("step3.5-flash-tiny", {"per_layer_config": {"1": {"head_dim": 8}}}, "num_attention_heads: missing"),
        ("deepseek-v3-tiny", {"num_key_value_heads": 2}, "num_key_value_heads: 2 is not supported"),
        ("qwen3-moe-tiny", {"num_experts": 10**9}, "num_experts: 1000000000 is more than 10000"),
        ("qwen3-moe-tiny", {"shared_expert_intermediate_size": 64}, "shared_expert_intermediate_size: 64 is not supp"),
        ("qwen3-tiny", {"use_qk_norm": False}, "use_qk_norm: False is not supported"),
        ("step3.5-flash-tiny", {"use_rope_layers": [0]}, r"use_rope_layers: \[0\] is not supported"),
        ("deepseek-v3-tiny", {"n_group": 3}, "n_group: 3 does not divide 16 experts"),
        ("deepseek-v3-tiny", {"topk_group": 1, "num_experts_per_tok": 5}, "cannot give 5 experts"),
        ("deepseek-v3-tiny", {"n_group": 16, "topk_group": 8}, "needs two"),
        ("deepseek-v3-tiny", {"topk_method": "greedy"}, "'greedy' is not supported"),
        ("qwen3-moe-tiny", {"num_experts_per_tok": 13}, "13 is more than num_experts, 12"),
        ("qwen3-moe-tiny", {"use_sliding_window": True}, "use_sliding_window: True is not supported"),
        ("qwen3-moe-tiny", {"mlp_only_layers": [3]}, "names layer 3"),
        ("ernie-4.5-moe-tiny", {"use_bias": True}, "use_bias: True is not supported"),
        ("ernie-4.5-moe-tiny", {"moe_layer_end_index": 4}, "moe_layer_end_index: 4 is not a layer"),
    ],
)
def test_a_wrong_config_of_each_family_is_named(preset: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        _family(preset, **changes)


@pytest.mark.parametrize(
    ("outer", "preset"),
    [("step3_vl", "step3-tiny"), ("step3p7", "step3.5-flash-tiny"), ("step_robotics", "qwen3-tiny")],
)
def test_a_vision_language_model_is_its_text_model(outer: str, preset: str) -> None:
    """With or without a model_type inside; token ids may stand outside."""
    inner = {key: value for key, value in PRESETS[preset].items() if key not in ("eos_token_id", "model_type")}
    config = {"model_type": outer, "text_config": inner, "eos_token_id": PRESETS[preset]["eos_token_id"],
              "vision_config": {"hidden_size": 7}, "architectures": ["SomethingForConditionalGeneration"]}  # fmt: skip
    assert parse(config) == parse(dict(PRESETS[preset]))


def test_a_key_of_the_text_model_beside_text_config_is_refused() -> None:
    inner = {key: value for key, value in PRESETS["qwen3-tiny"].items() if key != "rope_theta"}
    with pytest.raises(ModelError, match=r"config\.json: rope_theta: is read in text_config only"):
        parse({"model_type": "internvl", "text_config": inner, "rope_theta": 5.0, "projector_hidden_act": "gelu"})


def test_query_pre_attn_scalar_scales_the_scores() -> None:
    attention = _family("step3.5-flash-tiny", query_pre_attn_scalar=64).layers[0].attention
    assert attention.scale == pytest.approx(64**-0.5)

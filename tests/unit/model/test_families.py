"""config.json -> ModelSpec: the layouts that families publish, and what is refused."""

from __future__ import annotations

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


def test_step3_vl_is_its_text_model() -> None:
    text = {key: value for key, value in PRESETS["step3-tiny"].items() if key != "eos_token_id"}
    spec = parse({"model_type": "step3_vl", "text_config": text, "vision_config": {}, "eos_token_id": 1})
    assert spec == step3()


def test_llama_spec_and_defaults() -> None:
    spec = llama(num_key_value_heads=None, eos_token_id=[2, 7])
    attention = spec.layers[0].attention
    assert (attention.num_kv_heads, attention.head_dim, attention.rope.rotary_dim) == (4, 16, 16)
    assert spec.eos_token_ids == (2, 7) and spec.max_top_k == 0
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
        ({"rope_scaling": {"rope_type": "yarn"}}, "original_max_position_embeddings: missing"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope_scaling: factor: missing"),
        ({"eos_token_id": "x"}, "eos_token_id: expected token ids"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps: expected a number"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings: expected true or false"),
    ],
)
def test_a_wrong_config_names_file_and_key(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=r"^config\.json") as error:
        llama(**changes)
    assert message in str(error.value)


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

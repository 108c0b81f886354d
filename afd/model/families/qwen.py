"""Qwen2, Qwen3 and Qwen3-MoE: GQA with projection biases (2) or head norms (3); dense SwiGLU or 128 experts."""

from __future__ import annotations

from afd.model.families.config_reader import ConfigReader
from afd.model.families.family import Family, Naming
from afd.model.families.layout import (
    BIAS_NAMES,
    GQA_NAMES,
    HEAD_NORM_NAMES,
    LAYER,
    ROTARY_BUFFER,
    TRUNK_NAMES,
    check_top_k,
    gqa_attention,
    model_spec,
    swiglu_names,
)
from afd.model.spec import AttentionSpec, FfnKind, FfnSpec, LayerSpec, ModelSpec, RouterSpec

DENSE_NAMES = {**TRUNK_NAMES, **GQA_NAMES, **BIAS_NAMES, **HEAD_NORM_NAMES, **swiglu_names("mlp")}
MOE_NAMES = {
    **DENSE_NAMES,
    "router": LAYER + "mlp.gate.weight",
    **swiglu_names("mlp.experts.{expert}", "expert_"),
}


def parse_qwen2(config: ConfigReader, name: str) -> ModelSpec:
    _check(config)
    attention = gqa_attention(config, default_theta=1e6, qkv_bias=True)
    return _dense(config, name, "qwen2", attention)


def parse_qwen3(config: ConfigReader, name: str) -> ModelSpec:
    _check(config)
    return _dense(config, name, "qwen3", _qwen3_attention(config))


def parse_qwen3_moe(config: ConfigReader, name: str) -> ModelSpec:
    """A layer is MoE where its number is not in mlp_only_layers and decoder_sparse_step divides number + 1."""
    _check(config)
    num_layers = config.integer("num_hidden_layers")
    moe = FfnSpec(
        FfnKind.MOE,
        intermediate=config.integer("moe_intermediate_size"),
        num_experts=config.integer("num_experts", "num_local_experts"),
        top_k=config.integer("num_experts_per_tok"),
        router=RouterSpec(renormalise=config.flag("norm_topk_prob")),
    )
    check_top_k(config, moe, "num_experts_per_tok", "num_experts")
    dense = FfnSpec(FfnKind.DENSE, config.integer("intermediate_size"))
    only_dense = config.layer_set("mlp_only_layers", num_layers) or frozenset()
    step = config.integer("decoder_sparse_step", default=1)
    attention = _qwen3_attention(config)
    layers = tuple(LayerSpec(attention, dense if i in only_dense or (i + 1) % step else moe) for i in range(num_layers))
    return model_spec(config, name, "qwen3_moe", layers, default_eps=1e-6)


def _check(config: ConfigReader) -> None:
    config.refuse("use_sliding_window", unless=False)
    config.refuse("hidden_act", unless="silu")


def _qwen3_attention(config: ConfigReader) -> AttentionSpec:
    bias = config.flag("attention_bias")
    return gqa_attention(config, default_theta=1e6, qk_norm=True, qkv_bias=bias, o_bias=bias)


def _dense(config: ConfigReader, name: str, family: str, attention: AttentionSpec) -> ModelSpec:
    layer = LayerSpec(attention, FfnSpec(FfnKind.DENSE, config.integer("intermediate_size")))
    return model_spec(config, name, family, (layer,) * config.integer("num_hidden_layers"), default_eps=1e-6)


QWEN2 = Family(
    name="qwen2",
    model_types=("qwen2",),
    architectures=("Qwen2ForCausalLM",),
    parse=parse_qwen2,
    naming=Naming(DENSE_NAMES, ignored=(ROTARY_BUFFER,)),
)
QWEN3 = Family(
    name="qwen3",
    model_types=("qwen3",),
    architectures=("Qwen3ForCausalLM",),
    parse=parse_qwen3,
    naming=Naming(DENSE_NAMES, ignored=(ROTARY_BUFFER,)),
)
QWEN3_MOE = Family(
    name="qwen3_moe",
    model_types=("qwen3_moe",),
    architectures=("Qwen3MoeForCausalLM",),
    parse=parse_qwen3_moe,
    naming=Naming(MOE_NAMES, ignored=(ROTARY_BUFFER,)),
)

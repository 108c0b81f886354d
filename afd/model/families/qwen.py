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
    full_attention_only,
    fused_expert_names,
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
    config.refuse("qkv_bias", unless=True)
    attention = gqa_attention(config, default_theta=1e4, default_context=32768, default_kv_heads=32, qkv_bias=True)
    return _dense(config, name, "qwen2", attention)


def parse_qwen3(config: ConfigReader, name: str) -> ModelSpec:
    _check(config)
    attention = _qwen3_attention(config, default_kv_heads=32, default_head_dim=128)
    return _dense(config, name, "qwen3", attention)


def parse_qwen3_moe(config: ConfigReader, name: str) -> ModelSpec:
    """A layer is MoE where its number is not in mlp_only_layers and decoder_sparse_step divides number + 1."""
    _check(config)
    config.refuse("shared_expert_intermediate_size", unless=0)
    num_layers = config.layers()
    moe = FfnSpec(
        FfnKind.MOE,
        intermediate=config.integer("moe_intermediate_size"),
        num_experts=config.experts("num_experts", "num_local_experts"),
        top_k=config.integer("num_experts_per_tok"),
        router=RouterSpec(renormalise=config.flag("norm_topk_prob")),
    )
    check_top_k(config, moe, "num_experts_per_tok", "num_experts")
    dense = FfnSpec(FfnKind.DENSE, config.integer("intermediate_size"))
    only_dense = config.layer_set("mlp_only_layers", num_layers) or frozenset()
    step = config.integer("decoder_sparse_step", default=1)
    attention = _qwen3_attention(config, default_kv_heads=4)
    layers = tuple(LayerSpec(attention, dense if i in only_dense or (i + 1) % step else moe) for i in range(num_layers))
    return model_spec(config, name, "qwen3_moe", layers, default_eps=1e-6, default_context=32768)


def _check(config: ConfigReader) -> None:
    config.refuse("use_sliding_window", unless=False)
    config.get("sliding_window")  # without effect then
    config.refuse("hidden_act", unless="silu")
    full_attention_only(config, config.layers())


def _qwen3_attention(config: ConfigReader, default_kv_heads: int, default_head_dim: int | None = None) -> AttentionSpec:
    config.refuse("use_qk_norm", unless=True)
    bias = config.flag("attention_bias")
    return gqa_attention(
        config,
        default_theta=1e4,
        default_context=32768,
        default_kv_heads=default_kv_heads,
        default_head_dim=default_head_dim,
        qk_norm=True,
        qkv_bias=bias,
        o_bias=bias,
    )


def _dense(config: ConfigReader, name: str, family: str, attention: AttentionSpec) -> ModelSpec:
    layer = LayerSpec(attention, FfnSpec(FfnKind.DENSE, config.integer("intermediate_size")))
    return model_spec(config, name, family, (layer,) * config.layers(), default_eps=1e-6, default_context=32768)


QWEN2 = Family(
    name="qwen2",
    model_types=("qwen2",),
    architectures=("Qwen2ForCausalLM",),
    read=parse_qwen2,
    naming=Naming(DENSE_NAMES, ignored=(ROTARY_BUFFER,)),
)
QWEN3 = Family(
    name="qwen3",
    model_types=("qwen3",),
    architectures=("Qwen3ForCausalLM",),
    read=parse_qwen3,
    naming=Naming(DENSE_NAMES, ignored=(ROTARY_BUFFER,)),
)
QWEN3_MOE = Family(
    name="qwen3_moe",
    model_types=("qwen3_moe",),
    architectures=("Qwen3MoeForCausalLM",),
    read=parse_qwen3_moe,
    naming=Naming(MOE_NAMES, (fused_expert_names("mlp.experts"),), ignored=(ROTARY_BUFFER,)),
)

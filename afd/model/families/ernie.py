"""ERNIE 4.5 MoE: GQA with interleaved rotary pairs; softmax experts chosen with a correction bias, shared experts."""

from __future__ import annotations

from afd.model.families.config_reader import ConfigReader, shown
from afd.model.families.family import Family, Naming
from afd.model.families.layout import (
    GQA_NAMES,
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
from afd.model.spec import FfnKind, FfnSpec, LayerSpec, ModelSpec, RouterSpec

NAMES = {
    **TRUNK_NAMES,
    **GQA_NAMES,
    "router": LAYER + "mlp.gate.weight",
    "router_bias": LAYER + "mlp.moe_statics.e_score_correction_bias",
    **swiglu_names("mlp"),
    **swiglu_names("mlp.experts.{expert}", "expert_"),
    **swiglu_names("mlp.shared_experts", "shared_"),
}


def parse(config: ConfigReader, name: str) -> ModelSpec:
    for key, known in (("use_bias", False), ("hidden_act", "silu"), ("use_rmsnorm", True), ("moe_gate", "topk")):
        config.refuse(key, unless=known)
    num_layers = config.layers()
    full_attention_only(config, num_layers)
    first, last = _moe_range(config, num_layers)
    interval = config.integer("moe_layer_interval", default=1)
    dense = FfnSpec(FfnKind.DENSE, config.integer("intermediate_size"))
    moe = _moe(config)
    attention = gqa_attention(
        config, default_theta=500000.0, default_context=131072, default_kv_heads=4, interleaved=True
    )
    layers = tuple(
        LayerSpec(attention, moe if first <= i <= last and (i + 1) % interval == 0 else dense)
        for i in range(num_layers)
    )
    return model_spec(config, name, "ernie4_5_moe", layers, default_eps=1e-5, default_context=131072, default_tie=True)


def _moe_range(config: ConfigReader, num_layers: int) -> tuple[int, int]:
    """First and last layer that may be MoE; the last is -1 for the model's last one."""
    limits = []
    for key, default in (("moe_layer_start_index", 1), ("moe_layer_end_index", -1)):
        value = config.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or not -1 <= value < num_layers:
            raise config.fail(key, f"{shown(value)} is not a layer: the model has layers 0 to {num_layers - 1}")
        limits.append(value)
    return limits[0], limits[1] if limits[1] >= 0 else num_layers - 1


def _moe(config: ConfigReader) -> FfnSpec:
    width = config.integer("moe_intermediate_size")
    num_shared = config.integer("moe_num_shared_experts", default=2, least=0)
    ffn = FfnSpec(
        FfnKind.MOE,
        intermediate=width,
        num_experts=config.experts("moe_num_experts", "num_experts"),
        top_k=config.integer("moe_k", "num_experts_per_tok"),
        shared_intermediate=width * num_shared,
        router=RouterSpec(
            dtype="float32", selection_bias=True, renormalise=True, norm_min=config.number("moe_norm_min", 1e-12)
        ),
    )
    check_top_k(config, ffn, "moe_k", "moe_num_experts")
    return ffn


FAMILY = Family(
    name="ernie4_5_moe",
    model_types=("ernie4_5_moe",),
    architectures=("Ernie4_5_MoeForCausalLM",),
    read=parse,
    naming=Naming(
        NAMES,
        (fused_expert_names("mlp.experts"),),
        ignored=(ROTARY_BUFFER, r"model\.mtp_.*"),
        layer_prefix="model.layers.",
    ),
)

"""Step-3's text model: MFA attention; dense layers, and MoE layers with packed experts and a shared expert."""

from __future__ import annotations

from afd.model.families.config_reader import ConfigReader
from afd.model.families.family import Family, Naming
from afd.model.families.layout import (
    GQA_NAMES,
    LAYER,
    TRUNK_NAMES,
    check_attention,
    check_top_k,
    full_attention_only,
    max_position,
    model_spec,
    swiglu_names,
)
from afd.model.families.rope_reader import read_rope
from afd.model.families.vision_language import VISION_TENSORS
from afd.model.spec import (
    AttentionKind,
    AttentionSpec,
    FfnKind,
    FfnSpec,
    LayerSpec,
    ModelSpec,
    RopeSpec,
    RouterRule,
    RouterSpec,
)

NAMES = {
    **TRUNK_NAMES,
    **GQA_NAMES,
    "q_down": LAYER + "self_attn.q_proj.weight",
    "q_norm": LAYER + "self_attn.inter_norm.weight",
    "q_up": LAYER + "self_attn.wq.weight",
    "router": LAYER + "moe.gate.weight",
    **swiglu_names("mlp"),
    **swiglu_names("moe", "expert_"),
    **swiglu_names("share_expert", "shared_"),
}


def parse(config: ConfigReader, name: str) -> ModelSpec:
    config.refuse("hidden_act", unless="silu")
    config.refuse("use_mfa", unless=True)
    num_layers = config.layers()
    full_attention_only(config, num_layers)
    head_dim = config.integer("head_dim")
    theta, scaling = read_rope(config, 500000.0, max_position(config, None))
    attention = AttentionSpec(
        kind=AttentionKind.MFA,
        num_heads=config.integer("num_attention_heads"),
        num_kv_heads=config.integer("num_attention_groups", "num_key_value_heads", default=1),
        head_dim=head_dim,
        v_head_dim=head_dim,
        rope=RopeSpec(theta, rotary_dim=head_dim, scaling=scaling),
        q_rank=config.integer("share_q_dim"),
    )
    check_attention(config, attention, "num_attention_groups")
    dense = FfnSpec(FfnKind.DENSE, config.integer("intermediate_size"))
    moe_layers = config.layer_set("moe_layers_enum", num_layers)
    if moe_layers is None:
        moe_layers = frozenset(range(1, num_layers))
    moe = _moe_ffn(config) if moe_layers else dense
    layers = tuple(LayerSpec(attention, moe if i in moe_layers else dense) for i in range(num_layers))
    return model_spec(config, name, "step3", layers, default_eps=1e-5, default_context=None)


def _moe_ffn(config: ConfigReader) -> FfnSpec:
    ffn = FfnSpec(
        FfnKind.MOE,
        intermediate=config.integer("moe_intermediate_size"),
        num_experts=config.experts("moe_num_experts"),
        top_k=config.integer("moe_top_k"),
        shared_intermediate=config.integer("share_expert_dim"),
        router=RouterSpec(RouterRule.SOFTMAX, dtype="activation", renormalise=config.flag("norm_expert_weight")),
    )
    check_top_k(config, ffn, "moe_top_k", "moe_num_experts")
    return ffn


FAMILY = Family(
    name="step3",
    model_types=("step3_text",),
    architectures=("Step3TextForCausalLM",),
    read=parse,
    naming=Naming(NAMES, ignored=VISION_TENSORS),
)

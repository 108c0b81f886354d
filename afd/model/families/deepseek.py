"""DeepSeek-V3 (and R1): MLA; a few dense layers, then sigmoid-routed experts in groups with a shared expert."""

from __future__ import annotations

from afd.model.families.config_reader import ConfigReader, yarn_mscale
from afd.model.families.family import Family, Naming
from afd.model.families.layout import LAYER, ROTARY_BUFFER, TRUNK_NAMES, check_top_k, model_spec, swiglu_names
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
    "q": LAYER + "self_attn.q_proj.weight",
    "q_down": LAYER + "self_attn.q_a_proj.weight",
    "q_norm": LAYER + "self_attn.q_a_layernorm.weight",
    "q_up": LAYER + "self_attn.q_b_proj.weight",
    "kv_down": LAYER + "self_attn.kv_a_proj_with_mqa.weight",
    "kv_norm": LAYER + "self_attn.kv_a_layernorm.weight",
    "kv_up": LAYER + "self_attn.kv_b_proj.weight",
    "o": LAYER + "self_attn.o_proj.weight",
    "router": LAYER + "mlp.gate.weight",
    "router_bias": LAYER + "mlp.gate.e_score_correction_bias",
    **swiglu_names("mlp"),
    **swiglu_names("mlp.experts.{expert}", "expert_"),
    **swiglu_names("mlp.shared_experts", "shared_"),
}


def parse(config: ConfigReader, name: str) -> ModelSpec:
    for key, known in (
        ("attention_bias", False),
        ("hidden_act", "silu"),
        ("scoring_func", "sigmoid"),
        ("topk_method", "noaux_tc"),
        ("moe_layer_freq", 1),
    ):
        config.refuse(key, unless=known)
    num_layers = config.integer("num_hidden_layers")
    dense = FfnSpec(FfnKind.DENSE, config.integer("intermediate_size"))
    moe = _moe(config)
    attention = _attention(config)
    first_moe = _count(config, "first_k_dense_replace", 3)
    layers = tuple(LayerSpec(attention, dense if i < first_moe else moe) for i in range(num_layers))
    return model_spec(config, name, "deepseek_v3", layers, default_eps=1e-6)


def _attention(config: ConfigReader) -> AttentionSpec:
    rotary_dim = config.integer("qk_rope_head_dim")
    theta, scaling = config.rope(default_theta=10000.0)
    parameters = config.values.get("rope_parameters") or config.values.get("rope_scaling") or {}
    all_dim = ConfigReader(parameters, f"{config.where}: rope_scaling").number("mscale_all_dim", 0.0)
    mscale = yarn_mscale(scaling.factor, all_dim) if scaling is not None and all_dim else 1.0
    return AttentionSpec(
        kind=AttentionKind.MLA,
        num_heads=config.integer("num_attention_heads"),
        num_kv_heads=1,
        head_dim=config.integer("qk_nope_head_dim") + rotary_dim,
        v_head_dim=config.integer("v_head_dim"),
        rope=RopeSpec(theta, rotary_dim, interleaved=config.flag("rope_interleave", True), scaling=scaling),
        q_rank=config.integer("q_lora_rank") if config.has("q_lora_rank") else 0,
        kv_rank=config.integer("kv_lora_rank"),
        temperature=mscale * mscale,
    )


def _moe(config: ConfigReader) -> FfnSpec:
    num_experts = config.integer("n_routed_experts")
    num_groups = config.integer("n_group", default=1)
    top_groups = config.integer("topk_group", default=1)
    width = config.integer("moe_intermediate_size")
    ffn = FfnSpec(
        FfnKind.MOE,
        intermediate=width,
        num_experts=num_experts,
        top_k=config.integer("num_experts_per_tok"),
        shared_intermediate=width * _count(config, "n_shared_experts", 1),
        router=RouterSpec(
            rule=RouterRule.SIGMOID,
            dtype="float32",
            selection_bias=True,
            num_groups=num_groups,
            top_groups=top_groups,
            renormalise=config.flag("norm_topk_prob", True),
            scaling=config.number("routed_scaling_factor", 1.0),
        ),
    )
    check_top_k(config, ffn, "num_experts_per_tok", "n_routed_experts")
    if num_experts % num_groups:
        raise config.fail("n_group", f"{num_groups} does not divide {num_experts} experts")
    group = num_experts // num_groups
    if top_groups > num_groups or ffn.top_k > top_groups * group:
        raise config.fail(
            "topk_group", f"{top_groups} of {num_groups} groups of {group} experts cannot give {ffn.top_k} experts"
        )
    if num_groups > 1 and group < 2:
        raise config.fail("n_group", "a group's score is that of its two best experts, so it needs two")
    return ffn


def _count(config: ConfigReader, key: str, default: int) -> int:
    """An integer that may be 0."""
    return 0 if config.values.get(key) == 0 else config.integer(key, default=default)


FAMILY = Family(
    name="deepseek_v3",
    model_types=("deepseek_v3",),
    architectures=("DeepseekV3ForCausalLM",),
    parse=parse,
    naming=Naming(NAMES, ignored=(ROTARY_BUFFER,), layer_prefix="model.layers."),
)

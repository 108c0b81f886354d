"""DeepSeek-V3 (and R1): MLA; a few dense layers, then sigmoid-routed experts in groups with a shared expert."""

from __future__ import annotations

from afd.model.families.config_reader import ConfigReader
from afd.model.families.family import Family, Naming
from afd.model.families.layout import (
    LAYER,
    ROTARY_BUFFER,
    TRUNK_NAMES,
    check_attention,
    check_top_k,
    full_attention_only,
    fused_expert_names,
    max_position,
    model_spec,
    swiglu_names,
)
from afd.model.families.rope_reader import read_rope, yarn_mscale
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


_CONTEXT = 4096
"""Context of a configuration that names none, as in transformers' class."""


def parse(config: ConfigReader, name: str) -> ModelSpec:
    for key, known in (
        ("attention_bias", False),
        ("hidden_act", "silu"),
        ("scoring_func", "sigmoid"),
        ("topk_method", "noaux_tc"),
        ("moe_layer_freq", 1),
    ):
        config.refuse(key, unless=known)
    num_layers = config.layers()
    full_attention_only(config, num_layers)
    dense = FfnSpec(FfnKind.DENSE, config.integer("intermediate_size"))
    moe = _moe(config)
    attention = _attention(config)
    first_moe = config.integer("first_k_dense_replace", default=3, least=0)
    layers = tuple(LayerSpec(attention, dense if i < first_moe else moe) for i in range(num_layers))
    return model_spec(config, name, "deepseek_v3", layers, default_eps=1e-6, default_context=_CONTEXT)


def _attention(config: ConfigReader) -> AttentionSpec:
    rotary_dim = config.integer("qk_rope_head_dim")
    theta, scaling = read_rope(config, 1e4, max_position(config, _CONTEXT), also=("mscale_all_dim",))
    parameters = config.section("rope_scaling") or config.section("rope_parameters")
    all_dim = parameters.number("mscale_all_dim", 0.0) if parameters is not None else 0.0
    mscale = yarn_mscale(scaling.factor, all_dim) if scaling is not None and all_dim else 1.0
    num_heads = config.integer("num_attention_heads")
    config.refuse("num_key_value_heads", unless=num_heads)
    attention = AttentionSpec(
        kind=AttentionKind.MLA,
        num_heads=num_heads,
        num_kv_heads=1,
        head_dim=config.integer("qk_nope_head_dim") + rotary_dim,
        v_head_dim=config.integer("v_head_dim"),
        rope=RopeSpec(theta, rotary_dim, interleaved=config.flag("rope_interleave", True), scaling=scaling),
        q_rank=config.integer("q_lora_rank", default=0 if "q_lora_rank" in config.values else 1536),
        kv_rank=config.integer("kv_lora_rank"),
        temperature=mscale * mscale,
    )
    check_attention(config, attention, "num_key_value_heads")
    return attention


def _moe(config: ConfigReader) -> FfnSpec:
    num_experts = config.experts("n_routed_experts", "num_local_experts")
    num_groups = config.integer("n_group", default=1 if "n_group" in config.values else 8)
    top_groups = config.integer("topk_group", default=1 if "topk_group" in config.values else 4)
    width = config.integer("moe_intermediate_size")
    ffn = FfnSpec(
        FfnKind.MOE,
        intermediate=width,
        num_experts=num_experts,
        top_k=config.integer("num_experts_per_tok"),
        shared_intermediate=width * config.integer("n_shared_experts", default=1, least=0),
        router=RouterSpec(
            rule=RouterRule.SIGMOID,
            dtype="float32",
            selection_bias=True,
            num_groups=num_groups,
            top_groups=top_groups,
            renormalise=config.flag("norm_topk_prob", True),
            scaling=config.number("routed_scaling_factor", 2.5),
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


FAMILY = Family(
    name="deepseek_v3",
    model_types=("deepseek_v3",),
    architectures=("DeepseekV3ForCausalLM",),
    read=parse,
    naming=Naming(NAMES, (fused_expert_names("mlp.experts"),), ignored=(ROTARY_BUFFER,), layer_prefix="model.layers."),
)

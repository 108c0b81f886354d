"""Step-3.5-Flash: GQA with head norms and head gates, sliding-window layers with their own heads and rotary embedding;
sigmoid-routed experts with a selection bias, a shared expert, and a clamped SwiGLU in the last layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from afd.model.families.config_reader import ConfigReader
from afd.model.families.family import Family, Naming
from afd.model.families.layout import (
    GQA_NAMES,
    HEAD_NORM_NAMES,
    LAYER,
    TRUNK_NAMES,
    check_heads,
    check_top_k,
    model_spec,
    swiglu_names,
)
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

FULL, SLIDING = "full_attention", "sliding_attention"

NAMES = {
    **TRUNK_NAMES,
    **GQA_NAMES,
    **HEAD_NORM_NAMES,
    "head_gate": LAYER + "self_attn.g_proj.weight",
    "router": LAYER + "moe.gate.weight",
    "router_bias": LAYER + "moe.router_bias",
    **swiglu_names("mlp"),
    **swiglu_names("moe", "expert_"),
    **swiglu_names("share_expert", "shared_"),
}


def parse(config: ConfigReader, name: str) -> ModelSpec:
    for key, known in (
        ("attention_bias", False),
        ("mlp_bias", False),
        ("sink", False),
        ("use_mfa", False),
        ("use_rope_layers", []),
        ("hidden_act", "silu"),
    ):
        config.refuse(key, unless=known)
    num_layers = config.integer("num_hidden_layers")
    types = config.per_layer("layer_types", num_layers) or [FULL] * num_layers
    for layer, kind in enumerate(types):
        if kind not in (FULL, SLIDING):
            raise config.fail("layer_types", f"layer {layer} is {kind!r} (known: {FULL}, {SLIDING})")
    moe_layers = _moe_layers(config, num_layers)
    layers = tuple(
        LayerSpec(
            _attention(config, i, types),
            _moe(config, i, num_layers) if i in moe_layers else _dense(config, i, num_layers),
        )
        for i in range(num_layers)
    )
    return model_spec(
        config, name, "step3p5", layers, default_eps=1e-5, zero_centred_norms=config.flag("zero_centered", True)
    )


def _attention(config: ConfigReader, layer: int, types: list[str]) -> AttentionSpec:
    sliding = types[layer] == SLIDING
    reader = config
    if sliding:
        reader = ConfigReader({**config.values, **_sliding_settings(config)}, config.where)
    head_dim = reader.integer("head_dim")
    attention = AttentionSpec(
        kind=AttentionKind.GQA,
        num_heads=reader.integer("num_attention_heads"),
        num_kv_heads=reader.integer("num_attention_groups", "num_key_value_heads"),
        head_dim=head_dim,
        v_head_dim=head_dim,
        rope=_rope(config, layer, types, head_dim),
        window=config.integer("sliding_window") if sliding else 0,
        qk_norm=config.flag("use_qk_norm", True),
        head_gate=config.flag("use_head_wise_attn_gate", True),
    )
    check_heads(reader, attention, "num_attention_groups")
    return attention


def _sliding_settings(config: ConfigReader) -> Mapping[str, Any]:
    """What the sliding layers have of their own: attention_other_setting, or transformers' name for their heads."""
    if config.has("num_sliding_attention_heads"):
        return {"num_attention_heads": config.integer("num_sliding_attention_heads")}
    settings = config.values.get("attention_other_setting") or {}
    if not isinstance(settings, Mapping):
        raise config.fail("attention_other_setting", f"expected an object, found {settings!r}")
    return {
        key: settings[key] for key in ("num_attention_heads", "num_attention_groups", "head_dim") if key in settings
    }


def _rope(config: ConfigReader, layer: int, types: list[str], head_dim: int) -> RopeSpec:
    """Of one layer, from lists with an entry for each layer, or from one rope_parameters object for each layer type."""
    by_type = config.values.get("rope_parameters") or {}
    if isinstance(by_type, Mapping) and types[layer] in by_type:
        own = ConfigReader({"rope_parameters": by_type[types[layer]]}, f"{config.where}: rope_parameters")
        factor = ConfigReader(by_type[types[layer]], own.where).number("partial_rotary_factor", 1.0)
    else:
        theta = config.values.get("rope_theta", 10000.0)
        thetas = config.per_layer("rope_theta", len(types)) if isinstance(theta, list | tuple) else [theta] * len(types)
        factors = config.per_layer("partial_rotary_factors", len(types)) or [1.0] * len(types)
        stretched = types[layer] in (config.values.get("yarn_only_types") or [FULL])
        scaling = config.values.get("rope_scaling") if stretched else None
        assert thetas is not None
        own = ConfigReader({"rope_theta": thetas[layer], "rope_scaling": scaling}, config.where)
        factor = ConfigReader({"partial_rotary_factors": factors[layer]}, config.where).number("partial_rotary_factors")
    theta, scaling = own.rope(default_theta=10000.0)
    return RopeSpec(theta, rotary_dim=int(head_dim * factor), scaling=scaling)


def _moe_layers(config: ConfigReader, num_layers: int) -> frozenset[int]:
    """moe_layers_enum, or transformers' mlp_layer_types; absent: all but the first three."""
    kinds = config.per_layer("mlp_layer_types", num_layers)
    if kinds is not None:
        return frozenset(i for i, kind in enumerate(kinds) if kind == "sparse")
    num_beyond = config.integer("num_nextn_predict_layers") if config.values.get("num_nextn_predict_layers") else 0
    named = config.layer_set("moe_layers_enum", num_layers, num_beyond)
    return frozenset(range(3, num_layers)) if named is None else named


def _dense(config: ConfigReader, layer: int, num_layers: int) -> FfnSpec:
    limit = _limit(config, "swiglu_limits_shared", layer, num_layers)
    return FfnSpec(FfnKind.DENSE, config.integer("intermediate_size"), limit=limit)


def _moe(config: ConfigReader, layer: int, num_layers: int) -> FfnSpec:
    rule = str(config.values.get("moe_router_activation") or RouterRule.SIGMOID)
    if rule not in list(RouterRule):
        raise config.fail("moe_router_activation", f"{rule!r} is not supported (known: {', '.join(RouterRule)})")
    ffn = FfnSpec(
        FfnKind.MOE,
        intermediate=config.integer("moe_intermediate_size"),
        num_experts=config.integer("moe_num_experts", "n_routed_experts"),
        top_k=config.integer("moe_top_k", "num_experts_per_tok"),
        shared_intermediate=config.integer("share_expert_dim", "share_expert_dims"),
        router=RouterSpec(
            rule=RouterRule(rule),
            dtype="float32" if config.flag("need_fp32_gate", True) else "activation",
            selection_bias=config.flag("use_moe_router_bias", True),
            renormalise=config.flag("norm_expert_weight", True),
            scaling=config.number("moe_router_scaling_factor", 1.0),
        ),
        limit=_limit(config, "swiglu_limits", layer, num_layers),
        shared_limit=_limit(config, "swiglu_limits_shared", layer, num_layers),
    )
    check_top_k(config, ffn, "moe_top_k", "moe_num_experts")
    return ffn


def _limit(config: ConfigReader, key: str, layer: int, num_layers: int) -> float:
    """A layer's clamp; 0 or null: none."""
    limits = config.per_layer(key, num_layers)
    if limits is None or limits[layer] is None:
        return 0.0
    return ConfigReader({key: limits[layer]}, config.where).number(key)


FAMILY = Family(
    name="step3p5",
    model_types=("step3p5",),
    architectures=("Step3p5ForCausalLM",),
    parse=parse,
    naming=Naming(
        NAMES,
        per_expert=swiglu_names("moe.experts.{expert}", "expert_"),
        layer_prefix="model.layers.",
    ),
)

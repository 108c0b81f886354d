"""Step-3.5-Flash: GQA with head norms and head gates, sliding-window layers with their own heads and rotary embedding;
sigmoid-routed experts with a selection bias, a shared expert, and a clamped SwiGLU in the last layers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from afd.model.families.config_reader import ConfigReader, shown
from afd.model.families.family import Family, Naming
from afd.model.families.layout import (
    FULL,
    GQA_NAMES,
    HEAD_NORM_NAMES,
    LAYER,
    SLIDING,
    TRUNK_NAMES,
    check_attention,
    check_top_k,
    fused_expert_names,
    max_position,
    model_spec,
    swiglu_names,
)
from afd.model.families.rope_reader import read_rope
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

_CONTEXT = 128000
"""Context of a configuration that names none, as in transformers' class."""

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

TRANSFORMERS_NAMES = {
    "router": LAYER + "mlp.gate.weight",
    "router_bias": LAYER + "mlp.gate.e_score_correction_bias",
    **fused_expert_names("mlp.experts"),
    **swiglu_names("mlp.shared_experts", "shared_"),
}
"""What a model has that transformers 5 saved in its own format."""


def parse(config: ConfigReader, name: str) -> ModelSpec:
    for key, known in (
        ("attention_bias", False),
        ("mlp_bias", False),
        ("sink", False),
        ("use_mfa", False),
        ("use_rope_layers", []),
        ("use_moe", True),
        ("gating", True),
        ("hidden_act", "silu"),
    ):
        config.refuse(key, unless=known)
    num_layers = config.layers()
    types = config.per_layer("layer_types", num_layers) or [FULL] * num_layers
    for layer, kind in enumerate(types):
        if kind not in (FULL, SLIDING):
            raise config.fail("layer_types", f"layer {layer} is {shown(kind)} (known: {FULL}, {SLIDING})")
    moe_layers = _moe_layers(config, num_layers)
    attention = _Attention(config, types)
    layers = tuple(
        LayerSpec(
            attention.of_layer(i),
            _moe(config, i, num_layers) if i in moe_layers else _dense(config, i, num_layers),
        )
        for i in range(num_layers)
    )
    for kind in (FULL, SLIDING):
        if len({layer.attention.rope for layer, own in zip(layers, types, strict=True) if own == kind}) > 1:
            raise config.fail("layer_types", f"layers of type {kind} differ in rope_theta or partial_rotary_factors")
    return model_spec(
        config,
        name,
        "step3p5",
        layers,
        default_eps=1e-5,
        default_context=_CONTEXT,
        zero_centred_norms=config.flag("zero_centered", True),
    )


class _Attention:
    """The attention of each layer: what sliding layers have of their own, and the rotary embedding of each type."""

    def __init__(self, config: ConfigReader, types: list[str]):
        self._config = config
        self._types = types
        self._sliding = _sliding_settings(config)
        self._own = _layer_overrides(config, len(types))
        self._by_type = _rope_by_type(config, types)
        self._stretched = config.get("yarn_only_types") or [FULL]
        config.get("sliding_window")  # without effect on full layers
        scaling = config.section("rope_scaling")
        if scaling is not None and scaling.has("type") and not scaling.has("rope_type"):
            raise scaling.fail("type", "is not read for this family: name it rope_type")

    def of_layer(self, layer: int) -> AttentionSpec:
        config, sliding = self._config, self._types[layer] == SLIDING
        if self._own is not None:
            reader = ConfigReader({**config.values, **self._own.get(layer, {})}, config.where, config.asked)
        elif sliding:
            reader = ConfigReader({**config.values, **self._sliding}, config.where, config.asked)
        else:
            reader = config
        head_dim = reader.integer("head_dim")
        scalar = reader.positive("query_pre_attn_scalar", float(head_dim))
        attention = AttentionSpec(
            kind=AttentionKind.GQA,
            num_heads=reader.integer("num_attention_heads"),
            num_kv_heads=reader.integer("num_attention_groups", "num_key_value_heads"),
            head_dim=head_dim,
            v_head_dim=head_dim,
            rope=self._rope(layer, head_dim),
            window=config.integer("sliding_window") if sliding else 0,
            qk_norm=config.flag("use_qk_norm", True),
            head_gate=config.flag("use_head_wise_attn_gate", True),
            temperature=math.sqrt(head_dim / scalar),
        )
        check_attention(reader, attention, "num_attention_groups")
        return attention

    def _rope(self, layer: int, head_dim: int) -> RopeSpec:
        """Rotation of one layer, read from one rope_parameters object for each layer type, or from lists by layer."""
        config, kind = self._config, self._types[layer]
        if self._by_type is not None:
            settings = dict(self._by_type[kind])
            factor = ConfigReader(settings, f"{config.where}: rope_parameters").number("partial_rotary_factor", 1.0)
            settings.pop("partial_rotary_factor", None)
            own = ConfigReader({"rope_parameters": settings}, f"{config.where}: {kind}")
        else:
            theta, scaling = config.get("rope_theta"), config.get("rope_scaling")
            if isinstance(theta, list | tuple):
                thetas = config.per_layer("rope_theta", len(self._types))
                theta = thetas[layer] if thetas else None
            factors = config.per_layer("partial_rotary_factors", len(self._types))
            factor = 1.0
            if factors:
                factor = ConfigReader({"partial_rotary_factors": factors[layer]}, config.where).number(
                    "partial_rotary_factors"
                )
            scaling = scaling if kind in self._stretched else None
            own = ConfigReader({"rope_theta": theta, "rope_scaling": scaling}, config.where)
        theta, scaling = read_rope(own, 1e4, max_position(config, _CONTEXT))
        return RopeSpec(theta, rotary_dim=int(head_dim * factor), scaling=scaling)


def _sliding_settings(config: ConfigReader) -> Mapping[str, Any]:
    """What the sliding layers have of their own: attention_other_setting, or transformers' name for their heads."""
    settings = config.section("attention_other_setting")
    if config.has("num_sliding_attention_heads"):
        heads = config.integer("num_sliding_attention_heads")
        if settings is not None and settings.integer("num_attention_heads", default=heads) != heads:
            raise settings.fail("num_attention_heads", f"contradicts num_sliding_attention_heads, {heads}")
        return {"num_attention_heads": heads}
    if settings is None:
        return {}
    settings.refuse("attention_type", unless=SLIDING)
    settings.refuse("true_head_dim", unless=settings.get("head_dim") or config.get("head_dim"))
    own = {key: settings.get(key) for key in ("num_attention_heads", "num_attention_groups", "head_dim")}
    settings.refuse_rest((), "attention_other_setting")
    return {key: value for key, value in own.items() if value is not None}


def _layer_overrides(config: ConfigReader, num_layers: int) -> Mapping[int, Mapping[str, Any]] | None:
    """per_layer_config, which transformers writes: the heads of single layers, before all other keys for them."""
    overrides = config.section("per_layer_config")
    if overrides is None:
        return None if config.get("per_layer_config") is None else {}
    own = {}
    for layer in sorted(config.layer_set("per_layer_config", num_layers) or ()):
        settings = overrides.section(str(layer))
        if settings is None:
            continue
        own[layer] = {"num_attention_heads": settings.integer("num_attention_heads")}
        settings.refuse_rest((), "per_layer_config")
    return own


def _rope_by_type(config: ConfigReader, types: list[str]) -> Mapping[str, Mapping[str, Any]] | None:
    """rope_parameters with an object for each layer type; None when absent."""
    parameters = config.section("rope_parameters")
    if parameters is None:
        return None
    by_type = {kind: parameters.section(kind) for kind in dict.fromkeys(types)}
    found = {kind: dict(reader.values) for kind, reader in by_type.items() if reader is not None}
    if len(found) < len(by_type):
        raise config.fail("rope_parameters", f"expected an object for each layer type ({', '.join(by_type)})")
    parameters.refuse_rest((FULL, SLIDING), "rope_parameters")
    return found


def _moe_layers(config: ConfigReader, num_layers: int) -> frozenset[int]:
    """moe_layers_enum, or transformers' mlp_layer_types; absent: all but the first three."""
    num_beyond = config.integer("num_nextn_predict_layers", default=0, least=0)
    named = config.layer_set("moe_layers_enum", num_layers, num_beyond)
    kinds = config.per_layer("mlp_layer_types", num_layers)
    if kinds is None:
        return frozenset(range(3, num_layers)) if named is None else named
    for layer, kind in enumerate(kinds):
        if kind not in ("sparse", "dense"):
            raise config.fail("mlp_layer_types", f"layer {layer} is {shown(kind)} (known: sparse, dense)")
    sparse = frozenset(i for i, kind in enumerate(kinds) if kind == "sparse")
    if named is not None and {i for i in named if i < num_layers} != sparse:
        raise config.fail("mlp_layer_types", "contradicts moe_layers_enum")
    return sparse


def _dense(config: ConfigReader, layer: int, num_layers: int) -> FfnSpec:
    limit = _limit(config, "swiglu_limits_shared", layer, num_layers)
    return FfnSpec(FfnKind.DENSE, config.integer("intermediate_size"), limit=limit)


def _moe(config: ConfigReader, layer: int, num_layers: int) -> FfnSpec:
    rule = config.get("moe_router_activation") or RouterRule.SIGMOID
    if rule not in list(RouterRule):
        raise config.fail("moe_router_activation", f"{shown(rule)} is not supported (known: {', '.join(RouterRule)})")
    ffn = FfnSpec(
        FfnKind.MOE,
        intermediate=config.integer("moe_intermediate_size"),
        num_experts=config.experts("moe_num_experts", "n_routed_experts", "num_local_experts"),
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
    read=parse,
    naming=Naming(
        NAMES,
        alternatives=(
            swiglu_names("moe.experts.{expert}", "expert_"),
            TRANSFORMERS_NAMES,
        ),
        layer_prefix="model.layers.",
    ),
)

"""Tensor names and spec parts that families share: each names only what it does differently."""

from __future__ import annotations

from afd.model.families.config_reader import MAX_SIZE, ConfigReader, shown
from afd.model.families.rope_reader import read_rope, yarn_context
from afd.model.spec import AttentionKind, AttentionSpec, FfnSpec, LayerSpec, ModelSpec, RopeSpec

LAYER = "model.layers.{layer}."

TRUNK_NAMES = {
    "embed": "model.embed_tokens.weight",
    "attn_norm": LAYER + "input_layernorm.weight",
    "ffn_norm": LAYER + "post_attention_layernorm.weight",
    "final_norm": "model.norm.weight",
    "head": "lm_head.weight",
}

GQA_NAMES = {
    "q": LAYER + "self_attn.q_proj.weight",
    "k": LAYER + "self_attn.k_proj.weight",
    "v": LAYER + "self_attn.v_proj.weight",
    "o": LAYER + "self_attn.o_proj.weight",
}

BIAS_NAMES = {
    "q_bias": LAYER + "self_attn.q_proj.bias",
    "k_bias": LAYER + "self_attn.k_proj.bias",
    "v_bias": LAYER + "self_attn.v_proj.bias",
    "o_bias": LAYER + "self_attn.o_proj.bias",
}

HEAD_NORM_NAMES = {
    "q_head_norm": LAYER + "self_attn.q_norm.weight",
    "k_head_norm": LAYER + "self_attn.k_norm.weight",
}

ROTARY_BUFFER = r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"
"""Old checkpoints hold it; it is computed."""


def swiglu_names(where: str, prefix: str = "") -> dict[str, str]:
    """Parts gate, up and down of the FFN under layers.{layer}.<where>. prefix: "shared_" or "expert_"."""
    return {f"{prefix}{part}": f"{LAYER}{where}.{part}_proj.weight" for part in ("gate", "up", "down")}


def fused_expert_names(where: str) -> dict[str, str]:
    """Experts as transformers 5 holds them: gate above up in one matrix for each expert. where: "mlp.experts"."""
    gate_up = f"{LAYER}{where}.gate_up_proj"
    return {"expert_gate": gate_up, "expert_up": gate_up, "expert_down": f"{LAYER}{where}.down_proj"}


FULL, SLIDING = "full_attention", "sliding_attention"


def full_attention_only(config: ConfigReader, num_layers: int) -> None:
    """Refuse layer types that a family without them does not have."""
    for layer, kind in enumerate(config.per_layer("layer_types", num_layers) or ()):
        if kind != FULL:
            raise config.fail("layer_types", f"layer {layer} is {shown(kind)} (known for this family: {FULL})")


def gqa_attention(
    config: ConfigReader,
    *,
    default_theta: float,
    default_context: int,
    default_kv_heads: int | None = None,
    default_head_dim: int | None = None,
    interleaved: bool = False,
    qk_norm: bool = False,
    qkv_bias: bool = False,
    o_bias: bool = False,
) -> AttentionSpec:
    """Grouped-query attention from the keys that most configurations share.

    The defaults stand for absent keys, as in transformers' class of the family. A key that is null, or absent without a
    default, is derived: as many K/V heads as query heads, their width from the hidden size.
    """
    num_heads = config.integer("num_attention_heads")
    derived_dim = max(config.integer("hidden_size") // num_heads, 1)
    head_dim = config.integer("head_dim", default=_unless_null(config, "head_dim", default_head_dim, derived_dim))
    kv_heads = _unless_null(config, "num_key_value_heads", default_kv_heads, num_heads)
    theta, scaling = read_rope(config, default_theta, max_position(config, default_context))
    attention = AttentionSpec(
        kind=AttentionKind.GQA,
        num_heads=num_heads,
        num_kv_heads=config.integer("num_key_value_heads", default=kv_heads),
        head_dim=head_dim,
        v_head_dim=head_dim,
        rope=RopeSpec(theta, rotary_dim=head_dim, interleaved=interleaved, scaling=scaling),
        qk_norm=qk_norm,
        qkv_bias=qkv_bias,
        o_bias=o_bias,
    )
    check_attention(config, attention, "num_key_value_heads")
    return attention


def _unless_null(config: ConfigReader, key: str, default: int | None, derived: int) -> int:
    """What stands for an absent key (default, if there is one) or for null."""
    return derived if default is None or key in config.values else default


def check_attention(config: ConfigReader, attention: AttentionSpec, kv_heads_key: str) -> None:
    if attention.num_heads % attention.num_kv_heads:
        raise config.fail(kv_heads_key, f"{attention.num_kv_heads} does not divide {attention.num_heads} query heads")
    rotary_dim = attention.rope.rotary_dim
    if rotary_dim % 2 or not 0 < rotary_dim <= attention.head_dim:
        raise config.fail("head_dim", f"{rotary_dim} of {attention.head_dim} dimensions cannot rotate in pairs")


def check_top_k(config: ConfigReader, ffn: FfnSpec, top_k_key: str, experts_key: str) -> None:
    if ffn.top_k > ffn.num_experts:
        raise config.fail(top_k_key, f"{ffn.top_k} is more than {experts_key}, {ffn.num_experts}")


_CONTEXT_KEYS = ("max_position_embeddings", "max_position_embedding", "max_seq_len")


def max_position(config: ConfigReader, default: int | None) -> int:
    """The context that the configuration names: the first of its keys that is set."""
    named = [key for key in _CONTEXT_KEYS if config.has(key)]
    return config.integer(named[0] if named else _CONTEXT_KEYS[0], default=default)


def model_spec(
    config: ConfigReader,
    name: str,
    family: str,
    layers: tuple[LayerSpec, ...],
    *,
    default_eps: float,
    default_context: int | None,
    default_tie: bool = False,
    zero_centred_norms: bool = False,
) -> ModelSpec:
    """The whole model, from its layers and the keys that all configurations share."""
    context = max_position(config, default_context)
    stretched = [c for layer in layers if (c := yarn_context(layer.attention.rope.scaling)) is not None]
    if stretched and not 1 <= stretched[0] <= MAX_SIZE:
        raise config.fail("rope_scaling", f"a context of {stretched[0]:g} tokens is not believed")
    return ModelSpec(
        name=name,
        family=family,
        hidden=config.integer("hidden_size"),
        vocab_size=config.integer("vocab_size"),
        layers=layers,
        rms_eps=config.positive("rms_norm_eps", default_eps),
        tie_embeddings=config.flag("tie_word_embeddings", default_tie),
        max_context=int(stretched[0]) if stretched else context,
        bos_token_id=config.token_id("bos_token_id"),
        eos_token_ids=config.token_ids("eos_token_id"),
        torch_dtype=config.dtype(),
        zero_centred_norms=zero_centred_norms,
    )

"""Tensor names and spec parts that families share: each names only what it does differently."""

from __future__ import annotations

from afd.model.families.config_reader import ConfigReader
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


def gqa_attention(
    config: ConfigReader,
    *,
    default_theta: float,
    interleaved: bool = False,
    qk_norm: bool = False,
    qkv_bias: bool = False,
    o_bias: bool = False,
) -> AttentionSpec:
    """Grouped-query attention from the keys that most configurations share."""
    num_heads = config.integer("num_attention_heads")
    head_dim = config.integer("head_dim", default=max(config.integer("hidden_size") // num_heads, 1))
    theta, scaling = config.rope(default_theta)
    attention = AttentionSpec(
        kind=AttentionKind.GQA,
        num_heads=num_heads,
        num_kv_heads=config.integer("num_key_value_heads", default=num_heads),
        head_dim=head_dim,
        v_head_dim=head_dim,
        rope=RopeSpec(theta, rotary_dim=head_dim, interleaved=interleaved, scaling=scaling),
        qk_norm=qk_norm,
        qkv_bias=qkv_bias,
        o_bias=o_bias,
    )
    check_heads(config, attention, "num_key_value_heads")
    return attention


def check_heads(config: ConfigReader, attention: AttentionSpec, key: str) -> None:
    if attention.num_heads % attention.num_kv_heads:
        raise config.fail(key, f"{attention.num_kv_heads} does not divide {attention.num_heads} query heads")


def check_top_k(config: ConfigReader, ffn: FfnSpec, top_k_key: str, experts_key: str) -> None:
    if ffn.top_k > ffn.num_experts:
        raise config.fail(top_k_key, f"{ffn.top_k} is more than {experts_key}, {ffn.num_experts}")


def model_spec(
    config: ConfigReader,
    name: str,
    family: str,
    layers: tuple[LayerSpec, ...],
    *,
    default_eps: float,
    default_context: int | None = None,
    default_tie: bool = False,
    zero_centred_norms: bool = False,
) -> ModelSpec:
    """The whole model, from its layers and the keys that all configurations share."""
    return ModelSpec(
        name=name,
        family=family,
        hidden=config.integer("hidden_size"),
        vocab_size=config.integer("vocab_size"),
        layers=layers,
        rms_eps=config.number("rms_norm_eps", default_eps),
        tie_embeddings=config.flag("tie_word_embeddings", default_tie),
        max_context=config.integer(
            "max_position_embeddings", "max_position_embedding", "max_seq_len", default=default_context
        ),
        bos_token_id=config.token_id("bos_token_id"),
        eos_token_ids=config.token_ids("eos_token_id"),
        torch_dtype=config.dtype(),
        zero_centred_norms=zero_centred_norms,
    )

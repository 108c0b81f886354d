"""Llama and what shares its layout (SmolLM2): GQA, dense SwiGLU. Hugging Face folders and GGUF files."""

from __future__ import annotations

import math
from collections.abc import Sequence

from afd.model.families.config_reader import ConfigReader, shown
from afd.model.families.family import Family, Naming
from afd.model.families.layout import (
    BIAS_NAMES,
    GQA_NAMES,
    ROTARY_BUFFER,
    TRUNK_NAMES,
    check_attention,
    full_attention_only,
    gqa_attention,
    model_spec,
    swiglu_names,
)
from afd.model.spec import AttentionKind, AttentionSpec, FfnKind, FfnSpec, LayerSpec, ModelSpec, RopeScaling, RopeSpec

HF_NAMES = {**TRUNK_NAMES, **GQA_NAMES, **BIAS_NAMES, **swiglu_names("mlp")}

GGUF_NAMES = {
    "embed": "token_embd.weight",
    "attn_norm": "blk.{layer}.attn_norm.weight",
    "q": "blk.{layer}.attn_q.weight",
    "k": "blk.{layer}.attn_k.weight",
    "v": "blk.{layer}.attn_v.weight",
    "o": "blk.{layer}.attn_output.weight",
    "ffn_norm": "blk.{layer}.ffn_norm.weight",
    "gate": "blk.{layer}.ffn_gate.weight",
    "up": "blk.{layer}.ffn_up.weight",
    "down": "blk.{layer}.ffn_down.weight",
    "final_norm": "output_norm.weight",
    "head": "output.weight",
}


def parse(config: ConfigReader, name: str) -> ModelSpec:
    config.refuse("mlp_bias", unless=False)
    config.refuse("hidden_act", unless="silu")
    bias = config.flag("attention_bias")
    num_layers = config.layers()
    full_attention_only(config, num_layers)
    attention = gqa_attention(config, default_theta=1e4, default_context=2048, qkv_bias=bias, o_bias=bias)
    layer = LayerSpec(attention, FfnSpec(FfnKind.DENSE, config.integer("intermediate_size")))
    return model_spec(config, name, "llama", (layer,) * num_layers, default_eps=1e-6, default_context=2048)


def parse_gguf(metadata: ConfigReader, name: str) -> ModelSpec:
    """metadata: GGUF keys; "gguf.has_output" tells whether the file holds a head of its own, "gguf.rope_freqs" holds
    the numbers of its rope_freqs.weight, by which the frequencies are divided.
    """
    hidden = metadata.integer("llama.embedding_length")
    num_heads = metadata.integer("llama.attention.head_count")
    head_dim = metadata.integer("llama.attention.key_length", default=max(hidden // num_heads, 1))
    attention = AttentionSpec(
        kind=AttentionKind.GQA,
        num_heads=num_heads,
        num_kv_heads=metadata.integer("llama.attention.head_count_kv", default=num_heads),
        head_dim=head_dim,
        v_head_dim=metadata.integer("llama.attention.value_length", default=head_dim),
        rope=_gguf_rope(metadata, head_dim),
    )
    check_attention(metadata, attention, "llama.attention.head_count_kv")
    if attention.v_head_dim != head_dim:
        raise metadata.fail(
            "llama.attention.value_length", f"{attention.v_head_dim} differs from key_length, {head_dim}"
        )
    layer = LayerSpec(attention, FfnSpec(FfnKind.DENSE, metadata.integer("llama.feed_forward_length")))
    tokens = metadata.get("tokenizer.ggml.tokens")
    num_tokens = len(tokens) if isinstance(tokens, Sequence) and tokens else None
    return ModelSpec(
        name=name,
        family="llama",
        hidden=hidden,
        vocab_size=metadata.integer("llama.vocab_size", default=num_tokens),
        layers=(layer,) * metadata.layers("llama.block_count"),
        rms_eps=metadata.positive("llama.attention.layer_norm_rms_epsilon"),
        tie_embeddings=not metadata.flag("gguf.has_output"),
        max_context=metadata.integer("llama.context_length"),
        bos_token_id=metadata.token_id("tokenizer.ggml.bos_token_id"),
        eos_token_ids=metadata.token_ids("tokenizer.ggml.eos_token_id"),
    )


def _gguf_rope(metadata: ConfigReader, head_dim: int) -> RopeSpec:
    """llama.cpp's rules: without a type the scaling is linear; a factor of 0 is none; scale_linear is its old name."""
    kind = metadata.get("llama.rope.scaling.type") or "linear"
    if kind not in ("none", "linear"):
        raise metadata.fail("llama.rope.scaling.type", f"{shown(kind)} is not supported (known: none, linear)")
    old = metadata.number("llama.rope.scale_linear", 0.0)
    factor = metadata.number("llama.rope.scaling.factor", old)
    if factor < 0.0:
        raise metadata.fail("llama.rope.scaling.factor", f"expected a number from 0, found {factor}")
    rotary_dim = metadata.integer("llama.rope.dimension_count", default=head_dim)
    divisors = tuple(metadata.get("gguf.rope_freqs") or ())
    if divisors and (len(divisors) != rotary_dim // 2 or not all(0.0 < d < math.inf for d in divisors)):
        raise metadata.fail("rope_freqs.weight", f"expected {rotary_dim // 2} finite numbers above 0")
    return RopeSpec(
        metadata.positive("llama.rope.freq_base", 10000.0),
        rotary_dim=rotary_dim,
        scaling=RopeScaling("linear", factor) if kind == "linear" and factor not in (0.0, 1.0) else None,
        divisors=divisors,
    )


FAMILY = Family(
    name="llama",
    model_types=("llama",),
    architectures=("LlamaForCausalLM",),
    read=parse,
    naming=Naming(HF_NAMES, ignored=(ROTARY_BUFFER,)),
    read_gguf=parse_gguf,
    gguf_naming=Naming(GGUF_NAMES, ignored=(r"rope_freqs\.weight",), interleaved_rope_rows=True),
)

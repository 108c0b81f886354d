"""Llama and what shares its layout (SmolLM2): GQA, dense SwiGLU. Hugging Face folders and GGUF files."""

from __future__ import annotations

from afd.model.families.config_reader import ConfigReader
from afd.model.families.family import Family, Naming
from afd.model.families.layout import (
    BIAS_NAMES,
    GQA_NAMES,
    ROTARY_BUFFER,
    TRUNK_NAMES,
    check_heads,
    gqa_attention,
    model_spec,
    swiglu_names,
)
from afd.model.spec import AttentionKind, AttentionSpec, FfnKind, FfnSpec, LayerSpec, ModelSpec, RopeSpec

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
    attention = gqa_attention(config, default_theta=10000.0, qkv_bias=bias, o_bias=bias)
    layer = LayerSpec(attention, FfnSpec(FfnKind.DENSE, config.integer("intermediate_size")))
    layers = (layer,) * config.integer("num_hidden_layers")
    return model_spec(config, name, "llama", layers, default_eps=1e-6, default_context=2048)


def parse_gguf(metadata: ConfigReader, name: str) -> ModelSpec:
    """metadata: GGUF keys; "gguf.has_output" tells whether the file holds a head of its own."""
    hidden = metadata.integer("llama.embedding_length")
    num_heads = metadata.integer("llama.attention.head_count")
    head_dim = metadata.integer("llama.attention.key_length", default=max(hidden // num_heads, 1))
    metadata.refuse("llama.rope.scaling.type", unless="none")
    metadata.refuse("llama.expert_count", unless=0)
    attention = AttentionSpec(
        kind=AttentionKind.GQA,
        num_heads=num_heads,
        num_kv_heads=metadata.integer("llama.attention.head_count_kv", default=num_heads),
        head_dim=head_dim,
        v_head_dim=head_dim,
        rope=RopeSpec(
            metadata.number("llama.rope.freq_base", 10000.0),
            rotary_dim=metadata.integer("llama.rope.dimension_count", default=head_dim),
        ),
    )
    check_heads(metadata, attention, "llama.attention.head_count_kv")
    layer = LayerSpec(attention, FfnSpec(FfnKind.DENSE, metadata.integer("llama.feed_forward_length")))
    return ModelSpec(
        name=name,
        family="llama",
        hidden=hidden,
        vocab_size=metadata.integer(
            "llama.vocab_size", default=len(metadata.values.get("tokenizer.ggml.tokens") or ()) or None
        ),
        layers=(layer,) * metadata.integer("llama.block_count"),
        rms_eps=metadata.number("llama.attention.layer_norm_rms_epsilon"),
        tie_embeddings=not metadata.flag("gguf.has_output"),
        max_context=metadata.integer("llama.context_length"),
        bos_token_id=metadata.token_id("tokenizer.ggml.bos_token_id"),
        eos_token_ids=metadata.token_ids("tokenizer.ggml.eos_token_id"),
    )


FAMILY = Family(
    name="llama",
    model_types=("llama",),
    architectures=("LlamaForCausalLM",),
    parse=parse,
    naming=Naming(HF_NAMES, ignored=(ROTARY_BUFFER,)),
    gguf_parse=parse_gguf,
    gguf_naming=Naming(GGUF_NAMES, ignored=(r"rope_freqs\.weight",), interleaved_rope_rows=True),
)

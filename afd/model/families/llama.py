"""Llama and what shares its layout (SmolLM2): GQA, dense SwiGLU. Hugging Face folders and GGUF files."""

from __future__ import annotations

from afd.model.families.config_reader import ConfigReader
from afd.model.families.family import Family, Naming
from afd.model.spec import AttentionKind, AttentionSpec, FfnKind, FfnSpec, LayerSpec, ModelSpec, RopeSpec

HF_NAMES = {
    "embed": "model.embed_tokens.weight",
    "attn_norm": "model.layers.{layer}.input_layernorm.weight",
    "q": "model.layers.{layer}.self_attn.q_proj.weight",
    "k": "model.layers.{layer}.self_attn.k_proj.weight",
    "v": "model.layers.{layer}.self_attn.v_proj.weight",
    "o": "model.layers.{layer}.self_attn.o_proj.weight",
    "ffn_norm": "model.layers.{layer}.post_attention_layernorm.weight",
    "gate": "model.layers.{layer}.mlp.gate_proj.weight",
    "up": "model.layers.{layer}.mlp.up_proj.weight",
    "down": "model.layers.{layer}.mlp.down_proj.weight",
    "final_norm": "model.norm.weight",
    "head": "lm_head.weight",
}

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
    for key, neutral in (("attention_bias", False), ("mlp_bias", False), ("hidden_act", "silu")):
        config.refuse(key, unless=neutral)
    hidden = config.integer("hidden_size")
    num_heads = config.integer("num_attention_heads")
    head_dim = config.integer("head_dim", default=max(hidden // num_heads, 1))
    theta, scaling = config.rope(default_theta=10000.0)
    attention = AttentionSpec(
        kind=AttentionKind.GQA,
        num_heads=num_heads,
        num_kv_heads=config.integer("num_key_value_heads", default=num_heads),
        head_dim=head_dim,
        v_head_dim=head_dim,
        rope=RopeSpec(theta, rotary_dim=head_dim, scaling=scaling),
    )
    _check_heads(config, attention)
    layer = LayerSpec(attention, FfnSpec(FfnKind.DENSE, config.integer("intermediate_size")))
    return ModelSpec(
        name=name,
        family="llama",
        hidden=hidden,
        vocab_size=config.integer("vocab_size"),
        layers=(layer,) * config.integer("num_hidden_layers"),
        rms_eps=config.number("rms_norm_eps", 1e-6),
        tie_embeddings=config.flag("tie_word_embeddings"),
        max_context=config.integer("max_position_embeddings", default=2048),
        bos_token_id=config.token_id("bos_token_id"),
        eos_token_ids=config.token_ids("eos_token_id"),
        torch_dtype=config.dtype(),
    )


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
    _check_heads(metadata, attention)
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


def _check_heads(config: ConfigReader, attention: AttentionSpec) -> None:
    if attention.num_heads % attention.num_kv_heads:
        raise config.fail(
            "num_key_value_heads", f"{attention.num_kv_heads} does not divide {attention.num_heads} query heads"
        )


FAMILY = Family(
    name="llama",
    model_types=("llama",),
    architectures=("LlamaForCausalLM",),
    parse=parse,
    naming=Naming(HF_NAMES, ignored=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",)),
    gguf_parse=parse_gguf,
    gguf_naming=Naming(GGUF_NAMES, ignored=(r"rope_freqs\.weight",), interleaved_rope_rows=True),
)

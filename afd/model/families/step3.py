"""Step-3's text model: MFA attention; dense layers, and MoE layers with packed experts and a shared expert."""

from __future__ import annotations

from collections.abc import Mapping

from afd.model.families.config_reader import ConfigReader
from afd.model.families.family import Family, Naming
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
    "embed": "model.embed_tokens.weight",
    "attn_norm": "model.layers.{layer}.input_layernorm.weight",
    "q_down": "model.layers.{layer}.self_attn.q_proj.weight",
    "q_norm": "model.layers.{layer}.self_attn.inter_norm.weight",
    "q_up": "model.layers.{layer}.self_attn.wq.weight",
    "k": "model.layers.{layer}.self_attn.k_proj.weight",
    "v": "model.layers.{layer}.self_attn.v_proj.weight",
    "o": "model.layers.{layer}.self_attn.o_proj.weight",
    "ffn_norm": "model.layers.{layer}.post_attention_layernorm.weight",
    "gate": "model.layers.{layer}.mlp.gate_proj.weight",
    "up": "model.layers.{layer}.mlp.up_proj.weight",
    "down": "model.layers.{layer}.mlp.down_proj.weight",
    "router": "model.layers.{layer}.moe.gate.weight",
    "expert_gate": "model.layers.{layer}.moe.gate_proj.weight",
    "expert_up": "model.layers.{layer}.moe.up_proj.weight",
    "expert_down": "model.layers.{layer}.moe.down_proj.weight",
    "shared_gate": "model.layers.{layer}.share_expert.gate_proj.weight",
    "shared_up": "model.layers.{layer}.share_expert.up_proj.weight",
    "shared_down": "model.layers.{layer}.share_expert.down_proj.weight",
    "final_norm": "model.norm.weight",
    "head": "lm_head.weight",
}
VISION = (r"vision_model\..*", r"vit_downsampler2?\..*", r"vit_large_projector\..*")


def parse(config: ConfigReader, name: str) -> ModelSpec:
    """`step3_text`, or the text model inside `step3_vl` (its vision tower is left out: text only)."""
    if isinstance(config.values.get("text_config"), Mapping):
        config = ConfigReader({**config.values, **config.values["text_config"]}, f"{config.where}: text_config")
    num_layers = config.integer("num_hidden_layers")
    head_dim = config.integer("head_dim")
    theta, scaling = config.rope(default_theta=500000.0)
    attention = AttentionSpec(
        kind=AttentionKind.MFA,
        num_heads=config.integer("num_attention_heads"),
        num_kv_heads=config.integer("num_attention_groups", default=1),
        head_dim=head_dim,
        v_head_dim=head_dim,
        rope=RopeSpec(theta, rotary_dim=head_dim, scaling=scaling),
        q_rank=config.integer("share_q_dim"),
    )
    if attention.num_heads % attention.num_kv_heads:
        raise config.fail("num_attention_groups", f"does not divide {attention.num_heads} query heads")
    dense = FfnSpec(FfnKind.DENSE, config.integer("intermediate_size"))
    moe_layers = _moe_layers(config, num_layers)
    moe = _moe_ffn(config) if moe_layers else dense
    return ModelSpec(
        name=name,
        family="step3",
        hidden=config.integer("hidden_size"),
        vocab_size=config.integer("vocab_size"),
        layers=tuple(LayerSpec(attention, moe if i in moe_layers else dense) for i in range(num_layers)),
        rms_eps=config.number("rms_norm_eps", 1e-5),
        tie_embeddings=config.flag("tie_word_embeddings"),
        max_context=config.integer("max_position_embedding", "max_position_embeddings", "max_seq_len"),
        bos_token_id=config.token_id("bos_token_id"),
        eos_token_ids=config.token_ids("eos_token_id"),
        torch_dtype=config.dtype(),
    )


def _moe_ffn(config: ConfigReader) -> FfnSpec:
    ffn = FfnSpec(
        FfnKind.MOE,
        intermediate=config.integer("moe_intermediate_size"),
        num_experts=config.integer("moe_num_experts"),
        top_k=config.integer("moe_top_k"),
        shared_intermediate=config.integer("share_expert_dim"),
        router=RouterSpec(RouterRule.SOFTMAX, dtype="activation", renormalise=config.flag("norm_expert_weight")),
    )
    if ffn.top_k > ffn.num_experts:
        raise config.fail("moe_top_k", f"{ffn.top_k} is more than moe_num_experts, {ffn.num_experts}")
    return ffn


def _moe_layers(config: ConfigReader, num_layers: int) -> frozenset[int]:
    """moe_layers_enum: "4,5,6" in checkpoints, a list in class defaults; absent: every layer but the first."""
    key = "moe_layers_enum"
    value = config.values.get(key)
    if value is None:
        return frozenset(range(1, num_layers))
    items = [i for i in value.strip().split(",") if i.strip()] if isinstance(value, str) else value
    try:
        layers = frozenset(int(item) for item in items)
    except (TypeError, ValueError):
        raise config.fail(key, f"expected layer numbers, found {value!r}") from None
    for layer in sorted(layers):
        if not 0 <= layer < num_layers:
            raise config.fail(key, f"names layer {layer}, but the model has layers 0 to {num_layers - 1}")
    return layers


FAMILY = Family(
    name="step3",
    model_types=("step3_text", "step3_vl"),
    architectures=("Step3TextForCausalLM", "Step3VLForConditionalGeneration"),
    parse=parse,
    naming=Naming(NAMES, ignored=VISION),
)

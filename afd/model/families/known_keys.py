"""Keys of config.json and of GGUF metadata that no family reads: which do not matter, and which must be off.

Everything else is refused by name (ConfigReader.refuse_rest). One place for all families, so that a key is judged once.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from afd.model.families.config_reader import ConfigReader

_IMMATERIAL = (
    # what the file is about, and who wrote it
    r"_.*|model_type|architectures|auto_map|transformers_version|.*_version|name_or_path|torch_dtype|dtype|finetuning_task",
    r"task_specific_params|custom_pipelines|language|license|tags|unsloth_.*|transformers\.js_config",
    # the tokenizer's and the chat's
    r".*_tokens?|.*_token_ids?|tokenizer_.*|prefix|ignore_index",
    # training
    r".*dropout.*|initializer_range|init_std|.*_loss_coef|.*_loss_alpha|seq_aux|router_jitter_noise|gradient_checkpointing",
    r"pretraining_tp|label_smoothing|moe_use_aux_free|moe_capacity|max_sequence_length|recompute.*|output_router_logits",
    # other programs' ways of computing the same
    r"use_cache|chunk_size_feed_forward|attn_implementation|experts_implementation|use_flash.*|fuse_.*|tensor_parallel.*",
    r"sequence_parallel|ep_size|torchscript|use_bfloat16|tf_legacy_loss|att_impl_type|is_decoder",
    # shape of transformers' answers; heads that are not for text
    r"return_dict|output_hidden_states|output_attentions|tie_last_hidden_states|id2label|label2id|num_labels|problem_type",
    # sampling: generation_config.json's, which transformers takes out of config.json
    r"max_length|min_length|max_new_tokens|do_sample|early_stopping|num_beams|num_beam_groups|diversity_penalty|temperature",
    r"top_k|top_p|min_p|typical_p|repetition_penalty|encoder_repetition_penalty|length_penalty|no_repeat_ngram_size",
    r"encoder_no_repeat_ngram_size|bad_words_ids|num_return_sequences|output_scores|return_dict_in_generate",
    r"remove_invalid_values|exponential_decay_length_penalty|epsilon_cutoff|eta_cutoff|num_assistant_tokens.*",
    r"assistant_.*|target_lookbehind",
    # multi-token prediction, which is left out
    r"num_nextn_predict_layers|num_mtp_layers|mtp_.*|enable_mtp",
    # read by the loader itself
    r"quantization|quantization_config|compression_config",
)  # fmt: skip
_IMMATERIAL_PATTERN = re.compile("|".join(_IMMATERIAL))

_OFF: Mapping[str, Any] = {
    "add_cross_attention": False,
    "alibi": False,
    "attention_bias": False,
    "compression_ratio": 1.0,
    "embedding_multiplier": 1.0,
    "is_causal": True,
    "is_encoder_decoder": False,
    "logit_scale": 1.0,
    "mlp_bias": False,
    "partial_rotary_factor": 1.0,
    "per_layer_config": {},
    "pruned_heads": {},
    "qkv_bias": False,
    "residual_multiplier": 1.0,
    "rotary_pct": 1.0,
    "tie_encoder_decoder": False,
    "use_bias": False,
    "use_bidirectional_attention": False,
    "use_qk_norm": False,
    "use_sliding_window": False,
}
"""Settings of transformers that a family without them has switched off: any other value is refused."""

_OF_FAMILY: Mapping[str, Collection[str]] = {
    "qwen2": ("max_window_layers",),
    "qwen3": ("max_window_layers",),
    "qwen3_moe": ("max_window_layers",),
    "deepseek_v3": ("head_dim", "qk_head_dim"),  # transformers computes both from the parts
    "step3p5": ("moe_every_n_layer", "moe_layer_offset"),  # moe_layers_enum says it
}


def refuse_unknown(config: ConfigReader, family: str) -> None:
    """ModelError for the first key of config.json that is set, was not read and might change the numbers."""
    for key, off in _OFF.items():
        if key in config.values and key not in config.asked:
            config.refuse(key, unless=off)
    known = {key for key in config.values if _IMMATERIAL_PATTERN.fullmatch(key)}
    config.refuse_rest(known | set(_OF_FAMILY.get(family, ())), f"family {family}")


_GGUF_IMMATERIAL = ("rope.scaling.finetuned", "rope.scaling.original_context_length", "vocab_size", "context_length")
_GGUF_OFF: Mapping[str, Any] = {
    "attention.causal": True,
    "attention.sliding_window": 0,
    "expert_count": 0,
    "expert_used_count": 0,
    "logit_scale": 1.0,
    "nextn_predict_layers": 0,
    "tensor_data_layout": "Meta AI original pth",
    "use_parallel_residual": False,
}


def refuse_unknown_gguf(metadata: ConfigReader, architecture: str) -> None:
    """The same for GGUF: of the keys of the architecture. general.* and tokenizer.* have no part in the numbers."""
    metadata.refuse("general.type", unless="model")
    for key, off in _GGUF_OFF.items():
        if f"{architecture}.{key}" in metadata.values:
            metadata.refuse(f"{architecture}.{key}", unless=off)
    known = {key for key in metadata.values if not key.startswith(f"{architecture}.")}
    metadata.refuse_rest(known | {f"{architecture}.{key}" for key in _GGUF_IMMATERIAL}, f"family {architecture}")

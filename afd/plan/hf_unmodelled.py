"""Keys of a Hugging Face config.json that change what a token costs in a way that the planner does not model.

A config that sets one of them is refused by the key's name rather than priced as if it were not there. Values that
switch a feature off (null, false, 0, empty) do not count.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from afd.errors import ConfigError

_PATTERNS = {
    "a sparse attention that picks keys with an indexer": r"index_.*|indexer_.*|(nsa|moba|dsa|msa)_.*"
    r"|sparse_(attention|attn|block|topk|window|init|local)\w*|\w+_sparse_attention\w*|use_sparse_attention",
    "a compressed cache": r"compress_(ratio|rate)s?|kv_compress\w*|compression_(ratio|rate)s?",
    "linear or recurrent layers": r"full_attention_interval|(mamba|ssm|rwkv|recurrent)_.*|mamba\w+|lru_width"
    r"|linear_(num|key|value|conv|attn)_.*|conv_L_cache|conv_bias|layer_group_size|short_conv\w*|use_mamba\w*",
    "layers of different kinds by a rule": r"attn_layer_(period|offset|indices)"
    r"|hybrid_(override|layer|attention|block)\w*|layers_block_type|block_types?|block_configs|full_attn_idxs|cross_attention_layers",
    "a rule for mixture layers": r"expert_layer_(period|offset)",
    "caches that layers share": r"num_kv_shared_layers|kv_shar\w+|cla_share_factor|use_cla|cross_layer_\w+"
    r"|attention_k_eq_v",
    "sliding layers with heads of their own": r"swa_(num|head|v_head)_?\w*|(num_)?global_(head_dim|key_value_heads)",
    "more residual streams": r"hc_.*|mhc_.*|hyper_connection\w*|num_residual_streams|altup_.*|laurel_.*",
    "experts that compute nothing": r"zero_expert\w*|num_(zero|null)_experts",
    "tables and layers beside the decoder's": r"(ngram|n_gram|engram)_\w+|hidden_size_per_layer_input|moe_latent_size",
    "a gate on attention's output": r"attn_output_gate|attention_output_gate",
    "a dense FFN beside the experts": r"use_residual|parallel_attn_mlp_res|moe_residual\w*",
    "an encoder": r"is_encoder_decoder|add_cross_attention",
}
_STRIDES = "moe_every_n_layers?|expert_interval|moe_frequency|moe_layer_frequency"

_KNOWN = [(re.compile(pattern), what) for what, pattern in _PATTERNS.items()]


def refuse_unmodelled(config: Mapping[str, Any], where: str, model_type: str) -> None:
    """ConfigError that names the first key whose meaning would change the price."""
    for key, value in config.items():
        if value in (None, False, 0, "", [], {}):
            continue
        if re.fullmatch(_STRIDES, key) and value != 1:
            raise _refusal(where, model_type, key, value, "a rule for mixture layers")
        for pattern, what in _KNOWN:
            if pattern.fullmatch(key):
                raise _refusal(where, model_type, key, value, what)
    v_head_dim, head_dim = config.get("v_head_dim"), config.get("head_dim")
    if not config.get("kv_lora_rank") and v_head_dim and v_head_dim != (head_dim or v_head_dim):
        raise _refusal(where, model_type, "v_head_dim", v_head_dim, "values of another width than keys")


def _refusal(where: str, model_type: str, key: str, value: object, what: str) -> ConfigError:
    shown = repr(value) if len(repr(value)) <= 40 else "..."
    return ConfigError(
        f"{where}: {key} = {shown} means {what}, which the planner does not model for {model_type!r}: "
        "describe the model's layers in a --model-file instead"
    )

"""Hugging Face config.json -> ModelShape. Reads what decides bytes and FLOPs; ignores the rest.

Families differ in key names more than in shapes, so each fact has one ordered list of the keys it goes by. What is not
modelled is refused by the key's or the layer kind's name rather than priced wrongly (`hf_unmodelled`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import msgspec

from afd.errors import ConfigError
from afd.plan.attention import AnyAttention, Gqa, Lightning, Mfa, Mla
from afd.plan.hf_ffn import ffn_groups
from afd.plan.hf_keys import Keys
from afd.plan.hf_unmodelled import refuse_unmodelled
from afd.plan.hf_weights import weight_bytes_of
from afd.plan.models import DraftLayer, FfnGroup, ModelShape

_FULL = {"full_attention", "full", "attention", 1, "1"}
_WINDOWED = {"sliding_attention", "sliding_window", "local_attention", "local"}
_CHUNKED = {"chunked_attention"}
_KV_HEADS = ("num_key_value_heads", "num_attention_groups", "multi_query_group_num", "num_kv_heads", "n_head_kv")
_LIGHTNING = {"linear_attention", "lightning", 0, "0"}


def shape_from_hf_config(config: Mapping[str, Any], name: str, where: str) -> ModelShape:
    """The decoder of a config (its text_config when nested); ConfigError naming `where` and the key at fault."""
    text = config.get("text_config") or config.get("llm_config")
    merged = {**config, **text} if isinstance(text, Mapping) else config
    keys = Keys(merged, where)
    model_type = str(keys.value("model_type") or "unknown")
    refuse_unmodelled(merged, where, model_type)
    layers = keys.integer("num_hidden_layers", "n_layer", "num_layers")
    hidden = keys.integer("hidden_size", "n_embd", "d_model")
    try:
        return ModelShape(
            name=name,
            title=name,
            hidden=hidden,
            vocab=keys.integer("vocab_size", "padded_vocab_size"),
            max_context=keys.integer(
                "max_position_embeddings", "max_position_embedding", "max_seq_len", "n_positions", "seq_length"
            ),
            attention=_attention_groups(keys, model_type, layers, hidden),
            ffn=_merged(ffn_groups(keys, model_type, layers)),
            tied=bool(keys.value("tie_word_embeddings")),
            weights=weight_bytes_of(merged, where),
            draft=_draft(keys, model_type, layers, hidden),
            source=where,
        )
    except (ValueError, msgspec.ValidationError) as error:
        raise ConfigError(f"{where}: {error}") from None


def _attention_groups(keys: Keys, model_type: str, layers: int, hidden: int) -> tuple[AnyAttention, ...]:
    kinds = Counter(_layer_kinds(keys, model_type, layers))
    groups: list[AnyAttention] = []
    for kind, count in kinds.items():
        if kind in _LIGHTNING and _is_minimax(model_type):
            groups.append(Lightning(layers=count, heads=_heads(keys), head_dim=_head_dim(keys, hidden)))
        elif kind in _FULL:
            groups.append(_cached_attention(keys, model_type, count, hidden, window=0))
        elif kind in _WINDOWED:
            window = keys.integer("sliding_window", "window_size")
            groups.append(_cached_attention(keys, model_type, count, hidden, window, sliding=True))
        elif kind in _CHUNKED:
            window = keys.integer("attention_chunk_size")
            groups.append(_cached_attention(keys, model_type, count, hidden, window))
        else:
            raise ConfigError(f"{keys.where}: attention kind {kind!r} of {model_type!r} is not modelled by the planner")
    return tuple(groups)


def _draft(keys: Keys, model_type: str, layers: int, hidden: int) -> DraftLayer | None:
    """MTP layers: one of the kind that a list names behind the decoder's, else the decoder's last full one.

    Step-3.5's are dense (and have heads of their own), DeepSeek's are mixtures like its last layer.
    """
    count = keys.integer("num_nextn_predict_layers", "num_mtp_layers", "num_mtp_modules", default=0)
    if not count:
        return None
    listed = keys.value("layer_types")
    windowed = isinstance(listed, list) and len(listed) > layers and listed[layers] in _WINDOWED
    window = keys.integer("sliding_window", "window_size") if windowed else 0
    own = model_type.startswith(("step3p", "step4", "step5"))
    dense = FfnGroup(layers=1, intermediate=keys.integer("intermediate_size")) if own else None
    return DraftLayer(
        count=count,
        attention=_cached_attention(keys, model_type, 1, hidden, window, sliding=windowed),
        ffn=dense or ffn_groups(keys, model_type, layers)[-1],
        own_head=own,
    )


def _layer_kinds(keys: Keys, model_type: str, layers: int) -> list[Any]:
    """One kind per layer, from the list the config carries or from the rule its family uses."""
    listed = keys.value("layer_types", "attn_type_list")
    if listed is not None:
        if not isinstance(listed, list) or len(listed) < layers:
            raise ConfigError(f"{keys.where}: layer_types must list {layers} layers")
        return listed[:layers]  # entries beyond are MTP heads
    if "sliding_window_pattern" in keys and "sliding_window" in keys:
        letters = keys.value("sliding_window_pattern")  # "LLLG": local and global
        if isinstance(letters, str) and letters and not set(letters) - {"L", "G"}:
            kinds = {"L": "sliding_attention", "G": "full_attention"}
            return [kinds[letters[i % len(letters)]] for i in range(layers)]
        pattern = max(1, keys.integer("sliding_window_pattern"))
        return ["full_attention" if (i + 1) % pattern == 0 else "sliding_attention" for i in range(layers)]
    if model_type.startswith("gemma2"):
        return ["full_attention" if i % 2 else "sliding_attention" for i in range(layers)]
    if "max_window_layers" in keys and keys.value("use_sliding_window"):
        full = keys.integer("max_window_layers")
        return ["full_attention" if i < full else "sliding_attention" for i in range(layers)]
    if model_type.startswith("llama4") and "attention_chunk_size" in keys:
        step = max(1, keys.integer("no_rope_layer_interval", default=4))
        return ["full_attention" if (i + 1) % step == 0 else "chunked_attention" for i in range(layers)]
    if keys.value("sliding_window") and keys.value("use_sliding_window") is not False:
        return ["sliding_attention"] * layers
    return ["full_attention"] * layers


def _cached_attention(
    keys: Keys, model_type: str, count: int, hidden: int, window: int, sliding: bool = False
) -> AnyAttention:
    heads, head_dim = _heads(keys), _head_dim(keys, hidden)
    kv_heads = keys.integer(*_KV_HEADS, default=1 if keys.value("multi_query") else heads)
    if "kv_lora_rank" in keys:
        return Mla(
            layers=count,
            heads=heads,
            head_dim=keys.integer("qk_nope_head_dim"),
            rope_dim=keys.integer("qk_rope_head_dim"),
            v_head_dim=keys.integer("v_head_dim"),
            kv_rank=keys.integer("kv_lora_rank"),
            q_rank=keys.integer("q_lora_rank", default=0),
            window=window,
        )
    if "share_q_dim" in keys:
        q_rank = keys.integer("share_q_dim")
        return Mfa(layers=count, heads=heads, head_dim=head_dim, kv_heads=kv_heads, q_rank=q_rank, window=window)
    other = keys.value("attention_other_setting") if sliding else None  # Step-3.5: sliding layers have their own heads
    if isinstance(other, Mapping):
        own = Keys(other, f"{keys.where}: attention_other_setting")
        heads = own.integer("num_attention_heads", default=heads)
        kv_heads = own.integer("num_attention_groups", "num_key_value_heads", default=kv_heads)
        head_dim = own.integer("head_dim", default=head_dim)
    gate = bool(keys.value("use_head_wise_attn_gate"))
    return Gqa(layers=count, heads=heads, head_dim=head_dim, kv_heads=kv_heads, head_gate=gate, window=window)


def _heads(keys: Keys) -> int:
    heads = keys.integer("num_attention_heads", "n_head")
    if heads == 0:
        raise ConfigError(f"{keys.where}: num_attention_heads must be positive")
    return heads


def _head_dim(keys: Keys, hidden: int) -> int:
    return keys.integer("head_dim", "kv_channels", "attention_head_dim", default=hidden // _heads(keys))


def _is_minimax(model_type: str) -> bool:
    return model_type.startswith("minimax")


def _merged(groups: list[FfnGroup]) -> tuple[FfnGroup, ...]:
    """Equal layers counted together, in order of first appearance."""
    counts = Counter(groups)
    return tuple(msgspec.structs.replace(group, layers=count) for group, count in counts.items())

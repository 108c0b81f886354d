"""Named shapes for `dummy:<preset>`: each is a config.json as its family publishes it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def _step3(hidden: int, heads: int, head_dim: int, q_rank: int, layers: int, dense: int, experts: int,
           expert_width: int, moe_layers: str, vocab: int, context: int) -> Mapping[str, Any]:  # fmt: skip
    return {
        "model_type": "step3_text",
        "hidden_size": hidden,
        "intermediate_size": dense,
        "num_attention_heads": heads,
        "num_attention_groups": 1,
        "num_hidden_layers": layers,
        "head_dim": head_dim,
        "share_q_dim": q_rank,
        "moe_intermediate_size": expert_width,
        "moe_num_experts": experts,
        "moe_top_k": 3,
        "share_expert_dim": expert_width,
        "moe_layers_enum": moe_layers,
        "norm_expert_weight": False,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "vocab_size": vocab,
        "max_position_embedding": context,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }


def _llama(hidden: int, heads: int, kv_heads: int, layers: int, dense: int, vocab: int) -> Mapping[str, Any]:
    return {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": dense,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "num_hidden_layers": layers,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100000.0,
        "vocab_size": vocab,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def _layer_list(start: int, stop: int) -> str:
    return ",".join(str(layer) for layer in range(start, stop))


PRESETS: Mapping[str, Mapping[str, Any]] = {
    "llama-tiny": _llama(hidden=64, heads=4, kv_heads=2, layers=3, dense=160, vocab=256),
    "smollm2-135m": _llama(hidden=576, heads=9, kv_heads=3, layers=30, dense=1536, vocab=49152),
    "step3-tiny": _step3(
        hidden=128, heads=4, head_dim=32, q_rank=64, layers=5, dense=256, experts=8, expert_width=64,
        moe_layers="1,2,3", vocab=512, context=2048,
    ),
    # About 0.5 B parameters in the proportions of Step-3: for benches on a CPU.
    "step3-mini": _step3(
        hidden=1024, heads=16, head_dim=64, q_rank=256, layers=8, dense=2560, experts=24, expert_width=896,
        moe_layers=_layer_list(1, 7), vocab=16384, context=8192,
    ),
    "step3": _step3(
        hidden=7168, heads=64, head_dim=256, q_rank=2048, layers=61, dense=18432, experts=48,
        expert_width=5120, moe_layers=_layer_list(4, 60), vocab=128815, context=65536,
    ),
}  # fmt: skip

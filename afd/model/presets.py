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


def _qwen3(hidden: int, heads: int, kv_heads: int, head_dim: int, layers: int, dense: int, vocab: int,
           context: int) -> Mapping[str, Any]:  # fmt: skip
    return {
        "model_type": "qwen3",
        "hidden_size": hidden,
        "intermediate_size": dense,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "num_hidden_layers": layers,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "vocab_size": vocab,
        "max_position_embeddings": context,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }


def _qwen3_moe(hidden: int, heads: int, kv_heads: int, head_dim: int, layers: int, experts: int, top_k: int,
               expert_width: int, vocab: int, context: int) -> Mapping[str, Any]:  # fmt: skip
    return {
        "model_type": "qwen3_moe",
        "hidden_size": hidden,
        "intermediate_size": 3 * hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "num_hidden_layers": layers,
        "moe_intermediate_size": expert_width,
        "num_experts": experts,
        "num_experts_per_tok": top_k,
        "norm_topk_prob": True,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "vocab_size": vocab,
        "max_position_embeddings": context,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }


def _deepseek_v3(hidden: int, heads: int, q_rank: int, kv_rank: int, rope_dim: int, head_dim: int, layers: int,
                 first_dense: int, dense: int, experts: int, top_k: int, groups: int, top_groups: int,
                 expert_width: int, vocab: int, context: int) -> Mapping[str, Any]:  # fmt: skip
    return {
        "model_type": "deepseek_v3",
        "hidden_size": hidden,
        "intermediate_size": dense,
        "num_attention_heads": heads,
        "q_lora_rank": q_rank,
        "kv_lora_rank": kv_rank,
        "qk_rope_head_dim": rope_dim,
        "qk_nope_head_dim": head_dim,
        "v_head_dim": head_dim,
        "num_hidden_layers": layers,
        "first_k_dense_replace": first_dense,
        "moe_intermediate_size": expert_width,
        "n_routed_experts": experts,
        "num_experts_per_tok": top_k,
        "n_shared_experts": 1,
        "n_group": groups,
        "topk_group": top_groups,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "rope_scaling": {
            "type": "yarn", "factor": 40.0, "original_max_position_embeddings": context // 40,
            "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0,
        },
        "vocab_size": vocab,
        "max_position_embeddings": context,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }  # fmt: skip


def _step3p5(hidden: int, heads: int, sliding_heads: int, kv_heads: int, head_dim: int, layers: int, first_moe: int,
             window: int, dense: int, experts: int, top_k: int, expert_width: int, vocab: int,
             context: int) -> Mapping[str, Any]:  # fmt: skip
    """Every fourth layer sees all, the others a window; SwiGLU is clamped in the last two layers."""
    sliding = [layer % 4 != 0 for layer in range(layers)]
    unclamped = [0.0] * (layers - 2)
    return {
        "model_type": "step3p5",
        "hidden_size": hidden,
        "intermediate_size": dense,
        "num_attention_heads": heads,
        "num_attention_groups": kv_heads,
        "head_dim": head_dim,
        "num_hidden_layers": layers,
        "layer_types": ["sliding_attention" if s else "full_attention" for s in sliding],
        "sliding_window": window,
        "attention_other_setting": {
            "attention_type": "sliding_attention", "num_attention_heads": sliding_heads,
            "num_attention_groups": kv_heads, "head_dim": head_dim,
        },
        "rope_theta": [1e4 if s else 5e6 for s in sliding],
        "partial_rotary_factors": [1.0 if s else 0.5 for s in sliding],
        "rope_scaling": {
            "rope_type": "llama3", "factor": 2.0, "original_max_position_embeddings": context // 2,
            "low_freq_factor": 1.0, "high_freq_factor": 32.0,
        },
        "yarn_only_types": ["full_attention"],
        "use_qk_norm": True,
        "use_head_wise_attn_gate": True,
        "zero_centered": True,
        "moe_layers_enum": _layer_list(first_moe, layers),
        "moe_num_experts": experts,
        "moe_top_k": top_k,
        "moe_intermediate_size": expert_width,
        "share_expert_dim": expert_width,
        "moe_router_activation": "sigmoid",
        "moe_router_scaling_factor": 3.0,
        "norm_expert_weight": True,
        "use_moe_router_bias": True,
        "need_fp32_gate": True,
        "swiglu_limits": [*unclamped, 7.0, 7.0],
        "swiglu_limits_shared": [*unclamped, 0.0, 16.0],
        "rms_norm_eps": 1e-5,
        "vocab_size": vocab,
        "max_position_embeddings": context,
        "bos_token_id": 0,
        "eos_token_id": [1, 2],
    }  # fmt: skip


def _ernie_4_5_moe(hidden: int, heads: int, kv_heads: int, head_dim: int, layers: int, dense: int, experts: int,
                   top_k: int, expert_width: int, shared: int, first_moe: int, vocab: int,
                   context: int) -> Mapping[str, Any]:  # fmt: skip
    return {
        "model_type": "ernie4_5_moe",
        "hidden_size": hidden,
        "intermediate_size": dense,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "num_hidden_layers": layers,
        "moe_intermediate_size": expert_width,
        "moe_num_experts": experts,
        "moe_k": top_k,
        "moe_num_shared_experts": shared,
        "moe_layer_start_index": first_moe,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
        "vocab_size": vocab,
        "max_position_embeddings": context,
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
    "step3.5-flash-tiny": _step3p5(
        hidden=64, heads=4, sliding_heads=6, kv_heads=2, head_dim=16, layers=6, first_moe=1, window=24, dense=112,
        experts=12, top_k=3, expert_width=32, vocab=512, context=2048,
    ),
    "step3.5-flash": _step3p5(
        hidden=4096, heads=64, sliding_heads=96, kv_heads=8, head_dim=128, layers=45, first_moe=3, window=512,
        dense=11264, experts=288, top_k=8, expert_width=1280, vocab=128896, context=262144,
    ),
    "deepseek-v3-tiny": _deepseek_v3(
        hidden=64, heads=4, q_rank=32, kv_rank=32, rope_dim=8, head_dim=16, layers=4, first_dense=1, dense=112,
        experts=16, top_k=4, groups=4, top_groups=2, expert_width=24, vocab=512, context=2560,
    ),
    "deepseek-v3": _deepseek_v3(
        hidden=7168, heads=128, q_rank=1536, kv_rank=512, rope_dim=64, head_dim=128, layers=61, first_dense=3,
        dense=18432, experts=256, top_k=8, groups=8, top_groups=4, expert_width=2048, vocab=129280, context=163840,
    ),
    "qwen3-tiny": _qwen3(hidden=64, heads=4, kv_heads=2, head_dim=16, layers=3, dense=112, vocab=512, context=2048),
    "qwen3-8b": _qwen3(
        hidden=4096, heads=32, kv_heads=8, head_dim=128, layers=36, dense=12288, vocab=151936, context=40960
    ),
    "qwen3-moe-tiny": _qwen3_moe(
        hidden=64, heads=4, kv_heads=2, head_dim=16, layers=3, experts=12, top_k=4, expert_width=32, vocab=512,
        context=2048,
    ),
    "qwen3-235b-a22b": _qwen3_moe(
        hidden=4096, heads=64, kv_heads=4, head_dim=128, layers=94, experts=128, top_k=8, expert_width=1536,
        vocab=151936, context=40960,
    ),
    "ernie-4.5-moe-tiny": _ernie_4_5_moe(
        hidden=64, heads=4, kv_heads=2, head_dim=16, layers=4, dense=112, experts=8, top_k=3, expert_width=32,
        shared=2, first_moe=1, vocab=512, context=2048,
    ),
    "ernie-4.5-300b-a47b": _ernie_4_5_moe(
        hidden=8192, heads=64, kv_heads=8, head_dim=128, layers=54, dense=28672, experts=64, top_k=8,
        expert_width=3584, shared=0, first_moe=3, vocab=103424, context=131072,
    ),
}  # fmt: skip

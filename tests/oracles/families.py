"""Tiny models of every family, built, saved and run by transformers: the oracle of AFD's specs, loaders and layers.

Every weight is random, norms and selection biases too, so that a part left out or swapped shows in the logits.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers as hf
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.models.step3p7.configuration_step3p7 import Step3p7TextConfig
from transformers.models.step3p7.modeling_step3p7 import Step3p7TextModel

Logits = Callable[[Tensor], Tensor]
"""token ids [1, n] -> logits [1, n, vocab]"""

VOCAB = 160
_DENSE = {"vocab_size": VOCAB, "hidden_size": 96, "intermediate_size": 112, "num_hidden_layers": 3,
          "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 512,
          "eos_token_id": 1, "bos_token_id": 0}  # fmt: skip
_LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
           "original_max_position_embeddings": 32}  # fmt: skip
_YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64,
         "beta_fast": 32, "beta_slow": 1}  # fmt: skip
_DEEPSEEK = {**_DENSE, "num_attention_heads": 4, "num_key_value_heads": 4, "first_k_dense_replace": 1,
             "moe_intermediate_size": 24, "n_routed_experts": 16, "num_experts_per_tok": 4, "n_group": 4,
             "topk_group": 2, "kv_lora_rank": 40, "qk_rope_head_dim": 16, "qk_nope_head_dim": 24,
             "v_head_dim": 20}  # fmt: skip


def _qwen3_moe() -> nn.Module:
    config = hf.Qwen3MoeConfig(**_DENSE, head_dim=16, moe_intermediate_size=24, num_experts=8, num_experts_per_tok=3,
                               norm_topk_prob=True, mlp_only_layers=[0])  # fmt: skip
    return hf.Qwen3MoeForCausalLM(config)


def _ernie() -> nn.Module:
    config = hf.Ernie4_5_MoeConfig(**_DENSE, head_dim=16, moe_intermediate_size=24, moe_num_experts=8, moe_k=3,
                                   moe_num_shared_experts=2, moe_layer_start_index=1)  # fmt: skip
    return hf.Ernie4_5_MoeForCausalLM(config)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_DENSE, head_dim=16, rope_parameters=_LLAMA3)),
    "llama-bias": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_DENSE, head_dim=16, attention_bias=True)),
    "qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**_DENSE, tie_word_embeddings=True)),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**_DENSE, head_dim=16, rope_parameters=_YARN)),
    "qwen3-moe": _qwen3_moe,
    "deepseek-v3": lambda: hf.DeepseekV3ForCausalLM(
        hf.DeepseekV3Config(
            **_DEEPSEEK, q_lora_rank=32, rope_parameters={**_YARN, "mscale": 1.0, "mscale_all_dim": 0.7}
        )
    ),
    "deepseek-v3-plain-query": lambda: hf.DeepseekV3ForCausalLM(
        hf.DeepseekV3Config(**_DEEPSEEK, q_lora_rank=None, rope_interleave=False, n_shared_experts=2)
    ),
    "ernie-4.5-moe": _ernie,
}

STEP3P5_CONFIG: dict[str, Any] = {
    "model_type": "step3p5", "architectures": ["Step3p5ForCausalLM"], "vocab_size": VOCAB, "hidden_size": 64,
    "intermediate_size": 112, "num_hidden_layers": 5, "num_nextn_predict_layers": 1, "num_attention_heads": 4,
    "num_attention_groups": 2, "head_dim": 16, "max_position_embeddings": 512, "rms_norm_eps": 1e-5,
    "layer_types": ["full_attention", *["sliding_attention"] * 3, "full_attention", "sliding_attention"],
    "sliding_window": 8, "attention_other_setting": {"attention_type": "sliding_attention", "num_attention_heads": 6},
    "rope_theta": [5e6, 1e4, 1e4, 1e4, 5e6, 1e4], "partial_rotary_factors": [0.5, 1.0, 1.0, 1.0, 0.5, 1.0],
    "rope_scaling": {"rope_type": "llama3", "factor": 2.0, "original_max_position_embeddings": 64,
                     "low_freq_factor": 1.0, "high_freq_factor": 32.0},
    "yarn_only_types": ["full_attention"], "use_qk_norm": True, "use_head_wise_attn_gate": True,
    "zero_centered": True, "moe_layers_enum": "1,2,3,4", "moe_num_experts": 8, "moe_top_k": 3,
    "moe_intermediate_size": 24, "share_expert_dim": 32, "moe_router_activation": "sigmoid",
    "moe_router_scaling_factor": 3.0, "norm_expert_weight": True, "use_moe_router_bias": True, "need_fp32_gate": True,
    "swiglu_limits": [0.0, 0.0, 0.0, 0.3, 0.3, 0.0], "swiglu_limits_shared": [0.2, 0.0, 0.0, 0.0, 0.5, 0.0],
    "bos_token_id": 0, "eos_token_id": [1, 2], "tie_word_embeddings": False,
}  # fmt: skip
"""As the public checkpoints publish it, with the entries of one multi-token prediction layer at the lists' ends."""


def save_model(name: str, folder: Path) -> Logits:
    """Write the model as a Hugging Face folder, in float32; returns the oracle."""
    torch.manual_seed(11)
    if name == "step3p5":
        return save_step3p5(folder, STEP3P5_CONFIG)
    model = MODELS[name]().eval()
    randomise(model)
    model.save_pretrained(folder)
    return lambda ids: model(ids).logits


@torch.no_grad()
def randomise(model: nn.Module, zero_centred: bool = False) -> None:
    """Weights that keep activations at scale 1; norms around 1, biases and selection biases around 0."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if "inv_freq" in name:
            continue
        if "norm" in name:
            tensor.uniform_(-0.5, 0.5) if zero_centred else tensor.uniform_(0.5, 1.5)
        elif "e_score_correction_bias" in name:
            tensor.uniform_(-0.1, 0.1)
        elif tensor.dim() > 1:
            tensor.normal_(0, tensor.shape[-1] ** -0.5)
        else:
            tensor.normal_(0, 0.3)


def save_step3p5(folder: Path, settings: dict[str, Any]) -> Logits:
    """transformers has the text model without a head of its own; the names are the public checkpoint's."""
    config = Step3p7TextConfig.from_dict(copy.deepcopy(settings))
    model = Step3p7TextModel(config).eval()
    randomise(model, zero_centred=True)
    head = torch.randn(config.vocab_size, config.hidden_size) * config.hidden_size**-0.5
    tensors = {"lm_head.weight": head}
    for name, tensor in model.state_dict().items():
        prefix, _, rest = name.rpartition(".mlp.")
        if rest == "experts.gate_up_proj":
            gate, up = tensor.chunk(2, dim=1)
            tensors[f"model.{prefix}.moe.gate_proj.weight"] = gate.contiguous()
            tensors[f"model.{prefix}.moe.up_proj.weight"] = up.contiguous()
        else:
            tensors[f"model.{_step3p5_name(name)}"] = tensor.contiguous()
    tensors["model.layers.5.eh_proj.weight"] = torch.zeros(4, 4)  # of the multi-token prediction layer: not loaded
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(settings))
    return lambda ids: F.linear(model(ids).last_hidden_state, head)


def _step3p5_name(name: str) -> str:
    for ours, public in (
        ("mlp.experts.down_proj", "moe.down_proj.weight"),
        ("mlp.gate.e_score_correction_bias", "moe.router_bias"),
        ("mlp.gate.weight", "moe.gate.weight"),
        ("mlp.shared_experts", "share_expert"),
    ):
        name = name.replace(ours, public)
    return name

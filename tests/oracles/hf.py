"""Hugging Face transformers as an oracle: greedy tokens, top-2 logit gaps and logits of a GGUF Llama model, float32.

Nothing of AFD's loading is used: the `gguf` package reads the file, and transformers' own code puts the rotary rows
back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from gguf import GGUFReader, dequantize
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor

_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


@dataclass(frozen=True)
class HfOutput:
    """top2_gaps: difference of the two largest logits before each token."""

    token_ids: list[int]
    top2_gaps: list[float]


def load_hf_llama(gguf: Path) -> LlamaForCausalLM:
    """The model of a GGUF file as transformers runs it, float32, on the CPU. Tied embeddings only (SmolLM2)."""
    reader = GGUFReader(str(gguf))
    config = _config(reader)
    processor = LlamaTensorProcessor(config=config.to_dict())
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    state = {}
    for tensor in reader.tensors:
        weights = processor.process(dequantize(tensor.data, tensor.tensor_type), tensor.name).weights
        state[_hf_name(tensor.name)] = torch.tensor(weights)
    missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
    assert set(missing) <= {"lm_head.weight"} and not unexpected, (missing, unexpected)
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its buffer is computed, not loaded
    return model.eval()


@torch.inference_mode()
def hf_greedy_along(model: LlamaForCausalLM, prompt: Sequence[int], output: Sequence[int]) -> HfOutput:
    """The greedy token before each of `output`, whose own tokens are followed: one pass instead of one a token.

    Up to the first place where the two differ this is what transformers generates by itself.
    """
    logits = model(torch.tensor([[*prompt, *output[:-1]]])).logits[0, len(prompt) - 1 :]
    top = logits.topk(2)
    return HfOutput(top.indices[:, 0].tolist(), (top.values[:, 0] - top.values[:, 1]).tolist())


@torch.inference_mode()
def hf_logits(model: LlamaForCausalLM, prompt: Sequence[int]) -> torch.Tensor:
    """Logits of every position of a prompt, [tokens, vocab] float32."""
    return model(torch.tensor([list(prompt)])).logits[0]


def _config(reader: GGUFReader) -> LlamaConfig:
    def value(key: str) -> float:
        return reader.fields[f"llama.{key}"].contents()

    return LlamaConfig(
        hidden_size=value("embedding_length"),
        intermediate_size=value("feed_forward_length"),
        num_hidden_layers=value("block_count"),
        num_attention_heads=value("attention.head_count"),
        num_key_value_heads=value("attention.head_count_kv"),
        rms_norm_eps=value("attention.layer_norm_rms_epsilon"),
        rope_theta=value("rope.freq_base"),
        max_position_embeddings=value("context_length"),
        vocab_size=value("vocab_size"),
        tie_word_embeddings=True,
        dtype="float32",
    )


def _hf_name(gguf_name: str) -> str:
    *prefix, stem, _ = gguf_name.split(".")
    layer = f"model.layers.{prefix[1]}." if prefix else ""
    return f"{layer}{_NAMES[stem]}.weight"

"""A tiny Llama folder with a long context, text and a chat template, whose answers end soon."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from afd.model.loading import resolve_model
from afd.model.tokenizer_files import load_tokenizer

CONTEXT = 131_072
NUM_LAYERS = 5
KV_BYTES_PER_TOKEN = NUM_LAYERS * 2 * 8 * 128 * 2  # in bfloat16
END_TOKEN = "<|im_end|>"
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_long_llama(folder: Path, *, end_gain: float = 1.0) -> Path:
    """The default model's tokenizer over seeded random weights.

    end_gain: how much the head prefers the end token; 1.0 = it is nearly certain, 0.0 = tokens are drawn evenly.
    """
    files = load_tokenizer(resolve_model("smollm2-135m-instruct"))
    assert files is not None
    end_id = files.tokenizer.token_to_id(END_TOKEN)
    vocab, hidden, dense = files.tokenizer.get_vocab_size(), 64, 128
    folder.mkdir()
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": dense,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "num_hidden_layers": NUM_LAYERS,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100000.0,
        "vocab_size": vocab,
        "max_position_embeddings": CONTEXT,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": end_id,
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config))
    files.tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE, "eos_token": END_TOKEN}))
    rng = np.random.default_rng(0)

    def random(*shape: int) -> np.ndarray:
        return rng.normal(0.0, 0.02, shape).astype(np.float32)

    tensors = {"model.embed_tokens.weight": random(vocab, hidden) + 0.05, "lm_head.weight": random(vocab, hidden) * 0}
    tensors["lm_head.weight"][end_id] = end_gain
    tensors["model.norm.weight"] = np.ones(hidden, np.float32)
    for i in range(NUM_LAYERS):
        layer = f"model.layers.{i}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{layer}{norm}.weight"] = np.ones(hidden, np.float32)
        for name in ("q_proj", "k_proj", "v_proj"):
            tensors[f"{layer}self_attn.{name}.weight"] = random(1024, hidden)
        tensors[f"{layer}self_attn.o_proj.weight"] = random(hidden, 1024) * 0.01
        tensors[f"{layer}mlp.gate_proj.weight"] = random(dense, hidden)
        tensors[f"{layer}mlp.up_proj.weight"] = random(dense, hidden)
        tensors[f"{layer}mlp.down_proj.weight"] = random(hidden, dense) * 0.01
    save_file(tensors, folder / "model.safetensors")
    return folder

"""Mutated model files through the door that every process of a cluster uses: a model, or a ModelError of one line, in
little time; whatever config.json, an index, a safetensors or GGUF header, or the tokenizer's files say.
"""

from __future__ import annotations

import json
import random
import shutil
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

from afd.errors import ModelError
from afd.model.loading import resolve_model
from afd.model.presets import PRESETS
from afd.model.tokenizer_files import load_tokenizer
from tests.fuzz.bodies import mutated_text
from tests.fuzz.campaign import MemoryGauge, generator, nothing_left, volume
from tests.fuzz.mutations import mutate_bytes, mutate_value
from tests.unit.model.model_files import hf_tensors, write_safetensors

MAX_CPU_S = 5.0
MAX_MESSAGE = 2500
SMALL = {"hidden_size": 16, "intermediate_size": 16, "vocab_size": 300, "num_hidden_layers": 2}
ROPE = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 32, "mscale": 1.0}
MOE = {"moe_intermediate_size": 8, "num_hidden_layers": 3}


def _tokenizer() -> Tokenizer:
    alphabet = sorted(ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE({token: i for i, token in enumerate([*alphabet, "ab", "<s>", "</s>"])}, [("a", "b")]))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return tokenizer


def _folder(root: Path, name: str, config: dict[str, Any], nested: bool = False) -> Path:
    """A whole model in two shards, with tokenizer, template and generation settings."""
    folder = root / name
    folder.mkdir()
    tensors = hf_tensors(config)
    names = sorted(tensors)
    weight_map = {}
    for shard, part in (("a.safetensors", names[::2]), ("b.safetensors", names[1::2])):
        write_safetensors(folder / shard, {name: tensors[name] for name in part})
        weight_map |= dict.fromkeys(part, shard)
    files: dict[str, Any] = {
        "config.json": {"model_type": "internvl", "text_config": config, "vision_config": {}} if nested else config,
        "model.safetensors.index.json": {"metadata": {}, "weight_map": weight_map},
        "generation_config.json": {"eos_token_id": [2, 3], "temperature": 0.7, "top_p": 0.9, "top_k": 5},
        "tokenizer.json": json.loads(_tokenizer().to_str()),
        "tokenizer_config.json": {"eos_token": "</s>", "bos_token": {"content": "<s>"}, "chat_template": "{{ 1 }}",
                                  "added_tokens_decoder": {"258": {"content": "</s>", "special": True}}},
        "special_tokens_map.json": {"eos_token": "</s>"},
        "added_tokens.json": {"<x>": 259},
    }  # fmt: skip
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    return folder


def _gguf_file(root: Path) -> Path:
    path = root / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for key, size in (("block_count", 1), ("embedding_length", 32), ("feed_forward_length", 32),
                      ("attention.head_count", 2), ("context_length", 64), ("vocab_size", 300)):  # fmt: skip
        writer.add_uint32(f"llama.{key}", size)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_float32("llama.rope.scaling.factor", 2.0)
    writer.add_string("tokenizer.ggml.model", "gpt2")
    writer.add_string("tokenizer.ggml.pre", "smollm")
    writer.add_array("tokenizer.ggml.tokens", list(_tokenizer().get_vocab()))
    writer.add_array("tokenizer.ggml.merges", ["a b"])
    writer.add_array("tokenizer.ggml.token_type", [1] * 259)
    writer.add_uint32("tokenizer.ggml.eos_token_id", 2)
    writer.add_string("tokenizer.chat_template", "{{ 1 }}")
    shapes = {"token_embd": (300, 32), "output_norm": (32,), "rope_freqs": (8,)}
    block = {"attn_norm": (32,), "ffn_norm": (32,), "attn_q": (32, 32), "attn_k": (32, 32), "attn_v": (32, 32),
             "attn_output": (32, 32), "ffn_gate": (32, 32), "ffn_up": (32, 32), "ffn_down": (32, 32)}  # fmt: skip
    shapes |= {f"blk.0.{name}": shape for name, shape in block.items()}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", np.ones(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Whole models, as they are before anything is changed."""
    root = tmp_path_factory.mktemp("models")
    llama = {**PRESETS["llama-tiny"], **SMALL, "rope_scaling": ROPE}
    models = [
        _folder(root, "llama", llama),
        _folder(root, "qwen3-moe", {**PRESETS["qwen3-moe-tiny"], **SMALL, **MOE}),
        _folder(root, "deepseek", {**PRESETS["deepseek-v3-tiny"], **SMALL, **MOE}),
        _folder(root, "ernie", {**PRESETS["ernie-4.5-moe-tiny"], **SMALL, **MOE}),
        _folder(
            root, "step3p5", {**PRESETS["step3.5-flash-tiny"], **{k: SMALL[k] for k in ("hidden_size", "vocab_size")}}
        ),
        _folder(root, "nested", {**PRESETS["qwen3-tiny"], **SMALL}, nested=True),
        _gguf_file(root),
    ]
    for model in models:
        load_tokenizer(resolve_model(str(model)))
    return models


def _mutated_json(rng: random.Random, raw: bytes) -> bytes:
    value = json.loads(raw)
    for _ in range(rng.choice((1, 1, 2, 3))):
        value = mutate_value(rng, value)
    text = json.dumps(value)
    if rng.random() < 0.2:
        text = mutated_text(rng, text)
    data = text.encode("utf-8", "surrogatepass")
    return mutate_bytes(rng, data) if rng.random() < 0.1 else data


def _mutated_safetensors(rng: random.Random, raw: bytes) -> bytes:
    size = int.from_bytes(raw[:8], "little")
    header, body = raw[8 : 8 + size], raw[8 + size :]
    if rng.random() < 0.3:
        return mutate_bytes(rng, raw[: 8 + size]) + body
    header = _mutated_json(rng, header)
    return len(header).to_bytes(8, "little") + header + body


def _mutated_gguf(rng: random.Random, raw: bytes) -> bytes:
    """Bytes of the header; words in it become counts that nothing holds."""
    end = raw.rindex(b"ffn_down") + 60
    header, body = bytearray(raw[:end]), raw[end:]
    if rng.random() < 0.5:
        at = rng.randrange(8, end - 8)
        header[at : at + 8] = rng.choice((0, 1, 255, 2**31, 2**32 - 1, 2**40, 2**62, 2**63, 2**64 - 1)).to_bytes(
            8, "little"
        )
        return bytes(header) + body
    return mutate_bytes(rng, bytes(header)) + body


_MUTATORS: dict[str, Callable[[random.Random, bytes], bytes]] = {
    ".json": _mutated_json, ".safetensors": _mutated_safetensors, ".gguf": _mutated_gguf,
}  # fmt: skip


def test_mutated_model_files(models: list[Path], tmp_path: Path) -> None:
    num_cases = volume(10_000, 400)
    rng = generator("model files", num_cases)
    copies = [
        Path(shutil.copytree(m, tmp_path / m.name) if m.is_dir() else shutil.copy(m, tmp_path / m.name)) for m in models
    ]
    found: Counter[str] = Counter()
    gauge = MemoryGauge(num_cases)
    with nothing_left():
        for _ in range(num_cases):
            model = rng.choice(copies)
            path = rng.choice(sorted(model.iterdir())) if model.is_dir() else model
            genuine = path.read_bytes()
            path.write_bytes(_MUTATORS[path.suffix](rng, genuine))
            start = time.process_time()
            try:
                load_tokenizer(resolve_model(str(model)))
                found["served"] += 1
            except ModelError as error:
                message = str(error)
                assert message.isprintable() and len(message) < MAX_MESSAGE, repr(message)
                found["refused"] += 1
            assert time.process_time() - start < MAX_CPU_S
            path.write_bytes(genuine)
            gauge.step()
    gauge.check()
    assert found["refused"] > num_cases // 4 and found["served"] > num_cases // 10, found

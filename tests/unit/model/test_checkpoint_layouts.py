"""Published layouts of the same weights: other names, fused experts, GGUF scalings; and quantised ones by name."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from afd.errors import ModelError
from afd.kv.cache import KVCache
from afd.model.batch import AttentionBatch
from afd.model.loading import load_attention_half, load_ffn_half, resolve_model
from afd.model.reference import forward
from afd.model.rope import inverse_frequencies
from afd.model.sharding import ShardSpec
from afd.model.spec import RopeScaling, RopeSpec
from afd.ops.select import select
from afd.types import FfnParallel

MakeFolder = Callable[..., Path]
Tensors = dict[str, np.ndarray]


@torch.inference_mode()
def _logits(model: Path, parallel: FfnParallel = FfnParallel.HYBRID, ranks: int = 1) -> torch.Tensor:
    found = resolve_model(str(model))
    attention = load_attention_half(found, select("cpu", "float32"))
    ffns = [load_ffn_half(found, ShardSpec(rank, ranks, parallel), select("cpu", "float32")) for rank in range(ranks)]
    cache = KVCache(found.spec, 1, 8, torch.float32)
    batch = AttentionBatch.build([(0, 5, [0])], 8)
    return attention.logits(forward(attention, ffns, torch.arange(5) + 9, batch, cache))


def _renamed(change: Callable[[str], str | None]) -> Callable[[Tensors], None]:
    def edit(tensors: Tensors) -> None:
        for name in list(tensors):
            new = change(name)
            if new is not None:
                tensors[new] = tensors.pop(name)

    return edit


def _without_prefix(name: str) -> str | None:
    return name.removeprefix("model.") if name.startswith("model.") else None


def _fused(tensors: Tensors) -> None:
    """As transformers 5 holds them: [experts, 2 * width, hidden], gate above up."""
    layers = {match[1] for name in tensors if (match := re.match(r"(.*\.mlp\.experts)\.\d+\.", name))}
    for where in sorted(layers):
        count = len({name for name in tensors if re.match(rf"{re.escape(where)}\.\d+\.gate", name)})
        gate, up, down = (
            np.stack([tensors.pop(f"{where}.{e}.{part}_proj.weight") for e in range(count)])
            for part in ("gate", "up", "down")
        )
        tensors[f"{where}.gate_up_proj"], tensors[f"{where}.down_proj"] = np.concatenate([gate, up], axis=1), down


def _as_transformers_holds_step3p5(tensors: Tensors) -> None:
    renames = (("moe.gate.weight", "mlp.gate.weight"), ("moe.router_bias", "mlp.gate.e_score_correction_bias"),
               ("moe.down_proj.weight", "mlp.experts.down_proj"), ("share_expert.", "mlp.shared_experts."))  # fmt: skip
    for name in list(tensors):
        if name.endswith("moe.gate_proj.weight"):
            up = tensors.pop(name.replace("gate_proj", "up_proj"))
            fused = name.replace("moe.gate_proj.weight", "mlp.experts.gate_up_proj")
            tensors[fused] = np.concatenate([tensors.pop(name), up], axis=1)
            continue
        new = name
        for ours, theirs in renames:
            new = new.replace(ours, theirs)
        if new != name and name in tensors:
            tensors[new] = tensors.pop(name)


@pytest.mark.parametrize("preset", ["llama-tiny", "qwen3-tiny", "deepseek-v3-tiny"])
def test_a_base_models_names(make_folder: MakeFolder, tmp_path: Path, preset: str) -> None:
    plain = make_folder(preset).rename(tmp_path / "plain")
    base = make_folder(preset, edit_tensors=_renamed(_without_prefix))
    assert torch.equal(_logits(plain), _logits(base))


@pytest.mark.parametrize(
    ("preset", "edit"),
    [
        ("qwen3-moe-tiny", _fused),
        ("deepseek-v3-tiny", _fused),
        ("ernie-4.5-moe-tiny", _fused),
        ("step3.5-flash-tiny", _as_transformers_holds_step3p5),
    ],
)
def test_experts_fused_as_in_transformers(make_folder: MakeFolder, tmp_path: Path, preset: str, edit: Any) -> None:
    plain = make_folder(preset).rename(tmp_path / "plain")
    fused = make_folder(preset, edit_tensors=edit)
    assert torch.equal(_logits(plain), _logits(fused))
    for parallel in FfnParallel:
        assert torch.equal(_logits(plain, parallel, 3), _logits(fused, parallel, 3)), parallel


@pytest.mark.parametrize(
    ("prefix", "around"),
    [
        ("model.language_model.", ["model.visual.merger.weight", "model.image_newline"]),
        ("language_model.model.", ["multi_modal_projector.linear_1.bias", "image_newline", "mm_projector.weight"]),
        ("model.text_model.", ["model.vision_model.patch.weight", "model.connector.proj.weight"]),
        ("language_model.", ["audio_tower.conv1.weight", "multi_modal_projector.weight"]),
    ],
)
def test_the_text_model_inside_another(make_folder: MakeFolder, tmp_path: Path, prefix: str, around: list[str]) -> None:
    def nest(config: dict[str, Any]) -> None:
        text = dict(config)
        config.clear()
        config.update(model_type="anything", text_config=text, hidden_size=8, tie_word_embeddings=False)

    def edit(tensors: Tensors) -> None:
        _renamed(lambda name: prefix + name.removeprefix("model.") if name.startswith("model.") else None)(tensors)
        tensors.update({name: np.zeros((2, 2), np.float32) for name in around})

    plain = make_folder("qwen3-tiny").rename(tmp_path / "plain")
    assert torch.equal(_logits(plain), _logits(make_folder("qwen3-tiny", nest, edit)))


def test_two_names_for_one_part_are_an_error(make_folder: MakeFolder) -> None:
    def add(tensors: Tensors) -> None:
        tensors["norm.weight"] = tensors["model.norm.weight"]

    with pytest.raises(ModelError, match=r"tensors model\.norm\.weight and norm\.weight are the same part"):
        resolve_model(str(make_folder("llama-tiny", edit_tensors=add)))


def test_a_tied_head_that_is_stored_with_other_numbers_is_the_head(make_folder: MakeFolder, tmp_path: Path) -> None:
    """As in transformers, which does not tie what differs."""

    def own_head(tensors: Tensors) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
        tensors["lm_head.weight"][-1] += 1.0

    tied = make_folder("llama-tiny").rename(tmp_path / "tied")
    untied = make_folder("llama-tiny", edit_tensors=own_head)
    assert not resolve_model(str(untied)).spec.tie_embeddings
    assert torch.equal(_logits(tied)[:, :-1], _logits(untied)[:, :-1])
    assert not torch.equal(_logits(tied)[:, -1], _logits(untied)[:, -1])


def _quantised(folder: Path, dtype: torch.dtype, scale: str, shape: tuple[int, ...]) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors = {
        name: torch.zeros(64, 64).to(dtype),
        f"{name}{scale}": torch.ones(shape),
        "model.embed_tokens.weight": torch.zeros(256, 64),
    }
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("dtype", "scale", "shape", "layout"),
    [
        (torch.float8_e4m3fn, "_scale", (1,), "float8 with one scale for each tensor"),
        (torch.float8_e4m3fn, "_scale", (64, 1), "float8 with one scale for each row"),
        (torch.int8, "_scale", (64, 1), "int8 with one scale for each row"),
        (torch.uint8, "_scale_2", (1,), "NVFP4 (ModelOpt)"),
        (torch.int32, "_packed", (64, 8), "packed integers or FP4 (compressed-tensors)"),
    ],
)
def test_a_foreign_layout_is_named_by_its_tensors(
    make_folder: MakeFolder, dtype: torch.dtype, scale: str, shape: tuple[int, ...], layout: str
) -> None:
    folder = make_folder("llama-tiny")
    _quantised(folder, dtype, scale, shape)
    with pytest.raises(
        ModelError, match=rf"stored as {re.escape(layout)}, which is not supported; what loads: bfloat16"
    ):
        resolve_model(str(folder))


_COMPRESSED = {"quant_method": "compressed-tensors", "format": "pack-quantized"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quantization_config": _COMPRESSED}, "quant_method 'compressed-tensors' ('pack-quantized') is not supported"),
        ({"quantization_config": {"quant_method": "awq"}}, "quant_method 'awq' is not supported"),
        ({"quantization_config": {"quant_algo": "NVFP4"}}, "quant_method 'modelopt' ('NVFP4') is not supported"),
        ({"quantization": {"bits": 4, "group_size": 64}}, "quantization: MLX quantisation, 4 bits in groups of 64,"),
        ({"quantization_config": {"quant_method": "fp8", "weight_block_size": None}}, "one scale for a tensor or row"),
        ({"quantization_config": {"quant_method": "fp8", "weight_block_size": 5}}, "5 is not two positive integers"),
        ({"quantization_config": {"quant_method": "fp8", "rotate": 1}}, "quantization_config: rotate: 1 is not known"),
        ({"quantization_config": []}, "quantisation [] is not supported"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("nested", [False, True])
def test_a_quantised_configuration_is_named(
    make_folder: MakeFolder, changes: dict[str, Any], message: str, nested: bool
) -> None:
    def edit(config: dict[str, Any]) -> None:
        config.update(changes)
        if nested:
            text = dict(config)
            config.clear()
            config.update(model_type="kimi_k25", text_config=text)

    with pytest.raises(ModelError) as error:
        resolve_model(str(make_folder("llama-tiny", edit)))
    assert message in str(error.value) and ("text_config" in str(error.value)) is nested


def test_modelopts_own_file_is_read(make_folder: MakeFolder) -> None:
    folder = make_folder("llama-tiny")
    for algorithm in (None, "NVFP4"):
        text = json.dumps({"quantization": {"quant_algo": algorithm, "kv_cache_quant_algo": "FP8"}})
        (folder / "hf_quant_config.json").write_text(text)
        if algorithm is None:
            resolve_model(str(folder))
    with pytest.raises(ModelError, match=r"hf_quant_config\.json: weights in 'NVFP4' \(ModelOpt\) are not supported"):
        resolve_model(str(folder))


def _gguf(path: Path, factors: np.ndarray | None = None, **metadata: Any) -> Path:
    """One layer of 32, two heads, seeded."""
    rng = np.random.default_rng(4)
    writer = gguf.GGUFWriter(path, "llama")
    for key, size in (("block_count", 1), ("embedding_length", 32), ("feed_forward_length", 32), ("vocab_size", 64),
                      ("attention.head_count", 2), ("context_length", 64)):  # fmt: skip
        writer.add_uint32(f"llama.{key}", size)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    for key, value in metadata.items():
        name = key.replace("__", ".")
        add = writer.add_string if isinstance(value, str) else writer.add_float32
        add(name if name.startswith("general") else f"llama.{name}", value)
    shapes: dict[str, tuple[int, ...]] = {"token_embd": (64, 32), "output_norm": (32,)}
    for part in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
        shapes[f"blk.0.{part}"] = (32, 32)
    shapes |= {"blk.0.attn_norm": (32,), "blk.0.ffn_norm": (32,)}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", rng.normal(0, 0.2, shape).astype(np.float32))
    if factors is not None:
        writer.add_tensor("rope_freqs.weight", factors.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


FACTORS = np.array([1, 1, 2, 4, 8, 8, 8, 8])


@pytest.mark.parametrize(
    ("metadata", "divisor"),
    [
        ({}, 1.0),
        ({"rope__scaling__factor": 4.0}, 4.0),
        ({"rope__scale_linear": 4.0}, 4.0),
        ({"rope__scaling__factor": 2.0, "rope__scale_linear": 4.0}, 2.0),
        ({"rope__scaling__factor": 0.0}, 1.0),
        ({"rope__scaling__type": "linear", "rope__scaling__factor": 4.0}, 4.0),
        ({"rope__scaling__type": "none", "rope__scaling__factor": 4.0}, 1.0),
    ],
)
@pytest.mark.parametrize("factors", [None, FACTORS])
def test_gguf_frequencies_are_those_of_llama_cpp(
    tmp_path: Path, metadata: dict[str, Any], divisor: float, factors: np.ndarray | None
) -> None:
    """Divided by rope_freqs.weight, one for each, and by the linear factor."""
    spec = resolve_model(str(_gguf(tmp_path / "m.gguf", factors, **metadata))).spec
    plain = 10000.0 ** -(torch.arange(0, 16, 2) / 16)
    want = plain / torch.tensor(FACTORS if factors is not None else 1.0) / divisor
    torch.testing.assert_close(inverse_frequencies(spec.layers[0].attention.rope), want.float())


def test_gguf_frequency_factors_change_the_logits(tmp_path: Path) -> None:
    plain, scaled = _logits(_gguf(tmp_path / "a.gguf")), _logits(_gguf(tmp_path / "b.gguf", FACTORS))
    ones = _logits(_gguf(tmp_path / "c.gguf", np.ones(8)))
    assert torch.equal(plain, ones) and not torch.allclose(plain, scaled, rtol=1e-3)


def test_llama3_scaling_as_frequency_factors_is_llama3_scaling(tmp_path: Path) -> None:
    """What llama.cpp's converter does: original frequencies over scaled ones."""
    llama3 = RopeSpec(10000.0, 16, scaling=RopeScaling("llama3", 8.0, 1.0, 4.0, 32))
    factors = inverse_frequencies(RopeSpec(10000.0, 16)) / inverse_frequencies(llama3)
    spec = resolve_model(str(_gguf(tmp_path / "m.gguf", factors.numpy()))).spec
    torch.testing.assert_close(inverse_frequencies(spec.layers[0].attention.rope), inverse_frequencies(llama3))


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"rope__scaling__type": "yarn"}, "llama.rope.scaling.type: 'yarn' is not supported (known: none, linear)"),
        ({"rope__scaling__factor": -1.0}, "llama.rope.scaling.factor: expected a number from 0"),
        ({"rope__scaling__attn_factor": 2.0}, "llama.rope.scaling.attn_factor: 2.0 is not known to family llama"),
        ({"logit_scale": 2.0}, "llama.logit_scale: 2.0 is not supported"),
        ({"attention__clamp_kqv": 2.0}, "llama.attention.clamp_kqv: 2.0 is not known to family llama"),
        ({"general__type": "adapter"}, "general.type: 'adapter' is not supported"),
    ],
)
def test_gguf_keys_that_change_the_numbers_are_refused(tmp_path: Path, metadata: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError) as error:
        resolve_model(str(_gguf(tmp_path / "m.gguf", **metadata)))
    assert message in str(error.value)


@pytest.mark.parametrize("factors", [np.ones(4), np.zeros(8), np.full(8, np.inf), np.ones((2, 4))])
def test_gguf_frequency_factors_that_make_no_sense_are_refused(tmp_path: Path, factors: np.ndarray) -> None:
    with pytest.raises(ModelError, match=r"rope_freqs\.weight: expected"):
        resolve_model(str(_gguf(tmp_path / "m.gguf", factors)))

"""afd inspect: figures from headers, memory of each role against what is loaded, and experts that give nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE

from afd.cli.main import main
from afd.model.expert_health import expert_health
from afd.model.ffn import DenseFfn, MoeFfn
from afd.model.halves import AttentionHalf
from afd.model.inspect import attention_bytes, ffn_bytes
from afd.model.loading import load_attention_half, load_ffn_half, resolve_model
from afd.model.sharding import ShardSpec
from afd.model.spec import WEIGHT_TYPES
from afd.ops.cpu.packed import PackedInt8, PackedMatrix
from afd.ops.int8 import Int8Weight
from afd.ops.ops import SwiGlu, Weight
from afd.ops.select import select
from afd.types import FfnParallel


def _report(capsys: pytest.CaptureFixture[str], *args: str) -> dict[str, object]:
    assert main(["inspect", *args, "--json"]) == 0
    report: dict[str, object] = json.loads(capsys.readouterr().out)
    return report


def test_step3_in_full_size(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "dummy:step3", "--topology", "2A2F"]) == 0
    text = capsys.readouterr().out
    assert "316.3 B total, 37.9 B active" in text
    assert "512 KV elements per token" in text
    assert text.count("attention/") == 2 and text.count("ffn/") == 2


def test_the_json_form(capsys: pytest.CaptureFixture[str]) -> None:
    report = _report(capsys, "dummy:step3.5-flash", "--topology", "1A4F", "--weights", "int8")
    assert report["kv_bytes"] == {"bfloat16": 184320, "float32": 368640}
    assert report["windowed_kv_bytes"] == 33 * 2048 * 2
    assert report["experts"] == []
    ffn = [role["weight_bytes"] for role in report["roles"] if role["role"].startswith("ffn")]
    assert 191.3e9 < sum(ffn) < 193e9, "one byte a weight and few for scales"


def test_what_a_model_serves(capsys: pytest.CaptureFixture[str], make_folder: Callable[..., Path]) -> None:
    assert _report(capsys, "smollm2-135m-instruct")["serves"] == "chat"
    folder = make_folder("llama-tiny")
    assert _report(capsys, str(folder))["serves"] == "token ids"
    Tokenizer(BPE({"a": 0}, [])).save(str(folder / "tokenizer.json"))
    assert _report(capsys, str(folder))["serves"] == "text"
    (folder / "tokenizer.json").write_text("{}")
    assert main(["inspect", str(folder)]) != 0
    assert "tokenizer.json: not a tokenizer" in capsys.readouterr().err


@pytest.mark.parametrize("weights", WEIGHT_TYPES)
@pytest.mark.parametrize("parallel", FfnParallel)
@pytest.mark.parametrize("model", ["dummy:step3-tiny", "dummy:qwen3-moe-tiny"])
def test_the_memory_told_is_the_memory_taken(model: str, parallel: FfnParallel, weights: str) -> None:
    folder = resolve_model(model)
    for rank in range(3):
        shard = ShardSpec(rank, 3, parallel)
        half = load_ffn_half(folder, shard, select("cpu", "bfloat16"), weights=weights)
        held = sum(_bytes_of(layer) for layer in half.layers)
        assert ffn_bytes(folder.spec, shard, "bfloat16", weights) == held


@pytest.mark.parametrize("weights", WEIGHT_TYPES)
@pytest.mark.parametrize("model", ["dummy:step3-tiny", "dummy:llama-tiny", "dummy:deepseek-v3-tiny"])
def test_the_memory_told_of_attention_is_the_memory_taken(model: str, weights: str) -> None:
    folder = resolve_model(model)
    half = load_attention_half(folder, select("cpu", "bfloat16"), weights=weights)
    assert attention_bytes(folder.spec, "bfloat16", weights) == _attention_bytes(half)


def _attention_bytes(half: AttentionHalf) -> int:
    """All that a half holds, each piece of memory once."""
    found: dict[int, int] = {}
    for part in (half._embedding, half._final_norm, half._head):
        found[id(part)] = _weight_bytes(part)
    for layer in half.layers:
        weights = layer.attention._w  # type: ignore[attr-defined]
        router = layer.router
        parts = [getattr(weights, name) for name in weights.__slots__] + [layer.attn_norm, layer.ffn_norm]
        parts += [] if router is None else [router._weight, router._bias]
        for part in parts:
            if part is not None:
                found[id(part)] = _weight_bytes(part)
    return sum(found.values())


def _bytes_of(layer: object) -> int:
    if isinstance(layer, DenseFfn):
        return _swiglu_bytes(layer.swiglu)
    assert isinstance(layer, MoeFfn)
    shared = 0 if layer._shared is None else _swiglu_bytes(layer._shared.swiglu)
    return shared + sum(_swiglu_bytes(expert) for expert in layer._experts)


def _swiglu_bytes(swiglu: SwiGlu) -> int:
    return _weight_bytes(swiglu.gate_up) + _weight_bytes(swiglu.down)


def _weight_bytes(weight: Weight) -> int:
    if isinstance(weight, Int8Weight):
        return weight.values.nbytes + weight.scales.nbytes
    if isinstance(weight, PackedInt8):  # without what pads its last panel
        return weight.shape[0] * (weight.shape[1] + 4)
    return (weight.data if isinstance(weight, PackedMatrix) else weight).nbytes


def test_dead_experts_are_named(make_folder: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    def kill(tensors: dict[str, np.ndarray]) -> None:
        tensors["model.layers.2.moe.down_proj.weight"][5] *= 1e-4
        tensors["model.layers.3.moe.gate_proj.weight"][0] = 0

    folder = make_folder("step3-tiny", edit_tensors=kill)
    layers = list(expert_health(resolve_model(str(folder)).checkpoint))
    assert [(e.layer, e.expert) for layer in layers for e in layer if e.dead] == [(2, 5), (3, 0)]
    assert main(["inspect", str(folder)]) == 0
    text = capsys.readouterr().out
    assert "DEAD expert 5" in text and text.count("DEAD") == 2
    assert len(_report(capsys, str(folder))["experts"]) == 24
    assert _report(capsys, str(folder), "--no-experts")["experts"] == []


def test_the_probe_is_the_experts_own_arithmetic(make_folder: Callable[..., Path]) -> None:
    """Norms and output of one expert stored by itself, against torch."""
    folder = make_folder("deepseek-v3-tiny")
    checkpoint = resolve_model(str(folder)).checkpoint
    [health] = [e for layer in expert_health(checkpoint) for e in layer if (e.layer, e.expert) == (2, 3)]
    half = load_ffn_half(resolve_model(str(folder)), ShardSpec(), select("cpu", "float32"))
    layer = half.layers[2]
    assert isinstance(layer, MoeFfn)
    probe = np.random.default_rng(0).standard_normal((16, 64), np.float32)
    output = layer._experts[3](torch.from_numpy(probe))
    assert health.output_rms == pytest.approx(float(output.square().mean().sqrt()), rel=1e-4)
    down = layer._experts[3].down
    assert isinstance(down, torch.Tensor)
    assert health.down_norm == pytest.approx(float(down.norm()), rel=1e-5)


def test_a_wrong_topology_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "dummy:step3-tiny", "--topology", "2B"]) == 2
    assert "is not of the form xAyF" in capsys.readouterr().err

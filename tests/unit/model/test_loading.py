"""resolve_model and the load functions: what is found, what is refused, and how little of the weights is read."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from afd.errors import ConfigError, ModelError
from afd.kv.cache import KVCache
from afd.model.batch import AttentionBatch
from afd.model.families import ConfigReader, family_of_config
from afd.model.inventory import Half, inventory
from afd.model.loading import DEFAULT_MODEL, load_attention_half, load_ffn_half, resolve_model
from afd.model.presets import PRESETS
from afd.model.reference import forward
from afd.model.sharding import ShardSpec
from afd.model.spec import ModelSpec
from afd.model.weights.checkpoint import Checkpoint
from afd.model.weights.source import Slices
from afd.ops.select import select
from afd.types import FfnParallel
from tests.fakes.forks import Forks
from tests.unit.model.model_files import STEP3_TINY

MakeFolder = Callable[..., Path]


def test_the_default_model_resolves() -> None:
    folder = resolve_model(DEFAULT_MODEL)
    spec = folder.spec
    assert (spec.num_layers, spec.hidden, spec.vocab_size, spec.max_context) == (30, 576, 49152, 8192)
    assert (spec.bos_token_id, spec.eos_token_ids, spec.tie_embeddings) == (1, (2,), True)
    assert folder.tokenizer_path == folder.path
    assert folder.path is not None
    assert resolve_model(str(folder.path)).fingerprint == folder.fingerprint


def test_a_hf_folder_resolves() -> None:
    folder = resolve_model(str(STEP3_TINY))
    assert (folder.name, folder.spec.family, folder.spec.torch_dtype) == ("step3-tiny", "step3", "bfloat16")
    assert folder.tokenizer_path is None
    assert len(folder.fingerprint) == 64


def test_generation_config_adds_eos_ids(make_folder: MakeFolder) -> None:
    path = make_folder("llama-tiny")
    (path / "generation_config.json").write_text('{"eos_token_id": [2, 9]}')
    assert resolve_model(str(path)).spec.eos_token_ids == (2, 9)


def test_the_fingerprint_sees_config_and_weights_not_the_place(make_folder: MakeFolder, tmp_path: Path) -> None:
    path = make_folder("llama-tiny")
    first = resolve_model(str(path)).fingerprint
    moved = path.rename(tmp_path / "moved")
    assert resolve_model(str(moved)).fingerprint == first
    weights = moved / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    second = resolve_model(str(moved)).fingerprint
    config = moved / "config.json"
    config.write_text(config.read_text() + " ")
    assert len({first, second, resolve_model(str(moved)).fingerprint}) == 3


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no-such-model", "is neither 'smollm2-135m-instruct', nor a folder"),
        ("dummy:huge", "unknown preset .known: llama-tiny, .*step3"),
    ],
)
def test_an_unknown_name_lists_what_there_is(name: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        resolve_model(name)


def test_broken_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json"):
        resolve_model(str(tmp_path))
    config = tmp_path / "config.json"
    config.write_text("{")
    with pytest.raises(ModelError, match=r"config\.json: not JSON"):
        resolve_model(str(tmp_path))
    config.write_text("[]")
    with pytest.raises(ModelError, match=r"config\.json: expected a JSON object, found list"):
        resolve_model(str(tmp_path))
    config.write_text(json.dumps(PRESETS["llama-tiny"]))
    with pytest.raises(ModelError, match=r"has neither model\.safetensors nor"):
        resolve_model(str(tmp_path))


def _drop(tensors: dict[str, np.ndarray]) -> None:
    del tensors["model.layers.1.self_attn.k_proj.weight"]


def _add(tensors: dict[str, np.ndarray]) -> None:
    tensors["model.layers.1.self_attn.q_proj.bias"] = np.zeros(64, np.float32)


def _reshape(tensors: dict[str, np.ndarray]) -> None:
    tensors["model.norm.weight"] = np.zeros(32, np.float32)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (_drop, r"missing tensor model.layers.1.self_attn.k_proj.weight, expected shape [32, 64]"),
        (_add, r"extra tensor model.layers.1.self_attn.q_proj.bias of shape [64]"),
        (_reshape, r"model.safetensors: tensor model.norm.weight: expected shape [64], found [32]"),
    ],
)
def test_missing_extra_and_misshaped_tensors_are_named(make_folder: MakeFolder, edit: Any, message: str) -> None:
    path = make_folder("llama-tiny", edit_tensors=edit)
    with pytest.raises(ModelError) as error:
        resolve_model(str(path))
    assert message in str(error.value) and str(path) in str(error.value)


def test_a_dtype_that_cannot_be_read_is_named(make_folder: MakeFolder) -> None:
    path = make_folder("llama-tiny")
    weights = path / "model.safetensors"
    weights.write_bytes(weights.read_bytes().replace(b'"F32"', b'"I32"', 1))
    with pytest.raises(ModelError, match=r"tensor model.embed_tokens.weight: dtype I32 is not supported .*BF16"):
        resolve_model(str(path))


def test_a_gguf_type_that_cannot_be_dequantised_is_named(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for key in ("block_count", "embedding_length", "feed_forward_length", "attention.head_count", "context_length"):
        writer.add_uint32(f"llama.{key}", 2 if key == "embedding_length" else 1)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_uint32("llama.vocab_size", 2)
    writer.add_tensor("token_embd.weight", np.ones((2, 2), np.int32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelError, match=r"m\.gguf: .*tensor token_embd\.weight: dtype I32 is not supported"):
        resolve_model(str(path))


def test_a_layer_too_many_is_one_error(make_folder: MakeFolder) -> None:
    def deeper(config: dict[str, Any]) -> None:
        config["num_hidden_layers"] = 4

    path = make_folder("llama-tiny", edit_config=deeper)
    with pytest.raises(ModelError, match=r"missing tensor model\.layers\.3.*\(and more\)$"):
        resolve_model(str(path))


def test_a_tied_model_may_carry_its_head_and_vision_parts_are_ignored(make_folder: MakeFolder) -> None:
    def add_head(tensors: dict[str, np.ndarray]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]

    resolve_model(str(make_folder("llama-tiny", edit_tensors=add_head)))

    def add_vision(tensors: dict[str, np.ndarray]) -> None:
        tensors["vision_model.embeddings.class_embedding"] = np.zeros((1, 8), np.float32)

    resolve_model(str(make_folder("step3-tiny", edit_tensors=add_vision)))


class _RecordingSource:
    """Stands before a source and notes the elements read under each name."""

    def __init__(self, checkpoint: Checkpoint):
        self.reads: dict[str, int] = {}
        self._source = checkpoint.source
        self.tensors = checkpoint.source.tensors

    def read(self, name: str, slices: Slices = ()) -> Any:
        raw = self._source.read(name, slices)
        self.reads[name] = self.reads.get(name, 0) + raw.array.size
        return raw


def _recorded(name: str) -> tuple[Any, _RecordingSource]:
    folder = resolve_model(name)
    recorder = _RecordingSource(folder.checkpoint)
    object.__setattr__(folder.checkpoint, "source", recorder)
    return folder, recorder


def test_the_attention_loader_reads_no_ffn_weight() -> None:
    folder, recorder = _recorded(str(STEP3_TINY))
    steps: list[tuple[int, int]] = []
    load_attention_half(folder, select("cpu", "float32"), progress=lambda done, total: steps.append((done, total)))
    wanted = [t for t in inventory(folder.spec) if t.half is Half.ATTENTION]
    expected = {folder.checkpoint.naming.stored_name(t): t.num_elements for t in wanted}
    assert recorder.reads == expected
    assert steps == [(i + 1, len(wanted)) for i in range(len(wanted))]


@pytest.mark.parametrize("parallel", FfnParallel)
@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_ffn_shards_together_read_each_weight_once(parallel: FfnParallel, num_ranks: int) -> None:
    """With ep the shared expert is whole on every rank; everything else is read by exactly one."""
    total: dict[str, int] = {}
    spec = resolve_model(str(STEP3_TINY)).spec
    for rank in range(num_ranks):
        folder, recorder = _recorded(str(STEP3_TINY))
        steps: list[tuple[int, int]] = []
        load_ffn_half(
            folder,
            ShardSpec(rank, num_ranks, parallel),
            select("cpu", "float32"),
            progress=lambda d, t, s=steps: s.append((d, t)),
        )
        assert steps[-1][0] == steps[-1][1] == len(steps)
        for name, count in recorder.reads.items():
            total[name] = total.get(name, 0) + count
    for tensor in inventory(spec):
        name = folder.checkpoint.naming.stored_name(tensor)
        if tensor.half is Half.ATTENTION:
            assert name not in total
            continue
        copies = num_ranks if parallel is FfnParallel.EP and tensor.part.startswith("shared_") else 1
        assert total[name] == copies * tensor.num_elements, name


def test_dtypes_by_name_or_as_torch_dtypes_and_nothing_else() -> None:
    folder = resolve_model("dummy:llama-tiny")
    assert load_attention_half(folder, select("cpu", "bfloat16")).dtype is torch.bfloat16
    assert load_ffn_half(folder, ShardSpec(), select("cpu", torch.float32)).dtype is torch.float32
    for wrong in ("float16", torch.float64):
        with pytest.raises(ModelError, match=r"compute dtype .* is not supported"):
            load_attention_half(folder, select("cpu", wrong))


def test_a_rank_outside_its_world_is_refused() -> None:
    with pytest.raises(ConfigError, match="rank 2 is not among 2"):
        ShardSpec(2, 2)


def _every_half(folder: Path) -> list[torch.Tensor]:
    """Outputs of one rank's FFN, and what the attention half embeds and computes, as a fingerprint of all weights."""
    found = resolve_model(str(folder))
    attention, ffn = (
        load_attention_half(found, select("cpu", "float32")),
        load_ffn_half(found, ShardSpec(), select("cpu", "float32")),
    )
    cache = KVCache(found.spec, 1, 8, torch.float32)
    batch = AttentionBatch.build([(0, 5, [0])], 8)
    with torch.inference_mode():
        return [attention.logits(forward(attention, [ffn], torch.arange(5) + 9, batch, cache))]


def _one_by_one(tensors: dict[str, np.ndarray]) -> None:
    for name in [n for n in tensors if re.search(r"moe\.(gate|up|down)_proj", n)]:
        for expert, array in enumerate(tensors.pop(name)):
            tensors[name.replace(".moe.", f".moe.experts.{expert}.")] = array


def test_experts_packed_or_one_by_one(make_folder: MakeFolder, tmp_path: Path) -> None:
    packed = make_folder("step3.5-flash-tiny").rename(tmp_path / "packed")
    single = make_folder("step3.5-flash-tiny", edit_tensors=_one_by_one)
    assert torch.equal(_every_half(packed)[0], _every_half(single)[0])
    for num_ranks in (2, 5):
        for rank in range(num_ranks):
            load_ffn_half(resolve_model(str(single)), ShardSpec(rank, num_ranks), select("cpu", "float32"))


def _nest(config: dict[str, Any]) -> None:
    text = dict(config)
    config.clear()
    config.update(model_type="step3_vl", text_config=text, vision_config={})


@pytest.mark.parametrize("prefix", ["model.language_model.", "language_model.model."])
def test_the_language_model_inside_a_vision_language_checkpoint(
    make_folder: MakeFolder, tmp_path: Path, prefix: str
) -> None:
    def rename(tensors: dict[str, np.ndarray]) -> None:
        for name in list(tensors):
            if name.startswith("model."):
                tensors[prefix + name.removeprefix("model.")] = tensors.pop(name)
        if prefix.startswith("language"):
            tensors["language_model.lm_head.weight"] = tensors.pop("lm_head.weight")
        tensors["model.vision_model.conv1.weight"] = np.zeros((2, 2), np.float32)
        tensors["vit_large_projector.weight"] = np.zeros((2, 2), np.float32)

    plain = make_folder("step3-tiny").rename(tmp_path / "plain")
    nested = make_folder("step3-tiny", _nest, rename)
    assert torch.equal(_every_half(plain)[0], _every_half(nested)[0])


def test_prediction_layers_behind_the_last_are_left_out(make_folder: MakeFolder) -> None:
    def add(tensors: dict[str, np.ndarray]) -> None:
        tensors["model.layers.4.eh_proj.weight"] = np.zeros((2, 2), np.float32)

    resolve_model(str(make_folder("deepseek-v3-tiny", edit_tensors=add)))


def test_a_missing_expert_is_named(make_folder: MakeFolder) -> None:
    name = "model.layers.1.mlp.experts.7.up_proj.weight"
    with pytest.raises(ModelError, match=rf"missing tensor {name}, expected shape \[24, 64\]"):
        resolve_model(str(make_folder("deepseek-v3-tiny", edit_tensors=lambda tensors: tensors.pop(name))))


_PEAK_BYTES = """
import torch
from afd.model.loading import load_ffn_half, resolve_model
from afd.model.sharding import ShardSpec
from afd.ops.select import select

def status_bytes(key):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith(key))

def answer(model):
    torch.set_num_threads(1)
    folder = resolve_model(model)
    ops = select("cpu", "bfloat16")
    load_ffn_half(resolve_model("dummy:llama-tiny"), ShardSpec(), ops)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    idle = status_bytes("VmRSS")
    half = load_ffn_half(folder, ShardSpec(0, 2), ops)
    return str(status_bytes("VmHWM") - idle)
"""


@pytest.fixture(scope="module")
def peaks() -> Iterator[Forks]:
    """Model -> what loading one of its two FFN ranks adds to an idle process at its peak, in bytes."""
    with Forks(_PEAK_BYTES) as forks:
        yield forks


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_loading_a_shard_peaks_near_its_size(peaks: Forks) -> None:
    """Peak resident memory over an idle process, of one of two FFN ranks of the default model: within 1.3x."""
    spec = resolve_model(DEFAULT_MODEL).spec
    assert int(peaks.ask(DEFAULT_MODEL)) < 1.3 * _shard_bytes(spec)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("one_by_one", [False, True], ids=["packed", "one by one"])
def test_loading_experts_peaks_near_the_shards_size(peaks: Forks, tmp_path: Path, one_by_one: bool) -> None:
    """Half the experts of a bfloat16 checkpoint of 50 MB of experts, packed and expert by expert."""
    config = {**PRESETS["step3.5-flash-tiny"], "hidden_size": 512, "moe_intermediate_size": 256, "moe_num_experts": 12}
    reader = ConfigReader(config, "test config")
    family = family_of_config(reader)
    spec = family.parse(reader, "test")
    tensors = {}
    for tensor in inventory(spec):
        name, data = family.naming.stored_name(tensor), torch.zeros(tensor.shape, dtype=torch.bfloat16)
        if one_by_one and tensor.part.startswith("expert_"):
            name = name.replace(".moe.", ".moe.experts.{}.")
            tensors |= {name.format(e): data[e].clone() for e in range(12)}
        else:
            tensors[name] = data
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert int(peaks.ask(str(tmp_path))) < 1.3 * _shard_bytes(spec)


def _shard_bytes(spec: ModelSpec) -> int:
    """bfloat16 bytes of one of two FFN ranks."""
    return sum(t.num_elements for t in inventory(spec) if t.half is Half.FFN)

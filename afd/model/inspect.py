"""What a model is and what serving it takes, from headers alone: shapes, parameters, KV bytes, memory of each role."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

from afd.model.inventory import Half, ParameterCounts, TensorSpec, count_parameters, inventory
from afd.model.loading import ModelFolder
from afd.model.sharding import ShardSpec
from afd.model.spec import DTYPE_BYTES, AttentionKind, AttentionSpec, FfnKind, FfnSpec, LayerSpec, ModelSpec
from afd.model.tokenizer_files import load_tokenizer
from afd.types import FfnParallel, Topology

_INT8_SCALE_BYTES = 4


@dataclass(frozen=True, slots=True)
class LayerGroup:
    """All layers of one shape.

    kv_elements: of one token in one of them.
    """

    layers: tuple[int, ...]
    attention: str
    ffn: str
    kv_elements: int


@dataclass(frozen=True, slots=True)
class RoleMemory:
    """Weight bytes of one worker of a topology, without buffers and KV cache."""

    role: str
    weight_bytes: int


@dataclass(frozen=True, slots=True)
class ModelReport:
    """kv_elements, kv_bytes: of one token of context over all layers, the latter by KV dtype.

    windowed_kv_bytes: the part of kv_bytes in `dtype` that belongs to sliding-window layers.
    serves: "chat", "text" (a tokenizer without chat template) or "token ids".
    """

    name: str
    family: str
    serves: str
    fingerprint: str
    hidden: int
    vocab_size: int
    max_context: int
    layers: tuple[LayerGroup, ...]
    parameters: ParameterCounts
    kv_elements: int
    kv_bytes: dict[str, int]
    windowed_kv_bytes: int
    dtype: str
    weights: str
    topology: str
    roles: tuple[RoleMemory, ...]


def describe(
    folder: ModelFolder, topology: Topology, parallel: FfnParallel, dtype: str = "bfloat16", weights: str = "auto"
) -> ModelReport:
    """The report of `afd inspect`. No weight is read; ModelError when the tokenizer cannot be served."""
    spec = folder.spec
    windowed = sum(a.kv_elements_per_token for a in spec.attention_layers if a.window)
    return ModelReport(
        name=folder.name,
        family=spec.family,
        serves=_serves(folder),
        fingerprint=folder.fingerprint,
        hidden=spec.hidden,
        vocab_size=spec.vocab_size,
        max_context=spec.max_context,
        layers=tuple(_layer_groups(spec)),
        parameters=count_parameters(spec),
        kv_elements=spec.kv_elements_per_token(),
        kv_bytes={kv: spec.kv_bytes_per_token(kv) for kv in ("bfloat16", "float32")},
        windowed_kv_bytes=windowed * DTYPE_BYTES[dtype],
        dtype=dtype,
        weights=weights,
        topology=str(topology),
        roles=tuple(role_memory(spec, topology, parallel, dtype, weights)),
    )


def _serves(folder: ModelFolder) -> str:
    files = load_tokenizer(folder)
    if files is None:
        return "token ids"
    return "chat" if files.chat_templates else "text"


def role_memory(
    spec: ModelSpec, topology: Topology, parallel: FfnParallel, dtype: str, weights: str
) -> Iterable[RoleMemory]:
    """Weight bytes of each worker, in rank order, attention first."""
    attention = attention_bytes(spec, dtype, weights)
    if topology.mono:
        yield RoleMemory("attention/0", attention + ffn_bytes(spec, ShardSpec(parallel=parallel), dtype, weights))
        return
    for rank in range(topology.num_attention):
        yield RoleMemory(f"attention/{rank}", attention)
    for rank in range(topology.num_ffn):
        shard = ShardSpec(rank, topology.num_ffn, parallel)
        yield RoleMemory(f"ffn/{rank}", ffn_bytes(spec, shard, dtype, weights))


def attention_bytes(spec: ModelSpec, dtype: str, weights: str) -> int:
    """Weight bytes of the attention half."""
    total = 0
    for tensor in inventory(spec):
        if tensor.half is not Half.ATTENTION:
            continue
        if weights == "int8-all" and _is_projection(spec, tensor):
            total += _int8_bytes(tensor.shape)
        else:
            total += tensor.num_elements * (4 if _is_float32(spec, tensor) else DTYPE_BYTES[dtype])
        if weights == "int8-all" and tensor.part == "embed" and spec.tie_embeddings:
            total += _int8_bytes(tensor.shape)  # the head's copy
    return total


def _is_projection(spec: ModelSpec, tensor: TensorSpec) -> bool:
    """True for matrices of the attention half that `int8-all` rounds."""
    if tensor.part == "head":
        return True
    of_attention = tensor.part in ("q", "q_down", "q_up", "k", "v", "head_gate", "o")
    return of_attention and spec.layers[tensor.layer].attention.kind is not AttentionKind.MLA


def _int8_bytes(shape: tuple[int, ...]) -> int:
    """Bytes of 8-bit matrices with a float32 scale for each row."""
    return prod(shape[:-1]) * (shape[-1] + _INT8_SCALE_BYTES)


def _is_float32(spec: ModelSpec, tensor: TensorSpec) -> bool:
    """True for parts of the attention half that are float32 whatever the compute dtype."""
    if tensor.part == "router":
        router = spec.layers[tensor.layer].ffn.router
        return router is not None and router.dtype == "float32"
    return tensor.part == "router_bias" or tensor.part.endswith("norm")


def ffn_bytes(spec: ModelSpec, shard: ShardSpec, dtype: str, weights: str) -> int:
    """Weight bytes of one FFN rank."""
    total = 0
    for tensor in inventory(spec):
        if tensor.half is not Half.FFN:
            continue
        shape = _local_shape(tensor, spec.layers[tensor.layer].ffn, shard)
        total += prod(shape) * DTYPE_BYTES[dtype] if weights == "auto" else _int8_bytes(shape)
    return total


def _local_shape(tensor: TensorSpec, ffn: FfnSpec, shard: ShardSpec) -> tuple[int, int, int]:
    """(matrices, rows, columns) of what a rank holds of an FFN tensor."""
    num_matrices = 1
    if tensor.part.startswith("expert_"):
        num_matrices, inner = len(shard.experts(ffn.num_experts)), len(shard.expert_slice(ffn.intermediate))
    elif tensor.part.startswith("shared_"):
        inner = len(shard.shared_slice(ffn.shared_intermediate))
    else:
        inner = len(shard.dense_slice(ffn.intermediate))
    rows, columns = tensor.shape[-2:]
    return (num_matrices, rows, inner) if tensor.part.endswith("down") else (num_matrices, inner, columns)


def _layer_groups(spec: ModelSpec) -> Iterable[LayerGroup]:
    places: dict[LayerSpec, list[int]] = {}
    for idx, layer in enumerate(spec.layers):
        places.setdefault(layer, []).append(idx)
    for layer, indices in places.items():
        yield LayerGroup(
            tuple(indices),
            _attention_text(layer.attention),
            _ffn_text(layer.ffn),
            layer.attention.kv_elements_per_token,
        )


def _attention_text(attention: AttentionSpec) -> str:
    text = f"{attention.kind} {attention.num_heads} heads x {attention.head_dim}"
    if attention.kind is AttentionKind.MLA:
        text += f", latent {attention.kv_rank} + {attention.rope.rotary_dim}"
    else:
        text += f", {attention.num_kv_heads} KV"
    if attention.q_rank:
        text += f", query rank {attention.q_rank}"
    return text + (f", window {attention.window}" if attention.window else "")


def _ffn_text(ffn: FfnSpec) -> str:
    if ffn.kind is FfnKind.DENSE:
        return f"dense {ffn.intermediate}{_clamp(ffn.limit)}"
    shared = f", shared {ffn.shared_intermediate}{_clamp(ffn.shared_limit)}" if ffn.shared_intermediate else ""
    rule = ffn.router.rule if ffn.router is not None else ""
    return f"{ffn.num_experts} experts x {ffn.intermediate}{_clamp(ffn.limit)}, top {ffn.top_k} {rule}{shared}"


def _clamp(limit: float) -> str:
    return f" clamped at {limit:g}" if limit else ""

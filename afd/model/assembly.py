"""Builds the halves from a checkpoint, tensor by tensor: never more in memory than the half and one piece."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import prod

import torch
from torch import Tensor

from afd.errors import ModelError
from afd.model.attention_kinds import Attention, AttentionWeights, GqaAttention, MfaAttention, projection_parts
from afd.model.ffn import DenseFfn, Ffn, MoeFfn, SharedExpert
from afd.model.halves import AttentionHalf, AttentionLayer, FFNHalf
from afd.model.inventory import Half, TensorSpec, inventory
from afd.model.latent_attention import LatentWeights, MlaAttention
from afd.model.rope import Rotaries
from afd.model.router import Router
from afd.model.sharding import ShardSpec
from afd.model.spec import WEIGHT_TYPES, AttentionKind, AttentionSpec, FfnKind, FfnSpec
from afd.model.weights.checkpoint import Checkpoint
from afd.model.weights.source import Progress, RawTensor, Slices
from afd.ops.int8 import Int8Weight, int8_copy, int8_in
from afd.ops.ops import Ops, Rotary, SwiGlu, Weight

PIECE_ELEMENTS = 1 << 20
"""Elements read at once: bounds what loading holds beyond the half itself."""


def assemble_attention_half(
    checkpoint: Checkpoint, ops: Ops, progress: Progress | None, weights: str = "auto"
) -> AttentionHalf:
    spec = checkpoint.spec
    reader = _Reader(checkpoint, Half.ATTENTION, ops, progress, _known(weights) == "int8-all")
    rotaries = Rotaries(ops)
    embedding, head = _embedding_and_head(reader, tied=spec.tie_embeddings)
    layers = []
    for idx, layer in enumerate(spec.layers):
        attn_norm = reader.norm("attn_norm", idx)
        attention = _attention(reader, layer.attention, idx, rotaries.of(layer.attention.rope))
        ffn_norm = reader.norm("ffn_norm", idx)
        fused = attention.fused(attn_norm, ffn_norm)
        layers.append(AttentionLayer(attn_norm, attention, ffn_norm, _router(reader, layer.ffn, idx), fused))
    return AttentionHalf(ops, spec, embedding, layers, reader.norm("final_norm"), head)


def assemble_ffn_half(
    checkpoint: Checkpoint, shard: ShardSpec, ops: Ops, progress: Progress | None, weights: str = "auto"
) -> FFNHalf:
    reader = _Reader(checkpoint, Half.FFN, ops, progress, _known(weights) != "auto")
    layers = [_ffn(reader, layer.ffn, shard, idx) for idx, layer in enumerate(checkpoint.spec.layers)]
    return FFNHalf(ops, checkpoint.spec, layers)


def _known(weights: str) -> str:
    if weights not in WEIGHT_TYPES:
        raise ModelError(f"weights {weights!r} are not supported (known: {', '.join(WEIGHT_TYPES)})")
    return weights


def _embedding_and_head(reader: _Reader, tied: bool) -> tuple[Weight, Weight]:
    """One matrix for both if tied, unless the head is to be int8: rows of the embedding are never rounded."""
    if not tied:
        return reader.matrix(("embed",), -1), reader.projection(("head",), -1)
    if not reader.int8:
        embedding = reader.matrix(("embed",), -1)
        return embedding, embedding
    table = reader.stack(("embed",), -1)
    rounded = int8_copy(table, reader.room(table.shape, torch.int8), PIECE_ELEMENTS)
    return table, reader.ops.prepare(rounded)


def _attention(reader: _Reader, spec: AttentionSpec, idx: int, rope: Rotary) -> Attention:
    if spec.kind is AttentionKind.MLA:
        return _latent_attention(reader, spec, idx, rope)
    weights = AttentionWeights(reader.projection(projection_parts(spec), idx), reader.projection(("o",), idx))
    if spec.qkv_bias:
        weights.qkv_bias = reader.stack(("q_bias", "k_bias", "v_bias"), idx)
    if spec.o_bias:
        weights.o_bias = reader.load("o_bias", idx)
    if spec.qk_norm:
        weights.q_head_norm, weights.k_head_norm = (reader.norm(f"{part}_head_norm", idx) for part in ("q", "k"))
    if spec.kind is AttentionKind.GQA:
        return GqaAttention(reader.ops, spec, weights, reader.rms_eps, rope)
    weights.q_norm, weights.q_up = reader.norm("q_norm", idx), reader.projection(("q_up",), idx)
    return MfaAttention(reader.ops, spec, weights, reader.rms_eps, rope)


def _latent_attention(reader: _Reader, spec: AttentionSpec, idx: int, rope: Rotary) -> Attention:
    weights = LatentWeights(
        q_up=reader.matrix(("q_up" if spec.q_rank else "q",), idx),
        kv_down=reader.matrix(("kv_down",), idx),
        kv_norm=reader.norm("kv_norm", idx),
        kv_up=reader.load("kv_up", idx),
        o=reader.matrix(("o",), idx),
    )
    if spec.q_rank:
        weights.q_down, weights.q_norm = reader.matrix(("q_down",), idx), reader.norm("q_norm", idx)
    return MlaAttention(reader.ops, spec, weights, rope)


def _router(reader: _Reader, ffn: FfnSpec, idx: int) -> Router | None:
    if ffn.router is None:
        return None
    dtype = torch.float32 if ffn.router.dtype == "float32" else None
    bias = reader.load("router_bias", idx, dtype=torch.float32) if ffn.router.selection_bias else None
    return Router(reader.ops, ffn.router, ffn.top_k, reader.load("router", idx, dtype=dtype), bias)


def _ffn(reader: _Reader, ffn: FfnSpec, shard: ShardSpec, idx: int) -> Ffn:
    if ffn.kind is FfnKind.DENSE:
        return DenseFfn(_swiglu(reader, "", shard.dense_slice(ffn.intermediate), idx, ffn.limit))
    experts = shard.experts(ffn.num_experts)
    width = shard.expert_slice(ffn.intermediate)
    which, inner = _slice(experts), _slice(width)
    gate_up = reader.weight(("expert_gate", "expert_up"), idx, (which, inner), dim=1)
    down = reader.weight(("expert_down",), idx, (which, slice(None), inner))
    ops = reader.ops
    swiglus = [ops.swiglu(ops.prepare(gate_up[e]), ops.prepare(down[e]), ffn.limit) for e in range(len(experts))]
    shared = None
    if ffn.shared_intermediate:
        columns = shard.shared_slice(ffn.shared_intermediate)
        swiglu = _swiglu(reader, "shared_", columns, idx, ffn.shared_limit)
        shared = SharedExpert(swiglu, *shard.shared_expert_rows())
    return MoeFfn(ops, swiglus, experts.start, shared)


def _swiglu(reader: _Reader, prefix: str, columns: range, idx: int, limit: float) -> SwiGlu:
    gate_up = reader.projection((f"{prefix}gate", f"{prefix}up"), idx, (_slice(columns),))
    down = reader.projection((f"{prefix}down",), idx, (slice(None), _slice(columns)))
    return reader.ops.swiglu(gate_up, down, limit)


def _slice(part: range) -> slice:
    return slice(part.start, part.stop)


class _Reader:
    """Fills tensors of the compute dtype from one checkpoint and reports progress.

    int8: round the matrices that are read with `weight` and `projection`.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        half: Half,
        ops: Ops,
        progress: Progress | None,
        int8: bool = False,
    ):
        self._checkpoint = checkpoint
        self._tensors = {(t.part, t.layer): t for t in inventory(checkpoint.spec) if t.half is half}
        self.ops = ops
        self._progress = progress
        self.int8 = int8
        self._memory = ops.weight_memory()
        self._num_done = 0
        self.rms_eps = checkpoint.spec.rms_eps

    def norm(self, part: str, layer: int = -1) -> Tensor:
        """The factors of an RMSNorm, float32."""
        weight = self.load(part, layer, dtype=torch.float32)
        return weight + 1.0 if self._checkpoint.spec.zero_centred_norms else weight

    def load(self, part: str, layer: int = -1, slices: Slices = (), dtype: torch.dtype | None = None) -> Tensor:
        """One part, or its slice."""
        return self.stack((part,), layer, slices, dtype=dtype)

    def stack(
        self,
        parts: tuple[str, ...],
        layer: int,
        slices: Slices = (),
        dim: int = 0,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """The same slice of several parts, concatenated along `dim`, each read straight into its place."""
        out = self.room(self._shape(parts, layer, slices, dim), dtype or self.ops.dtype)
        self._fill(out, parts, layer, slices, dim)
        return out

    def matrix(self, parts: tuple[str, ...], layer: int) -> Weight:
        """Load a matrix that only `Ops.linear` and `Ops.embed` use; see `stack`."""
        return self.ops.prepare(self.stack(parts, layer))

    def projection(self, parts: tuple[str, ...], layer: int, slices: Slices = ()) -> Weight:
        """Load a matrix that only `Ops.linear` uses, and that may be rounded to 8 bits; see `weight`."""
        return self.ops.prepare(self.weight(parts, layer, slices))

    def weight(self, parts: tuple[str, ...], layer: int, slices: Slices, dim: int = 0) -> Tensor | Int8Weight:
        """Load matrices that may be rounded to 8 bits; see `stack`."""
        if not self.int8:
            return self.stack(parts, layer, slices, dim)
        out = int8_in(self.room(self._shape(parts, layer, slices, dim), torch.int8))
        self._fill(out, parts, layer, slices, dim)
        return out

    def room(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor to be filled."""
        return self._memory.empty(shape, dtype)

    def _shape(self, parts: tuple[str, ...], layer: int, slices: Slices, dim: int) -> list[int]:
        shapes = [_sliced_shape(self._tensors[part, layer].shape, slices) for part in parts]
        total = list(shapes[0])
        total[dim] = sum(shape[dim] for shape in shapes)
        return total

    def _fill(self, out: Tensor | Int8Weight, parts: tuple[str, ...], layer: int, slices: Slices, dim: int) -> None:
        start = 0
        for part in parts:
            tensor = self._tensors[part, layer]
            length = _sliced_shape(tensor.shape, slices)[dim]
            self._read(out.narrow(dim, start, length), tensor, slices)
            start += length
            self._num_done += 1
            if self._progress is not None:
                self._progress(self._num_done, len(self._tensors))

    def _read(self, out: Tensor | Int8Weight, tensor: TensorSpec, slices: Slices) -> None:
        """Read tensor[slices] into `out` in pieces along its first dimension."""
        if prod(out.shape) == 0:
            return
        offset = slices[0].start if slices and slices[0].start is not None else 0
        step = max(PIECE_ELEMENTS // prod(out.shape[1:]), 1)
        edges = [*range(0, out.shape[0], step), out.shape[0]]
        for start, stop in pairwise(edges):
            raw = self._checkpoint.read(tensor, (slice(offset + start, offset + stop), *slices[1:]))
            if isinstance(out, Int8Weight):
                out.store(start, stop, _to_torch(raw))
            else:
                out[start:stop] = _to_torch(raw)
        if self._checkpoint.naming.interleaved_rope_rows and tensor.part in ("q", "k"):
            head_dim = self._checkpoint.spec.layers[tensor.layer].attention.head_dim
            for rows in (out.values, out.scales[:, None]) if isinstance(out, Int8Weight) else (out,):
                rows.copy_(_half_split_rows(rows, head_dim))


def _sliced_shape(shape: tuple[int, ...], slices: Slices) -> tuple[int, ...]:
    full = slices + (slice(None),) * (len(shape) - len(slices))
    return tuple(len(range(*s.indices(size))) for s, size in zip(full, shape, strict=True))


def _half_split_rows(rows: Tensor, head_dim: int) -> Tensor:
    """Undo llama.cpp's row order, in which rotary pairs are neighbours: (2i, 2i+1) back to (i, i + head_dim/2)."""
    return rows.view(-1, head_dim // 2, 2, rows.shape[1]).transpose(1, 2).reshape(rows.shape)


def _to_torch(raw: RawTensor) -> Tensor:
    if raw.is_bfloat16:
        return torch.from_numpy(raw.array.view("int16")).view(torch.bfloat16)
    return torch.from_numpy(raw.array)

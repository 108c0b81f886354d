"""Builds the halves from a checkpoint, tensor by tensor: never more in memory than the half and one piece."""

from __future__ import annotations

from itertools import pairwise
from math import prod

import torch
from torch import Tensor

from afd.errors import ModelError
from afd.model.attention_kinds import PROJECTION_PARTS, Attention, GqaAttention, MfaAttention
from afd.model.ffn import DenseFfn, Ffn, MoeFfn, SharedExpert, SwiGlu
from afd.model.halves import AttentionHalf, AttentionLayer, FFNHalf
from afd.model.inventory import Half, TensorSpec, inventory
from afd.model.loading import Progress
from afd.model.router import Router
from afd.model.sharding import ShardSpec
from afd.model.spec import AttentionKind, AttentionSpec, FfnKind, FfnSpec
from afd.model.weights.checkpoint import Checkpoint
from afd.model.weights.source import RawTensor, Slices

PIECE_ELEMENTS = 1 << 20
"""Elements read at once: bounds what loading holds beyond the half itself."""

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def assemble_attention_half(
    checkpoint: Checkpoint, dtype: str | torch.dtype, device: str, progress: Progress | None
) -> AttentionHalf:
    spec = checkpoint.spec
    reader = _Reader(checkpoint, Half.ATTENTION, _compute_dtype(dtype), device, progress)
    embedding = reader.load("embed")
    layers = []
    for idx, layer in enumerate(spec.layers):
        attn_norm = reader.load("attn_norm", idx, dtype=torch.float32)
        attention = _attention(reader, layer.attention, idx)
        ffn_norm = reader.load("ffn_norm", idx, dtype=torch.float32)
        layers.append(AttentionLayer(attn_norm, attention, ffn_norm, _router(reader, layer.ffn, idx)))
    final_norm = reader.load("final_norm", dtype=torch.float32)
    head = embedding if spec.tie_embeddings else reader.load("head")
    return AttentionHalf(spec, embedding, layers, final_norm, head)


def assemble_ffn_half(
    checkpoint: Checkpoint,
    shard: ShardSpec,
    dtype: str | torch.dtype,
    device: str,
    progress: Progress | None,
) -> FFNHalf:
    compute_dtype = _compute_dtype(dtype)
    reader = _Reader(checkpoint, Half.FFN, compute_dtype, device, progress)
    layers = [_ffn(reader, layer.ffn, shard, idx) for idx, layer in enumerate(checkpoint.spec.layers)]
    return FFNHalf(checkpoint.spec, layers, compute_dtype)


def _attention(reader: _Reader, spec: AttentionSpec, idx: int) -> Attention:
    qkv = reader.stack(PROJECTION_PARTS[spec.kind], idx)
    o = reader.load("o", idx)
    if spec.kind is AttentionKind.GQA:
        return GqaAttention(spec, qkv, o)
    q_norm = reader.load("q_norm", idx, dtype=torch.float32)
    return MfaAttention(spec, qkv, q_norm, reader.load("q_up", idx), o, reader.rms_eps)


def _router(reader: _Reader, ffn: FfnSpec, idx: int) -> Router | None:
    if ffn.router is None:
        return None
    dtype = torch.float32 if ffn.router.dtype == "float32" else None
    return Router(ffn.router, ffn.top_k, reader.load("router", idx, dtype=dtype))


def _ffn(reader: _Reader, ffn: FfnSpec, shard: ShardSpec, idx: int) -> Ffn:
    if ffn.kind is FfnKind.DENSE:
        return DenseFfn(_swiglu(reader, "", shard.dense_slice(ffn.intermediate), idx))
    experts = shard.experts(ffn.num_experts)
    width = shard.expert_slice(ffn.intermediate)
    which, columns = _slice(experts), _slice(width)
    gate_up = reader.stack(("expert_gate", "expert_up"), idx, (which, columns), dim=1)
    down = reader.load("expert_down", idx, (which, slice(None), columns))
    shared = None
    if ffn.shared_intermediate:
        swiglu = _swiglu(reader, "shared_", shard.shared_slice(ffn.shared_intermediate), idx)
        shared = SharedExpert(swiglu, *shard.shared_expert_rows())
    return MoeFfn(gate_up, down, experts.start, shared)


def _swiglu(reader: _Reader, prefix: str, columns: range, idx: int) -> SwiGlu:
    gate_up = reader.stack((f"{prefix}gate", f"{prefix}up"), idx, (_slice(columns),))
    return SwiGlu(gate_up, reader.load(f"{prefix}down", idx, (slice(None), _slice(columns))))


def _slice(part: range) -> slice:
    return slice(part.start, part.stop)


def _compute_dtype(dtype: str | torch.dtype) -> torch.dtype:
    resolved = _DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if resolved is None or resolved not in _DTYPES.values():
        raise ModelError(f"compute dtype {dtype} is not supported (known: {', '.join(_DTYPES)})")
    return resolved


class _Reader:
    """Fills tensors of the compute dtype from one checkpoint and reports progress."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        half: Half,
        dtype: torch.dtype,
        device: str,
        progress: Progress | None,
    ):
        self._checkpoint = checkpoint
        self._tensors = {(t.part, t.layer): t for t in inventory(checkpoint.spec) if t.half is half}
        self._dtype = dtype
        self._device = device
        self._progress = progress
        self._num_done = 0
        self.rms_eps = checkpoint.spec.rms_eps

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
        tensors = [self._tensors[part, layer] for part in parts]
        shapes = [_sliced_shape(tensor.shape, slices) for tensor in tensors]
        total = list(shapes[0])
        total[dim] = sum(shape[dim] for shape in shapes)
        out = torch.empty(total, dtype=dtype or self._dtype, device=self._device)
        start = 0
        for tensor, shape in zip(tensors, shapes, strict=True):
            self._fill(out.narrow(dim, start, shape[dim]), tensor, slices)
            start += shape[dim]
            self._num_done += 1
            if self._progress is not None:
                self._progress(self._num_done, len(self._tensors))
        return out

    def _fill(self, out: Tensor, tensor: TensorSpec, slices: Slices) -> None:
        """Read tensor[slices] into `out` in pieces along its first dimension."""
        if out.numel() == 0:
            return
        offset = slices[0].start if slices and slices[0].start is not None else 0
        step = max(PIECE_ELEMENTS // prod(out.shape[1:]), 1)
        edges = [*range(0, out.shape[0], step), out.shape[0]]
        for start, stop in pairwise(edges):
            raw = self._checkpoint.read(tensor, (slice(offset + start, offset + stop), *slices[1:]))
            out[start:stop] = _to_torch(raw)
        if self._checkpoint.naming.interleaved_rope_rows and tensor.part in ("q", "k"):
            head_dim = self._checkpoint.spec.layers[tensor.layer].attention.head_dim
            out.copy_(_half_split_rows(out, head_dim))


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

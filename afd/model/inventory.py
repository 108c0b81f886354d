"""Every tensor that a model of a given spec has: its part, layer, shape, and which half needs it.

The one list that the loaders, the header check, the parameter counts and the dummy weights share. Parts are
AFD's own names; a family maps them to the names in its checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from math import prod

from afd.model.spec import AttentionKind, AttentionSpec, FfnKind, LayerSpec, ModelSpec


class Half(StrEnum):
    ATTENTION = "attention"
    FFN = "ffn"


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """shape: [out, in] for matrices, [experts, out, in] for packed experts.
    layer: -1 outside the layers.
    """

    part: str
    layer: int
    shape: tuple[int, ...]
    half: Half

    @property
    def num_elements(self) -> int:
        return prod(self.shape)


def inventory(spec: ModelSpec) -> tuple[TensorSpec, ...]:
    """All tensors of the model, in the order in which a token meets them."""
    return tuple(_tensors(spec))


def _tensors(spec: ModelSpec) -> Iterator[TensorSpec]:
    yield TensorSpec("embed", -1, (spec.vocab_size, spec.hidden), Half.ATTENTION)
    for idx, layer in enumerate(spec.layers):
        for part, shape in _attention_parts(spec.hidden, layer):
            yield TensorSpec(part, idx, shape, Half.ATTENTION)
        for part, shape in _ffn_parts(spec.hidden, layer):
            yield TensorSpec(part, idx, shape, Half.FFN)
    yield TensorSpec("final_norm", -1, (spec.hidden,), Half.ATTENTION)
    if not spec.tie_embeddings:
        yield TensorSpec("head", -1, (spec.vocab_size, spec.hidden), Half.ATTENTION)


def _attention_parts(hidden: int, layer: LayerSpec) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "attn_norm", (hidden,)
    yield from _projections(hidden, layer.attention)
    yield "ffn_norm", (hidden,)
    if layer.ffn.router is not None:
        yield "router", (layer.ffn.num_experts, hidden)
        if layer.ffn.router.selection_bias:
            yield "router_bias", (layer.ffn.num_experts,)


def _projections(hidden: int, attention: AttentionSpec) -> Iterator[tuple[str, tuple[int, ...]]]:
    q_width = attention.num_heads * attention.head_dim
    k_width = attention.num_kv_heads * attention.head_dim
    v_width = attention.num_kv_heads * attention.v_head_dim
    if attention.q_rank:
        yield "q_down", (attention.q_rank, hidden)
        yield "q_norm", (attention.q_rank,)
        yield "q_up", (q_width, attention.q_rank)
    else:
        yield "q", (q_width, hidden)
    if attention.kind is AttentionKind.MLA:
        nope_dim = attention.head_dim - attention.rope.rotary_dim
        yield "kv_down", (attention.cached_k_dim, hidden)
        yield "kv_norm", (attention.kv_rank,)
        yield "kv_up", (attention.num_heads * (nope_dim + attention.v_head_dim), attention.kv_rank)
    else:
        yield "k", (k_width, hidden)
        yield "v", (v_width, hidden)
    if attention.qkv_bias:
        yield "q_bias", (q_width,)
        yield "k_bias", (k_width,)
        yield "v_bias", (v_width,)
    if attention.qk_norm:
        yield "q_head_norm", (attention.head_dim,)
        yield "k_head_norm", (attention.head_dim,)
    if attention.head_gate:
        yield "head_gate", (attention.num_heads, hidden)
    yield "o", (hidden, attention.num_heads * attention.v_head_dim)
    if attention.o_bias:
        yield "o_bias", (hidden,)


def _ffn_parts(hidden: int, layer: LayerSpec) -> Iterator[tuple[str, tuple[int, ...]]]:
    ffn = layer.ffn
    if ffn.kind is FfnKind.DENSE:
        yield from _swiglu("", hidden, ffn.intermediate)
        return
    yield "expert_gate", (ffn.num_experts, ffn.intermediate, hidden)
    yield "expert_up", (ffn.num_experts, ffn.intermediate, hidden)
    yield "expert_down", (ffn.num_experts, hidden, ffn.intermediate)
    if ffn.shared_intermediate:
        yield from _swiglu("shared_", hidden, ffn.shared_intermediate)


def _swiglu(prefix: str, hidden: int, intermediate: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{prefix}gate", (intermediate, hidden)
    yield f"{prefix}up", (intermediate, hidden)
    yield f"{prefix}down", (hidden, intermediate)


@dataclass(frozen=True, slots=True)
class ParameterCounts:
    """active: read for one token, without the input embedding (of which one row is read)."""

    total: int
    active: int
    attention: int
    ffn: int


def count_parameters(spec: ModelSpec) -> ParameterCounts:
    total = active = attention = 0
    for tensor in inventory(spec):
        size = tensor.num_elements
        total += size
        attention += size if tensor.half is Half.ATTENTION else 0
        if tensor.part.startswith("expert_"):
            ffn = spec.layers[tensor.layer].ffn
            active += size // ffn.num_experts * ffn.top_k
        elif tensor.part != "embed" or spec.tie_embeddings:
            active += size
    return ParameterCounts(total=total, active=active, attention=attention, ffn=total - attention)

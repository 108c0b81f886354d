"""Attention kinds: how q, k and v come out of a normed hidden state. One class a kind.

Each is called with h [n, hidden], writes this step's K and V into the cache and returns [n, hidden], the value to
add to the residual. `fused` offers the same together with its residual and the norms on both sides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from afd.kv.cache import KVCache
from afd.model.batch import AttentionBatch
from afd.model.spec import AttentionKind, AttentionSpec
from afd.ops.ops import KvWrite, LayerBatch, LayerCall, LayerShape, LayerWeights, Ops, Rotary, Rotation, Weight


class Attention(Protocol):
    """One layer's attention."""

    def __call__(self, h: Tensor, batch: AttentionBatch, cache: KVCache, layer_idx: int) -> Tensor: ...

    def fused(self, attn_norm: Tensor, ffn_norm: Tensor) -> FusedAttention | None: ...


@dataclass(slots=True)
class AttentionWeights:
    """What a layer of kind GQA or MFA has; None where its spec says that it has none.

    qkv: the projections of `projection_parts`, stacked along rows.  q_norm [q_rank], q_up [q width, q_rank]: MFA.
    q_head_norm, k_head_norm [head_dim].  qkv_bias [q + k + v width], o_bias [hidden].  Norms are float32.
    """

    qkv: Weight
    o: Weight
    q_norm: Tensor | None = None
    q_up: Weight | None = None
    q_head_norm: Tensor | None = None
    k_head_norm: Tensor | None = None
    qkv_bias: Tensor | None = None
    o_bias: Tensor | None = None


class FusedAttention:
    """A layer's attention with its residual and the norms on both sides, in one call."""

    def __init__(self, call: LayerCall, spec: AttentionSpec, rope: Rotary):
        self.call = call
        self._spec = spec
        self._rope = rope

    def takes(self, partials: Sequence[Tensor], cache: KVCache, layer_idx: int) -> bool:
        """Whether this cache can be read and written in such a call, and so many partials added."""
        return self.call.takes(len(partials), cache.k[layer_idx], cache.v[layer_idx])

    def __call__(
        self, x: Tensor, partials: Sequence[Tensor], batch: AttentionBatch, cache: KVCache, layer_idx: int
    ) -> Tensor:
        """Add partials and attention to the residual x [n, hidden] float32 in place -> the FFN's rows [n, hidden]."""
        return self.call(x, partials, self.tokens(batch), cache.k[layer_idx], cache.v[layer_idx])

    def tokens(self, batch: AttentionBatch) -> LayerBatch:
        """The batch as this layer reads it."""
        return batch.of_layer(self._spec.window).for_call(self._rope, self.call.batch)

    def reads_like(self, other: FusedAttention) -> bool:
        """Whether `tokens` are the same for both."""
        return self._rope is other._rope and bool(self._spec.window) == bool(other._spec.window)


class _RotaryAttention:
    """What GQA and MFA share: head norms, rotation, cache write, paged attention, head gate, output projection."""

    def __init__(self, ops: Ops, spec: AttentionSpec, weights: AttentionWeights, eps: float, rope: Rotary):
        self._ops = ops
        self._spec = spec
        self._w = weights
        self._eps = eps
        self._rope = rope
        first = spec.q_rank or spec.num_heads * spec.head_dim
        self._widths = [first, spec.num_kv_heads * spec.head_dim, spec.num_kv_heads * spec.v_head_dim]
        if spec.head_gate:
            self._widths.append(spec.num_heads)

    def _project(self, h: Tensor) -> list[Tensor]:
        """q (or its low-rank form), k, v, and the head gate's logits where there is one: [n, width] each."""
        projected = self._ops.linear(h, self._w.qkv)
        if self._w.qkv_bias is not None:
            projected[:, : self._w.qkv_bias.shape[0]] += self._w.qkv_bias
        return list(torch.split(projected, self._widths, dim=1))

    def _attend(self, q: Tensor, parts: list[Tensor], batch: AttentionBatch, cache: KVCache, layer_idx: int) -> Tensor:
        """q [n, heads * head_dim]; parts: k, v and perhaps the gate -> [n, hidden]."""
        spec = self._spec
        q = q.view(-1, spec.num_heads, spec.head_dim)
        k = parts[0].view(-1, spec.num_kv_heads, spec.head_dim)
        v = parts[1].view(-1, spec.num_kv_heads, spec.v_head_dim)
        if self._w.q_head_norm is not None and self._w.k_head_norm is not None:
            q = self._normed_heads(q, self._w.q_head_norm)
            k = self._normed_heads(k, self._w.k_head_norm)
        k_cache, v_cache = cache.k[layer_idx], cache.v[layer_idx]
        rotation = Rotation(*batch.rope_tables(self._rope), spec.rope.interleaved)
        batch = batch.of_layer(spec.window)
        q = self._ops.rope_write_kv(q, KvWrite(k, v, k_cache, v_cache, batch.slot_mapping), rotation)
        out = self._ops.paged_attention(batch.attention(q, k_cache, v_cache, spec.scale, spec.window))
        if spec.head_gate:
            out = out * torch.sigmoid(parts[2])[:, :, None]
        projected = self._ops.linear(out.flatten(1), self._w.o)
        return projected if self._w.o_bias is None else projected + self._w.o_bias

    def fused(self, attn_norm: Tensor, ffn_norm: Tensor) -> FusedAttention | None:
        """The whole layer in one call, where the ops can do that for its weights and shape."""
        w, spec = self._w, self._spec
        weights = LayerWeights(
            attn_norm,
            ffn_norm,
            w.qkv,
            w.o,
            w.qkv_bias,
            w.q_norm,
            w.q_up,
            w.q_head_norm,
            w.k_head_norm,
            w.o_bias,
        )
        shape = LayerShape(
            num_heads=spec.num_heads,
            num_kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
            v_head_dim=spec.v_head_dim,
            q_rank=spec.q_rank or 0,
            head_gate=spec.head_gate,
            rotary_half=self._rope.half,
            interleaved=spec.rope.interleaved,
            window=spec.window,
            scale=spec.scale,
            eps=self._eps,
        )
        call = self._ops.attention_layer(weights, shape)
        return None if call is None else FusedAttention(call, spec, self._rope)

    def _normed_heads(self, heads: Tensor, weight: Tensor) -> Tensor:
        """RMSNorm of each head of [n, num_heads, head_dim]."""
        return self._ops.norm(heads.reshape(-1, heads.shape[2]).contiguous(), weight, self._eps).view(heads.shape)


class GqaAttention(_RotaryAttention):
    """q, k, v straight from the hidden state."""

    def __call__(self, h: Tensor, batch: AttentionBatch, cache: KVCache, layer_idx: int) -> Tensor:
        q, *parts = self._project(h)
        return self._attend(q, parts, batch, cache, layer_idx)


class MfaAttention(_RotaryAttention):
    """Step-3 (report, section 4): c = norm(W_q h), q = W_wq c; K and V are one head shared by all query heads."""

    def __call__(self, h: Tensor, batch: AttentionBatch, cache: KVCache, layer_idx: int) -> Tensor:
        assert self._w.q_norm is not None and self._w.q_up is not None, "MFA has a low-rank query"
        c, *parts = self._project(h)
        q = self._ops.linear(self._ops.norm(c.contiguous(), self._w.q_norm, self._eps), self._w.q_up)
        return self._attend(q, parts, batch, cache, layer_idx)


def projection_parts(spec: AttentionSpec) -> tuple[str, ...]:
    """Parts that a layer of kind GQA or MFA reads with one GEMM."""
    query = "q_down" if spec.kind is AttentionKind.MFA else "q"
    return (query, "k", "v", "head_gate") if spec.head_gate else (query, "k", "v")

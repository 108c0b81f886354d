"""Attention kinds: how q, k and v come out of a normed hidden state. One class a kind, one registry.

Each is called with h [n, hidden], writes this step's K and V into the cache and returns [n, hidden], the value to
add to the residual.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from afd.kv.cache import KVCache
from afd.model.attention_core import paged_attention, rope_write_kv
from afd.model.batch import AttentionBatch
from afd.model.primitives import linear, rms_norm
from afd.model.rope import inverse_frequencies
from afd.model.spec import AttentionKind, AttentionSpec


class Attention(Protocol):
    """One layer's attention."""

    def __call__(self, h: Tensor, batch: AttentionBatch, cache: KVCache, layer_idx: int) -> Tensor: ...


class _RotaryAttention:
    """What GQA and MFA share: rotation, cache write, paged attention, output projection."""

    def __init__(self, spec: AttentionSpec, o: Tensor):
        self._spec = spec
        self._o = o
        self._inv_freq = inverse_frequencies(spec.rope).to(o.device)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, batch: AttentionBatch, cache: KVCache, layer_idx: int) -> Tensor:
        """q, k, v [n, heads * width] -> [n, hidden]."""
        spec = self._spec
        q = q.view(-1, spec.num_heads, spec.head_dim)
        k = k.view(-1, spec.num_kv_heads, spec.head_dim)
        v = v.view(-1, spec.num_kv_heads, spec.v_head_dim)
        k_cache, v_cache = cache.k[layer_idx], cache.v[layer_idx]
        tables = batch.rope_tables(spec.rope, self._inv_freq)
        q = rope_write_kv(q, k, v, tables, spec.rope.interleaved, k_cache, v_cache, batch)
        out = paged_attention(q, k_cache, v_cache, batch, spec.scale, spec.window)
        return linear(out.flatten(1), self._o)


class GqaAttention(_RotaryAttention):
    """qkv [(num_heads + num_kv_heads) * head_dim + num_kv_heads * v_head_dim, hidden]; o [hidden, q width]."""

    def __init__(self, spec: AttentionSpec, qkv: Tensor, o: Tensor):
        super().__init__(spec, o)
        self._qkv = qkv
        self._widths = _qkv_widths(spec, spec.num_heads * spec.head_dim)

    def __call__(self, h: Tensor, batch: AttentionBatch, cache: KVCache, layer_idx: int) -> Tensor:
        q, k, v = torch.split(linear(h, self._qkv), self._widths, dim=1)
        return self._attend(q, k, v, batch, cache, layer_idx)


class MfaAttention(_RotaryAttention):
    """Step-3 (report, section 4): c = norm(W_q h), q = W_wq c; K and V are one head shared by all query heads.

    qkv [q_rank + head_dim + v_head_dim, hidden]; q_norm [q_rank] float32; q_up [num_heads * head_dim, q_rank].
    """

    def __init__(self, spec: AttentionSpec, qkv: Tensor, q_norm: Tensor, q_up: Tensor, o: Tensor, eps: float):
        super().__init__(spec, o)
        self._qkv = qkv
        self._q_norm = q_norm
        self._q_up = q_up
        self._eps = eps
        self._widths = _qkv_widths(spec, spec.q_rank)

    def __call__(self, h: Tensor, batch: AttentionBatch, cache: KVCache, layer_idx: int) -> Tensor:
        c, k, v = torch.split(linear(h, self._qkv), self._widths, dim=1)
        q = linear(rms_norm(c.contiguous(), self._q_norm, self._eps), self._q_up)
        return self._attend(q, k, v, batch, cache, layer_idx)


def _qkv_widths(spec: AttentionSpec, q_width: int) -> list[int]:
    return [q_width, spec.num_kv_heads * spec.head_dim, spec.num_kv_heads * spec.v_head_dim]


PROJECTION_PARTS: dict[AttentionKind, tuple[str, str, str]] = {
    AttentionKind.GQA: ("q", "k", "v"),
    AttentionKind.MFA: ("q_down", "k", "v"),
}
"""Parts that each kind reads with one GEMM: stacked along rows into its `qkv` matrix."""

"""MLA (DeepSeek-V2 report, section 2.1) with the weights absorbed: the cache holds one latent per token, nothing else.

A head's keys and values are linear images of the latent: k = W_uk c, v = W_uv c. Instead of computing them for every
cached token, the query is taken to the latent's space (q' = W_uk^T q) and the attended latent is taken to the values'
(o = W_uv c'): attention with one shared head of width kv_rank + rotary_dim, whose values are its first kv_rank columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from afd.kv.cache import KVCache
from afd.model.batch import AttentionBatch
from afd.model.spec import AttentionSpec
from afd.ops.ops import Ops, Rotary, Weight
from afd.ops.rope import rotate

LATENT_NORM_EPS = 1e-6
"""Epsilon of q_norm and kv_norm, fixed by the architecture, whatever rms_norm_eps is for the other norms."""


@dataclass(slots=True)
class LatentWeights:
    """q_down, q_norm: None where the query is not low-rank; then q_up [q width, hidden] takes the hidden state.

    kv_down [kv_rank + rotary_dim, hidden]; kv_norm [kv_rank]; kv_up [heads * (nope_dim + v_head_dim), kv_rank].
    """

    q_up: Weight
    kv_down: Weight
    kv_norm: Tensor
    kv_up: Tensor
    o: Weight
    q_down: Weight | None = None
    q_norm: Tensor | None = None


class MlaAttention:
    """kv_up is kept as its two halves: key_up [heads, nope_dim, kv_rank], value_up [heads, kv_rank, v_head_dim]."""

    def __init__(self, ops: Ops, spec: AttentionSpec, weights: LatentWeights, rope: Rotary):
        self._ops = ops
        self._spec = spec
        self._w = weights
        self._nope_dim = spec.head_dim - spec.rope.rotary_dim
        self._rope = rope
        per_head = weights.kv_up.view(spec.num_heads, self._nope_dim + spec.v_head_dim, spec.kv_rank)
        self._key_up = per_head[:, : self._nope_dim]
        self._value_up = per_head[:, self._nope_dim :].transpose(1, 2)

    def __call__(self, h: Tensor, batch: AttentionBatch, cache: KVCache, layer_idx: int) -> Tensor:
        spec, rope = self._spec, self._spec.rope
        batch = batch.of_layer(spec.window)
        tables = batch.rope_tables(self._rope)
        latent, k_rotary = torch.split(self._ops.linear(h, self._w.kv_down), [spec.kv_rank, rope.rotary_dim], dim=1)
        latent = self._ops.norm(latent.contiguous(), self._w.kv_norm, LATENT_NORM_EPS)
        k_rotary = rotate(k_rotary[:, None], *tables, rope.interleaved)[:, 0]
        k_cache = cache.k[layer_idx]
        self._ops.write_rows(torch.cat((latent, k_rotary), dim=1)[:, None], k_cache, batch.slot_mapping)

        q = self._query(h).view(-1, spec.num_heads, spec.head_dim)
        q_rotary = rotate(q[:, :, self._nope_dim :], *tables, rope.interleaved)
        q_latent = torch.bmm(q[:, :, : self._nope_dim].transpose(0, 1), self._key_up).transpose(0, 1)
        q = torch.cat((q_latent, q_rotary), dim=2)
        attention = batch.attention(q, k_cache, k_cache[..., : spec.kv_rank], spec.scale, spec.window)
        attended = self._ops.paged_attention(attention)
        out = torch.bmm(attended.transpose(0, 1), self._value_up).transpose(0, 1)
        return self._ops.linear(out.flatten(1), self._w.o)

    def fused(self, attn_norm: Tensor, ffn_norm: Tensor) -> None:
        """No `Ops` has such a layer in one call."""

    def _query(self, h: Tensor) -> Tensor:
        """[n, heads * head_dim]."""
        if self._w.q_down is None or self._w.q_norm is None:
            return self._ops.linear(h, self._w.q_up)
        rank = self._ops.norm(self._ops.linear(h, self._w.q_down), self._w.q_norm, LATENT_NORM_EPS)
        return self._ops.linear(rank, self._w.q_up)

"""Attention kinds as the planner sees them: weights, cached elements and FLOPs, nothing else.

A group is a number of layers with the same attention. Each kind states four facts; the sums over context, precision
and layers are written once, in `AttentionGroup`. Formulas: Step-3 report (arXiv 2507.19427) section 4.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

Positive = Annotated[int, msgspec.Meta(ge=1)]
NonNegative = Annotated[int, msgspec.Meta(ge=0)]

LIGHTNING_STATE_BYTES = 4
"""A lightning layer keeps its state in float32 whatever the KV cache holds."""


class AttentionGroup(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag_field="kind"):
    """`layers` equal attention layers. A kind overrides what it has; this base has no weights and no cache.

    head_dim: of queries and keys (without MLA's rotary part).
    window: keys a query sees, 0 = all.
    kv_bytes: bytes of a cached element in the published deployment (1 = fp8 or int8).
    """

    layers: Positive
    heads: Positive
    head_dim: Positive
    window: NonNegative = 0
    kv_bytes: Annotated[float, msgspec.Meta(gt=0)] = 1.0

    def linear_weights(self, hidden: int) -> int:
        """Weights of one layer's projections."""
        return 0

    @property
    def output_width(self) -> int:
        """Input width of the output projection."""
        return self.heads * self.head_dim

    @property
    def kv_elements(self) -> int:
        """Cached elements per token and layer."""
        return 0

    @property
    def kv_shards(self) -> int:
        """Chips over which tensor parallelism can spread the cache; further ones hold copies."""
        return self.heads

    @property
    def flops_per_key(self) -> int:
        """FLOPs of one query token against one cached token, one layer."""
        return 0

    @property
    def prefill_flops_per_key(self) -> int:
        """FLOPs per key of a prompt's row: `flops_per_key`, unless it is computed in another form than decodes."""
        return self.flops_per_key

    def prefill_flops(self, prompt: float) -> float:
        """FLOPs of the mean row of a prompt, all layers of the group: half of the prompt before it, or its window."""
        keys = prompt / 2
        if self.window and prompt > self.window:
            keys = self.window - self.window**2 / (2 * prompt)
        return self.layers * (self.prefill_flops_per_key * keys + self.state_flops)

    @property
    def state_elements(self) -> int:
        """Elements of a recurrent state per request and layer, read and written every step."""
        return 0

    @property
    def state_flops(self) -> int:
        """FLOPs of updating and reading that state for one token, one layer."""
        return 0

    def _keys(self, context: float) -> float:
        return min(context, self.window) if self.window else context

    def resident_bytes(self, context: float, kv_bytes: float | None = None) -> float:
        """Bytes one request of `context` tokens holds, all layers of the group.

        kv_bytes: None = as published.
        """
        cached = self.kv_elements * self._keys(context) * (self.kv_bytes if kv_bytes is None else kv_bytes)
        return self.layers * (cached + self.state_elements * LIGHTNING_STATE_BYTES)

    def moved_bytes(self, context: float, kv_bytes: float | None = None) -> float:
        """Bytes one decoded token moves between memory and chip: the cache once, the state twice."""
        return self.resident_bytes(context, kv_bytes) + self.layers * self.state_elements * LIGHTNING_STATE_BYTES

    def core_flops(self, context: float) -> float:
        """FLOPs of one decoded token's scores and values, all layers of the group."""
        return self.layers * (self.flops_per_key * self._keys(context) + self.state_flops)


class Gqa(AttentionGroup, frozen=True, kw_only=True, tag="gqa"):
    """Queries, keys and values straight from the hidden state; multi-head (kv_heads = heads) to multi-query (1).

    head_gate: one extra projection to a gate per head (Step-3.5).
    """

    kv_heads: Positive
    head_gate: bool = False

    def linear_weights(self, hidden: int) -> int:
        qkv = hidden * (self.heads + 2 * self.kv_heads) * self.head_dim
        return qkv + self.output_width * hidden + (hidden * self.heads if self.head_gate else 0)

    @property
    def kv_elements(self) -> int:
        return 2 * self.kv_heads * self.head_dim

    @property
    def kv_shards(self) -> int:
        return self.kv_heads

    @property
    def flops_per_key(self) -> int:
        return 4 * self.heads * self.head_dim


class Mfa(AttentionGroup, frozen=True, kw_only=True, tag="mfa"):
    """Step-3: a low-rank query of width `q_rank`, and `kv_heads` (1) K and V heads shared by all query heads."""

    kv_heads: Positive
    q_rank: Positive

    def linear_weights(self, hidden: int) -> int:
        narrow = self.q_rank + 2 * self.kv_heads * self.head_dim
        return hidden * narrow + self.q_rank * self.output_width + self.output_width * hidden

    @property
    def kv_elements(self) -> int:
        return 2 * self.kv_heads * self.head_dim

    @property
    def kv_shards(self) -> int:
        return self.kv_heads

    @property
    def flops_per_key(self) -> int:
        return 4 * self.heads * self.head_dim


class Mla(AttentionGroup, frozen=True, kw_only=True, tag="mla"):
    """Latent attention, absorbed form: `kv_rank` + `rope_dim` cached elements, shared by all heads.

    q_rank: 0 = the query is projected straight from the hidden state.
    """

    rope_dim: Positive
    v_head_dim: Positive
    kv_rank: Positive
    q_rank: NonNegative = 0

    def linear_weights(self, hidden: int) -> int:
        wide = self.heads * (self.head_dim + self.rope_dim)
        query = hidden * self.q_rank + self.q_rank * wide if self.q_rank else hidden * wide
        latent = hidden * (self.kv_rank + self.rope_dim)
        up = self.kv_rank * self.heads * (self.head_dim + self.v_head_dim)
        return query + latent + up + self.output_width * hidden

    @property
    def output_width(self) -> int:
        return self.heads * self.v_head_dim

    @property
    def kv_elements(self) -> int:
        return self.kv_rank + self.rope_dim

    @property
    def kv_shards(self) -> int:
        return 1

    @property
    def flops_per_key(self) -> int:
        """The report counts the value product as wide as the score (576, not 512): 5.6 % above the exact count."""
        return 4 * self.heads * (self.kv_rank + self.rope_dim)

    @property
    def prefill_flops_per_key(self) -> int:
        """Keys and values of each head at full width: no latent is multiplied."""
        return 2 * self.heads * (self.head_dim + self.rope_dim + self.v_head_dim)


class Lightning(AttentionGroup, frozen=True, kw_only=True, tag="lightning"):
    """Linear attention with a [head_dim, head_dim] float32 state per head (MiniMax): q, k, v, output gate, output."""

    def linear_weights(self, hidden: int) -> int:
        return 5 * hidden * self.output_width

    @property
    def state_elements(self) -> int:
        return self.heads * self.head_dim**2

    @property
    def state_flops(self) -> int:
        return 10 * self.heads * self.head_dim**2


AnyAttention = Gqa | Mfa | Mla | Lightning

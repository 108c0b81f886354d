"""What a model computes with: the `Ops` of one machine, and the records that every implementation of them takes.

`reference.ReferenceOps` is the oracle, `torch_ops.TorchOps` runs on any device, `cpu.CpuOps` calls native code.
`select.select` chooses one, once; the halves of a model are handed it, and never ask what the machine is.

Activations are float32 or bfloat16 (`Ops.dtype`), on `Ops.device`; sums are float32, rounded once on the way out.
All functions may be called from any thread and write only to what they are documented to write to.

The KV cache of one layer is two contiguous tensors, `k_cache` `[num_blocks, num_kv_heads, block_size, head_dim]` and
`v_cache`, whose head_dim may differ. The slot of a token is block * block_size + offset.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from afd.ops.int8 import Int8Weight
from afd.ops.sample_rows import SampledRows, SampleRow


class Weight(Protocol):
    """A matrix [out, in] in the form that the `Ops` read which made it (`Ops.prepare`). A plain tensor is one."""

    @property
    def shape(self) -> torch.Size: ...


class RowMax(NamedTuple):
    """The first NaN of each row of a matrix, or else the first of its largest elements.

    largest: [m] float32.
    idx: [m] int64, the column it is in.
    """

    largest: Tensor
    idx: Tensor

    @classmethod
    def of_nothing(cls, num_rows: int, device: torch.device | None = None) -> RowMax:
        """The maxima of matrices without columns, with which `join` begins."""
        largest = torch.full((num_rows,), -math.inf, dtype=torch.float32, device=device)
        return cls(largest, torch.zeros(num_rows, dtype=torch.int64, device=device))

    def join(self, later: RowMax) -> None:
        """Become the maxima of both matrices side by side. later: of the columns behind this one's, numbered on."""
        better = (later.largest > self.largest) | (later.largest.isnan() & ~self.largest.isnan())
        for old, new in zip(self, later, strict=True):
            torch.where(better, new, old, out=old)


class AttentionArgs(NamedTuple):
    """Causal attention of a mixed batch: sequences with one query token (decode) and with many (prefill chunks).

    q: [num_tokens, num_heads, head_dim], the sequences' tokens one after another; tokens may be apart in memory.
    block_table: int32 [num_seqs, max_blocks]; a sequence's row names the blocks of its positions in order.
    seq_lens: int32 [num_seqs], context lengths including this step's tokens, whose K and V are already written.
    query_start: int32 [num_seqs + 1]; sequence i has the tokens query_start[i] to query_start[i + 1], its last ones.
        Tokens behind query_start[-1] are padding: what comes out for them has no meaning.
    window: a query at position i sees the key at j if i - j < window; 0 = no window.
    host_seq_lens, host_query_start: the same numbers in host memory, for loops that must not wait for a GPU.
    """

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    block_table: Tensor
    seq_lens: Tensor
    query_start: Tensor
    scale: float
    window: int
    host_seq_lens: npt.NDArray[np.int32]
    host_query_start: npt.NDArray[np.int32]


class KvWrite(NamedTuple):
    """K and V [num_tokens, num_kv_heads, head_dim] of a step, and where they are stored.

    slot_mapping: int64 [num_tokens]; a negative slot skips the token where the implementation says so.
    """

    k: Tensor
    v: Tensor
    k_cache: Tensor
    v_cache: Tensor
    slot_mapping: Tensor


class Rotation(NamedTuple):
    """Rotary angles of a step's positions.

    cos, sin: float32 [num_tokens, rotary_dim / 2]. Dimension i is paired with i + rotary_dim / 2, or 2 i with 2 i + 1
        if interleaved; dimensions from rotary_dim on pass unchanged.
    """

    cos: Tensor
    sin: Tensor
    interleaved: bool = False


class RoutingRule(NamedTuple):
    """How a router chooses experts.

    sigmoid: scores are sigmoids of the logits, else their softmax.
    num_groups, top_groups: experts are chosen out of the best groups alone; 1 group = out of all.
    renormalise: the weights of a token add up to 1; norm_min: the least that they are divided by.
    scaling: what all weights are multiplied by in the end.
    """

    top_k: int
    sigmoid: bool = False
    num_groups: int = 1
    top_groups: int = 1
    renormalise: bool = True
    norm_min: float = 0.0
    scaling: float = 1.0


class Routing(NamedTuple):
    """The experts of each token, best first: ids int32 [num_tokens, top_k], weights float32 of the same shape."""

    ids: Tensor
    weights: Tensor


class Rotary(Protocol):
    """The angles of all layers that rotate alike. half: half of the rotated dimensions."""

    half: int

    def of(self, positions: Tensor, end: int) -> tuple[Tensor, Tensor]:
        """(cos, sin) [num_tokens, half] float32 of `positions` [num_tokens] int64, which are all below `end`."""


class SwiGlu(Protocol):
    """down(silu(gate(x)) * up(x)) over a slice of the intermediate dimension, which may be empty.

    gate_up: [2 * slice, hidden], gate first.
    down: [hidden, slice].
    limit: of the clamped form, 0 = none.
    """

    @property
    def gate_up(self) -> Weight: ...
    @property
    def down(self) -> Weight: ...
    @property
    def limit(self) -> float: ...

    def __call__(self, rows: Tensor) -> Tensor:
        """rows [n, hidden] -> [n, hidden], in the same dtype."""


class Experts(Protocol):
    """The experts of an MoE layer that one rank holds, all of one shape."""

    def add_to(
        self, out: Tensor, rows: Tensor, routing: Routing, measured: bool
    ) -> tuple[Sequence[int], Sequence[float] | None]:
        """out [n, hidden] float32 += the sum over local experts e of weight_e * e(row), in the experts' order.

        Returns the rows of each expert and, if measured, the sum of its outputs' mean squares before weighting.
        """


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """The weights of one attention layer and of the norms on both sides of it; None = it has none.

    q_norm, q_up: of a low-rank query (MFA).
    """

    attn_norm: Tensor
    ffn_norm: Tensor
    qkv: Weight
    o: Weight
    qkv_bias: Tensor | None = None
    q_norm: Tensor | None = None
    q_up: Weight | None = None
    q_head_norm: Tensor | None = None
    k_head_norm: Tensor | None = None
    o_bias: Tensor | None = None


@dataclass(frozen=True, slots=True)
class LayerShape:
    """rotary_half: half of the rotated dimensions.
    q_rank: 0 unless MFA.
    window: 0 = none.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    q_rank: int
    head_gate: bool
    rotary_half: int
    interleaved: bool
    window: int
    scale: float
    eps: float


class LayerTables(NamedTuple):
    """A micro-batch's tokens as a layer reads them; see `AttentionArgs` and `Rotation`."""

    cos: Tensor
    sin: Tensor
    slot_mapping: Tensor
    block_table: Tensor
    seq_lens: Tensor
    query_start: Tensor


LayerBatch = Any
"""What `LayerCall.batch` made of a micro-batch; nothing else looks into it."""


class LayerCall(Protocol):
    """A layer's attention with its residual and the norms on both sides, in one call."""

    def takes(self, num_partials: int, k_cache: Tensor, v_cache: Tensor) -> bool:
        """Whether these caches can be read and written, and so many partials added."""

    def batch(self, tables: LayerTables) -> LayerBatch:
        """A micro-batch as calls take it: the same for all layers that read the same tables."""

    def __call__(
        self, x: Tensor, partials: Sequence[Tensor], batch: LayerBatch, k_cache: Tensor, v_cache: Tensor
    ) -> Tensor:
        """Add partials, then the layer's attention, to x [n, hidden] float32 in place; store K and V -> ffn_norm(x)."""


class WeightMemory(Protocol):
    """Where the weights of one half are put."""

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor to be filled."""


class Ops(Protocol):
    """The operations of a model's halves on one machine.

    name: of the implementation, for reports.
    dtype: of activations: inputs of GEMMs and rows that cross.
    """

    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def device(self) -> torch.device: ...

    # -- memory

    def memory_bytes(self) -> int:
        """What the device has in all, for weights, caches and buffers together."""

    def weight_memory(self) -> WeightMemory: ...

    def prepare(self, weight: Tensor | Int8Weight) -> Weight:
        """The matrix as the GEMMs take it fastest. Its memory may be reordered: the caller drops `weight`."""

    # -- dense

    def embed(self, ids: Tensor, table: Weight) -> Tensor:
        """Rows ids [n] int64 of table [vocab, hidden] -> [n, hidden] float32. IndexError where there is no such row."""

    def linear(self, x: Tensor, weight: Weight) -> Tensor:
        """x [n, in] times the transpose of weight [out, in] -> [n, out] in x's dtype."""

    def norm(self, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype | None = None) -> Tensor:
        """RMSNorm of each row of x [n, width], in `dtype`, by default that of x. weight: float32 [width]."""

    def silu_mul(self, gate_up: Tensor, limit: float) -> Tensor:
        """silu(gate) * up of [n, 2 * width], gate first -> [n, width].

        limit > 0: min(silu(gate), limit) * clamp(up, -limit, limit), the clamped SwiGLU of Step-3.5.
        """

    def swiglu(self, gate_up: Weight, down: Weight, limit: float = 0.0) -> SwiGlu: ...

    def head_logits(self, x: Tensor, head: Weight, out: Tensor, start: int, stop: int) -> None:
        """Write logits start..stop of the vocabulary into out [n, vocab] float32; start is a multiple of 64."""

    def head_max(self, x: Tensor, head: Weight, best: RowMax, start: int, stop: int) -> None:
        """Go on in `best`, the largest logits before start, with what `head_logits` would write up to stop."""

    # -- attention

    def rotary(self, frequencies: Tensor, factor: float) -> Rotary:
        """Angles of frequencies [half] float32; cos and sin are multiplied by `factor`."""

    def rope_write_kv(self, q: Tensor, write: KvWrite, rotation: Rotation) -> Tensor:
        """Rotate q [n, num_heads, head_dim] and write.k, store k and v, return q, which may be rotated in place."""

    def write_rows(self, rows: Tensor, cache: Tensor, slot_mapping: Tensor) -> None:
        """Store rows [n, num_kv_heads, width] at their slots of one [num_blocks, num_kv_heads, block_size, width]."""

    def paged_attention(self, args: AttentionArgs) -> Tensor:
        """[num_tokens, num_heads, v_head_dim]; see `AttentionArgs`."""

    def attention_layer(self, weights: LayerWeights, shape: LayerShape) -> LayerCall | None:
        """A whole layer in one call, where there is such code for weights and shape like these."""

    # -- experts

    def route(self, rows: Tensor, weight: Tensor, bias: Tensor | None, rule: RoutingRule) -> Routing:
        """The experts of rows [n, hidden]. Logits are in the dtype of weight [num_experts, hidden].

        bias: float32 [num_experts], added to scores for the choice alone.
        """

    def experts(self, experts: Sequence[SwiGlu], first_expert: int) -> Experts:
        """Experts first_expert, first_expert + 1, ... of a layer."""

    # -- tokens

    def sample(self, logits: Tensor, rows: Sequence[SampleRow]) -> SampledRows:
        """A token for each row of logits [m, vocab] float32, not changed, by the rule of docs/sampling.md.

        A token is a function of its row's logits and parameters alone, the same in every implementation. IndexError
        where these name a token that is not in the vocabulary.
        """

    # -- threads

    def start_threads(self, num_threads: int) -> None:
        """Start the threads that num_threads need, to run on the cores that the calling thread may use now."""

    def close(self) -> None:
        """End the threads, if any were started; a later call starts them again."""

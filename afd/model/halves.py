"""The two halves of a model. What crosses between them is Dispatch one way and partial rows the other.

Callers hold torch.inference_mode(). A half keeps no request state: batches, caches and residuals are the caller's,
so one half may serve any number of streams, from one thread at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from afd.kv.cache import KVCache
from afd.model.attention_kinds import Attention, FusedAttention
from afd.model.batch import AttentionBatch
from afd.model.expert_load import ExpertLoad
from afd.model.ffn import Dispatch, Ffn, MoeFfn
from afd.model.router import Router
from afd.model.spec import ModelSpec
from afd.ops.ops import Ops, RowMax, Weight

__all__ = ["AttentionBatch", "AttentionHalf", "AttentionLayer", "Dispatch", "FFNHalf"]


@dataclass(slots=True)
class AttentionLayer:
    """attn_norm, ffn_norm: [hidden] float32.
    router: None on dense layers.
    fused: attention and norms in one call.
    """

    attn_norm: Tensor
    attention: Attention
    ffn_norm: Tensor
    router: Router | None
    fused: FusedAttention | None = None


class AttentionHalf:
    """Embedding, attention, norms, routers, residual, head: all that is not an FFN weight."""

    def __init__(
        self,
        ops: Ops,
        spec: ModelSpec,
        embedding: Weight,
        layers: Sequence[AttentionLayer],
        final_norm: Tensor,
        head: Weight,
    ):
        self.ops = ops
        self.spec = spec
        self.dtype = ops.dtype  # activations: inputs of GEMMs and rows that cross; the residual is float32
        self.device = ops.device
        self._embedding = embedding
        self.layers = layers
        self._final_norm = final_norm
        self._head = head

    def embed(self, token_ids: Tensor) -> Tensor:
        """token_ids [n] int64 -> residual x [n, hidden] float32, a fresh tensor.

        The residual is float32 whatever the activation dtype: it is small beside weights and KV, and with it bfloat16
        logits come out 40 % closer to float32's (measured on SmolLM2).
        """
        return self.ops.embed(token_ids, self._embedding)

    def prepare(self, batch: AttentionBatch) -> None:
        """Make what the layers read of a batch, so that the first one finds it."""
        for layer in self.layers:
            if layer.fused is not None:
                layer.fused.tokens(batch)

    def layer(
        self, layer_idx: int, x: Tensor, batch: AttentionBatch, cache: KVCache, partials: Sequence[Tensor] = ()
    ) -> Dispatch:
        """Add the last layer's partials, then attention, to the residual x [n, hidden] in place; write K and V.

        Returns what the FFN needs.

        x holds everything up to this layer's attention from then on, so the Dispatch can be made again from x alone
        (`dispatch`) when an FFN rank is lost.
        """
        layer = self.layers[layer_idx]
        if layer.fused is not None and layer.fused.takes(partials, cache, layer_idx):
            return self._routed(layer_idx, layer.fused(x, partials, batch, cache, layer_idx))
        self.combine(x, partials)
        x += layer.attention(self._normed(x, layer.attn_norm), batch, cache, layer_idx)
        return self.dispatch(layer_idx, x)

    def dispatch(self, layer_idx: int, x: Tensor) -> Dispatch:
        """Normed rows and routing of layer `layer_idx` from the residual after its attention."""
        return self._routed(layer_idx, self._normed(x, self.layers[layer_idx].ffn_norm))

    def _routed(self, layer_idx: int, rows: Tensor) -> Dispatch:
        router = self.layers[layer_idx].router
        if router is None:
            return Dispatch(layer_idx, rows)
        expert_ids, expert_weights = router(rows)
        return Dispatch(layer_idx, rows, expert_ids, expert_weights)

    def combine(self, x: Tensor, partials: Sequence[Tensor], row_idx: Sequence[Tensor] | None = None) -> None:
        """x [n, hidden] float32 += the FFN ranks' partial rows, in rank order.

        row_idx: the rows of x that each partial is for, [rows of it] int64, no row twice; None = every row.
        """
        if row_idx is None:
            for partial in partials:
                x += partial
            return
        for partial, places in zip(partials, row_idx, strict=True):
            x.index_add_(0, places, partial.to(x.dtype))

    def head_rows(self, x_rows: Tensor) -> Tensor:
        """Final norm of residual rows [m, hidden]: the input of head_slice."""
        return self._normed(x_rows, self._final_norm)

    def head_slice(self, head_rows: Tensor, out: Tensor, start: int, stop: int) -> None:
        """Write logits start..stop of the vocabulary into out [m, vocab] float32; start is a multiple of 64."""
        self.ops.head_logits(head_rows, self._head, out, start, stop)

    def head_slice_max(self, head_rows: Tensor, best: RowMax, start: int, stop: int) -> None:
        """Go on in `best`, the largest logits before start and the entries they are of, with what `head_slice` would
        write.
        """
        self.ops.head_max(head_rows, self._head, best, start, stop)

    def _normed(self, x: Tensor, weight: Tensor) -> Tensor:
        return self.ops.norm(x, weight, self.spec.rms_eps, self.dtype)

    def logits(self, x_rows: Tensor) -> Tensor:
        """Residual rows after the last layer [m, hidden] -> logits [m, vocab] float32."""
        rows = self.head_rows(x_rows)
        out = torch.empty(rows.shape[0], self.spec.vocab_size, dtype=torch.float32, device=rows.device)
        self.head_slice(rows, out, 0, self.spec.vocab_size)
        return out


class FFNHalf:
    """One FFN rank's share of every layer."""

    def __init__(self, ops: Ops, spec: ModelSpec, layers: Sequence[Ffn]):
        self.ops = ops
        self.spec = spec
        self.dtype = ops.dtype
        self.layers = layers

    def expert_loads(self) -> dict[int, ExpertLoad]:
        """What each MoE layer's local experts did so far, by layer; empty lists where this rank holds none."""
        return {idx: ffn.load for idx, ffn in enumerate(self.layers) if isinstance(ffn, MoeFfn)}

    def layer(self, dispatch: Dispatch) -> Tensor:
        """Partial rows [n, hidden] in the activation dtype, routing weights applied; the ranks' sum is the FFN."""
        rows = self.layers[dispatch.layer](dispatch)
        return rows if rows.dtype is self.dtype else rows.to(self.dtype)

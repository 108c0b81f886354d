"""Which layers of a half native code goes through by itself, exchanges included: dense ones, many in a call.

With routed experts the router is Python's, and so is what lies between the layers.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from afd.kv.cache import KVCache
from afd.model.attention_kinds import FusedAttention
from afd.model.batch import AttentionBatch
from afd.model.ffn import DenseFfn
from afd.model.halves import AttentionHalf, FFNHalf
from afd.ops.cpu.binding import NativeKernels
from afd.ops.cpu.layer import AttentionLayerCall, LayerBatch, SwiGluCall
from afd.ops.cpu.ops import CpuOps
from afd.relay.native import AttentionRelayCall, Bounds, FfnRelayCall, Relayed, RelayLayer, check_interface
from stepmesh.lane import Lane

PATIENCE_S = 5e-3
"""Longest polling for the other side's stage in a relay: the largest decode batches' stages take about that long."""
STEP_PATIENCE_S = 50e-3
"""Longest sleep of the FFN side for the next step: heads of the largest decode batches take a fifth of that."""
RELAY_S = 100e-3
"""Longest relay: bounds what a worker's other duties wait for. Decode steps of the largest batches take half of it."""
MAX_RELAY_TOKENS = 256
"""Rows of a micro-batch above which a stage takes so long that what Python costs between two does not show."""


def _bounds() -> Bounds:
    """Time limits of a relay that begins now."""
    return Bounds(time.monotonic_ns() + int(RELAY_S * 1e9), int(PATIENCE_S * 1e9), int(STEP_PATIENCE_S * 1e9))


class _Runs:
    """Runs of layers that can be relayed."""

    def __init__(self, able: Sequence[bool]):
        self.ranges: list[range] = []
        start = 0
        for layer, can in enumerate((*able, False)):
            if not can:
                if layer > start:
                    self.ranges.append(range(start, layer))
                start = layer + 1
        self._of_layer = {layer: (idx, layer - run.start) for idx, run in enumerate(self.ranges) for layer in run}

    def place(self, layer: int) -> tuple[int, int]:
        """(run, place in it) of a layer that can be relayed."""
        return self._of_layer[layer]

    def takes(self, layer: int, num_tokens: int) -> bool:
        """Whether so many rows go through this layer in native code; else it is Python's."""
        return num_tokens <= MAX_RELAY_TOKENS and layer in self._of_layer


class AttentionRelay:
    """The attention side over one cache. Main thread only."""

    @classmethod
    def of(cls, half: AttentionHalf, cache: KVCache) -> AttentionRelay | None:
        """Runs over the half's dense layers; None without kernels that compute a whole layer of bfloat16 rows."""
        ops = half.ops
        if not isinstance(ops, CpuOps) or half.dtype is not torch.bfloat16:
            return None
        return cls(ops.kernels, [None if layer.router else layer.fused for layer in half.layers], cache)

    def __init__(self, kernels: NativeKernels, layers: Sequence[FusedAttention | None], cache: KVCache):
        check_interface(kernels.library)
        takes = [fused is not None and fused.takes((), cache, idx) for idx, fused in enumerate(layers)]
        self._runs = _Runs(takes)
        self.takes = self._runs.takes
        self._kinds: list[FusedAttention] = []  # one of each kind of batch
        self._calls = [
            AttentionRelayCall(kernels, [self._layer(layer, cache, i) for i in run if (layer := layers[i])])
            for run in self._runs.ranges
        ]

    def _layer(self, layer: FusedAttention, cache: KVCache, idx: int) -> RelayLayer:
        assert isinstance(layer.call, AttentionLayerCall)
        return RelayLayer(layer.call, cache.k[idx], cache.v[idx], self._kind(layer))

    def _kind(self, layer: FusedAttention) -> int:
        for idx, known in enumerate(self._kinds):
            if known.reads_like(layer):
                return idx
        self._kinds.append(layer)
        return len(self._kinds) - 1

    def begin(self, x: Tensor, batch: AttentionBatch, lane: Lane) -> Relayed:
        """Layer 0 of a step, computed and sent; nothing is awaited."""
        return self._calls[0].begin(x, self._batches(batch), lane, _bounds())

    def run(self, layer: int, x: Tensor, partials: Sequence[Tensor], batch: AttentionBatch, lane: Lane) -> Relayed:
        """Compute layer after layer for RELAY_S at most. The first adds the answer to lane.last (at most one)."""
        run, place = self._runs.place(layer)
        partial = partials[0] if partials else None
        return self._calls[run](place, x, partial, self._batches(batch), lane, _bounds())

    def _batches(self, batch: AttentionBatch) -> list[LayerBatch]:
        return [kind.tokens(batch) for kind in self._kinds]


class FfnRelay:
    """The FFN side. Main thread only."""

    @classmethod
    def of(cls, half: FFNHalf) -> FfnRelay | None:
        """The other side of `AttentionRelay.of`."""
        ops = half.ops
        if not isinstance(ops, CpuOps) or half.dtype is not torch.bfloat16:
            return None
        swiglus = [ffn.swiglu if isinstance(ffn, DenseFfn) else None for ffn in half.layers]
        return cls(ops.kernels, [swiglu if isinstance(swiglu, SwiGluCall) else None for swiglu in swiglus])

    def __init__(self, kernels: NativeKernels, layers: Sequence[SwiGluCall | None]):
        check_interface(kernels.library)
        self._runs = _Runs([call is not None for call in layers])
        self.takes = self._runs.takes
        self._last_layer = len(layers) - 1
        self._calls = [
            FfnRelayCall(kernels, [call for i in run if (call := layers[i]) is not None]) for run in self._runs.ranges
        ]

    def ends_with(self, layer: int) -> bool:
        """Whether a step ends with this layer and the next one can `begin`."""
        return layer == self._last_layer and self._runs.takes(0, 0)

    def begin(self, lane: Lane) -> Relayed:
        """Answer the step behind lane.last from layer 0 on, in the gang that this names: as far as it goes."""
        return self._calls[0].begin(lane, _bounds(), MAX_RELAY_TOKENS)

    def run(self, layer: int, lane: Lane) -> Relayed:
        """Answer `layer` and those behind it, with rows, step and gang of lane.last: as far as it goes."""
        run, place = self._runs.place(layer)
        return self._calls[run](place, lane, _bounds())

"""Consecutive dense layers of one micro-batch whose exchanges native code makes by itself (src/relay.h).

Over a lane of stepmesh, with whoever relays the other half of the same layers at its other end; or answers as ever.
bfloat16 rows on the wire; everything else as in `afd.kernels.fused`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, byref, c_int32, c_int64, c_uint32, c_void_p
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

from afd.kernels.fused import AttentionLayerCall, LayerBatch, SwiGluCall
from afd.kernels.native import NativeKernels, error_of
from stepmesh.lane import Lane

NS = 1e-9


class Outcome(IntEnum):
    """Why a relay ended: RelayOutcome of src/api.h."""

    DONE = 0
    TIME_OVER = 1
    LATE = 2
    OTHER = 3


class Lap(NamedTuple):
    """AfdLap of src/api.h: one layer's round trip, seen from one side. ns of CLOCK_MONOTONIC.

    answered_ns: when the answer was seen (attention; 0 = not yet) or sent (FFN).  compute_ns: the FFN's.
    """

    begun_ns: int
    computed_ns: int
    posted_ns: int
    answered_ns: int
    compute_ns: int
    gang_tokens: int


class _Lap(ctypes.Structure):
    _fields_ = (*((name, c_int64) for name in Lap._fields[:-1]), ("gang_tokens", c_uint32), ("unused", c_uint32))


class _Bounds(ctypes.Structure):
    """AfdRelayBounds of src/api.h."""

    _fields_ = (("until_ns", c_int64), ("patience_ns", c_int64))


class _Relayed(ctypes.Structure):
    """AfdRelayed of src/api.h."""

    _fields_ = (("laps", POINTER(_Lap)), ("num_laps", c_int32), ("outcome", c_int32))


class _RelayLayer(ctypes.Structure):
    """AfdRelayLayer of src/api.h."""

    _fields_ = (
        ("layer", c_void_p),
        ("k_cache", c_void_p),
        ("v_cache", c_void_p),
        ("num_blocks", c_int32),
        ("block_size", c_int32),
        ("batch", c_int32),
    )


class _AttentionRelay(ctypes.Structure):
    """AfdAttentionRelay of src/api.h."""

    _fields_ = (
        ("lane", c_void_p),
        ("last", c_void_p),
        ("layers", c_void_p),
        ("batches", c_void_p),
        ("x", c_void_p),
        ("num_layers", c_int32),
    )


class _FfnRelay(ctypes.Structure):
    """AfdFfnRelay of src/api.h."""

    _fields_ = (("lane", c_void_p), ("last", c_void_p), ("layers", c_void_p), ("num_layers", c_int32))


@dataclass(frozen=True, slots=True)
class Relayed:
    """What a relay did."""

    laps: list[Lap]
    outcome: Outcome


class _Laps:
    """Room for what one call does."""

    def __init__(self, num_layers: int):
        self._array = (_Lap * max(num_layers, 1))()
        self.done = _Relayed(self._array)

    def begin(self) -> _Relayed:
        self.done.num_laps = self.done.outcome = 0
        return self.done

    def taken(self) -> Relayed:
        laps = [
            Lap(lap.begun_ns, lap.computed_ns, lap.posted_ns, lap.answered_ns, lap.compute_ns, lap.gang_tokens)
            for lap in self._array[: self.done.num_laps]
        ]
        return Relayed(laps, Outcome(self.done.outcome))


@dataclass(frozen=True, slots=True)
class RelayLayer:
    """A layer over its cache [num_blocks, num_kv_heads, block_size, head_dim]. batch: which of the step's it reads."""

    call: AttentionLayerCall
    k_cache: Tensor
    v_cache: Tensor
    batch: int


class AttentionRelayCall:
    """The attention side of consecutive layers. Main thread only."""

    def __init__(self, kernels: NativeKernels, layers: Sequence[RelayLayer]):
        self._kernels = kernels
        self._kept = list(layers)  # weights and caches
        self._layers = (_RelayLayer * len(layers))(
            *[
                _RelayLayer(
                    layer.call.args_address,
                    layer.k_cache.data_ptr(),
                    layer.v_cache.data_ptr(),
                    layer.k_cache.shape[0],
                    layer.k_cache.shape[2],
                    layer.batch,
                )
                for layer in layers
            ]
        )
        self._laps = _Laps(len(layers))
        self._detail = (c_int32 * 2)()

    def __call__(
        self, first: int, x: Tensor, batches: Sequence[LayerBatch], lane: Lane, until_ns: int, patience_ns: int
    ) -> Relayed:
        """Layers first, first + 1, ... of residual x [n, hidden] float32, in place.

        The answer to lane.last is the first one's partial. Ends at until_ns, or when nothing came for patience_ns, too.
        """
        assert x.dtype is torch.float32 and x.is_contiguous() and x.shape[0] == batches[0].num_tokens
        pointers = (c_void_p * len(batches))(*[batch.args_address for batch in batches])
        relay = _AttentionRelay(
            lane.address,
            lane.last_address,
            ctypes.addressof(self._layers[first]),
            ctypes.addressof(pointers),
            x.data_ptr(),
            len(self._layers) - first,
        )
        done = self._laps.begin()
        status = self._kernels.library.afd_relay_attention(
            self._kernels.isa,
            torch.get_num_threads(),
            byref(relay),
            byref(_Bounds(until_ns, patience_ns)),
            byref(done),
            self._detail,
        )
        if status:
            raise error_of(status, self._detail[0], self._detail[1])
        return self._laps.taken()


class FfnRelayCall:
    """The FFN side of consecutive dense layers. Main thread only."""

    def __init__(self, kernels: NativeKernels, layers: Sequence[SwiGluCall]):
        self._kernels = kernels
        self._kept = list(layers)
        self._layers = (c_void_p * len(layers))(*[call.args_address for call in layers])
        self._laps = _Laps(len(layers))

    def __call__(self, first: int, lane: Lane, until_ns: int, patience_ns: int) -> Relayed:
        """Answer dispatches of layers first, first + 1, ... with the rows, step and gang of lane.last."""
        size = ctypes.sizeof(c_void_p)
        relay = _FfnRelay(
            lane.address,
            lane.last_address,
            ctypes.addressof(self._layers) + first * size,
            len(self._layers) - first,
        )
        done = self._laps.begin()
        status = self._kernels.library.afd_relay_ffn(
            self._kernels.isa,
            torch.get_num_threads(),
            byref(relay),
            byref(_Bounds(until_ns, patience_ns)),
            byref(done),
        )
        if status:
            raise error_of(status, 0, 0)
        return self._laps.taken()

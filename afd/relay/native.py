"""Consecutive dense layers of one micro-batch whose exchanges native code makes by itself: calls of src/relay.h.

Over a lane of stepmesh, with a peer that relays the other half of the same layers, or answers by the ordinary path.
bfloat16 rows on the wire; everything else as in `afd.ops.cpu.layer`.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Callable, Sequence
from ctypes import byref, c_int32, c_int64, c_void_p
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from afd.ops.cpu import abi
from afd.ops.cpu.binding import KernelsUnavailableError, NativeKernels, error_of
from afd.ops.cpu.layer import AttentionLayerCall, LayerBatch, SwiGluCall
from stepmesh.lane import Lane, SmLane, SmRules
from stepmesh.wire import HEADER

NS = 1e-9
_FIRST = struct.Struct("=q")  # of a record


class Outcome(IntEnum):
    """Why a relay ended: RelayOutcome of src/relay.h."""

    DONE = 0
    TIME_OVER = 1
    LATE = 2
    OTHER = 3
    SENT = 4


class Laps(NamedTuple):
    """AfdLap of src/relay.h: layers' round trips, seen from one side. Seconds of the monotonic clock, [layers] each.

    answered_s: when the answer was seen (attention; one shorter while the last one is awaited) or sent (FFN).
    """

    begun_s: npt.NDArray[np.float64]
    computed_s: npt.NDArray[np.float64]
    posted_s: npt.NDArray[np.float64]
    answered_s: npt.NDArray[np.float64]


class AfdRelayBounds(ctypes.Structure):
    _fields_ = (("until_ns", c_int64), ("patience_ns", c_int64), ("step_patience_ns", c_int64))


class AfdRelayed(ctypes.Structure):
    _fields_ = (
        ("laps", c_void_p),
        *((name, c_int32) for name in ("num_laps", "num_answered", "outcome", "gang_tokens")),
        *((name, c_int64) for name in ("began_ns", "ended_ns")),
        *((name, c_int64) for name in ("compute_ns", "post_ns", "wait_ns", "ffn_ns", "exposed_ns", "open_wait_ns")),
    )


class AfdRelayLayer(ctypes.Structure):
    _fields_ = (
        ("layer", c_void_p),
        ("k_cache", c_void_p),
        ("v_cache", c_void_p),
        ("num_blocks", c_int32),
        ("block_size", c_int32),
        ("batch", c_int32),
    )


class AfdAttentionRelay(ctypes.Structure):
    _fields_ = (
        ("lane", c_void_p),
        ("last", c_void_p),
        ("partial", c_void_p),
        ("layers", c_void_p),
        ("batches", c_void_p),
        ("x", c_void_p),
        ("num_layers", c_int32),
        ("begins", c_int32),
    )


class AfdFfnRelay(ctypes.Structure):
    _fields_ = (
        ("lane", c_void_p),
        ("last", c_void_p),
        ("layers", c_void_p),
        ("num_layers", c_int32),
        ("max_tokens", c_int32),
    )


class AfdLap(ctypes.Structure):
    _fields_ = tuple((name, c_int64) for name in ("begun_ns", "computed_ns", "posted_ns", "answered_ns"))


STRUCTURES = (
    AfdRelayBounds,
    AfdLap,
    AfdRelayed,
    AfdRelayLayer,
    AfdAttentionRelay,
    AfdFfnRelay,
    SmRules,
    SmLane,
)
FUNCTIONS = {name: (c_int32, [c_int32] * 2 + [c_void_p] * 4) for name in ("afd_relay_attention", "afd_relay_ffn")}
POST_FAILED = 1000
"""A status from here on is this number and the errno of a lane's bell."""
CONSTANTS = {
    "kPostFailed": POST_FAILED,
    "kRelayDone": Outcome.DONE,
    "kRelayTimeOver": Outcome.TIME_OVER,
    "kRelayLate": Outcome.LATE,
    "kRelayOther": Outcome.OTHER,
    "kRelaySent": Outcome.SENT,
    "sizeof(SmHeader)": HEADER.size,
}


def check_interface(library: ctypes.CDLL) -> None:
    """Compare this file with the library, as `afd.ops.cpu.binding` does its own. Raises KernelsUnavailableError."""
    try:
        abi.check(abi.told_by(library, "afd_relay_abi"), STRUCTURES, FUNCTIONS, CONSTANTS)
    except (AttributeError, abi.AbiMismatchError) as error:
        raise KernelsUnavailableError(f"the library was built from other sources ({error}): build it again") from error
    abi.declare(library, FUNCTIONS)


class Bounds(NamedTuple):
    """How long a relay may take.

    until_ns: at most, by the monotonic clock.
    patience_ns: with each frame that is awaited.
    step_patience_ns: with the first one of a step (FFN).
    """

    until_ns: int
    patience_ns: int
    step_patience_ns: int


class Relayed(NamedTuple):
    """What a relay did. Seconds; began_s, ended_s of the monotonic clock, the others sums over the layers.

    num_laps: layers that were sent (attention) or answered (FFN).
    num_answered: of the attention side, the last may be missing.
    gang_tokens: rows of the FFN's batch, by its last answer.
    ffn_s: its computing, by all of them.
    exposed_s: of wait_s, what was longer than that.
    open_wait_s: behind ended_s, for what did not come (attention).
    record: of all laps, for `laps`.
    """

    num_laps: int
    num_answered: int
    outcome: Outcome
    gang_tokens: int
    began_s: float
    ended_s: float
    compute_s: float
    post_s: float
    wait_s: float
    ffn_s: float
    exposed_s: float
    open_wait_s: float
    record: bytes

    @property
    def on_time(self) -> bool:
        """The next layers may be relayed, too; else the other side is slower than polling is for, or does not relay."""
        return self.outcome in (Outcome.DONE, Outcome.TIME_OVER)

    @property
    def first_begun_s(self) -> float:
        """When the first layer began, of one at least."""
        (begun_ns,) = _FIRST.unpack_from(self.record)
        return float(begun_ns * NS)

    def laps(self) -> Laps:
        """Each layer by itself: for traces, which few look at."""
        times = np.frombuffer(self.record, np.int64).reshape(-1, len(Laps._fields)) * NS
        begun, computed, posted, answered = times.T
        return Laps(begun, computed, posted, answered[: self.num_answered])


class _Call:
    """One of the library's relays, with room for what a call does."""

    def __init__(self, kernels: NativeKernels, function: Callable[..., int], num_layers: int):
        self._isa = kernels.isa
        self._function = function
        self._detail = (c_int32 * 2)()
        self._laps = np.zeros((num_layers, len(Laps._fields)), np.int64)
        self._row_bytes = self._laps.itemsize * len(Laps._fields)

    def __call__(self, relay: ctypes.Structure, bounds: Bounds) -> Relayed:
        done = AfdRelayed(self._laps.ctypes.data)
        threads = torch.get_num_threads()
        status = self._function(
            self._isa, threads, byref(relay), byref(AfdRelayBounds(*bounds)), byref(done), self._detail
        )
        if status:
            raise _error_of(status, self._detail[0], self._detail[1])
        # With all caches full of weights each call costs microseconds here: sums come from below, a record is bytes.
        return Relayed(
            done.num_laps,
            done.num_answered,
            Outcome(done.outcome),
            done.gang_tokens,
            done.began_ns * NS,
            done.ended_ns * NS,
            done.compute_ns * NS,
            done.post_ns * NS,
            done.wait_ns * NS,
            done.ffn_ns * NS,
            done.exposed_ns * NS,
            done.open_wait_ns * NS,
            ctypes.string_at(done.laps, self._row_bytes * done.num_laps),
        )


@dataclass(frozen=True, slots=True)
class RelayLayer:
    """A layer over its cache [num_blocks, num_kv_heads, block_size, head_dim]. batch: which of the step's it reads."""

    call: AttentionLayerCall
    k_cache: Tensor
    v_cache: Tensor
    batch: int


class AttentionRelayCall:
    """The attention side of consecutive layers. Main thread only.

    An error is the end of the process: what was exchanged before it is not booked. (So it is with the kernels' own.)
    """

    def __init__(self, kernels: NativeKernels, layers: Sequence[RelayLayer]):
        self._kept = list(layers)  # weights and caches
        self._layers = (AfdRelayLayer * len(layers))(
            *[
                AfdRelayLayer(
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
        self._call = _Call(kernels, kernels.library.afd_relay_attention, len(layers))

    def __call__(
        self, first: int, x: Tensor, partial: Tensor | None, batches: Sequence[LayerBatch], lane: Lane, bounds: Bounds
    ) -> Relayed:
        """Layers first, first + 1, ... of residual x [n, hidden] float32, in place.

        partial: the answer to lane.last, [n, hidden] bfloat16, which the first layer adds; None = x has it. The answer
        of the last layer, if it came, is added, too.
        """
        return self._relay(first, len(self._layers) - first, x, partial, batches, lane, bounds)

    def begin(self, x: Tensor, batches: Sequence[LayerBatch], lane: Lane, bounds: Bounds) -> Relayed:
        """The first layer of a step, behind lane.last: sent, and not waited for."""
        return self._relay(0, 1, x, None, batches, lane, bounds, begins=True)

    def _relay(
        self,
        first: int,
        num_layers: int,
        x: Tensor,
        partial: Tensor | None,
        batches: Sequence[LayerBatch],
        lane: Lane,
        bounds: Bounds,
        *,
        begins: bool = False,
    ) -> Relayed:
        assert x.dtype is torch.float32 and x.is_contiguous() and x.shape[0] == batches[0].num_tokens
        address = 0
        if partial is not None:
            assert partial.dtype is torch.bfloat16 and partial.is_contiguous() and partial.shape == x.shape
            address = partial.data_ptr()
        pointers = (c_void_p * len(batches))(*[batch.args_address for batch in batches])
        layers = ctypes.addressof(self._layers) + first * ctypes.sizeof(AfdRelayLayer)
        batch_pointers = ctypes.addressof(pointers)
        relay = AfdAttentionRelay(
            lane.address, lane.last_address, address, layers, batch_pointers, x.data_ptr(), num_layers, begins
        )
        return self._call(relay, bounds)


class FfnRelayCall:
    """The FFN side of consecutive dense layers. Main thread only."""

    def __init__(self, kernels: NativeKernels, layers: Sequence[SwiGluCall]):
        self._kept = list(layers)
        self._layers = (c_void_p * len(layers))(*[call.args_address for call in layers])
        self._call = _Call(kernels, kernels.library.afd_relay_ffn, len(layers))

    def __call__(self, first: int, lane: Lane, bounds: Bounds) -> Relayed:
        """Answer dispatches of layers first, first + 1, ... with the rows, step and gang of lane.last."""
        return self._relay(first, lane, bounds)

    def begin(self, lane: Lane, bounds: Bounds, max_tokens: int) -> Relayed:
        """Answer from layer 0 on another step of at most so many rows, in the gang that lane.last names."""
        return self._relay(0, lane, bounds, max_tokens)

    def _relay(self, first: int, lane: Lane, bounds: Bounds, max_tokens: int = 0) -> Relayed:
        layers = ctypes.addressof(self._layers) + first * ctypes.sizeof(c_void_p)
        relay = AfdFfnRelay(lane.address, lane.last_address, layers, len(self._layers) - first, max_tokens)
        return self._call(relay, bounds)


def _error_of(status: int, where: int, value: int) -> Exception:
    """What a status other than 0 says, with the call's error_detail."""
    if status >= POST_FAILED:
        return OSError(status - POST_FAILED, os.strerror(status - POST_FAILED), "a lane's bell")
    return error_of(status, where, value)

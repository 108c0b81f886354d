"""One batch a leg, computed by this thread; and the steps of it that other paths take, too."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch
from torch import Tensor

from afd.ffn.gang import GangBatch
from afd.ffn.path import Lap, Leg
from afd.model.halves import Dispatch, FFNHalf
from afd.model.wire_format import decode_rows, encode_rows
from stepmesh.errors import StaleArrivalError
from stepmesh.layout import PayloadLayout
from stepmesh.mesh import Mesh
from stepmesh.tensor import to_numpy, to_torch
from stepmesh.types import CombineMeta, DispatchArrived, DispatchParts, FrameKind, Header, Rows


class PythonPath:
    """A `BatchPath` on the CPU. Keeps nothing between batches. Main thread only."""

    computing = False

    def __init__(
        self,
        half: FFNHalf,
        mesh: Mesh,
        layout: PayloadLayout,
        *,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self._rows = BatchRows(half, layout)
        self._mesh = mesh
        self._clock = clock

    def run(self, batch: GangBatch) -> Leg:
        begun_s = self._clock()
        rows = to_numpy(self._rows.of(batch))
        computed_s = self._clock()
        answer(self._mesh, batch, rows, computed_s - begun_s)
        return leg_of_one(batch, begun_s, computed_s, self._clock())

    def go_on(self) -> None:
        return None

    def finished(self) -> list[Leg]:
        return []


class BatchRows:
    """What a half makes of batches that have arrived. place: brings a member's rows to where the half computes."""

    def __init__(self, half: FFNHalf, layout: PayloadLayout, place: Callable[[Tensor], Tensor] = lambda rows: rows):
        self._half = half
        self._layout = layout
        self._place = place

    def of(self, batch: GangBatch) -> Tensor:
        """[rows of all members, hidden] in the wire's type."""
        dispatch = self._merged(batch.layer, [arrival.parts for arrival in dispatches_of(batch)])
        rows, _ = encode_rows(self._half.layer(dispatch), self._layout.combine_dtype)
        return rows

    def _merged(self, layer: int, parts: Sequence[DispatchParts]) -> Dispatch:
        """The members' rows as one batch, in rank order. Routing stays on the host: see `Dispatch`."""
        rows = _cat([self._decoded(p) for p in parts])
        first = parts[0]
        if first.expert_ids is None or first.expert_weights is None:
            return Dispatch(layer, rows, None, None)
        ids = _cat([torch.from_numpy(p.expert_ids) for p in parts if p.expert_ids is not None])
        weights = _cat([torch.from_numpy(p.expert_weights) for p in parts if p.expert_weights is not None])
        return Dispatch(layer, rows, ids, weights, _own_places(parts))

    def _decoded(self, parts: DispatchParts) -> Tensor:
        """One member's rows in the compute dtype."""
        scales = None if parts.scales is None else self._place(torch.from_numpy(parts.scales))
        return decode_rows(self._place(to_torch(parts.rows, self._layout.dispatch_dtype)), scales, self._half.dtype)


def dispatches_of(batch: GangBatch) -> list[DispatchArrived]:
    """What has arrived of each member, in rank order."""
    found = [arrival.token for arrival in batch.arrivals if isinstance(arrival.token, DispatchArrived)]
    assert len(found) == len(batch.arrivals)
    return found


def answer(mesh: Mesh, batch: GangBatch, rows: Rows, compute_s: float) -> None:
    """Send each member its part of the batch's rows, which took compute_s."""
    arrivals = dispatches_of(batch)
    gang_tokens = sum(_batch_tokens(arrival.header) for arrival in arrivals)
    meta = CombineMeta(batch.gang_id, batch.mask, gang_tokens, int(compute_s * 1e9))
    start = 0
    for arrival in arrivals:
        end = start + arrival.header.num_tokens
        with contextlib.suppress(StaleArrivalError):  # the peer was lost meanwhile; the answer has no reader
            mesh.combine(arrival, meta, rows[start:end])
        start = end


def leg_of_one(batch: GangBatch, begun_s: float, computed_s: float, answered_s: float) -> Leg:
    """A single batch."""
    return Leg(
        batch.stream,
        batch.layer,
        1,
        batch.num_tokens,
        len(batch.arrivals),
        batch.gang_id,
        batch.arrivals[0].epoch,
        begun_s,
        answered_s,
        computed_s - begun_s,
        answered_s - computed_s,
        0.0,
        partial(_only, begun_s, computed_s, answered_s),
        batch.first_s,
    )


def _only(begun_s: float, computed_s: float, answered_s: float) -> Iterable[Lap]:
    return (Lap(begun_s, computed_s, answered_s),)


def _own_places(parts: Sequence[DispatchParts]) -> Tensor | None:
    """Each row's place in its sender's micro-batch, by which `ffn_parallel = ep` shares out the shared expert: the
    ranks need not merge a gang's members in the same batches. None for one sender of all its rows: places are 0..n-1.
    """
    if len(parts) == 1 and parts[0].row_idx is None:
        return None
    return torch.cat(
        [
            torch.arange(p.rows.shape[0], dtype=torch.int32) if p.row_idx is None else torch.from_numpy(p.row_idx)
            for p in parts
        ]
    )


def _batch_tokens(header: Header) -> int:
    """Rows of the sender's micro-batch: what all FFN ranks know alike, however many of them each was sent."""
    return header.gang_tokens if header.kind == FrameKind.SPARSE_DISPATCH else header.num_tokens


def _cat(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))

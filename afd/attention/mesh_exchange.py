"""The exchange over stepmesh: one dispatch to every FFN rank, one partial back from each, summed by the caller.

With a `RowSelection` each rank is sent its rows only, and its partial has as many; without, all rows go to all ranks.

An FFN rank that drops out of a step under way voids every exchange in flight: `poll` raises PeerLostError, the worker
cancels and runs the interrupted steps again once `ready` is true (nothing of them was booked). A rank that no open step
uses interrupts nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from afd.attention.exchange import Combined, Gang
from afd.errors import PeerLostError
from afd.model.halves import Dispatch
from afd.model.row_selection import RowSelection
from afd.model.wire_format import encode_rows
from stepmesh.errors import PeerNotConnectedError, SlotBusyError
from stepmesh.lane import BEFORE_FIRST, Lane, Trips
from stepmesh.layout import PayloadLayout
from stepmesh.mesh import Mesh
from stepmesh.tensor import to_numpy, to_torch
from stepmesh.types import (
    CombineArrived,
    DispatchMeta,
    DispatchParts,
    Member,
    PeerDown,
    PeerUp,
    RankId,
)


@dataclass(slots=True)
class _InFlight:
    """One stream's step. gang_id, mask: from the former's layer-0 answer, echoed for the rest of the step.

    epoch, peers: what the step began with.
    open: a step is under way (its epoch must stay live).
    """

    epoch: int = 0
    peers: tuple[RankId, ...] = ()
    open: bool = False
    seq: int = -1
    step: int = 0
    layer: int = 0
    num_tokens: int = 0
    gang_id: int = 0
    mask: int = 0
    arrived: dict[int, CombineArrived] = field(default_factory=dict)  # by FFN rank
    waiting: bool = False

    def meta(self, stream: int) -> DispatchMeta:
        return DispatchMeta(stream, self.epoch, self.step, self.layer, self.gang_id, self.mask)


class MeshExchange:
    """Main thread only. A new epoch takes effect at each stream's next layer 0."""

    def __init__(self, mesh: Mesh, layout: PayloadLayout, selection: RowSelection | None = None):
        self._mesh = mesh
        self._layout = layout
        self._selection = selection
        self._epoch = 0
        self._retired = 0
        self._peers: tuple[RankId, ...] = ()
        self._up: set[RankId] = set()  # of any live epoch
        self._losses: dict[RankId, str] = {}  # why those are down that were up once
        self._streams: dict[int, _InFlight] = {}
        self._completed: deque[Combined] = deque()
        self._suspended = "the cluster is not formed yet"

    def adopt(self, epoch: int, members: Sequence[Member]) -> None:
        """Use `members` (all FFN ranks, in rank order) from the next layer 0 of each stream on."""
        self._mesh.set_members(epoch, members)
        self._epoch, self._peers = epoch, tuple(member.id for member in members)
        self._retire()

    def suspend(self, reason: str) -> None:
        """The view has no complete FFN side: nothing may start until `adopt`."""
        self._peers = ()
        self._suspended = reason

    @property
    def ready(self) -> bool:
        return bool(self._peers) and self._up.issuperset(self._peers)

    @property
    def unreachable(self) -> dict[RankId, str]:
        """The FFN ranks of the newest epoch that are not connected, and why."""
        return {peer: self._losses.get(peer, "is not connected yet") for peer in self._peers if peer not in self._up}

    @property
    def down_reason(self) -> str:
        """Why it is not ready, in words for people."""
        if not self._peers:
            return self._suspended
        return next((f"{peer} {why}" for peer, why in self.unreachable.items()), "")

    def send(self, stream: int, step: int, dispatch: Dispatch) -> None:
        flight = self._flight(stream, step, dispatch.layer, int(dispatch.rows.shape[0]))
        meta = flight.meta(stream)
        ids, weights = dispatch.expert_ids, dispatch.expert_weights
        rows, scales = encode_rows(dispatch.rows, self._layout.dispatch_dtype, dispatch.scales)
        parts = DispatchParts(
            to_numpy(rows),
            None if scales is None else scales.numpy(),
            None if ids is None else ids.numpy(),
            None if weights is None else weights.numpy(),
        )
        selection = self._selection
        rows_of_ranks = None if selection is None else selection.rows_of_ranks(dispatch.layer, parts.expert_ids)
        try:
            if rows_of_ranks is None:
                flight.seq = self._mesh.dispatch(flight.peers, meta, parts)
            else:
                flight.seq = self._mesh.dispatch_sparse(flight.peers, meta, parts, rows_of_ranks)
        except (PeerNotConnectedError, SlotBusyError) as error:
            raise PeerLostError(str(error)) from error
        flight.waiting = True

    def poll(self, timeout_s: float) -> list[Combined]:
        lost = ""
        for event in self._mesh.progress(0.0 if self._completed else timeout_s):
            if isinstance(event, CombineArrived):
                self._arrived(event)
            elif isinstance(event, PeerUp):
                self._up.add(event.peer)
            elif isinstance(event, PeerDown):
                self._up.discard(event.peer)
                self._losses[event.peer] = f"is lost: {event.reason}"
                if any(flight.open and event.peer in flight.peers for flight in self._streams.values()):
                    lost = f"{event.peer} is lost: {event.reason}"
        if lost:
            raise PeerLostError(lost)
        completed = list(self._completed)
        self._completed.clear()
        return completed

    def has_news(self) -> bool:
        return bool(self._completed) or self._mesh.has_news()

    def _flight(self, stream: int, step: int, layer: int, num_tokens: int) -> _InFlight:
        """The stream's, before a dispatch. Layer 0: the step is of the newest epoch, and of no gang yet."""
        flight = self._streams.setdefault(stream, _InFlight())
        assert not flight.waiting, f"stream {stream} has an exchange in flight"
        if not self._peers:
            raise PeerLostError(self.down_reason)
        if layer == 0:
            flight.epoch, flight.peers, flight.gang_id, flight.mask = self._epoch, self._peers, 0, 0
            flight.open = True
            self._retire()
        flight.step, flight.layer, flight.num_tokens = step, layer, num_tokens
        flight.arrived.clear()
        return flight

    def begin_lane(self, stream: int, step: int, num_tokens: int) -> Lane | None:
        """A lane for native code that makes layer 0 of a step by itself; None where `lane` would give none."""
        if len(self._peers) != 1 or self._selection is not None:
            return None
        flight = self._flight(stream, step, 0, num_tokens)
        before = flight.meta(stream)._replace(layer=BEFORE_FIRST)
        return self._mesh.lanes.after_answer(flight.peers[0], before, num_tokens)

    def lane(self, stream: int) -> Lane | None:
        """A lane for native code that goes on from the stream's newest exchange; `book` must be told what it did there.

        None: go on with `send`. There are lanes for dense rows to a single FFN rank only.
        """
        flight = self._streams[stream]
        if len(flight.peers) != 1 or flight.waiting or self._selection is not None:
            return None
        return self._mesh.lanes.after_answer(flight.peers[0], flight.meta(stream), flight.num_tokens)

    def book(self, lane: Lane, trips: Trips) -> None:
        """Count what native code did on the lane, one exchange at least. An answer still to come comes by `poll`."""
        self._mesh.lanes.book(lane, trips)
        flight, newest = self._streams[lane.stream], lane.newest()
        flight.seq, flight.layer = newest.seq, newest.layer
        flight.waiting = trips.num_answered < trips.num_sent
        flight.arrived.clear()

    def idle(self, stream: int) -> None:
        if (flight := self._streams.get(stream)) is not None:
            flight.open = False
        if self.ready:
            self._mesh.idle(stream)
            self._retire()

    def cancel(self) -> None:
        for flight in self._streams.values():
            flight.open = flight.waiting = False
            flight.arrived.clear()
        self._completed.clear()

    def _retire(self) -> None:
        """Let go of the epochs before the oldest that a step under way began with."""
        oldest = min((s.epoch for s in self._streams.values() if s.open), default=self._epoch)
        if oldest - 1 > self._retired:
            self._retired = oldest - 1
            self._mesh.retire_epoch(self._retired)

    def _arrived(self, event: CombineArrived) -> None:
        header = event.header
        flight = self._streams.get(header.stream)
        if flight is None or not flight.waiting or header.seq != flight.seq:
            return  # the answer to an exchange that was cancelled
        flight.arrived[event.peer.rank] = event
        if header.layer == 0 and event.peer.rank == header.stream % len(flight.peers):
            flight.gang_id, flight.mask = header.gang_id, header.member_mask
        if len(flight.arrived) < len(flight.peers):
            return
        flight.waiting = False
        answers = [flight.arrived[peer.rank] for peer in flight.peers]
        self._completed.append(
            Combined(
                header.stream,
                [self._tensor(answer) for answer in answers],
                _row_idx(answers),
                Gang(
                    max(answer.header.gang_tokens for answer in answers),
                    flight.mask.bit_count(),
                    flight.gang_id,
                    flight.epoch,
                ),
                compute_s=max(answer.header.compute_ns for answer in answers) / 1e9,
            )
        )

    def _tensor(self, answer: CombineArrived) -> Tensor:
        return to_torch(answer.rows, self._layout.combine_dtype)


def _row_idx(answers: Sequence[CombineArrived]) -> list[Tensor] | None:
    """The rows that each answer is for; None after a broadcast."""
    found = [torch.from_numpy(answer.row_idx) for answer in answers if answer.row_idx is not None]
    return found or None

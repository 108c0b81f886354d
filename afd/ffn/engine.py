"""The FFN worker's loop: gather dispatches into gangs, compute one batch, answer every member. Main thread only."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from afd.ffn.dispatch_check import DispatchCheck
from afd.ffn.gang import Arrival, GangBatch, GangTable
from afd.ffn.lateness import Lateness
from afd.ffn.relay import GangRelay, RelayedGang
from afd.model.expert_load import ExpertLoad
from afd.model.halves import Dispatch, FFNHalf
from afd.model.wire_format import decode_rows, encode_rows
from afd.telemetry.ring import Stage, StageBlock, TraceRing
from afd.worker.threads import ThreadShare
from stepmesh.errors import StaleArrivalError
from stepmesh.layout import PayloadLayout
from stepmesh.mesh import Mesh
from stepmesh.tensor import to_numpy, to_torch
from stepmesh.types import (
    CombineMeta,
    DispatchArrived,
    DispatchParts,
    FrameKind,
    Header,
    IdleNotice,
    PeerDown,
    Rows,
)

MAX_WAIT_S = 0.1  # longest block on file descriptors


@dataclass(slots=True)
class FFNTotals:
    """Sums since start. busy_s: computing.  answer_s: writing answers.  other_s: events, gangs, merging: neither.

    wait_s: blocked while a step was under way somewhere (the bubble); of it, gang_wait_s with rows here whose gang was
    not complete.
    """

    busy_s: float = 0.0
    answer_s: float = 0.0
    other_s: float = 0.0
    wait_s: float = 0.0
    gang_wait_s: float = 0.0
    num_batches: int = 0
    num_tokens: int = 0
    num_members: int = 0  # / num_batches = mean gang size
    num_full_gangs: int = 0  # batches that held more than one attention worker


class FFNEngine:
    """Merges, computes, answers. Keeps nothing between exchanges but gang timing.

    Main thread only, which holds torch.inference_mode().
    """

    def __init__(
        self,
        half: FFNHalf,
        mesh: Mesh,
        gangs: GangTable,
        *,
        layout: PayloadLayout,
        threads: ThreadShare | None = None,
        relay: GangRelay | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self._half = half
        self._check = DispatchCheck(half.spec)
        self._mesh = mesh
        self.gangs = gangs
        self._layout = layout
        self._threads = threads
        self._clock = clock
        self.totals = FFNTotals()
        self.lateness = Lateness(len(half.spec.layers))
        self.ring = TraceRing()
        self._relay = relay

    def expert_loads(self) -> dict[int, ExpertLoad]:
        """What the local experts of each MoE layer did so far; any thread."""
        return self._half.expert_loads()

    def run_once(self, timeout_s: float) -> None:
        """Compute and answer one complete batch; where there is none, wait for it at most `timeout_s`. What native code
        relays, behind a batch or from a step's beginning on, has bounds of its own (afd/model/relay.py).

        One at a time: a rank that always has work must come back to its caller, too, whose loop shows that it lives.
        """
        now, totals = self._clock(), self.totals
        counted_s, blocked_s = totals.busy_s + totals.answer_s, 0.0
        batch, relay = self.gangs.next_batch(now), self._relay
        step = relay.next_step() if batch is None and relay is not None else None
        if step is not None:
            blocked_s = self._relayed(step) + self._take_events(0.0)
        elif batch is None:
            blocked_s = self._wait(timeout_s)
            batch = self.gangs.next_batch(self._clock())
        if batch is not None:
            self._compute(batch)
            if relay is not None and (behind := relay.behind(batch)) is not None:
                blocked_s += self._relayed(behind)
            blocked_s += self._take_events(0.0)
        if batch is not None or self.gangs.under_way:
            counted_s = totals.busy_s + totals.answer_s - counted_s
            totals.other_s += max(0.0, self._clock() - now - blocked_s - counted_s)  # below 0: a GPU computed meanwhile

    @property
    def _computing(self) -> bool:
        """A batch is being computed while the loop goes on."""
        return False

    def _wait(self, timeout_s: float) -> float:
        """Until something happens, a gang's patience ends, or the time is over; seconds blocked."""
        begun_s = self._clock()
        deadline_s = self.gangs.deadline()
        if deadline_s is not None:
            timeout_s = min(timeout_s, max(0.0, deadline_s - begun_s))
        waiting = self.gangs.under_way and not self._computing
        gathering = waiting and self.gangs.has_pending
        blocked_s = self._take_events(min(timeout_s, MAX_WAIT_S))
        if waiting:
            self.totals.wait_s += blocked_s
            self.totals.gang_wait_s += blocked_s if gathering else 0.0
            self.ring.add(Stage("wait", begun_s, begun_s + blocked_s))
        return blocked_s

    def _take_events(self, timeout_s: float) -> float:
        """Whatever happens first, at most `timeout_s` from now; seconds blocked before it."""
        begun_s = self._clock()
        events = self._mesh.progress(timeout_s)
        blocked_s = self._clock() - begun_s
        for event in events:
            if isinstance(event, DispatchArrived):
                self._arrived(event)
            elif isinstance(event, IdleNotice):
                self.gangs.idle(event.peer.rank, event.stream)
            elif isinstance(event, PeerDown):
                self.gangs.lost(event.peer.rank)
        return blocked_s

    def _arrived(self, event: DispatchArrived) -> None:
        """To the gangs; or, when it names what does not exist, the end of this connection with the peer."""
        header, ids = event.header, event.parts.expert_ids
        if ids is not None:  # a peer in shared memory could write into its slot again: check what will be computed
            ids = ids.copy()
            event = event._replace(parts=event.parts._replace(expert_ids=ids))
        fault = self._check.fault(header.layer, header.top_k, ids)
        if fault is not None:
            self._mesh.reject(event, fault)
            return
        self.gangs.arrive(
            Arrival(
                event.peer.rank,
                header.stream,
                header.layer,
                header.epoch,
                header.gang_id,
                header.member_mask,
                header.num_tokens,
                self._clock(),
                event,
            )
        )

    def _compute(self, batch: GangBatch) -> None:
        if self._threads is not None:
            self._threads.use(alone=self.gangs.num_active_streams <= 1)
        begun_s = self._clock()
        rows = to_numpy(self._answer_rows(batch))
        self._answer(batch, rows, begun_s, self._clock())

    def _answer_rows(self, batch: GangBatch) -> Tensor:
        """[rows of all members, hidden] in the wire's type."""
        parts = [a.token.parts for a in batch.arrivals if isinstance(a.token, DispatchArrived)]
        assert len(parts) == len(batch.arrivals)
        rows, _ = encode_rows(self._half.layer(self._merge(batch.layer, parts)), self._layout.combine_dtype)
        return rows

    def _answer(self, batch: GangBatch, rows: Rows, begun_s: float, done_s: float) -> None:
        """Send each member its rows, which took the time from begun_s to done_s."""
        arrivals = [a.token for a in batch.arrivals]
        gang_tokens = sum(_batch_tokens(a.header) for a in arrivals if isinstance(a, DispatchArrived))
        meta = CombineMeta(batch.gang_id, batch.mask, gang_tokens, int((done_s - begun_s) * 1e9))
        start = 0
        for arrival in arrivals:
            assert isinstance(arrival, DispatchArrived)
            end = start + arrival.header.num_tokens
            with contextlib.suppress(StaleArrivalError):  # the peer was lost meanwhile; the answer has no reader
                self._mesh.combine(arrival, meta, rows[start:end])
            start = end
        self._account(batch, begun_s, done_s, self._clock())

    def _relayed(self, gang: RelayedGang) -> float:
        """Book what native code did; seconds it waited."""
        done, totals = gang.done, self.totals
        totals.busy_s += done.compute_s
        totals.answer_s += done.post_s
        totals.wait_s += done.wait_s
        totals.num_batches += done.num_laps
        totals.num_tokens += done.num_laps * gang.num_tokens
        totals.num_members += done.num_laps
        if done.num_laps:
            self.ring.add_block(StageBlock(done.ended_s, 3 * done.num_laps, partial(_relayed_stages, gang)))
        else:
            self.ring.add(Stage("wait", done.began_s, done.ended_s))
        return done.wait_s

    def _merge(self, layer: int, parts: Sequence[DispatchParts]) -> Dispatch:
        """The members' rows as one batch, in rank order."""
        rows = _cat([self._rows(p) for p in parts])
        first = parts[0]
        if first.expert_ids is None or first.expert_weights is None:
            return Dispatch(layer, rows, None, None)
        ids = _cat([torch.from_numpy(p.expert_ids) for p in parts if p.expert_ids is not None])
        weights = _cat([torch.from_numpy(p.expert_weights) for p in parts if p.expert_weights is not None])
        return Dispatch(layer, rows, ids, weights, _own_places(parts))

    def _rows(self, parts: DispatchParts) -> Tensor:
        """One member's rows in the compute dtype."""
        scales = None if parts.scales is None else torch.from_numpy(parts.scales)
        return decode_rows(to_torch(parts.rows, self._layout.dispatch_dtype), scales, self._half.dtype)

    def _account(self, batch: GangBatch, begun_s: float, done_s: float, answered_s: float) -> None:
        totals = self.totals
        totals.busy_s += done_s - begun_s
        totals.answer_s += answered_s - done_s
        totals.num_batches += 1
        totals.num_tokens += batch.num_tokens
        totals.num_members += len(batch.arrivals)
        totals.num_full_gangs += len(batch.arrivals) > 1
        first = batch.arrivals[0]
        where = (batch.stream, batch.layer, batch.num_tokens, 0, batch.gang_id, len(batch.arrivals), first.epoch)
        self.ring.add(Stage("gang_wait", batch.first_s, begun_s, *where))
        self.ring.add(Stage("ffn", begun_s, done_s, *where))
        self.ring.add(Stage("combine", done_s, answered_s, *where))
        self.lateness.add(batch.arrivals, self.gangs.step_s(batch.stream))


def _relayed_stages(gang: RelayedGang) -> Iterator[Stage]:
    laps, ended_s = gang.done.laps(), gang.done.began_s
    times = zip(laps.begun_s.tolist(), laps.computed_s.tolist(), laps.posted_s.tolist(), strict=True)
    for layer, (begun_s, computed_s, posted_s) in enumerate(times, gang.layer):
        where = (gang.stream, layer, gang.num_tokens, 0, gang.gang_id, 1, gang.epoch)
        yield Stage("wait", ended_s, begun_s)
        yield Stage("ffn", begun_s, computed_s, *where)
        yield Stage("combine", computed_s, posted_s, *where)
        ended_s = posted_s


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

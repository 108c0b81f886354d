"""The FFN worker's loop: gather dispatches into gangs, have each computed and answered. Main thread only."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from afd.ffn.dispatch_check import DispatchCheck
from afd.ffn.gang import Arrival, GangBatch, GangTable
from afd.ffn.lateness import Lateness
from afd.ffn.path import BatchPath, Leg
from afd.model.cuda import LOOK_S
from afd.model.expert_load import ExpertLoad
from afd.model.halves import FFNHalf
from afd.telemetry.ring import Stage, StageBlock, TraceRing
from afd.worker.threads import ThreadShare
from stepmesh.mesh import Mesh
from stepmesh.types import DispatchArrived, IdleNotice, PeerDown

MAX_WAIT_S = 0.1  # longest block on file descriptors


@dataclass(slots=True)
class FFNTotals:
    """Sums since start.

    busy_s: computing.
    answer_s: writing answers.
    other_s: events, gangs, merging: neither.

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
    """Gathers dispatches into gangs, and has their batches computed and answered by a path.

    Main thread only, which holds torch.inference_mode().
    """

    def __init__(
        self,
        half: FFNHalf,
        mesh: Mesh,
        gangs: GangTable,
        path: BatchPath,
        *,
        threads: ThreadShare | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self._half = half
        self._check = DispatchCheck(half.spec)
        self._mesh = mesh
        self.gangs = gangs
        self._path = path
        self._threads = threads
        self._clock = clock
        self.totals = FFNTotals()
        self.lateness = Lateness(len(half.spec.layers))
        self.ring = TraceRing()

    def expert_loads(self) -> dict[int, ExpertLoad]:
        """What the local experts of each MoE layer did so far; any thread."""
        return self._half.expert_loads()

    def run_once(self, timeout_s: float) -> None:
        """Have one complete batch computed and answered; where there is none, wait for it at most `timeout_s`. What a
        path does by itself behind a batch, or where a step may begin, has bounds of its own.

        One at a time: a rank that always has work must come back to its caller, too, whose loop shows that it lives.
        """
        now, totals = self._clock(), self.totals
        counted_s, blocked_s = totals.busy_s + totals.answer_s, 0.0
        batch, further = self.gangs.next_batch(now), None
        if batch is None:
            further = self._path.go_on()
            if further is None:
                blocked_s = self._wait(timeout_s)
                batch = self.gangs.next_batch(self._clock())
        if batch is not None:
            self._run(batch)
            further = self._path.go_on()
        if further is not None:
            self._book(further)
            blocked_s += further.wait_s
        if batch is not None or further is not None:
            blocked_s += self._take_events(0.0)
        if batch is not None or self.gangs.under_way:
            counted_s = totals.busy_s + totals.answer_s - counted_s
            totals.other_s += max(0.0, self._clock() - now - blocked_s - counted_s)  # below 0: a GPU computed meanwhile

    def _run(self, batch: GangBatch) -> None:
        if self._threads is not None:
            self._threads.use(alone=self.gangs.num_active_streams <= 1)
        leg = self._path.run(batch)
        self.lateness.add(batch.arrivals, self.gangs.step_s(batch.stream))
        if leg is not None:
            self._book(leg)

    def _wait(self, timeout_s: float) -> float:
        """Wait until something happens, a gang's patience ends, or the time is over -> seconds blocked."""
        begun_s = self._clock()
        deadline_s = self.gangs.deadline()
        if deadline_s is not None:
            timeout_s = min(timeout_s, max(0.0, deadline_s - begun_s))
        waiting = self.gangs.under_way and not self._path.computing
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
        events = self._mesh.progress(min(timeout_s, LOOK_S) if self._path.computing else timeout_s)
        blocked_s = self._clock() - begun_s
        for event in events:
            if isinstance(event, DispatchArrived):
                self._arrived(event)
            elif isinstance(event, IdleNotice):
                self.gangs.idle(event.peer.rank, event.stream)
            elif isinstance(event, PeerDown):
                self.gangs.lost(event.peer.rank)
        for leg in self._path.finished():
            self._book(leg)
        return blocked_s

    def _arrived(self, event: DispatchArrived) -> None:
        """Hand a dispatch to the gangs. One that names what does not exist ends the connection with its peer."""
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

    def _book(self, leg: Leg) -> None:
        totals, number = self.totals, leg.num_layers
        totals.busy_s += leg.compute_s
        totals.answer_s += leg.answer_s
        totals.wait_s += leg.wait_s
        totals.num_batches += number
        totals.num_tokens += number * leg.num_tokens
        totals.num_members += number * leg.num_members
        totals.num_full_gangs += number * (leg.num_members > 1)
        self.ring.add_block(StageBlock(leg.ended_s, 1 + 3 * number, partial(_stages, leg)))


def _stages(leg: Leg) -> Iterator[Stage]:
    """What the loop or the path waited for, what was computed, and the answers: in order of their ends."""
    ended_s = leg.began_s
    for layer, (begun_s, computed_s, answered_s) in enumerate(leg.laps(), leg.first_layer):
        where = (leg.stream, layer, leg.num_tokens, 0, leg.gang_id, leg.num_members, leg.epoch)
        if leg.gathered_s is not None:
            yield Stage("gang_wait", leg.gathered_s, begun_s, *where)
        elif begun_s > ended_s:
            yield Stage("wait", ended_s, begun_s)
        yield Stage("ffn", begun_s, computed_s, *where)
        yield Stage("combine", computed_s, answered_s, *where)
        ended_s = answered_s
    if leg.ended_s > ended_s:
        yield Stage("wait", ended_s, leg.ended_s)

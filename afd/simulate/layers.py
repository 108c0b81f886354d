"""Every layer of every step: attention workers, links and FFN ranks as devices that do one thing at a time.

The loop of an attention worker is `afd.attention.engine`'s: start every empty stream, then run the stage that
`afd.sched.head_slices` names among those that are ready. That of an FFN rank is `afd.ffn.engine`'s: whatever its gang
table says is complete, oldest first.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from afd.ffn.gang import Arrival, GangBatch, GangTable
from afd.sched.head_slices import NextStage, next_of, slice_end
from afd.simulate.events import EventQueue
from afd.simulate.results import Results
from afd.simulate.settings import Settings
from afd.simulate.worker import AttentionWorker, Step

TICK_S = 1e-6  # a deadline is looked at just after it, whatever the rounding


@dataclass(slots=True)
class _Lane:
    """One direction of a link. free_s: when it is free. row_s: what a row takes, of the link that all workers share."""

    free_s: float = 0.0
    row_s: float = 0.0


@dataclass(slots=True, eq=False)
class _Device:
    """An attention worker's processor and its link, full duplex. ready: steps whose next stage can run."""

    worker: AttentionWorker
    ready: deque[Step] = field(default_factory=deque)
    busy: bool = False
    out: _Lane = field(default_factory=_Lane)
    back: _Lane = field(default_factory=_Lane)


@dataclass(slots=True, eq=False)
class _Rank:
    """One FFN rank, the idx-th. wakes_at: when it will look at its table although nothing arrives."""

    idx: int
    table: GangTable
    busy: bool = False
    wakes_at: float = float("inf")


class LayerPath:
    """DataPath that simulates every exchange with every FFN rank."""

    def __init__(self, settings: Settings, events: EventQueue, results: Results):
        self._settings = settings
        self._times = settings.times
        self._events = events
        self._results = results
        self._sender_waits = settings.transfers == "sender"
        self._devices: dict[str, _Device] = {}
        self._ranks: list[_Rank] = []
        fabric = settings.times.fabric
        self._fabric_out = _Lane(row_s=0.0 if fabric is None else fabric.to_ffn_s)
        self._fabric_back = _Lane(row_s=0.0 if fabric is None else fabric.to_attention_s)
        self._epoch = 0
        self._new_epoch()

    # -- DataPath -----------------------------------------------------------------------------------------

    def wake(self, worker: AttentionWorker) -> None:
        self._turn(self._device(worker))

    def lose_attention(self, worker: AttentionWorker) -> None:
        self._devices.pop(worker.key, None)
        for rank in self._ranks:
            rank.table.lost(worker.rank)
            self._serve(rank)

    def lose_ffn(self) -> None:
        self._devices.clear()
        self._new_epoch()

    # -- attention side -----------------------------------------------------------------------------------

    def _turn(self, device: _Device) -> None:
        """Start what can start, then run one ready stage."""
        if device.busy:
            return
        worker, now = device.worker, self._events.now
        device.ready.extend(worker.begin_steps(now, lambda stream: self._idle(worker.rank, stream)))
        if not device.ready:
            return
        place = next_of([self._next_stage(step) for step in device.ready])
        step = device.ready[place]
        del device.ready[place]
        device.busy = True
        if step.layer + 1 == self._times.num_layers:
            self._run_head(device, step)
            return
        seconds = step.attention_s + (step.to_ffn_s if self._sender_waits else 0.0)
        self._events.after(seconds, self._computed, device, step, seconds)

    def _computed(self, device: _Device, step: Step, seconds: float) -> None:
        if not self._ran(device, step, seconds):
            return
        step.layer += 1
        step.missing, step.sent_s = len(self._ranks), self._events.now
        self._events.at(self._over(device.out, step.to_ffn_s, self._fabric_out, step), self._arrived, step)
        self._turn(device)

    def _next_stage(self, step: Step) -> NextStage:
        if step.head_rows:
            return NextStage.HEAD_GOES_ON
        return NextStage.HEAD_BEGINS if step.layer + 1 == self._times.num_layers else NextStage.LAYER

    def _run_head(self, device: _Device, step: Step) -> None:
        """The whole of it, or a slice where other streams are in flight; a step without samples has none."""
        vocab = self._times.vocab
        alone = len(device.worker.flying) == 1 or not step.head_s
        end = slice_end(step.head_rows, vocab, int(step.load.num_samples), alone=alone)
        seconds = step.head_s * (end - step.head_rows) / vocab
        step.head_rows = end
        self._events.after(seconds, self._finished if end == vocab else self._sliced, device, step, seconds)

    def _ran(self, device: _Device, step: Step, seconds: float) -> bool:
        """Book a stage that is over; False where its worker was lost meanwhile."""
        if step.void:
            return False
        device.busy = False
        self._results.attention_busy(device.worker.rank, seconds)
        return True

    def _sliced(self, device: _Device, step: Step, seconds: float) -> None:
        if not self._ran(device, step, seconds):
            return
        device.ready.append(step)
        self._turn(device)

    def _finished(self, device: _Device, step: Step, seconds: float) -> None:
        if not self._ran(device, step, seconds):
            return
        device.worker.finish(step, self._events.now)
        self._turn(device)

    def _combined(self, device: _Device, step: Step) -> None:
        if step.void:
            return
        step.exchange_s += self._events.now - step.sent_s
        device.ready.append(step)
        self._turn(device)

    def _over(self, lane: _Lane, seconds: float, fabric: _Lane, step: Step) -> float:
        """When rows that leave now are there: through their own link and what all links share, at the same time."""
        now = self._events.now
        if self._sender_waits:
            return now
        if self._settings.transfers == "delay":
            return now + seconds
        lane.free_s = max(now, lane.free_s) + seconds
        if not fabric.row_s:
            return lane.free_s
        fabric.free_s = max(now, fabric.free_s) + fabric.row_s * step.num_tokens
        return max(lane.free_s, fabric.free_s)

    # -- FFN side -----------------------------------------------------------------------------------------

    def _idle(self, rank: int, stream: int) -> None:
        for ffn in self._ranks:
            ffn.table.idle(rank, stream)
            self._serve(ffn)

    def _arrived(self, step: Step) -> None:
        if step.void:
            return
        now = self._events.now
        for rank in self._ranks:
            rank.table.arrive(
                Arrival(
                    step.worker.rank,
                    step.stream,
                    step.layer,
                    self._epoch,
                    step.gang_id,
                    step.mask,
                    step.num_tokens,
                    now,
                    step,
                )
            )
            self._serve(rank)

    def _serve(self, rank: _Rank) -> None:
        """Compute the oldest complete gang, or look again when the next deadline has passed."""
        if rank.busy:
            return
        now = self._events.now
        batch = rank.table.next_batch(now)
        if batch is None:
            deadline_s = rank.table.deadline()
            if deadline_s is not None and deadline_s < rank.wakes_at:
                rank.wakes_at = max(deadline_s, now) + TICK_S
                self._events.at(rank.wakes_at, self._deadline, rank, rank.wakes_at)
            return
        rank.busy = True
        seconds = busy_s = self._times.ffn_s(batch.num_tokens) * self._settings.pace.ffn(rank.idx, now)
        if self._sender_waits:
            busy_s += max(_step(arrival).to_attention_s for arrival in batch.arrivals)
        if rank is self._ranks[0]:
            self._results.gang(batch, [_step(arrival).attention_s for arrival in batch.arrivals])
        self._events.after(busy_s, self._answered, rank, batch, seconds, busy_s, self._epoch)

    def _deadline(self, rank: _Rank, planned_s: float) -> None:
        if rank.wakes_at == planned_s:
            rank.wakes_at = float("inf")
            self._serve(rank)

    def _answered(self, rank: _Rank, batch: GangBatch, seconds: float, busy_s: float, epoch: int) -> None:
        if epoch != self._epoch:
            return
        rank.busy = False
        self._results.ffn_busy_s += busy_s / len(self._ranks)
        former = self._ranks[batch.stream % len(self._ranks)]
        for arrival in batch.arrivals:
            step = _step(arrival)
            if step.void:
                continue
            if batch.layer == 0 and rank is former:
                step.gang_id, step.mask = batch.gang_id, batch.mask
                step.meet(batch.num_tokens, self._times)
            step.missing -= 1
            if step.missing == 0:
                step.ffn_s += seconds
                device = self._device(step.worker)
                there_s = self._over(device.back, step.to_attention_s, self._fabric_back, step)
                self._events.at(there_s, self._combined, device, step)
        self._serve(rank)

    # -- details ------------------------------------------------------------------------------------------

    def _device(self, worker: AttentionWorker) -> _Device:
        device = self._devices.get(worker.key)
        if device is None:
            device = self._devices[worker.key] = _Device(worker)
        return device

    def _new_epoch(self) -> None:
        self._epoch += 1
        num_ffn = self._settings.topology.num_ffn
        window_s = self._settings.gang_window_s
        self._ranks = [_Rank(idx, GangTable(idx, num_ffn, max_window_s=window_s)) for idx in range(num_ffn)]


def _step(arrival: Arrival) -> Step:
    assert isinstance(arrival.token, Step)
    return arrival.token

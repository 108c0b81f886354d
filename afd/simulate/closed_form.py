"""First and last layer of each step as decisions of the gang table, the layers between them by a closed form.

Devices are not simulated but shared. A step alone would take its latency, L (A + C + F) + head; while it runs it keeps
a device busy for a share of that time, such as (L A + head) / latency of its worker. Where the shares on a device add
up to more than 1, everything on it is stretched by their sum. In a steady state that is the pipeline's closed form:

    step = max(sum of (L A + head) on a worker, sum of L F of the gangs, sum of L C one way on a link,
               L (A + C + F) + head)

A gang moves as its slowest member does. Its table is kept by the FFN rank that forms it; the others do the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from afd.ffn.gang import Arrival, GangBatch, GangTable
from afd.simulate.events import EventQueue
from afd.simulate.results import Results
from afd.simulate.settings import Settings
from afd.simulate.worker import AttentionWorker, Step
from afd.types import MAX_STREAMS

TICK_S = 1e-6  # a deadline is looked at just after it, whatever the rounding
DONE_S = 1e-12


@dataclass(slots=True, eq=False)
class _Gang:
    """Steps that move together.

    left_s: what they would still take alone, up to the last layer or through it.
    stretch: how much longer it takes.
    share: of the slowest FFN rank's time while it is on its way.
    mean_share: of an FFN rank's, on average.
    loads: its workers'.
    """

    steps: list[Step]
    loads: list[_Load]
    layer: int
    left_s: float
    share: float
    mean_share: float
    ffn_s: float
    stretch: float = 1.0


class _Load:
    """Shares of a worker's processor and of each direction of its link that its steps in flight take, by stream."""

    __slots__ = ("_back", "_device", "_out", "stretch")

    def __init__(self) -> None:
        self._device, self._out, self._back = [0.0] * MAX_STREAMS, [0.0] * MAX_STREAMS, [0.0] * MAX_STREAMS
        self.stretch = 1.0

    def set(self, stream: int, device: float = 0.0, out: float = 0.0, back: float = 0.0) -> None:
        self._device[stream], self._out[stream], self._back[stream] = device, out, back
        self.stretch = max(1.0, sum(self._device), sum(self._out), sum(self._back))


class _FabricLoad:
    """Shares of each direction of the network between the roles that the steps in flight take."""

    def __init__(self) -> None:
        self._shares: dict[tuple[int, int], tuple[float, float]] = {}  # by attention rank and stream
        self.stretch = 1.0

    def set(self, rank: int, stream: int, out: float, back: float) -> None:
        self._shares[rank, stream] = (out, back)
        self._sum_up()

    def forget(self, rank: int) -> None:
        """The worker has nothing on its way any more."""
        self._shares = {key: share for key, share in self._shares.items() if key[0] != rank}
        self._sum_up()

    def _sum_up(self) -> None:
        shares = self._shares.values()
        self.stretch = max(1.0, sum(out for out, _ in shares), sum(back for _, back in shares))


class ClosedFormPath:
    """DataPath with a cost for each gang and worker instead of each layer, FFN rank and worker."""

    def __init__(self, settings: Settings, events: EventQueue, results: Results):
        self._settings = settings
        self._times = settings.times
        self._pace = settings.pace
        self._fabric = settings.times.fabric
        self._layers = settings.times.num_layers
        self._events = events
        self._results = results
        self._transfers = settings.transfers
        self._loads: dict[int, _Load] = {}  # by attention rank
        self._fabric_load = _FabricLoad()
        self._tables: list[GangTable] = []
        self._wakes_at: list[float] = []
        self._gangs: list[_Gang] = []
        self._moved_at = 0.0
        self._version = 0
        self._epoch = 0
        self._new_epoch()

    # -- DataPath -----------------------------------------------------------------------------------------

    def wake(self, worker: AttentionWorker) -> None:
        idle: list[int] = []
        for step in worker.begin_steps(self._events.now, idle.append):
            self._begin(step)
        for stream in idle:
            load = self._loads.get(worker.rank)
            if load is not None:
                load.set(stream)
                if self._fabric is not None:
                    self._fabric_load.set(worker.rank, stream, 0.0, 0.0)
            self._table(stream).idle(worker.rank, stream)
            self._form(stream)

    def lose_attention(self, worker: AttentionWorker) -> None:
        self._loads.pop(worker.rank, None)
        self._fabric_load.forget(worker.rank)
        for idx, table in enumerate(self._tables):
            table.lost(worker.rank)
            self._form(idx)

    def lose_ffn(self) -> None:
        self._move_on(self._events.now)
        self._gangs.clear()
        self._loads.clear()
        self._fabric_load = _FabricLoad()
        self._new_epoch()

    # -- first and last layer -----------------------------------------------------------------------------

    def _begin(self, step: Step) -> None:
        """Attention of layer 0; the rows arrive at the rank that forms the gang."""
        load = self._loads.get(step.worker.rank)
        if load is None:
            load = self._loads[step.worker.rank] = _Load()
        layers, now = self._layers, self._events.now
        ffn_s = self._times.ffn_s(step.gang_tokens) * self._pace.ffn_span(now)[1]
        alone_s = layers * (step.attention_s + step.to_ffn_s + ffn_s + step.to_attention_s) + step.head_s
        own_s = layers * step.attention_s + step.head_s
        if self._transfers == "sender":
            own_s += layers * step.to_ffn_s
        link = layers / alone_s if self._transfers == "link" else 0.0
        load.set(step.stream, own_s / alone_s, link * step.to_ffn_s, link * step.to_attention_s)
        first_s = load.stretch * (step.attention_s + step.to_ffn_s)
        if self._fabric is not None:
            rows = layers / alone_s * step.num_tokens
            out, back = rows * self._fabric.to_ffn_s, rows * self._fabric.to_attention_s
            self._fabric_load.set(step.worker.rank, step.stream, out, back)
            first_s = max(first_s, self._fabric_load.stretch * (step.attention_s + step.to_ffn_s))
        self._events.after(first_s, self._arrived, step)

    def _arrived(self, step: Step) -> None:
        if step.void:
            return
        self._arrive(step, 0, self._events.now)
        self._form(step.stream)

    def _arrive(self, step: Step, layer: int, at_s: float) -> None:
        step.layer = layer
        rank, tokens = step.worker.rank, step.num_tokens
        self._table(step.stream).arrive(
            Arrival(rank, step.stream, layer, self._epoch, step.gang_id, step.mask, tokens, at_s, step)
        )

    def _form(self, stream: int) -> None:
        """Whatever is complete at this stream's rank goes on; look again at the next deadline."""
        idx = stream % len(self._tables)
        table, now = self._tables[idx], self._events.now
        formed = []
        while (batch := table.next_batch(now)) is not None:
            formed.append(self._gang_of(batch))
        if formed:
            self._move_on(now)
            self._gangs += formed
            self._plan(now)
        deadline_s = table.deadline()
        if deadline_s is not None and deadline_s < self._wakes_at[idx]:
            self._wakes_at[idx] = max(deadline_s, now) + TICK_S
            self._events.at(self._wakes_at[idx], self._deadline, idx, self._wakes_at[idx])

    def _deadline(self, idx: int, planned_s: float) -> None:
        if self._wakes_at[idx] == planned_s:
            self._wakes_at[idx] = float("inf")
            self._form(idx)

    def _gang_of(self, batch: GangBatch) -> _Gang:
        steps = [_step(arrival) for arrival in batch.arrivals]
        num_tokens = batch.num_tokens
        if batch.layer == 0:
            for step in steps:
                step.gang_id, step.mask = batch.gang_id, batch.mask
                step.meet(num_tokens, self._times)
        mean, slowest = self._pace.ffn_span(self._events.now)
        mean_ffn_s = self._times.ffn_s(num_tokens)
        ffn_s, mean_ffn_s = slowest * mean_ffn_s, mean * mean_ffn_s
        back_s = ffn_s + max(step.to_attention_s for step in steps)
        self._results.gang(batch, [step.attention_s for step in steps], self._weight(batch.layer))
        occupied_s = back_s if self._transfers == "sender" else ffn_s
        layer_s = self._layer_s(steps, ffn_s)
        of_way = self._layers / ((self._layers - 1) * layer_s + back_s)
        share, mean_share = of_way * occupied_s, of_way * (occupied_s - ffn_s + mean_ffn_s)
        left_s = back_s
        if batch.layer == 0 and self._layers > 1:
            left_s += (self._layers - 2) * layer_s + _out_s(steps)
        loads = [self._loads[step.worker.rank] for step in steps]
        return _Gang(steps, loads, batch.layer, left_s, share, mean_share, ffn_s)

    def _weight(self, layer: int) -> int:
        """Layers that a gang seen at layer 0 or the last one stands for."""
        return 1 if layer else max(1, self._layers - 1)

    # -- the layers between -------------------------------------------------------------------------------

    def _layer_s(self, steps: Sequence[Step], ffn_s: float) -> float:
        """One layer of a gang alone: its slowest member's way there, F, and the slowest way back."""
        return _out_s(steps) + ffn_s + max(step.to_attention_s for step in steps)

    def _move_on(self, now: float) -> None:
        """Book how far every gang has come, and what the FFN was kept busy with."""
        passed_s, busy = now - self._moved_at, 0.0
        self._moved_at = now
        for gang in self._gangs:
            gang.left_s -= passed_s / gang.stretch
            busy += gang.mean_share / gang.stretch
        self._results.ffn_busy_s += busy * passed_s

    def _plan(self, now: float) -> None:
        """Stretch every gang by what it shares now; the next one to be through is looked at then."""
        shared = max(sum(gang.share for gang in self._gangs), self._fabric_load.stretch)
        for gang in self._gangs:
            gang.stretch = max(shared, max([load.stretch for load in gang.loads]))
        self._version += 1
        if self._gangs:
            next_s = min(gang.left_s * gang.stretch for gang in self._gangs)
            self._events.at(now + max(0.0, next_s), self._through, self._version)

    def _through(self, version: int) -> None:
        """Gangs that have come to the last layer's dispatch, or to the end of its exchange."""
        if version != self._version:
            return
        now = self._events.now
        self._move_on(now)
        through = [gang for gang in self._gangs if gang.left_s <= DONE_S]
        self._gangs = [gang for gang in self._gangs if gang.left_s > DONE_S]
        for gang in through:
            steps = [step for step in gang.steps if not step.void]
            if gang.layer == self._layers - 1:
                self._leave(steps, gang.ffn_s)
            elif steps:
                out_s = _out_s(steps)
                for step in steps:  # who is quicker was there before
                    early_s = gang.stretch * (out_s - step.attention_s - step.to_ffn_s)
                    self._arrive(step, self._layers - 1, now - early_s)
                self._form(steps[0].stream)
        self._plan(now)

    def _leave(self, steps: Sequence[Step], ffn_s: float) -> None:
        """The last layer's answer is there: head, sampling, commit."""
        for step in steps:
            step.ffn_s = self._layers * ffn_s
            step.exchange_s = step.ffn_s + self._layers * (step.to_ffn_s + step.to_attention_s)
            stretch = self._loads[step.worker.rank].stretch
            self._events.after(stretch * step.head_s, self._finished, step)

    def _finished(self, step: Step) -> None:
        if step.void:
            return
        worker = step.worker
        self._results.attention_busy(worker.rank, self._layers * step.attention_s + step.head_s)
        if self._transfers == "sender":
            self._results.attention_busy(worker.rank, self._layers * step.to_ffn_s)
        worker.finish(step, self._events.now)
        self.wake(worker)

    # -- details ------------------------------------------------------------------------------------------

    def _table(self, stream: int) -> GangTable:
        return self._tables[stream % len(self._tables)]

    def _new_epoch(self) -> None:
        self._epoch += 1
        num_ffn, window_s = self._settings.topology.num_ffn, self._settings.gang_window_s
        self._tables = [GangTable(idx, num_ffn, max_window_s=window_s) for idx in range(num_ffn)]
        self._wakes_at = [float("inf")] * num_ffn


def _out_s(steps: Sequence[Step]) -> float:
    """Attention and the way to the FFN of the slowest."""
    return max(step.attention_s + step.to_ffn_s for step in steps)


def _step(arrival: Arrival) -> Step:
    assert isinstance(arrival.token, Step)
    return arrival.token

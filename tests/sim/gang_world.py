"""Attention workers, FFN ranks and the network between them in virtual time, around the real gang tables."""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from afd.ffn.gang import Arrival, GangBatch, GangTable

LAYERS = 3
WINDOW_S, STRAGGLER_S = 0.002, 0.05
STALL_S = 0.2
HEARD_S = 0.02  # a new epoch reaches a worker within it


@dataclass(eq=False)
class Step:
    """One stream of a worker. number: of its exchange, by which answers to a cancelled one are told apart."""

    stream: int
    number: int = 0
    epoch: int = 0
    layer: int = 0
    gang: int = 0
    mask: int = 0
    missing: set[int] = field(default_factory=set)
    sent_s: float = 0.0
    num_done: int = 0
    size: int = 0  # of its last gang


@dataclass(eq=False)
class Worker:
    """One incarnation of an attention rank."""

    rank: int
    epoch: int
    steps: list[Step]
    alive: bool = True


class World:
    """Run it with `run`; what must hold is asserted where it happens, the rest is in the books."""

    def __init__(self, seed: int, num_attention: int, num_ffn: int, num_streams: int, *, trouble: float = 0.0):
        self.random = random.Random(seed)
        self.num_ffn, self.num_streams, self.trouble = num_ffn, num_streams, trouble
        self.now, self.epoch, self._counter = 0.0, 1, 0
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self.tables = [self._fresh(f) for f in range(num_ffn)]
        self.up = [True] * num_ffn
        self._free_s = [0.0] * num_ffn
        self._wakes_s = [0.0] * num_ffn
        self.workers: dict[int, Worker] = {}
        self.longest_s = 0.0
        self.num_stalls = self.num_lost = 0
        self.sets: dict[tuple[int, int], list[set[int]]] = {}
        self.disturbed: set[int] = set()  # gangs with a member that stalled or was lost
        self._answered: set[tuple[int, Step, int]] = set()
        for rank in range(num_attention):
            self.join(rank)

    def at(self, when: float, act: Callable[[], None]) -> None:
        self._counter += 1
        heapq.heappush(self._queue, (when, self._counter, act))

    def after(self, low: float, high: float, act: Callable[[], None]) -> None:
        self.at(self.now + self.random.uniform(low, high), act)

    def run(self, until_s: float) -> None:
        while self._queue and self._queue[0][0] < until_s:
            self.now, _, act = heapq.heappop(self._queue)
            act()

    # -- members ------------------------------------------------------------------------------------------

    def join(self, rank: int) -> None:
        """A fresh worker; everybody hears of the new epoch within HEARD_S."""
        worker = Worker(rank, self.epoch, [Step(stream) for stream in range(self.num_streams)])
        self.workers[rank] = worker
        self.new_epoch()
        worker.epoch = self.epoch
        for step in worker.steps:
            self.after(0.0, 0.003, partial(self._begin, worker, step))

    def new_epoch(self) -> None:
        self.epoch += 1
        for worker in self.workers.values():
            self.after(0.0, HEARD_S, partial(self._hear, worker, self.epoch))

    def _hear(self, worker: Worker, epoch: int) -> None:
        worker.epoch = max(worker.epoch, epoch)

    def lose(self, rank: int) -> None:
        """Its connections close; the coordinator raises the epoch; a successor may join later."""
        worker = self.workers.pop(rank)
        worker.alive = False
        self.num_lost += 1
        for step in worker.steps:
            self._disturb(step)
        for f in range(self.num_ffn):
            self.after(0.0, 0.002, partial(self._closed, f, rank))
        self.at(self.now + 0.003, self.new_epoch)

    def _closed(self, f: int, rank: int) -> None:
        self.tables[f].lost(rank)
        self._serve(f)

    def restart_ffn(self, f: int, away_s: float) -> None:
        """Every worker cancels what is in flight, and begins again in the new epoch once the rank is back."""
        self.up[f] = False
        for worker in self.workers.values():
            for step in worker.steps:
                self._disturb(step)
                step.number += 1
                step.missing.clear()
        self.at(self.now + away_s, partial(self._ffn_back, f))

    def _ffn_back(self, f: int) -> None:
        self.tables[f], self.up[f] = self._fresh(f), True
        self._free_s[f] = 0.0
        self.new_epoch()
        for worker in self.workers.values():
            worker.epoch = self.epoch
            for step in worker.steps:
                self.after(0.0, HEARD_S, partial(self._begin_again, worker, step, step.number))

    def _begin_again(self, worker: Worker, step: Step, number: int) -> None:
        if step.number == number:
            self._begin(worker, step)

    def _fresh(self, f: int) -> GangTable:
        return GangTable(f, self.num_ffn, max_window_s=WINDOW_S, straggler_s=STRAGGLER_S)

    def _disturb(self, step: Step) -> None:
        self.disturbed.add(step.gang)

    # -- attention side -----------------------------------------------------------------------------------

    def _begin(self, worker: Worker, step: Step) -> None:
        step.layer, step.gang, step.mask, step.epoch = 0, 0, 0, worker.epoch
        self._send(worker, step)

    def _send(self, worker: Worker, step: Step) -> None:
        if not worker.alive or not all(self.up):
            return
        step.number += 1
        step.missing, step.sent_s = set(range(self.num_ffn)), self.now
        for f in range(self.num_ffn):
            self.after(1e-5, 2e-4, partial(self._arrive, f, worker, step, step.number))

    def _answer(self, f: int, worker: Worker, step: Step, number: int, batch: GangBatch) -> None:
        if not worker.alive or step.number != number:
            return
        assert f in step.missing, "answered twice"
        step.missing.discard(f)
        if step.layer == 0 and f == step.stream % self.num_ffn:
            step.gang, step.mask, step.size = batch.gang_id, batch.mask, len(batch.arrivals)
            assert batch.mask >> worker.rank & 1
        if step.missing:
            return
        self.longest_s = max(self.longest_s, self.now - step.sent_s)
        low, high = 1e-4, 3e-4
        if self.random.random() < self.trouble:
            self.num_stalls += 1
            self._disturb(step)
            low = high = STALL_S
        step.layer += 1
        go_on: Callable[[Worker, Step], None] = self._send
        if step.layer == LAYERS:
            step.num_done += 1
            go_on = self._begin
            if self.random.random() < 5 * self.trouble:
                low, high = 0.001, 0.02
                for table in self.tables:
                    table.idle(worker.rank, step.stream)
        self.after(low, high, partial(self._unless_void, go_on, worker, step, number))

    def _unless_void(self, act: Callable[[Worker, Step], None], worker: Worker, step: Step, number: int) -> None:
        if step.number == number:
            act(worker, step)

    # -- FFN side -----------------------------------------------------------------------------------------

    def _arrive(self, f: int, worker: Worker, step: Step, number: int) -> None:
        if not self.up[f] or not worker.alive or step.number != number:
            return
        self.tables[f].arrive(
            Arrival(
                worker.rank,
                step.stream,
                step.layer,
                step.epoch,
                step.gang,
                step.mask,
                1,
                self.now,
                (worker, step, number),
            )
        )
        self._serve(f)

    def _serve(self, f: int) -> None:
        """The rank's loop: one batch at a time, then whatever is complete."""
        if self.now < self._free_s[f] or not self.up[f]:
            return
        table = self.tables[f]
        batch = table.next_batch(self.now)
        if batch is None:
            deadline = table.deadline()
            if deadline is not None and not self.now < self._wakes_s[f] <= deadline + 1e-6:
                self._wakes_s[f] = max(deadline, self.now) + 1e-6
                self.at(self._wakes_s[f], partial(self._serve, f))
            return
        if batch.layer:
            self.sets.setdefault((batch.arrivals[0].gang_id, batch.layer), []).append({a.rank for a in batch.arrivals})
            assert len({(a.epoch, a.gang_id) for a in batch.arrivals}) == 1, "two gangs in one batch"
        assert len({(a.stream, a.layer) for a in batch.arrivals}) == 1
        done = self._free_s[f] = self.now + self.random.uniform(1e-4, 3e-4)
        for arrival in batch.arrivals:
            worker, step, number = arrival.token
            assert (f, step, number) not in self._answered, "served twice"
            self._answered.add((f, step, number))
            self.at(done, partial(self._answer, f, worker, step, number, batch))
        self.at(done, partial(self._serve_on, f, table))

    def _serve_on(self, f: int, table: GangTable) -> None:
        if self.tables[f] is table:
            self._serve(f)

    # -- what must hold -----------------------------------------------------------------------------------

    def check(self) -> None:
        """Bounded waits, and the same sets everywhere for gangs that nothing disturbed."""
        patience_s = max(table.step_s(k) for table in self.tables for k in range(self.num_streams)) + WINDOW_S
        queue_s = 3e-4 * self.num_streams * (len(self.workers) + 1)
        assert self.longest_s <= STRAGGLER_S + 2 * patience_s + queue_s + 0.01, "waited past every bound"
        complete = 0
        for (gang, _), groups in self.sets.items():
            if gang in self.disturbed or len(groups) < self.num_ffn:
                continue  # the last ones may be under way
            complete += 1
            assert all(group == groups[0] for group in groups), "FFN ranks disagree about a gang"
            assert len(groups) == self.num_ffn
        assert complete

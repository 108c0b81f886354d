"""Gangs in a seeded simulation: attention workers of random speed, several FFN ranks, stalls, idling; invariants."""

import heapq
import random

import pytest

from afd.ffn.gang import Arrival, GangTable

LAYERS = 3


class Worker:
    """An attention worker of the simulation: one stream, LAYERS exchanges a step, random compute times."""

    def __init__(self, rank, num_ffn):
        self.rank, self.num_ffn = rank, num_ffn
        self.layer, self.gang, self.mask = 0, 0, 0
        self.waiting_for, self.sent_s, self.steps = set(), 0.0, 0
        self.idle = False


@pytest.mark.parametrize("num_ffn", [1, 2, 3])
@pytest.mark.parametrize("seed", range(12))
def test_simulation(seed, num_ffn):
    """Random speeds, stalls, idling: every dispatch is answered once, in bounded time, and sets agree on all ranks."""
    rng = random.Random(seed)
    straggler_s, window_s = 0.05, 0.002
    tables = [GangTable(f, num_ffn, max_window_s=window_s, straggler_s=straggler_s) for f in range(num_ffn)]
    workers = [Worker(r, num_ffn) for r in range(rng.randrange(1, 5))]
    queue, counter, stalls = [], 0, 0
    sets: dict[tuple[int, int], list[set[int]]] = {}

    def push(at, kind, *args):
        nonlocal counter
        counter += 1
        heapq.heappush(queue, (at, counter, kind, args))

    def send(now, worker):
        worker.waiting_for, worker.sent_s = set(range(num_ffn)), now
        for f in range(num_ffn):
            push(now + rng.uniform(1e-5, 2e-4), "arrive", f, worker.rank, worker.layer, worker.gang, worker.mask)

    for worker in workers:
        push(rng.uniform(0, 0.003), "send", worker.rank)
    now, longest = 0.0, 0.0
    while queue and now < 2.0:
        now, _, kind, args = heapq.heappop(queue)
        if kind == "send":
            send(now, workers[args[0]])
        elif kind == "arrive":
            f, rank, layer, gang, mask = args
            tables[f].arrive(Arrival(rank, 0, layer, 1, gang, mask, 1, now, f))
            push(now, "serve", f)
        elif kind == "serve":
            f = args[0]
            while (batch := tables[f].next_batch(now)) is not None:
                if batch.layer:
                    sets.setdefault((batch.arrivals[0].gang_id, batch.layer), []).append(
                        {a.rank for a in batch.arrivals}
                    )
                done = now + rng.uniform(1e-4, 3e-4)
                for a in batch.arrivals:
                    push(done, "answer", f, a.rank, batch.gang_id, batch.mask)
            deadline = tables[f].deadline()
            if deadline is not None:
                push(max(deadline, now + 1e-6), "serve", f)
        elif kind == "answer":
            f, rank, gang, mask = args
            worker = workers[rank]
            assert f in worker.waiting_for, "answered twice"
            worker.waiting_for.discard(f)
            if worker.layer == 0 and f == 0:
                worker.gang, worker.mask = gang, mask
                assert mask >> rank & 1
            if worker.waiting_for:
                continue
            longest = max(longest, now - worker.sent_s)
            worker.layer += 1
            delay = rng.uniform(1e-4, 3e-4)
            if rng.random() < 0.002:
                delay, stalls = 0.2, stalls + 1
            if worker.layer == LAYERS:
                worker.layer, worker.gang, worker.mask = 0, 0, 0
                worker.steps += 1
                if rng.random() < 0.02:
                    for t in tables:
                        t.idle(rank, 0)
                    delay = rng.uniform(0.001, 0.02)
            push(now + delay, "send", rank)
    assert all(worker.steps > 20 for worker in workers), "somebody stands still"
    assert longest <= straggler_s + max(t._streams[0].step_s for t in tables) + 0.02, "waited past every bound"
    if not stalls:
        for groups in sets.values():
            assert all(group == groups[0] for group in groups), "FFN ranks disagree about a gang"
            assert len(groups) == num_ffn

"""The alternative on the same requests: colocated expert parallelism (EP), all servers in lock-step.

Each server is a worker with attention for its own requests and a share of the experts (`afd.plan.colocated`). A step of
all of them takes what the slowest one's attention, the FFN of all rows and their all-to-all take. With two streams a
step has two micro-batches, and the all-to-all of one hides behind the other's computation.
"""

from __future__ import annotations

from afd.plan.colocated import ColocatedModel
from afd.simulate.events import EventQueue
from afd.simulate.results import Results
from afd.simulate.settings import Settings
from afd.simulate.times import rounded
from afd.simulate.worker import AttentionWorker, Step


class ColocatedPath:
    """DataPath of one EP deployment. A step of all servers begins as soon as any has work and none is under way."""

    def __init__(self, model: ColocatedModel, num_chips: int, settings: Settings, events: EventQueue, results: Results):
        self._model = model
        self._num_chips = num_chips
        self._layers = settings.times.num_layers
        self._slack = 1.0 + model.efficiency.jitter
        self._events = events
        self._results = results
        self._ffn: dict[int, tuple[float, float]] = {}
        self._workers: dict[str, AttentionWorker] = {}
        self._under_way = False

    # -- DataPath -----------------------------------------------------------------------------------------

    def wake(self, worker: AttentionWorker) -> None:
        self._workers[worker.key] = worker
        if not self._under_way:
            self._begin()

    def lose_attention(self, worker: AttentionWorker) -> None:
        self._workers.pop(worker.key, None)

    def lose_ffn(self) -> None:
        """There are none: what is under way goes on, void."""

    # -- steps --------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        steps: list[Step] = []
        for worker in self._workers.values():
            steps += worker.begin_steps(self._events.now, lambda stream: None)
        self._under_way = bool(steps)
        if steps:
            seconds, computing_s = self._times(steps)
            self._events.after(seconds, self._finished, steps, computing_s)

    def _finished(self, steps: list[Step], computing_s: float) -> None:
        for step in steps:
            if not step.void:
                step.worker.finish(step, self._events.now)
        for rank in {step.worker.rank for step in steps}:
            self._results.attention_busy(rank, computing_s)
        self._begin()

    def _times(self, steps: list[Step]) -> tuple[float, float]:
        """(the step of all servers, what of it computes)"""
        computing, transfers, heads = [], [], dict[int, float]()
        for stream in {step.stream for step in steps}:
            members = [step for step in steps if step.stream == stream]
            ffn_s, transfer_s = self._ffn_s(sum(step.num_tokens for step in members))
            computing.append(max(step.attention_s for step in members) + ffn_s)
            transfers.append(transfer_s)
            for step in members:
                heads[step.worker.rank] = heads.get(step.worker.rank, 0.0) + step.head_s
        one_s = max(compute_s + transfer_s for compute_s, transfer_s in zip(computing, transfers, strict=True))
        stretch = self._layers * self._model.efficiency.colocated_stretch
        layers_s = stretch * max(sum(computing), sum(transfers), one_s)
        head_s = max(heads.values())
        return layers_s + head_s, stretch * sum(computing) + head_s

    def _ffn_s(self, num_rows: int) -> tuple[float, float]:
        """FFN and all-to-all of one layer, of so many rows over all chips."""
        key = rounded(num_rows)
        found = self._ffn.get(key)
        if found is None:
            ffn_s, transfer_s = self._model.ffn_times(self._num_chips, key / self._num_chips)
            found = self._ffn[key] = (self._slack * ffn_s, self._slack * transfer_s)
        return found

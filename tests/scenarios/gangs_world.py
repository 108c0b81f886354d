"""An FFN worker's `GangTable` with scripted attention workers, as the world of a scenario."""

from __future__ import annotations

from afd.ffn.gang import Arrival, GangBatch, GangTable

NO_GANG = (0, 0)


class GangsWorld:
    """One FFN worker and one stream. Attention workers are called by their rank; times are milliseconds.

    At layer 0 an attention worker begins a step; at later layers it names the gang that it was answered there, as real
    ones do. Gangs are called A, B, ... in the order in which they are formed, without those of `steps`.
    """

    def __init__(self) -> None:
        self._said: list[str] = []
        self._table = GangTable(0, 1, max_window_s=0.005, straggler_s=0.1)
        self._now_s = 0.0
        self._epoch = 1
        self._gang_of: dict[int, tuple[int, int]] = {}
        self._names: dict[int, str] = {}

    # -- commands -----------------------------------------------------------------------------------------

    def layer(self, layer: str, *ranks: str, epoch: str = "") -> None:
        """Dispatches of these attention workers' layer arrive, all at once."""
        for rank in map(int, ranks):
            gang_id, mask = self._gang_of[rank] if int(layer) else NO_GANG
            number = int(epoch or self._epoch)
            self._table.arrive(Arrival(rank, 0, int(layer), number, gang_id, mask, 4, self._now_s))
        self._compute()

    def steps(self, count: str, *ranks: str, layers: str = "2", ms: str = "20") -> None:
        """These attention workers go through so many whole steps together, which nobody needs to see."""
        said, self._said = self._said, []
        for _ in range(int(count)):
            for layer in range(int(layers)):
                self.layer(str(layer), *ranks)
                self.wait(str(float(ms) / int(layers)))
        self._said = said
        self._names.clear()

    def wait(self, ms: str) -> None:
        """Time passes."""
        end_s = self._now_s + float(ms) / 1e3
        while (due_s := self._table.deadline()) is not None and due_s <= end_s:
            self._now_s = max(self._now_s, due_s)
            self._compute()
        self._now_s = end_s

    def epoch(self, number: str) -> None:
        """The cluster's epoch from now on: of steps that begin, and of layers whose epoch is not given."""
        self._epoch = int(number)

    def idle(self, *ranks: str) -> None:
        """These attention workers have nothing to run."""
        for rank in map(int, ranks):
            self._table.idle(rank, 0)
        self._compute()

    def lost(self, rank: str) -> None:
        """The attention worker's process is gone."""
        self._said += [f"layer {arrival.layer} of {arrival.rank} is dropped" for arrival in self._table.lost(int(rank))]
        self._compute()

    # -- what comes of it ---------------------------------------------------------------------------------

    def news(self) -> list[str]:
        lines, self._said = self._said, []
        return lines

    def _compute(self) -> None:
        while (batch := self._table.next_batch(self._now_s)) is not None:
            ranks = [arrival.rank for arrival in batch.arrivals]
            self._said.append(f"{self._now_s * 1e3:.0f} ms: {self._named(batch)} of {' '.join(map(str, ranks))}")
            for rank in ranks:
                self._gang_of[rank] = (batch.gang_id, batch.mask)

    def _named(self, batch: GangBatch) -> str:
        name = self._names.setdefault(batch.gang_id, chr(ord("A") + len(self._names)))
        return f"gang {name}, layer {batch.layer}"

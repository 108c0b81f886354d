"""How much later than its gang's first member each attention worker arrives. Pure.

The straggler score of a worker is the share of a step that its gangs' first members wait for it: its mean lateness over
the batches it shared, times the number of layers, over the step's time. 0 = always first.
"""

from __future__ import annotations

from collections.abc import Sequence

from afd.ffn.gang import Arrival
from afd.telemetry.recent import Growth

_LATE, _LAYERS = "late/", "layers/"


class Lateness:
    """Sums since start by attention rank. add: main thread; sums, score: any thread."""

    def __init__(self, num_layers: int):
        self._num_layers = num_layers
        self.late_s: dict[int, float] = {}
        self._layers_s: dict[int, float] = {}

    def add(self, arrivals: Sequence[Arrival], step_s: float) -> None:
        """One batch of a gang, computed now. step_s: that stream's step, 0 = not known yet (then it is not counted)."""
        if len(arrivals) < 2 or step_s <= 0.0:
            return
        first_s, layer_s = min(a.at_s for a in arrivals), step_s / self._num_layers
        for arrival in arrivals:
            rank = arrival.rank
            self.late_s[rank] = self.late_s.get(rank, 0.0) + arrival.at_s - first_s
            self._layers_s[rank] = self._layers_s.get(rank, 0.0) + layer_s

    def sums(self) -> dict[str, float]:
        """Sums that only rise, for `RecentSums` to tell the last seconds from."""
        late, layers = dict(self.late_s), dict(self._layers_s)
        return {f"{_LATE}{rank}": s for rank, s in late.items()} | {f"{_LAYERS}{rank}": s for rank, s in layers.items()}


def straggler_scores(growth: Growth) -> dict[int, float]:
    """Score by attention rank, of those that shared a batch in the window."""
    names = [name for name in growth.added if name.startswith(_LAYERS) and growth.of(name) > 0.0]
    ranks = sorted(int(name.removeprefix(_LAYERS)) for name in names)
    return {rank: growth.ratio(f"{_LATE}{rank}", f"{_LAYERS}{rank}") for rank in ranks}

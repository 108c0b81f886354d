"""AFD as a contestant."""

from __future__ import annotations

from collections.abc import Sequence

from bench.compare.contestant import Outcome
from bench.drawing import GREEDY, Drawing
from bench.local import BenchCluster, flags_of, run_round

ROUND_S = 300.0


class Ours:
    """AFD in a configuration such as "1A1F:0" (see `flags_of`), without HTTP."""

    def __init__(self, config: str, dtype: str, model: str):
        self.name = config
        self._cluster = BenchCluster(*flags_of(config, model=model, dtype=dtype))

    def __enter__(self) -> Ours:
        self._cluster.__enter__()
        self.pid = self._cluster.process.pid
        return self

    def run_round(self, prompts: Sequence[Sequence[int]], output_len: int, drawing: Drawing = GREEDY) -> Outcome:
        result = run_round(self._cluster, prompts, output_len, ROUND_S, drawing)
        return Outcome(result.output_tokens_per_s, [timeline.ids for timeline in result.timelines])

    def __exit__(self, *exc: object) -> None:
        self._cluster.__exit__(*exc)

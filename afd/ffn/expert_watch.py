"""Finds experts that receive tokens and give nothing, each once. Pure: what the experts did and `now` in, news out."""

from __future__ import annotations

from collections.abc import Mapping

from afd.model.expert_load import ExpertLoad

PERIOD_S = 10.0  # between two looks: a look costs a median for each layer


class ExpertWatch:
    """found: (layer, expert) of those seen silent so far, in order; replaced, never changed, so any thread may read."""

    def __init__(self) -> None:
        self._next_s = 0.0
        self.found: tuple[tuple[int, int], ...] = ()

    def look(self, loads: Mapping[int, ExpertLoad], now: float) -> list[tuple[int, int]]:
        """(layer, expert) of those that went silent since the last look; nothing before the next look is due."""
        if now < self._next_s:
            return []
        self._next_s = now + PERIOD_S
        silent = {(layer, expert) for layer, load in loads.items() for expert in load.silent()}
        news = sorted(silent.difference(self.found))
        self.found = tuple(sorted(silent.union(self.found)))
        return news

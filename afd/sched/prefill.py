"""How much prefill a step may hold beside the decodes that run. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from afd.sched.latency import LatencyModel, StepLoad
from afd.sched.rules import HEADROOM

FINENESS = 16  # a part of what fits that may stay unused


class PrefillBudget:
    """How many prefill tokens a step may hold beside the decodes that run. A `PrefillPace` of the scheduler."""

    def __init__(self, model: LatencyModel):
        self._model = model

    def prefill_tokens(self, streams: Sequence[StepLoad], stream: int, target_s: float, start: int, limit: int) -> int:
        """Most tokens from position `start` on, at most `limit`, that stream's step can add within the target."""

        def cycle_s(num_tokens: int) -> float:
            added = StepLoad.chunk(start, num_tokens)
            loads = [load.plus(added) if idx == stream else load for idx, load in enumerate(streams)]
            return self._model.cycle_s(loads)

        most_s = HEADROOM * target_s
        high_s = cycle_s(limit)
        if high_s <= most_s:
            return limit
        low, high, low_s = 0, limit, self._model.cycle_s(streams)  # fits (or nothing does), does not fit
        while high - low > max(1, low // FINENESS):
            # Where the line through both ends crosses, but well inside: the curve is nearly a line.
            share = (most_s - low_s) / (high_s - low_s) if high_s > low_s else 0.5
            middle = low + max(1, min(high - low - 1, round((high - low) * min(0.9, max(0.1, share)))))
            middle_s = cycle_s(middle)
            if middle_s <= most_s:
                low, low_s = middle, middle_s
            else:
                high, high_s = middle, middle_s
        return low

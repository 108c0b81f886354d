"""Which part of a trace the picture shows. Pure."""

from __future__ import annotations

from bisect import bisect_left
from statistics import median

from afd.trace.errors import TraceError
from afd.trace.timeline import ATTENTION, COMPUTING, FFN, Timeline, Worker

TURNS_WIDE = 80  # so many turns of attention would fill the window: one is wide enough for its layer's number
MIN_WINDOW_S = 1e-4
LEAD = 0.45  # a step ends this far into the window


def choose_window(timeline: Timeline, from_s: float | None = None, for_s: float | None = None) -> tuple[float, float]:
    """(start, end): single layers can be seen, and a step ends in it.

    Of the places where all workers work, the one with the median share of computing is taken: the picture shows what
    is usual, not what looks best. TraceError when nothing ran.
    """
    turns = turns_of(timeline)
    length_s = for_s if for_s is not None else max(MIN_WINDOW_S, TURNS_WIDE * median(turns))
    if from_s is not None:
        return from_s, from_s + length_s
    if length_s >= timeline.seconds:
        return 0.0, timeline.seconds
    heads = [s for w in timeline.of_role(ATTENTION) for s in w.stages if s.name == "head"]
    anchors = [s.end_s - LEAD * length_s for s in heads] or [turn * length_s for turn in range(1, 9)]
    last_s = timeline.seconds - length_s
    complete_s = max((worker.complete_from_s for worker in timeline.workers), default=0.0)
    starts = sorted({min(max(anchor, min(complete_s, last_s), 0.0), last_s) for anchor in anchors})
    busy = [_Busy(worker) for worker in timeline.workers]
    scored = sorted((min(b.within(start, start + length_s) for b in busy), start) for start in starts)
    working = [entry for entry in scored if entry[0] > 0.0] or scored
    return working[len(working) // 2][1], working[len(working) // 2][1] + length_s


def turns_of(timeline: Timeline) -> list[float]:
    """How long each layer's turn took, s. TraceError when nothing ran."""
    turns = [s.end_s - s.start_s for w in _drivers(timeline) for s in w.stages if s.name in ("attention", "ffn")]
    if not turns:
        raise TraceError(
            "nothing ran while the trace was taken: send requests, such as with `afd bench`, and try again"
        )
    return turns


def _drivers(timeline: Timeline) -> tuple[Worker, ...]:
    return timeline.of_role(ATTENTION) or timeline.of_role(FFN)


class _Busy:
    """Computing time of one worker within any window, by prefix sums."""

    def __init__(self, worker: Worker):
        stages = sorted((s for s in worker.stages if s.name in COMPUTING), key=lambda s: s.end_s)
        self._ends = [s.end_s for s in stages]
        self._sums = [0.0]
        for stage in stages:
            self._sums.append(self._sums[-1] + stage.end_s - stage.start_s)

    def within(self, start_s: float, end_s: float) -> float:
        """Seconds of the stages that end inside."""
        return self._sums[bisect_left(self._ends, end_s)] - self._sums[bisect_left(self._ends, start_s)]

"""How many streams to use: the number with the smallest predicted cycle, tried out where the model cannot know. Pure.

Splitting a batch costs GEMM efficiency and reads the weights once per stream; it pays where it hides the FFN's time or
the wire's. The model's curves say which numbers are worth a trial; a trial of a few cycles measures them.
"""

from __future__ import annotations

from dataclasses import dataclass

from afd.sched.latency import LatencyModel, StepLoad
from afd.sched.rules import TRIAL_WORSE
from afd.types import MAX_STREAMS

BETTER = 0.95  # a change must promise at least 5 %
DECIDE_EVERY = 16  # steps between decisions
TRIAL_CYCLES = 8
TRIAL_EVERY = 1024  # steps after which a measurement is old
TRIAL_GAP = 128  # steps between two trials at least


@dataclass(frozen=True, slots=True)
class _Measured:
    step: int
    num_seqs: int


class StreamChooser:
    """One attention worker's choice; call `choose` after steps, from its main thread."""

    def __init__(self, model: LatencyModel):
        self._model = model
        self._decided_at = 0
        self._trial_until: int | None = None  # step
        self._trial_ended_at = -TRIAL_GAP
        self._measured: dict[int, _Measured] = {}

    def due(self, step: int) -> bool:
        """False while `choose` would keep the number whatever the load."""
        return step >= (self._decided_at + DECIDE_EVERY if self._trial_until is None else self._trial_until)

    def choose(self, step: int, current: int, limit: int, num_seqs: int, load: StepLoad) -> int:
        """step: steps so far.
        current: streams in use.
        limit: most allowed.
        load: one step of all sequences.
        """
        limit = max(1, min(limit, MAX_STREAMS))
        if current > limit:
            self._trial_until = None
            return limit
        if not self.due(step):
            return current
        if self._trial_until is not None:
            self._trial_until, self._trial_ended_at = None, step
        self._decided_at = step
        usable = range(1, max(1, min(limit, num_seqs)) + 1)
        if num_seqs < 2 or current not in usable:
            return current  # streams without sequences cost nothing
        self._measured[current] = _Measured(step, num_seqs)
        cycles = {m: self._model.cycle_s([load.split(m)] * m) for m in usable}
        best = min(cycles, key=lambda m: (cycles[m], m))
        trial = self._worth_a_trial(step, current, num_seqs, cycles)
        if trial is not None:
            self._trial_until = step + TRIAL_CYCLES * trial
            self._model.forget_correction(trial)
            return trial
        return best if cycles[best] < BETTER * cycles[current] else current

    def _worth_a_trial(self, step: int, current: int, num_seqs: int, cycles: dict[int, float]) -> int | None:
        """The most promising number of streams whose last measurement is missing, old, or of another batch size."""
        if step - self._trial_ended_at < TRIAL_GAP and len(self._measured) >= len(cycles):
            return None
        limit_s = TRIAL_WORSE * min(cycles.values())
        unknown = []
        for m, cycle_s in cycles.items():
            seen = self._measured.get(m)
            fresh = seen is not None and step - seen.step < TRIAL_EVERY and _alike(seen.num_seqs, num_seqs)
            if m != current and not fresh and cycle_s <= limit_s:
                unknown.append((cycle_s, m))
        return min(unknown)[1] if unknown else None


def _alike(a: int, b: int) -> bool:
    """Within a factor of two."""
    return a <= 2 * b and b <= 2 * a

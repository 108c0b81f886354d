"""What the routed experts of one layer were asked and what they gave: counted while they compute, cheaply.

Written by the thread that computes; read from any thread, where a figure may be one batch old.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import isfinite
from statistics import median

SAMPLE_EVERY = 64
"""Batches between two measurements of output sizes: a measurement costs each active expert some microseconds."""

SILENT_SHARE = 0.01
"""Share of the layer's median output below which an expert that receives tokens counts as giving nothing."""


@dataclass(slots=True)
class ExpertLoad:
    """Entry e of the lists is expert first_expert + e.

    num_tokens: rows computed.
    squares, num_sampled: sum of mean squares, and rows, of the measured outputs: the experts' own, before routing
    weights; with tensor-parallel experts, this rank's part of them.
    """

    first_expert: int
    num_tokens: list[int]
    squares: list[float] = field(init=False)
    num_sampled: list[int] = field(init=False)
    num_batches: int = 0

    def __post_init__(self) -> None:
        self.squares = [0.0] * len(self.num_tokens)
        self.num_sampled = [0] * len(self.num_tokens)

    def begin_batch(self) -> bool:
        """Count a batch; true when its outputs are to be measured."""
        self.num_batches += 1
        return self.num_batches % SAMPLE_EVERY == 1

    def add(self, counts: Sequence[int], squares: Sequence[float] | None) -> None:
        """A batch's rows of each expert and, if it was measured, the sums of their outputs' mean squares."""
        for expert, count in enumerate(counts):
            self.num_tokens[expert] += count
            if squares is not None:
                self.squares[expert] += squares[expert]
                self.num_sampled[expert] += count

    def output_rms(self) -> list[float | None]:
        """Root mean square of each expert's measured outputs; None where none were."""
        return [
            (squares / rows) ** 0.5 if rows else None
            for squares, rows in zip(self.squares, self.num_sampled, strict=True)
        ]

    def imbalance(self) -> float:
        """Tokens of the busiest expert over the mean; 1 = even, 0 = no tokens yet."""
        total = sum(self.num_tokens)
        return max(self.num_tokens) * len(self.num_tokens) / total if total else 0.0

    def silent(self) -> list[int]:
        """Experts (global ids) that received tokens and gave nothing beside the layer's others, or no numbers."""
        outputs = self.output_rms()
        measured = [rms for rms in outputs if rms is not None]
        if len(measured) < 2:
            return []
        limit = SILENT_SHARE * median([rms for rms in measured if isfinite(rms)] or [0.0])
        return [self.first_expert + e for e, rms in enumerate(outputs) if rms is not None and not rms > limit]

"""When a step's LM head is computed, and in what slices: while nothing else can be. Pure.

A head of a few rows takes as long as ten layers or more. In one piece, or in turn with the other streams' layers, it
would leave the FFN side without rows. So layers come first, and a head fills the time in which this worker would wait:
slice by slice, until rows are back.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

SLICE_LOGITS = 48 << 10
"""Logits of one slice: between two of them other streams get their turn. Some hundred microseconds, as the slice's
share of the vocabulary shrinks with the number of rows that it is computed for."""
MIN_SLICE_ROWS = 512
SLICE_MULTIPLE = 64
"""Vocabulary rows of a slice are at least so many, for the cost of a call, and whole panels of a packed matrix."""


class NextStage(IntEnum):
    """What a stream does next, the most urgent first: others wait for layers, and a head that has begun frees a stream
    sooner than one that has not (with turns of a slice each both would end late).
    """

    LAYER = 0
    HEAD_GOES_ON = 1
    HEAD_BEGINS = 2


def slice_end(done: int, vocab: int, num_seqs: int, *, alone: bool) -> int:
    """Vocabulary rows that are there after the next slice. alone: no other stream is in flight to wait."""
    if alone:
        return vocab
    rows = max(MIN_SLICE_ROWS, SLICE_LOGITS // max(1, num_seqs) // SLICE_MULTIPLE * SLICE_MULTIPLE)
    return min(done + rows, vocab)


def next_of(ready: Sequence[NextStage]) -> int:
    """Which of the ready stages (at least one) to run: of the most urgent ones the longest ready, which is first."""
    return min(range(len(ready)), key=ready.__getitem__)

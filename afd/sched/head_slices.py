"""How a step's LM head is cut, so that the other streams' stages need not wait for the whole of it. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum, auto

HEAD_SLICE_ROWS = 4096
"""Vocabulary rows of one slice while other streams are in flight: about as long as a layer's stage."""


class NextStage(Enum):
    """What a stream does next."""

    LAYER = auto()
    HEAD_BEGINS = auto()
    HEAD_GOES_ON = auto()


def slice_end(done: int, vocab: int, *, alone: bool, rows: int = HEAD_SLICE_ROWS) -> int:
    """Vocabulary rows that are there after the next slice of `rows`. alone: no other stream is in flight to wait."""
    return vocab if alone else min(done + rows, vocab)


def next_of(ready: Sequence[NextStage]) -> int:
    """Which of the ready stages to run, the longest ready first: that one, but no head begins while another goes on.

    Streams that began together come to their heads together. With turns of a slice each both would end late, and the
    FFN side have nothing to do until then; one after the other the first is back at its layers while the second's
    head is computed, and from then on they are apart.
    """
    if NextStage.HEAD_GOES_ON in ready:
        for i, stage in enumerate(ready):
            if stage is not NextStage.HEAD_BEGINS:
                return i
    return 0

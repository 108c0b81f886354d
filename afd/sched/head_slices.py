"""How a step's LM head is cut, so that the other streams' stages need not wait for the whole of it. Pure."""

from __future__ import annotations

HEAD_SLICE_ROWS = 4096
"""Vocabulary rows of one slice while other streams are in flight: about as long as a layer's stage."""


def slice_end(done: int, vocab: int, *, alone: bool, rows: int = HEAD_SLICE_ROWS) -> int:
    """Vocabulary rows that are there after the next slice of `rows`. alone: no other stream is in flight to wait."""
    return vocab if alone else min(done + rows, vocab)

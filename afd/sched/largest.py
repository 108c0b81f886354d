"""The largest number that still holds: batches under a target, sequences that fit. Pure."""

from __future__ import annotations

from collections.abc import Callable


def largest(most: int, holds: Callable[[int], bool]) -> int:
    """The largest of 1 to `most` that holds; 0 when not even 1 does. What does not hold must not hold above either."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low

"""Few combinations of options in which every pair of values occurs."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

Pair = tuple[tuple[int, object], tuple[int, object]]


def pairs_of(combination: tuple[object, ...]) -> set[Pair]:
    """Each two of its values, with their places."""
    return set(itertools.combinations(enumerate(combination), 2))


def pairwise_cover(everything: Sequence[tuple], chosen: Sequence[tuple] = (), seed: int = 0) -> list[tuple]:
    """`chosen`, and as many more of `everything` as every pair needs that occurs in it (greedy, deterministic)."""
    rng = random.Random(seed)
    cover = list(chosen)
    missing = set().union(*map(pairs_of, everything)).difference(*map(pairs_of, cover))
    while missing:
        best = max(rng.sample(everything, len(everything)), key=lambda c: len(pairs_of(c) & missing))
        missing -= pairs_of(best)
        cover.append(best)
    return cover

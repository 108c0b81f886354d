"""Counter-based random numbers: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).

A sampler's number is a pure function of (seed, choice, output position): no state to keep, the same on every worker,
so a migrated request draws what it would have drawn at home.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (np.uint32(0x9E3779B9), np.uint32(0xBB67AE85))
_MASK = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)
_ROUNDS = 10

Words = npt.NDArray[np.uint32]


def philox4x32(counter: Words, key: Words) -> Words:
    """counter [n, 4], key [n, 2] uint32 -> [n, 4] uint32 random words."""
    c0, c1, c2, c3 = (counter[:, i].astype(np.uint32) for i in range(4))
    k0, k1 = (key[:, i].astype(np.uint32) for i in range(2))
    for _ in range(_ROUNDS):
        first = _MULTIPLIERS[0] * c0.astype(np.uint64)
        second = _MULTIPLIERS[1] * c2.astype(np.uint64)
        c0, c1, c2, c3 = (
            (second >> _SHIFT).astype(np.uint32) ^ c1 ^ k0,
            (second & _MASK).astype(np.uint32),
            (first >> _SHIFT).astype(np.uint32) ^ c3 ^ k1,
            (first & _MASK).astype(np.uint32),
        )
        k0, k1 = k0 + _WEYL[0], k1 + _WEYL[1]
    return np.stack((c0, c1, c2, c3), axis=1)


def uniforms(seeds: Sequence[int], choices: Sequence[int], positions: Sequence[int]) -> npt.NDArray[np.float64]:
    """[n] float64 in [0, 1): key = seed (its low 64 bits), counter = (output position, choice)."""
    if not seeds:  # a batch of greedy rows: ten rounds over nothing take 0.1 ms and more
        return np.empty(0)
    low, high = 0xFFFFFFFF, 32
    key = np.array([(s & low, s >> high & low) for s in seeds], np.uint32).reshape(-1, 2)
    counter = np.array(
        [(p & low, p >> high & low, c & low, 0) for p, c in zip(positions, choices, strict=True)], np.uint32
    ).reshape(-1, 4)
    words = philox4x32(counter, key).astype(np.uint64)
    mantissa = (words[:, 0] << np.uint64(21)) ^ (words[:, 1] >> np.uint64(11))
    return mantissa.astype(np.float64) * 2.0**-53

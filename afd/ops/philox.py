"""Counter-based random numbers: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).

A sampler's numbers are a pure function of (seed, choice, output position, token id): there is no state to keep, and
they are the same on every worker, so a migrated request draws what it would have drawn at home.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

GROUP = 64
"""Neighbouring token ids whose numbers have a common smallest one."""

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (np.uint32(0x9E3779B9), np.uint32(0xBB67AE85))
_MASK = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)
_ROUNDS = 10
_LANES = 16  # blocks of four words for a group's tokens

Words = npt.NDArray[np.uint32]
Doubles = npt.NDArray[np.float64]


def philox4x32(counter: Words, key: Words) -> Words:
    """counter [n, 4], key [n, 2] or [1, 2] uint32 -> [n, 4] uint32 random words."""
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


def exponentials(seed: int, choice: int, position: int, vocab_size: int) -> Doubles:
    """[vocab_size] float64: an exponential variate (mean 1) for each token id.

    The smallest of a group of 64 is an exponential divided by 64, and by how much each of the others exceeds it is one
    of its own (the exponential distribution has no memory). A sampler that looks for few small numbers makes one for
    each group, and the others of few groups only.
    """
    num_groups = -(-vocab_size // GROUP)
    words = _blocks(seed, choice, position, 0, num_groups).astype(np.uint64)
    bits = (words[:, 0] << np.uint64(20)) | (words[:, 1] >> np.uint64(12))
    smallest = _exponential((bits.astype(np.float64) + 0.5) * 2.0**-52) / GROUP
    holder = (words[:, 2] >> np.uint64(26)).astype(np.int64)
    blocks = _blocks(seed, choice, position, 1, _LANES * num_groups).reshape(num_groups, _LANES, 4)
    excess = _exponential((blocks.transpose(0, 2, 1).reshape(num_groups, GROUP).astype(np.float64) + 0.5) * 2.0**-32)
    excess[np.arange(num_groups), holder] = 0.0
    numbers: Doubles = (smallest[:, None] + excess).reshape(-1)[:vocab_size]
    return numbers


def logarithm(x: Doubles) -> Doubles:
    """Natural logarithm of positive normal numbers, by IEEE operations in a fixed order, which a library's is not."""
    bits = np.ascontiguousarray(x).view(np.int64)
    power = (bits - _SQRT_HALF) >> 52  # x / 2^power is at least sqrt(1/2), and less than twice that
    fraction = (bits - (power << 52)).view(np.float64)
    s = (fraction - 1.0) / (fraction + 1.0)
    z = s * s
    total = np.full_like(s, 1.0 / 17.0)  # atanh's series
    for denominator in (15.0, 13.0, 11.0, 9.0, 7.0, 5.0, 3.0, 1.0):
        total = total * z + 1.0 / denominator
    return power.astype(np.float64) * _LN_2 + 2.0 * s * total


_SQRT_HALF = np.int64(0x3FE6A09E667F3BCD)  # its bits
_LN_2 = float.fromhex("0x1.62e42fefa39efp-1")


def _exponential(uniform: Doubles) -> Doubles:
    return -logarithm(1.0 - uniform)


def _blocks(seed: int, choice: int, position: int, purpose: int, count: int) -> Words:
    """[count, 4]: blocks 0 to count - 1 of a draw; purpose: 0 for the groups' numbers, 1 for the tokens'."""
    counter = np.empty((count, 4), np.uint32)
    counter[:, 0] = np.arange(count)
    counter[:, 1:] = (position & 0xFFFFFFFF, choice & 0xFFFFFFFF, purpose)
    return philox4x32(counter, np.array([[seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF]], np.uint32))

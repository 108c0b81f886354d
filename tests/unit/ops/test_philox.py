"""The random numbers of a draw."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from afd.ops.philox import GROUP, exponentials, logarithm, philox4x32


def words(*values: int) -> np.ndarray:
    return np.array([values], np.uint32)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0),
         (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
    ],
)  # fmt: skip
def test_philox_known_answers(counter: tuple[int, ...], key: tuple[int, ...], expected: tuple[int, ...]) -> None:
    """The test vectors published with the algorithm."""
    assert philox4x32(words(*counter), words(*key))[0].tolist() == list(expected)


def test_numbers_depend_on_seed_choice_position_and_token_only() -> None:
    keys = [(seed, choice, position) for seed in (0, 7, -1, 2**40) for choice in (0, 1) for position in (0, 5)]
    rows = [exponentials(*key, 200) for key in keys]
    assert len({row.tobytes() for row in rows}) == len(keys)
    for key, row in zip(keys, rows, strict=True):
        for vocab_size in (1, 63, 64, 65, 199):
            assert exponentials(*key, vocab_size).tolist() == row[:vocab_size].tolist()


def chi_square(counts: np.ndarray, expected: np.ndarray | float) -> float:
    return float(((counts - expected) ** 2 / expected).sum())


def test_numbers_are_exponential_and_those_of_a_group_independent() -> None:
    rows = np.stack([exponentials(3, 0, position, 2 * GROUP) for position in range(2000)])
    as_uniform = -np.expm1(-rows)
    counts = np.histogram(as_uniform, 20, (0, 1))[0]
    assert chi_square(counts, rows.size / 20) < 43.8  # 19 degrees of freedom, p = 0.001
    for one, other in ((0, 1), (0, GROUP), (5, 63)):  # neighbours, and two in different groups
        counts = np.histogram2d(as_uniform[:, one], as_uniform[:, other], 4, ((0, 1), (0, 1)))[0]
        assert chi_square(counts, len(rows) / 16) < 37.7  # 15 degrees of freedom
    first = np.bincount(rows[:, :GROUP].argmin(axis=1), minlength=GROUP)
    assert chi_square(first, len(rows) / GROUP) < 103.4  # 63 degrees of freedom
    smallest = np.histogram(-np.expm1(-GROUP * rows[:, :GROUP].min(axis=1)), 20, (0, 1))[0]
    assert chi_square(smallest, len(rows) / 20) < 43.8


@given(st.floats(2.0**-53, 2.0**40))
def test_the_logarithm(x: float) -> None:
    assert float(logarithm(np.array([x]))[0]) == pytest.approx(math.log(x), rel=1e-13, abs=1e-300)


def test_the_logarithm_next_to_one() -> None:
    assert logarithm(np.array([1.0]))[0] == 0.0
    assert float(logarithm(np.array([1 - 2.0**-53]))[0]) == pytest.approx(-(2.0**-53), rel=1e-12)

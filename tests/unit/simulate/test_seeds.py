"""Means over seeds and their confidence intervals."""

from __future__ import annotations

import random

import pytest

from afd.errors import ConfigError
from afd.simulate.seeds import MAX_SEEDS, Interval, check_seeds, intervals


def test_an_interval_by_hand():
    """1, 2, 3: mean 2, deviation 1, and t of two degrees of freedom is 4.303."""
    assert Interval.of([1.0, 2.0, 3.0]) == Interval(2.0, pytest.approx(4.303 / 3**0.5))
    assert Interval.of([5.0, 5.0]).ci95 == 0.0
    assert Interval.of([0.0, 2.0]) == Interval(1.0, pytest.approx(12.706))


def test_what_is_a_number_in_every_run_has_an_interval():
    runs = [{"name": "a", "rate": 1.0, "usd": None, "lost": {}, "n": 4}, {"name": "a", "rate": 3.0, "usd": 2.0, "n": 4}]
    assert set(intervals(runs)) == {"rate", "n"} and intervals(runs)["rate"].mean == 2.0


def test_nineteen_of_twenty_intervals_hold_the_truth():
    rng = random.Random(0)
    for size in (2, 5, MAX_SEEDS):
        drawn = (Interval.of([rng.gauss(10.0, 3.0) for _ in range(size)]) for _ in range(1000))
        held = sum(abs(interval.mean - 10.0) <= interval.ci95 for interval in drawn)
        assert held == pytest.approx(950, abs=25)


@pytest.mark.parametrize("num_seeds", [1, 32])
def test_a_number_of_seeds_without_an_interval_is_refused(num_seeds):
    with pytest.raises(ConfigError, match="--seeds must be 2 to 31"):
        check_seeds(num_seeds)

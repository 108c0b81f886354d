"""The line through many steps, and what of it is the link's."""

from __future__ import annotations

import random

import pytest

from afd.sched.link import ENOUGH, SLOWER, LinkCost
from afd.sched.trend import Trend


def test_a_line_in_two_features_is_found_in_noise() -> None:
    noise, trend = random.Random(0), Trend(3)
    for _ in range(2000):
        rows, attended = noise.choice((4.0, 8.0, 512.0)), noise.uniform(1e3, 1e5)
        seconds = 7e-3 + 1e-5 * rows + 1e-7 * attended
        trend.add(seconds * noise.lognormvariate(0.0, 0.1), (1.0, rows, attended), seconds)
    assert trend.coefficients == pytest.approx((7e-3, 1e-5, 1e-7), rel=0.1)


def test_a_plateau_has_no_slope_and_no_coefficient_is_negative() -> None:
    noise, trend = random.Random(0), Trend(2)
    for _ in range(1000):
        rows = noise.choice((8.0, 9.0, 512.0))
        trend.add(0.02 - 1e-5 * rows, (1.0, rows), 0.02)
    base_s, row_s = trend.coefficients
    assert base_s == pytest.approx(0.018, rel=0.05) and row_s == 0.0


def test_where_sizes_do_not_vary_half_of_a_step_is_thought_to_grow_with_them() -> None:
    trend = Trend(2)
    assert trend.coefficients == (0.0, 0.0)
    for _ in range(10):
        trend.add(0.02, (1.0, 50.0), 0.02)
    assert trend.coefficients == pytest.approx((0.01, 0.01 / 50))


def test_a_machine_that_changes_is_followed_within_a_thousand_steps() -> None:
    trend = Trend(2)
    for seconds in [0.01] * 2000 + [0.03] * 2000:
        trend.add(seconds, (1.0, 8.0), 0.02)
    base_s, row_s = trend.coefficients
    assert base_s + 8.0 * row_s == pytest.approx(0.03, rel=0.05)


def seen(rows_and_seconds: list[tuple[float, float]], *, busiest_s: float, streams: int = 3) -> LinkCost:
    link = LinkCost()
    for rows, seconds in rows_and_seconds * ENOUGH:
        link.observe(rows, seconds, 0.09, streams, busiest_s)
    return link


def test_a_row_costs_what_steps_took_that_nobody_hindered() -> None:
    steps = [(100.0, 2e-3), (500.0, 10e-3)]
    assert seen(steps, busiest_s=0.03).row_s == pytest.approx(2e-5)
    assert seen(steps, busiest_s=0.03, streams=1).row_s == pytest.approx(2e-5)


def test_waiting_for_a_side_that_binds_only_bounds_what_a_row_costs() -> None:
    assert LinkCost().row_s is None
    link = seen([(100.0, 30e-3), (1000.0, 34e-3)], busiest_s=0.088)
    assert link.row_s == pytest.approx(34e-6, rel=0.01), "more rows took hardly longer"
    free = seen([(100.0, 1e-3)], busiest_s=0.03)
    free.observe(100.0, 30e-3, 0.09, 3, 0.088)
    assert free.row_s == pytest.approx(1e-5), "what was learnt in quieter times stays"


def test_a_link_is_busy_for_all_of_the_time_at_most() -> None:
    row_s = seen([(100.0, 80e-3)], busiest_s=0.03).row_s
    assert row_s is not None and 3 * SLOWER * 100 * row_s == pytest.approx(0.09)

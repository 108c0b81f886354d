"""Clock offsets: the true one always lies within the stated error."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from afd.trace.clocks import Bounds, Ping, agree, bounds_of
from afd.trace.errors import TraceError

delays = st.floats(1e-6, 0.1)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.floats(-1e4, 1e4), st.lists(st.tuples(delays, delays), min_size=1, max_size=20))
def test_the_true_offset_is_within_the_error(offset_s, trips):
    pings, now = [], 100.0
    for there_s, back_s in trips:
        pings.append(Ping(now, now + there_s + back_s, now + there_s - offset_s))
        now += 1.0
    bounds = bounds_of(pings)
    assert abs(bounds.offset_s - offset_s) <= bounds.error_s + 1e-9
    fastest_s = min(there_s + back_s for there_s, back_s in trips)
    assert bounds.error_s <= fastest_s / 2 + 1e-9


def test_one_ping_gives_its_midpoint_and_half_its_round_trip():
    bounds = bounds_of([Ping(10.0, 10.4, 3.2)])
    assert bounds.offset_s == pytest.approx(7.0) and bounds.error_s == pytest.approx(0.2)


def test_a_clock_that_was_stepped_leaves_the_fastest_ping():
    assert bounds_of([Ping(0.0, 0.2, 0.1), Ping(1.0, 1.1, 51.0)]) == Bounds(-50.0, 1.1 - 51.0)


def test_no_ping_is_an_error():
    with pytest.raises(TraceError):
        bounds_of([])


def test_workers_of_one_machine_share_the_narrower_offset():
    measured = {"attention/0": Bounds(4.0, 6.0), "ffn/0": Bounds(5.0, 8.0), "ffn/1": Bounds(1.0, 2.0)}
    offsets = agree(measured, {"attention/0": "m", "ffn/0": "m", "ffn/1": "other"}, "here")
    assert offsets["attention/0"].used == offsets["ffn/0"].used == Bounds(5.0, 6.0)
    assert offsets["attention/0"].measured == Bounds(4.0, 6.0)
    assert offsets["ffn/1"].used == Bounds(1.0, 2.0)


def test_our_own_machine_has_no_offset_unless_the_pings_say_otherwise():
    near, far = Bounds(-1e-4, 2e-4), Bounds(3.0, 3.1)
    assert agree({"a": near}, {"a": "here"}, "here")["a"].used == Bounds(0.0, 0.0)
    assert agree({"a": far}, {"a": "here"}, "here")["a"].used == far
    assert agree({"a": near, "b": far}, {"a": "here", "b": "here"}, "here")["a"].used == near


def test_an_unknown_machine_is_nobody_elses():
    measured = {"a": Bounds(0.0, 2.0), "b": Bounds(1.0, 3.0)}
    offsets = agree(measured, {"a": "", "b": ""}, "")
    assert offsets["a"].used == measured["a"] and offsets["b"].used == measured["b"]

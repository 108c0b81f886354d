"""Which part is drawn, and the table of shares."""

from __future__ import annotations

import pytest

from afd.telemetry.ring import Stage
from afd.trace.clocks import Bounds, Offset
from afd.trace.errors import TraceError
from afd.trace.summary import mean_gang, mean_round_trip_s, stage_shares, summary_text
from afd.trace.timeline import Timeline, Worker
from afd.trace.window import TURNS_WIDE, choose_window
from tests.fakes.trace import two_to_one


def test_single_layers_can_be_seen_and_a_step_ends_inside():
    timeline = two_to_one(num_steps=60, num_layers=8, seconds=2.0)
    start_s, end_s = choose_window(timeline)
    assert 0.0 <= start_s < end_s <= timeline.seconds
    assert end_s - start_s == pytest.approx(TURNS_WIDE * 1e-3)
    seen = [s for s in timeline.workers[0].stages if start_s <= s.start_s and s.end_s <= end_s]
    assert any(s.name == "head" for s in seen)


def test_the_window_lies_where_all_workers_work_and_nothing_is_lost():
    timeline = two_to_one(num_steps=60, num_layers=8, seconds=2.0)
    late = Worker("ffn", 0, 1, tuple(s for s in timeline.workers[2].stages if s.start_s > 1.0), complete_from_s=1.2)
    start_s, _ = choose_window(Timeline((*timeline.workers[:2], late), timeline.seconds))
    assert start_s >= 1.2


def test_what_is_asked_for_is_taken():
    timeline = two_to_one()
    assert choose_window(timeline, 0.05, 0.01) == pytest.approx((0.05, 0.06))
    start_s, end_s = choose_window(timeline, None, 0.02)
    assert end_s - start_s == pytest.approx(0.02)
    assert choose_window(timeline, None, 99.0) == (0.0, timeline.seconds)


def test_nothing_to_draw_is_said():
    idle = Timeline((Worker("attention", 0, 1, ()), Worker("ffn", 0, 1, ())), 2.0)
    with pytest.raises(TraceError, match="nothing ran"):
        choose_window(idle)
    only_wait = Timeline((Worker("attention", 0, 1, (Stage("wait", 0.0, 1.0),)),), 2.0)
    with pytest.raises(TraceError, match="nothing ran"):
        choose_window(only_wait)


def test_one_ffn_worker_alone_can_be_drawn():
    timeline = two_to_one()
    start_s, end_s = choose_window(Timeline(timeline.workers[2:], timeline.seconds))
    assert 0.0 <= start_s < end_s


def test_shares_are_of_the_traces_time_and_cut_at_its_ends():
    stages = (Stage("embed", -1.0, 1.0, 0), Stage("attention", 1.0, 2.0, 0), Stage("wait", 2.0, 9.0))
    shares = stage_shares(Worker("attention", 0, 1, stages), 4.0)
    assert shares["attention"] == pytest.approx(0.5) and shares["wait"] == pytest.approx(0.5)
    assert shares["busy"] == pytest.approx(0.5) and shares["ffn"] == 0.0


def test_gangs_and_round_trips():
    attention, _, ffn = two_to_one().workers
    assert mean_gang(attention) == mean_gang(ffn) == 2.0
    assert mean_round_trip_s(attention) == pytest.approx(2e-3) and mean_round_trip_s(ffn) == 0.0


def test_the_table_tells_shares_clocks_and_what_is_missing():
    timeline = two_to_one()
    short = Worker("ffn", 0, 1, timeline.workers[2].stages, complete_from_s=0.15)
    far, here = Bounds(1e-3, 1.2e-3), Bounds(0.0, 0.0)
    text = summary_text(
        Timeline((*timeline.workers[:2], short), 0.2, missing=("attention/2 is gone",)),
        {"attention/0": Offset(Bounds(-1e-5, 2e-5), here), "ffn/0": Offset(far, far)},
    )
    assert "attention/1" in text and "BUSY" in text
    assert "clock of attention/0: +5 us from here, error 15 us; used +0 us, error 0 us (the same clock as here)" in text
    assert "clock of ffn/0: +1100 us from here, error 100 us\n" in text
    assert "ffn/0: its ring holds the last 0.05 s only" in text and text.endswith("missing: attention/2 is gone")

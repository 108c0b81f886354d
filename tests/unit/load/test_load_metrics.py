"""Metrics: numpy and counting by hand say the same."""

from array import array

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from afd.errors import ConfigError
from afd.load.metrics import (
    Distribution,
    Goals,
    attain,
    peak_concurrency,
    peak_output_rate,
    steady_state,
    summarise,
)
from afd.load.record import Outcome, RequestRecord

PERCENTILES = (50.0, 90.0, 95.0, 99.0)


def record(start, times, *, end=None, tokens=None, outcome=Outcome.COMPLETED, prompt=10, due=None, retry_after=None):
    return RequestRecord(
        request_idx=0,
        num_prompt_tokens=prompt,
        due_s=start if due is None else due,
        start_s=start,
        end_s=end if end is not None else (times[-1] if times else start),
        token_times=array("d", times),
        num_output_tokens=len(times) if tokens is None else tokens,
        outcome=outcome,
        retry_after_s=retry_after,
    )


@st.composite
def random_records(draw):
    # Eighths of a second: sums are exact, so that twins may be compared without tolerance where times tie.
    records = []
    for _ in range(draw(st.integers(1, 12))):
        start = draw(st.integers(0, 40)) / 8
        gaps = draw(st.lists(st.integers(0, 12), max_size=8))
        times = [start + total / 8 for total in np.cumsum([draw(st.integers(1, 20)), *gaps])] if gaps else []
        outcome = draw(st.sampled_from([Outcome.COMPLETED] * 3 + [Outcome.REFUSED, Outcome.DISCONNECTED]))
        end = (times[-1] if times else start) + draw(st.integers(0, 4)) / 8
        records.append(record(start, times, end=end, outcome=outcome))
    return records


@settings(max_examples=60, derandomize=True, deadline=None)
@given(st.lists(st.floats(0, 1e4), min_size=1, max_size=40))
def test_distribution_equals_numpy(values):
    found = Distribution.of(iter(values), PERCENTILES)
    assert found.count == len(values)
    assert found.mean == pytest.approx(np.mean(values), rel=1e-9, abs=1e-9)
    assert found.std == pytest.approx(np.std(values), rel=1e-6, abs=1e-6)
    assert found.median == pytest.approx(np.median(values), rel=1e-9, abs=1e-9)
    assert found.max == max(values)
    for p, value in found.percentiles:
        assert value == pytest.approx(np.percentile(values, p), rel=1e-9, abs=1e-9)


def test_distribution_of_nothing_is_zero():
    assert Distribution.of([], (50.0,)) == Distribution(0, 0.0, 0.0, 0.0, 0.0, ((50.0, 0.0),))


@settings(max_examples=60, derandomize=True, deadline=None)
@given(random_records())
def test_summary_equals_counting_by_hand(records):
    found = summarise(records, duration_s=4.0, percentiles=PERCENTILES, goals=Goals(), concurrency=None)
    completed = [r for r in records if r.outcome is Outcome.COMPLETED]
    tokens = sum(len(r.token_times) for r in completed)
    assert (found.num_completed, found.num_failed) == (len(completed), len(records) - len(completed))
    assert found.output_throughput == tokens / 4
    assert found.total_token_throughput == (tokens + 10 * len(completed)) / 4
    assert found.request_throughput == len(completed) / 4
    assert sum(count for _, count in found.outcomes) == len(records)
    ttfts = [r.token_times[0] - r.start_s for r in completed if r.token_times]
    tpots = [np.diff(r.token_times).mean() for r in completed if len(r.token_times) > 1]
    gaps = [gap for r in completed for gap in np.diff(r.token_times)]
    e2els = [r.end_s - r.start_s for r in completed]
    for values, distribution in ((ttfts, found.ttft), (tpots, found.tpot), (gaps, found.itl), (e2els, found.e2el)):
        assert distribution.count == len(values)
        assert distribution.mean == pytest.approx(np.mean(values) if values else 0)
        assert dict(distribution.percentiles)[99.0] == pytest.approx(np.percentile(values, 99) if values else 0)


@settings(max_examples=60, derandomize=True, deadline=None)
@given(random_records())
def test_peaks_equal_trying_every_moment(records):
    moments = sorted({time for r in records for time in (r.start_s, r.end_s, *r.token_times)})
    running = [sum(r.start_s <= moment < r.end_s for r in records) for moment in moments]
    assert peak_concurrency(records) == max(running)
    windows = [sum(moment <= time < moment + 1 for r in records for time in r.token_times) for moment in moments]
    assert peak_output_rate(records) == max(windows)


def test_tpot_is_per_token_though_chunks_bear_several():
    bundled = record(0, [1.0, 1.5, 2.0], tokens=11)
    assert bundled.tpot_s == pytest.approx(0.1)
    assert list(bundled.gaps_s()) == [0.5, 0.5]
    assert record(0, [1.0]).tpot_s is None
    assert peak_output_rate([bundled]) == pytest.approx(11 / 3 * 2)  # half-open: 1.0 and 1.5, or 1.5 and 2.0


def test_short_run_has_its_mean_as_peak():
    found = summarise([record(0, [0.1, 0.2, 0.3])], duration_s=0.3, percentiles=(), goals=Goals(), concurrency=1)
    assert found.max_output_tokens_per_s == found.output_throughput == pytest.approx(10)


def test_attainment_and_goodput():
    goals = Goals.parse(["tpot:125", "ttft:1000", "e2el:3000"])
    records = [
        record(0, [0.5, 0.6]),  # good
        record(0, [1.0, 1.125]),  # good: limits are inclusive
        record(0, [1.5, 1.6]),  # ttft missed
        record(0, [0.5, 0.7]),  # tpot missed
        record(0, [0.5]),  # good: one token has no TPOT
        record(0, [0.5, 0.6], end=3.5),  # e2el missed
        record(0, [], outcome=Outcome.REFUSED),
        record(0, [0.5], outcome=Outcome.INTERRUPTED),
    ]
    found = attain(records, goals)
    assert found.num_good == 3
    assert dict(found.per_goal) == {"tpot": 4 / 5, "ttft": 5 / 6, "e2el": 5 / 6}
    assert found.joint == 3 / 6
    assert found.joint_of_sent == 3 / 7
    whole = summarise(records, duration_s=2.0, percentiles=(), goals=goals, concurrency=None)
    assert whole.request_goodput == 1.5
    assert whole.num_interrupted == 1


def test_no_goals_no_goodput():
    found = summarise([record(0, [1.0])], duration_s=1.0, percentiles=(), goals=Goals(), concurrency=1)
    assert found.attainment is None
    assert found.request_goodput is None


@pytest.mark.parametrize("pair", ["tpot", "tpot:", "tpot:x", "itl:5", "ttft:-1", "ttft:inf", "ttft:nan", ":5"])
def test_goals_that_make_no_sense(pair):
    with pytest.raises(ConfigError, match="METRIC:MILLISECONDS"):
        Goals.parse([pair])


def test_steady_state_of_a_closed_loop_leaves_out_the_ramps():
    # Two users, three requests each of 10 s with a token each second after 5 s of prefill; the last round is uneven.
    def answer(start, ttft, num):
        return record(start, [start + ttft + step for step in range(num)])

    records = [
        answer(0, 5, 6),
        answer(0, 6, 5),
        answer(10, 1, 10),
        answer(10, 1, 10),
        answer(20, 1, 4),
        answer(20, 1, 9),
    ]
    found = steady_state(records, 2)
    # From the later first token (6 s) until the first end after the last was sent (24 s).
    assert (found.start_s, found.end_s) == (6.0, 24.0)
    inside = sum(6 < time <= 24 for r in records for time in r.token_times)
    assert found.output_throughput == inside / 18


def test_steady_state_of_an_open_loop_ends_with_the_arrivals():
    records = [record(start, [start + 1, start + 2]) for start in range(10)]
    found = steady_state(records, None)
    assert (found.start_s, found.end_s) == (2.0, 9.0)
    assert found.output_throughput == 2.0


def test_no_steady_state():
    assert steady_state([], 4) is None
    assert steady_state([record(0, [1.0])], 2) is None  # never full
    assert steady_state([record(0, [1.0])], None) is None  # no time between the ramps
    assert steady_state([record(0, [], outcome=Outcome.REFUSED)], None) is None


def test_refusals_are_counted_apart():
    records = [
        record(0, [], end=0.05, outcome=Outcome.REFUSED, retry_after=2.0),
        record(0, [], end=0.15, outcome=Outcome.REFUSED, retry_after=7.0),
        record(0, [], end=0.1, outcome=Outcome.REFUSED),
        record(0, [1.0]),
    ]
    found = summarise(records, duration_s=1.0, percentiles=(99.0,), goals=Goals(), concurrency=None).refusals
    assert (found.count, found.num_with_retry_after) == (3, 2)
    assert (found.retry_after_min_s, found.retry_after_max_s) == (2.0, 7.0)
    assert found.latency.mean == pytest.approx(0.1)
    assert found.latency.max == 0.15


def test_queue_time_is_how_late_a_request_was_sent():
    found = summarise([record(5, [6.0], due=4.5)], duration_s=2.0, percentiles=(), goals=Goals(), concurrency=None)
    assert found.client_queue_time.max == 0.5

"""The sliding window of what was promised."""

import pytest

from afd.gateway.sla import WINDOW_S, SlaWindow


def test_percentiles_and_attainment():
    window = SlaWindow(tpot_target_s=0.05, ttft_target_s=1.0)
    for i in range(100):
        window.add(float(i) / 10, ttft_s=0.5 if i else 2.0, tpot_s=i / 1000)
    window.add(10.0, ttft_s=0.5, tpot_s=None)
    report = window.report(10.0)
    assert report.num_requests == 101
    assert report.tpot_p50_s == pytest.approx(0.050)
    assert report.tpot_p99_s == pytest.approx(0.099)
    assert report.tpot_attainment == pytest.approx(0.51)
    assert report.ttft_attainment == pytest.approx(100 / 101)


def test_old_requests_leave_the_window():
    window = SlaWindow(0.05, 1.0)
    window.add(0.0, 9.0, 9.0)
    window.add(50.0, 0.1, 0.01)
    report = window.report(WINDOW_S + 1)
    assert (report.num_requests, report.tpot_attainment, report.ttft_p99_s) == (1, 1.0, 0.1)


def test_an_empty_window_misses_nothing():
    report = SlaWindow(0.05, 1.0).report(0.0)
    assert (report.num_requests, report.tpot_p99_s, report.tpot_attainment) == (0, 0.0, 1.0)

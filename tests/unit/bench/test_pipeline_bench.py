"""bench/pipeline.py: which rounds count, and what a row says."""

from __future__ import annotations

from dataclasses import replace

import pytest

from afd.trace.pipeline import Pipeline
from bench.interference import foreign_cpu_s
from bench.pipeline import Measured, row

STEADY = Pipeline(
    num_streams=2,
    num_layers=10,
    cycle_s=0.1,
    own_s=0.03,
    head_s=0.01,
    ahead_s=0.0,
    other_s=0.005,
    ffn_s=0.02,
    answer_s=0.002,
    ffn_other_s=0.003,
    transfer_s=0.01,
    bubble=0.1,
    ffn_bubble=0.5,
    idle=0.0,
    exposed=0.02,
    gang_size=1.0,
    ffn_rows=16.0,
)


def rounds(*disturbed: float) -> list[Measured]:
    return [Measured(replace(STEADY, cycle_s=0.1 + cores), cores) for cores in disturbed]


def test_disturbed_rounds_do_not_count_where_enough_were_not():
    found = row("1A1F:2", 32, rounds(0.0, 0.01, 1.5, 0.02, 0.9))
    assert (found["quiet_rounds"], found["rounds"]) == (3, 5)
    assert found["cycle_ms"] == pytest.approx(110.0)


def test_where_most_were_disturbed_all_count_and_that_is_said():
    found = row("1A1F:2", 32, rounds(0.0, 0.01, 1.5, 1.0, 0.9))
    assert found["quiet_rounds"] == 0 and found["foreign_cores"] == 0.9
    assert found["cycle_ms"] == pytest.approx(1000.0)


def test_a_row_compares_the_closed_form_with_what_was_measured():
    found = row("1A1F:2", 32, rounds(0.0, 0.0, 0.0))
    assert found["bound_by"] == "attention" and found["closed_form_ms"] == pytest.approx(90.0)
    assert found["closed_form_error"] == pytest.approx(-0.1)
    assert found["balance"] == pytest.approx(45 / 25)
    assert found["ffn_us_per_row"] == pytest.approx(0.02 * 1e6 / 160)


def test_foreign_time_never_runs_backwards_by_more_than_a_tick():
    before = foreign_cpu_s()
    assert foreign_cpu_s() >= before - 0.05

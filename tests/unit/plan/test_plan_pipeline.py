"""Closed forms of the pipeline: their published definitions, their special cases and their order."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from afd.plan.pipeline import (
    Bound,
    PipelineKind,
    analytic_ratio,
    barrier_step_time,
    cycle,
    disaggregation_gain,
    min_streams,
    step_time,
)
from afd.plan.stages import StageTimes

SERIAL, CONSERVATIVE, OPTIMISTIC = PipelineKind

seconds = st.floats(1e-6, 1e-3)
stages = st.builds(
    StageTimes, attention_s=seconds, ffn_s=seconds, to_ffn_s=seconds, to_attention_s=seconds, head_s=st.just(0.0)
)


def stage(a, f, out=0.0, back=0.0, head=0.0):
    return StageTimes(attention_s=a, ffn_s=f, to_ffn_s=out, to_attention_s=back, head_s=head)


def test_the_three_models_by_hand():
    times = stage(a=100, f=80, out=20, back=30)
    assert cycle(times, 3, SERIAL).seconds == 230
    assert cycle(times, 3, CONSERVATIVE).seconds == 120  # max(100 + 20, 80 + 30)
    assert cycle(times, 3, OPTIMISTIC).seconds == 100  # max(100, 80, 50)


def test_optimistic_needs_enough_streams_and_falls_back():
    times = stage(a=100, f=80, out=20, back=30)
    assert min_streams(times) == 2.5
    assert cycle(times, 2).kind is CONSERVATIVE
    assert cycle(times, 3).kind is OPTIMISTIC
    assert cycle(times, 1).kind is SERIAL


def test_without_transfer_two_streams_are_enough():
    assert cycle(stage(a=100, f=100), 2).kind is OPTIMISTIC
    assert cycle(stage(a=100, f=100), 2).seconds == 100


@pytest.mark.parametrize(
    ("times", "bound"),
    [
        (stage(a=3, f=2, out=1), Bound.ATTENTION),
        (stage(a=2, f=3, out=1), Bound.FFN),
        (stage(a=2, f=2, out=2, back=1), Bound.NETWORK),
    ],
)
def test_what_binds(times, bound):
    assert cycle(times, 4).bound is bound
    assert cycle(times, 1).bound is bound


def test_a_conservative_stage_counts_its_own_transfer():
    assert cycle(stage(a=90, f=95, out=20, back=1), 2, CONSERVATIVE).bound is Bound.ATTENTION
    assert cycle(stage(a=95, f=90, out=1, back=20), 2, CONSERVATIVE).bound is Bound.FFN


def test_step_of_the_report():
    """272 us a stage, 61 layers, 3 micro-batches: 50 ms."""
    times = stage(a=272e-6, f=272e-6)
    assert step_time(times, cycle(times, 3).seconds, 3, 61) == pytest.approx(49.8e-3, rel=0.001)


def test_megascale_step_by_hand():
    """(T_a + T_e + 2 T_c) + T_f (m L - 1) with T_c = 5 each way."""
    assert barrier_step_time(stage(a=10, f=8, out=5, back=5), streams=3, num_layers=4) == 10 + 8 + 10 + 10 * 11
    assert barrier_step_time(stage(a=10, f=8, head=2), streams=3, num_layers=4) == 18 + 110 + 6


def test_analytic_ratio_by_hand():
    assert analytic_ratio(attention_s=100, transfer_s=40, ffn_base_s=20, ffn_slope_s=10) == 8
    assert analytic_ratio(attention_s=10, transfer_s=40, ffn_base_s=20, ffn_slope_s=10) == 2
    assert analytic_ratio(attention_s=10, transfer_s=5, ffn_base_s=90, ffn_slope_s=10) == 3  # sqrt(b_F / (a_F B))
    assert analytic_ratio(attention_s=10, transfer_s=5, ffn_base_s=90, ffn_slope_s=0) == math.inf


def test_disaggregation_gain_of_fastafd():
    """1.5 times the batch on seven of eight chips, at a slightly longer step."""
    assert disaggregation_gain(1.5, 7 / 8, 1.05) == pytest.approx(1.378, abs=1e-3)


@settings(max_examples=200, derandomize=True, deadline=None)
@given(times=stages, streams=st.integers(2, 4))
def test_more_overlap_is_never_slower(times, streams):
    serial, conservative, optimistic = (cycle(times, streams, kind).seconds for kind in PipelineKind)
    assert optimistic <= conservative <= serial
    assert optimistic >= max(times.attention_s, times.ffn_s)


@settings(max_examples=200, derandomize=True, deadline=None)
@given(times=stages, streams=st.integers(2, 4))
def test_an_optimistic_cycle_leaves_time_for_the_round_trip(times, streams):
    """Facts of the report: A + F + both transfers <= m cycles, or a micro-batch is not back in time."""
    beat = cycle(times, streams)
    round_trip = times.attention_s + times.ffn_s + times.transfer_s
    if beat.kind is OPTIMISTIC:
        assert round_trip <= streams * beat.seconds * (1 + 1e-12)


@settings(max_examples=100, derandomize=True, deadline=None)
@given(times=stages, layers=st.integers(1, 100))
def test_one_stream_is_serial_and_a_barrier_costs_at_most_one_round_trip(times, layers):
    one = cycle(times, 1)
    assert one.kind is SERIAL
    assert step_time(times, one.seconds, 1, layers) == pytest.approx(
        layers * (times.attention_s + times.ffn_s + times.transfer_s)
    )
    compute_bound = stage(a=times.attention_s, f=times.ffn_s)
    free = step_time(compute_bound, cycle(compute_bound, 3).seconds, 3, layers)
    barrier = barrier_step_time(compute_bound, 3, layers)
    assert free <= barrier * (1 + 1e-12)
    assert barrier <= free + times.attention_s + times.ffn_s

"""The pipeline as the planner sees it: what a transfer keeps busy, what binds, special cases, published formulas."""

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
    assert cycle(times, 3, OPTIMISTIC).seconds == 100  # max(100, 80, 20, 30, 230 / 3)


@pytest.mark.parametrize(
    ("times", "streams", "expected"),
    [
        (stage(250, 250, 80, 165), 3, 250),
        (stage(250, 250, 85, 170), 3, 755 / 3),  # no cliff where the transfers exceed the longer stage
        (stage(256, 253, 100, 200), 3, 809 / 3),
        (stage(200, 200, 70, 140), 3, 610 / 3),
        (stage(114, 180, 62, 122), 3, 180),
        (stage(114, 180, 62, 122), 2, 478 / 2),
        (stage(100, 90, 60, 140), 4, 140),  # the slower direction; the other one is not in its way
    ],
)
def test_the_closed_form_by_hand(times, streams, expected):
    assert cycle(times, streams).seconds == pytest.approx(expected)


def test_how_many_streams_keep_a_device_busy():
    times = stage(a=100, f=80, out=20, back=30)
    assert cycle(times, 2).min_streams == 2.3
    assert cycle(times, 2).bound is Bound.LATENCY
    assert cycle(times, 2).seconds == 115
    assert cycle(times, 3).bound is Bound.ATTENTION
    assert cycle(times, 1).kind is SERIAL
    assert cycle(stage(a=100, f=100), 2).seconds == 100  # without transfers two are enough


@pytest.mark.parametrize(
    ("times", "bound"),
    [
        (stage(a=3, f=2, out=1), Bound.ATTENTION),
        (stage(a=2, f=3, out=1), Bound.FFN),
        (stage(a=2, f=2, out=3, back=1), Bound.NETWORK),
        (stage(a=2, f=2, out=1, back=3), Bound.NETWORK),
    ],
)
def test_what_binds(times, bound):
    assert cycle(times, 4).bound is bound
    assert cycle(times, 1).bound is bound


def test_a_conservative_stage_counts_its_own_transfer():
    assert cycle(stage(a=90, f=95, out=20, back=1), 3, CONSERVATIVE).bound is Bound.ATTENTION
    assert cycle(stage(a=95, f=90, out=1, back=20), 3, CONSERVATIVE).bound is Bound.FFN


def test_step_of_the_report():
    """272 us a stage, 61 layers, 3 micro-batches: 50 ms."""
    times = stage(a=272e-6, f=272e-6)
    assert step_time(times, 3, 61) == pytest.approx(49.8e-3, rel=0.001)


def test_megascale_step_by_hand():
    """(T_a + T_e + 2 T_c) + T_f (m L - 1) with T_c = 5 each way."""
    assert barrier_step_time(stage(a=10, f=8, out=5, back=5), streams=3, num_layers=4) == 10 + 8 + 10 + 10 * 11
    assert barrier_step_time(stage(a=10, f=8, head=2), streams=3, num_layers=4) == 18 + 110 + 6


def test_analytic_ratio_by_hand():
    assert analytic_ratio(attention_s=100, transfer_s=40, ffn_base_s=20, ffn_slope_s=10) == 8
    assert analytic_ratio(attention_s=10, transfer_s=40, ffn_base_s=20, ffn_slope_s=10) == 2
    assert analytic_ratio(attention_s=10, transfer_s=5, ffn_base_s=90, ffn_slope_s=10) == 3  # sqrt(b_F / (a_F B))
    assert analytic_ratio(attention_s=10, transfer_s=5, ffn_base_s=90, ffn_slope_s=0) == math.inf


@settings(max_examples=200, derandomize=True, deadline=None)
@given(times=stages, streams=st.integers(2, 4))
def test_more_overlap_is_never_slower(times, streams):
    serial, conservative, optimistic = (cycle(times, streams, kind).seconds for kind in PipelineKind)
    assert optimistic <= conservative <= serial
    assert optimistic >= max(times.attention_s, times.ffn_s)


@settings(max_examples=200, derandomize=True, deadline=None)
@given(times=stages, streams=st.integers(2, 4), kind=st.sampled_from(PipelineKind))
def test_a_micro_batch_is_back_in_time(times, streams, kind):
    """Facts of the report: A + F + both transfers <= m cycles."""
    round_trip = times.attention_s + times.ffn_s + times.transfer_s
    assert round_trip <= streams * cycle(times, streams, kind).seconds * (1 + 1e-12)


@settings(max_examples=300, derandomize=True, deadline=None)
@given(
    times=stages,
    more=st.tuples(*[st.floats(1.0, 3.0)] * 5),
    head=st.floats(0.0, 1e-2),
    streams=st.integers(1, 4),
    layers=st.integers(1, 100),
    kind=st.sampled_from(PipelineKind),
)
def test_a_slower_stage_never_makes_a_shorter_step(times, more, head, streams, layers, kind):
    values = (times.attention_s, times.ffn_s, times.to_ffn_s, times.to_attention_s, head)
    here = StageTimes(*values)
    slower = StageTimes(*(value * factor for value, factor in zip(values, more, strict=True)))
    assert step_time(slower, streams, layers, kind) >= step_time(here, streams, layers, kind) * (1 - 1e-9)
    assert cycle(slower, streams, kind).seconds >= cycle(here, streams, kind).seconds * (1 - 1e-9)


@settings(max_examples=100, derandomize=True, deadline=None)
@given(times=stages, layers=st.integers(1, 100))
def test_one_stream_is_serial_and_a_barrier_costs_at_most_one_round_trip(times, layers):
    assert cycle(times, 1).kind is SERIAL
    assert step_time(times, 1, layers) == pytest.approx(layers * (times.attention_s + times.ffn_s + times.transfer_s))
    compute_bound = stage(a=times.attention_s, f=times.ffn_s)
    free = step_time(compute_bound, 3, layers)
    barrier = barrier_step_time(compute_bound, 3, layers)
    assert free <= barrier * (1 + 1e-12)
    assert barrier <= free + times.attention_s + times.ffn_s

"""With constant stage times the simulation is the planner's formulas; its own short cut is the full simulation."""

from __future__ import annotations

import pytest
from hypothesis import Phase, given
from hypothesis import settings as settings_of
from hypothesis import strategies as st

from afd.plan.efficiency import Efficiency
from afd.plan.pipeline import PipelineKind, cycle, step_time
from afd.plan.stages import RooflineStages
from afd.simulate.arrivals import Lengths, OpenLoop
from afd.simulate.cluster import Simulation
from tests.unit.simulate.cluster_under_test import LAYERS, run, settings, stage

OVERLAPPED = [
    (1, stage(250, 200, 30, 30)),  # one stream: serial
    (3, stage(250, 200, 30, 30)),  # attention
    (3, stage(200, 250, 30, 30)),  # FFN
    (4, stage(250, 200, 30, 30)),
    (3, stage(250, 200, 30, 30, head=900)),  # the head delays the other streams too
    (4, stage(100, 90, 70, 60)),
    (4, stage(100, 90, 60, 140)),  # network
    (3, stage(250, 250, 85, 170)),  # one stream's way, over three
    (2, stage(114, 180, 62, 122)),  # one stream's way, over two
]


def tpot_of(times, streams, kind=PipelineKind.OPTIMISTIC):
    return cycle(times, streams, kind).kind, step_time(times, streams, LAYERS, kind) * 1e3


@pytest.mark.parametrize(("streams", "times"), OVERLAPPED)
def test_the_simulated_pipeline_is_the_optimistic_formula(streams, times):
    kind, expected_ms = tpot_of(times, streams)
    assert kind is (PipelineKind.SERIAL if streams == 1 else PipelineKind.OPTIMISTIC)
    assert run("1A1F", times, streams=streams).tpot.mean_ms == pytest.approx(expected_ms, rel=0.01)


microseconds = st.floats(20, 500)


@settings_of(max_examples=30, derandomize=True, deadline=None, phases=[Phase.explicit, Phase.generate])
@given(st.tuples(*[microseconds] * 4), st.integers(1, 4))
def test_the_closed_form_is_the_simulation_of_every_layer(stages_us, streams):
    _, expected_ms = tpot_of(stage(*stages_us), streams)
    report = run("1A1F", stage(*stages_us), streams=streams, num_output=40)
    assert report.tpot.mean_ms == pytest.approx(expected_ms, rel=0.02)


@settings_of(max_examples=30, derandomize=True, deadline=None, phases=[Phase.explicit, Phase.generate])
@given(st.tuples(*[microseconds] * 4), st.integers(1, 4), st.floats(0, 2000))
def test_heads_fill_what_would_be_waiting(stages_us, streams, head_us):
    """Up to a tenth of a step in heads; what they cost lies between nothing and all of their time."""
    times = stage(*stages_us, head=head_us)
    _, expected_ms = tpot_of(times, streams)
    report = run("1A1F", times, streams=streams, num_output=40)
    assert report.tpot.mean_ms == pytest.approx(expected_ms, rel=0.02 if head_us < 300 else 0.06)


@pytest.mark.parametrize("times", [stage(200, 250, 30, 30), stage(250, 200, 30, 30)])
def test_senders_that_wait_are_the_conservative_formula(times):
    kind, expected_ms = tpot_of(times, 3, PipelineKind.CONSERVATIVE)
    assert kind is PipelineKind.CONSERVATIVE
    report = run("1A1F", times, transfers="sender")
    assert report.tpot.mean_ms == pytest.approx(expected_ms, rel=0.01)


@pytest.mark.parametrize("detail", ["layers", "ends"])
def test_latency_alone_is_hidden_where_bandwidth_would_not_be(detail):
    times = stage(100, 90, 120, 120)
    hidden, carried = (run("1A1F", times, streams=4, detail=detail, transfers=what) for what in ("delay", "link"))
    assert hidden.tpot.mean_ms == pytest.approx(LAYERS * 0.43, rel=0.02)  # A + F + C of one stream
    assert carried.tpot.mean_ms == pytest.approx(LAYERS * 0.48, rel=0.02)  # four streams' C, one way


@pytest.mark.parametrize("detail", ["layers", "ends"])
def test_no_transfer_and_one_stream_is_serial(detail):
    times = stage(200, 150, head=700)
    report = run("1A1F", times, streams=1, detail=detail)
    assert report.tpot.mean_ms == pytest.approx(LAYERS * 0.35 + 0.7, rel=1e-6)
    assert report.attention_bubble + report.ffn_bubble == pytest.approx(1.0, abs=0.02)  # one of the two always waits


@pytest.mark.parametrize(("streams", "times"), OVERLAPPED)
def test_inner_layers_in_closed_form_on_one_pair(streams, times):
    full, short = (run("1A1F", times, streams=streams, detail=detail) for detail in ("layers", "ends"))
    assert short.tpot.mean_ms == pytest.approx(full.tpot.mean_ms, rel=0.02)
    assert short.ffn_busy == pytest.approx(full.ffn_busy, rel=0.03)


@pytest.mark.parametrize("times", [stage(250, 200, 30, 30), stage(200, 250, 30, 30, head=300)])
@pytest.mark.parametrize("streams", [1, 3])
def test_inner_layers_in_closed_form_on_4a2f(streams, times):
    full, short = (run("4A2F", times, streams=streams, num_output=200, detail=detail) for detail in ("layers", "ends"))
    assert short.tpot.mean_ms == pytest.approx(full.tpot.mean_ms, rel=0.03)
    assert short.gang_size == pytest.approx(full.gang_size, rel=0.05)
    assert short.output_throughput == pytest.approx(full.output_throughput, rel=0.03)


def test_inner_layers_in_closed_form_under_poisson_load_with_prefill():
    """Roofline times, requests that come and go. The short cut knows no waiting for a device that is half busy."""
    arrivals = OpenLoop(150, 150.0, 1.0, Lengths(96, 0.5), Lengths(40, 0.5), seed=3)
    full, short = (
        Simulation(settings("4A2F", RooflineStages(Efficiency()), streams=2, detail=detail), arrivals).run()
        for detail in ("layers", "ends")
    )
    assert full.num_answered == short.num_answered == 150
    assert short.output_tokens == full.output_tokens
    assert short.tpot.p50_ms == pytest.approx(full.tpot.p50_ms, rel=0.08)
    assert short.ttft.p50_ms == pytest.approx(full.ttft.p50_ms, rel=0.15)
    assert short.output_throughput == pytest.approx(full.output_throughput, rel=0.03)

"""With constant stage times the simulation is the planner's formulas; its own short cut is the full simulation."""

from __future__ import annotations

import pytest

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
    (4, stage(100, 90, 70, 60)),  # network
]


def tpot_of(times, streams, kind=PipelineKind.OPTIMISTIC):
    beat = cycle(times, streams, kind)
    return beat.kind, step_time(times, beat.seconds, streams, LAYERS) * 1e3


@pytest.mark.parametrize(("streams", "times"), OVERLAPPED)
def test_the_simulated_pipeline_is_the_optimistic_formula(streams, times):
    kind, expected_ms = tpot_of(times, streams)
    assert kind is (PipelineKind.SERIAL if streams == 1 else PipelineKind.OPTIMISTIC)
    assert run("1A1F", times, streams=streams).tpot.mean_ms == pytest.approx(expected_ms, rel=0.01)


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
    assert carried.tpot.mean_ms == pytest.approx(LAYERS * 0.96, rel=0.02)  # four streams' C


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

"""Whole runs: every request ends once, whatever is lost; limits hold; equal input gives equal output."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from afd.sched.scheduler import SchedulerConfig
from afd.simulate.arrivals import ClosedLoop, Lengths, OpenLoop
from afd.simulate.cluster import Simulation, StuckError
from afd.simulate.loading import LoadTimes
from afd.simulate.planned import Failure
from afd.simulate.times import ConstantStages
from afd.types import Topology
from tests.unit.simulate.cluster_under_test import settings, stage

TIMES = ConstantStages(stage(120, 100, 10, 10, head=200))


def poisson(num_requests=60, rate=60.0, seed=0):
    return OpenLoop(num_requests, rate, 1.0, Lengths(60, 0.5), Lengths(20, 0.5), seed)


def fail(*texts, topology="2A1F"):
    return tuple(Failure.parse(text, Topology.parse(topology), LoadTimes(3.0, 4.0)) for text in texts)


def ended(report):
    return report.num_answered + sum(report.refused.values()) + sum(report.lost.values())


@pytest.mark.parametrize("detail", ["layers", "ends"])
@pytest.mark.parametrize("policy", ["off", "observe", "enforce"])
def test_every_request_is_answered_and_the_books_are_in_order(detail, policy):
    simulation = Simulation(settings("2A2F", TIMES, detail=detail, policy=policy), poisson())
    report = simulation.run()
    assert report.num_answered == report.num_requests == 60
    assert report.output_tokens == sum(request.num_output for request in poisson())
    for worker in simulation.workers:
        worker.scheduler.check()
        assert worker.scheduler.idle and worker.scheduler.pool.num_free == 4000 and not worker.flying
    assert 0.0 < report.attention_busy <= 1.0 and 0.0 < report.ffn_busy <= 1.0
    assert 1.0 <= report.gang_size <= 2.0 and report.imbalance >= 1.0


@pytest.mark.parametrize("detail", ["layers", "ends"])
def test_equal_input_equal_output(detail):
    one, other = (Simulation(settings("2A2F", TIMES, detail=detail), poisson()).run() for _ in range(2))
    assert one == other
    assert Simulation(settings("2A2F", TIMES, detail=detail), poisson(seed=1)).run() != one


@pytest.mark.parametrize("detail", ["layers", "ends"])
def test_requests_of_a_lost_attention_worker_go_on_at_another(detail):
    lost = Simulation(settings("2A1F", TIMES, detail=detail, failures=fail("attention:0@0.5+2")), poisson(120)).run()
    calm = Simulation(settings("2A1F", TIMES, detail=detail), poisson(120)).run()
    assert lost.num_answered == 120 and lost.migrated > 0
    assert lost.output_tokens == calm.output_tokens
    assert lost.tpot.p99_ms > 8 * calm.tpot.p50_ms, "the gateway took two seconds to notice"


@pytest.mark.parametrize("detail", ["layers", "ends"])
def test_the_only_attention_workers_requests_are_lost(detail):
    report = Simulation(
        settings("1A1F", TIMES, detail=detail, failures=fail("attention:0@0.5", topology="1A1F")), poisson(240)
    ).run()
    assert report.lost and ended(report) == 240
    assert "no worker could take it over in time" in " ".join(report.lost)
    assert report.refused["not_ready"] > 0, "who comes when it is known to be gone"


@pytest.mark.parametrize("detail", ["layers", "ends"])
def test_a_lost_ffn_worker_is_a_pause(detail):
    report = Simulation(settings("2A1F", TIMES, detail=detail, failures=fail("ffn:0@0.3+0.5")), poisson(60)).run()
    assert not report.lost and report.num_answered + report.refused.get("not_ready", 0) == ended(report) == 60
    assert report.tpot.p99_ms > 2.0 * report.tpot.p50_ms and report.ttft.p99_ms > 400.0


@pytest.mark.parametrize("detail", ["layers", "ends"])
def test_an_ffn_worker_that_does_not_return_in_time_costs_what_runs(detail):
    report = Simulation(settings("2A1F", TIMES, detail=detail, failures=fail("ffn:0@0.5+9")), poisson(60, 90.0)).run()
    assert ended(report) == 60 and sum(report.lost.values()) > 0
    assert all("ffn/0 was lost at 0.5 s" in reason for reason in report.lost)


@pytest.mark.parametrize("detail", ["layers", "ends"])
def test_workers_are_busy_for_a_share_of_the_run_also_where_nobody_is_answered(detail):
    crowd = OpenLoop(60, 200.0, 1.0, Lengths(60), Lengths(400), seed=0)
    report = Simulation(settings("2A1F", TIMES, detail=detail, failures=fail("ffn:0@0.4")), crowd).run()
    assert report.num_answered == 0 and ended(report) == 60
    assert 2.4 <= report.duration_s <= 2.5, "the last ones are given up after the recovery timeout"
    assert 0.1 < report.attention_busy < 0.2 and 0.1 < report.ffn_busy < 0.2, "busy for 0.4 s of 2.4"


def test_the_gateways_queue_is_bounded():
    crowd = OpenLoop(200, 2000.0, 1.0, Lengths(60), Lengths(60), seed=0)
    tight = settings(
        "1A1F", TIMES, policy="enforce", max_queue=16, tpot_s=0.02, scheduler=SchedulerConfig(max_num_seqs=4)
    )
    report = Simulation(tight, crowd).run()
    assert ended(report) == 200 and report.refused
    assert report.max_queue <= 16 + 4  # refused ones come back to their place in line


def test_little_kv_cache_preempts_and_still_answers_all():
    arrivals = ClosedLoop(24, 12, Lengths(30), Lengths(80), seed=0)
    report = Simulation(settings("1A1F", TIMES, num_blocks=40), arrivals).run()
    assert report.num_answered == 24 and report.preempted > 0


def test_answers_of_unknown_length_end_by_their_stop_token():
    report = Simulation(settings("1A1F", TIMES, stops_early=True, max_tokens=500), poisson(30)).run()
    assert report.num_answered == 30
    assert report.output_tokens == sum(request.num_output for request in poisson(30))


def test_workers_may_choose_their_streams():
    report = Simulation(settings("1A1F", TIMES, auto_streams=3), ClosedLoop(60, 20, Lengths(4), Lengths(60), 0)).run()
    assert report.num_answered == 60


def test_nobody_left_to_answer_is_said():
    losses = settings("1A1F", TIMES, failures=fail("ffn:0@0.1", topology="1A1F"), recovery_timeout_s=1e6)
    with pytest.raises(StuckError, match="give lost workers a restart"):
        Simulation(losses, poisson(60)).run()


@hypothesis_settings(max_examples=15, deadline=None, derandomize=True)
@given(
    topology=st.sampled_from(["1A1F", "2A1F", "3A2F"]),
    detail=st.sampled_from(["layers", "ends"]),
    policy=st.sampled_from(["off", "enforce"]),
    streams=st.integers(1, 4),
    burstiness=st.sampled_from([0.2, 1.0, 5.0]),
    failures=st.lists(
        st.tuples(st.sampled_from(["attention", "ffn"]), st.floats(0.0, 0.6), st.floats(0.1, 4.0)), max_size=3
    ),
    seed=st.integers(0, 5),
)
def test_each_request_ends_exactly_once(topology, detail, policy, streams, burstiness, failures, seed):
    """The clients assert that nobody is answered twice, or with another number of tokens than asked for."""
    planned = tuple(Failure(role, 0, at_s, restart_s) for role, at_s, restart_s in failures)
    arrivals = OpenLoop(25, 50.0, burstiness, Lengths(40, 0.9), Lengths(10, 0.9), seed)
    changes = {"detail": detail, "policy": policy, "failures": planned, "max_queue": 30}
    simulation = Simulation(settings(topology, TIMES, streams=streams, **changes), arrivals)
    report = simulation.run()
    assert report.num_requests == ended(report) == 25
    assert report.max_live <= 25 and report.max_queue <= 30 + 25
    assert 0.0 <= report.attention_busy <= 1.0 and 0.0 <= report.ffn_busy <= 1.0
    assert 0.0 <= report.attention_bubble <= 1.0 and 0.0 <= report.ffn_bubble <= 1.0
    for worker in simulation.workers:
        worker.scheduler.check()

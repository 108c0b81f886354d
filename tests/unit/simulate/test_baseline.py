"""Colocated expert parallelism on the same requests: a full batch is the planner's formula, and all move together."""

from __future__ import annotations

from functools import partial

import pytest

from afd.plan.catalog import load_chips, load_models
from afd.plan.colocated import ColocatedModel
from afd.plan.deployment import Deployment
from afd.plan.efficiency import Efficiency
from afd.plan.stages import RooflineStages
from afd.sched.scheduler import SchedulerConfig
from afd.simulate.arrivals import ClosedLoop, Lengths, OpenLoop
from afd.simulate.cluster import Simulation
from afd.simulate.colocated import ColocatedPath
from afd.simulate.settings import Settings
from afd.simulate.times import StepTimes
from afd.types import Topology

H800, FACTORS = load_chips()["h800"], Efficiency()
CONTEXT, OUTPUT = 4000, 16


def ep(num_servers: int, streams: int, arrivals, model: str = "step3"):
    """So many servers of eight H800."""
    shape = Deployment(
        model=load_models()[model],
        attention_chip=H800,
        ffn_chip=H800,
        topology=Topology(num_servers, 1),
        streams=streams,
    )
    colocated = ColocatedModel(shape, FACTORS)
    scheduler = SchedulerConfig(max_step_tokens=2048, max_num_seqs=2048, max_context=65_536, num_streams=streams)
    settings = Settings(
        topology=shape.topology,
        times=StepTimes(RooflineStages(FACTORS), shape),
        scheduler=scheduler,
        num_blocks=200_000,
        block_size=64,
        policy="off",
    )
    path_of = partial(ColocatedPath, colocated, num_servers * 8)
    return colocated, Simulation(settings, arrivals, path_of=path_of).run()


@pytest.mark.parametrize("streams", [1, 2])
@pytest.mark.parametrize(("num_servers", "per_chip"), [(2, 8), (6, 4)])
def test_full_batches_take_what_the_planner_says(streams, num_servers, per_chip):
    """As many requests on every chip and micro-batch; the last of them decode with nothing beside them."""
    clients = num_servers * 8 * per_chip * streams
    outcomes = ClosedLoop(clients, clients, Lengths(1), Lengths(OUTPUT), seed=0)
    model, report = ep(num_servers, streams, outcomes)
    expected_s = model.tpot(num_servers * 8, 1 + OUTPUT // 2, per_chip, streams)
    assert report.tpot.mean_ms == pytest.approx(1e3 * expected_s, rel=0.02)
    assert report.num_answered == clients and report.gang_size == 0.0


def test_servers_move_in_lock_step():
    """One request alone on two servers: each of its steps is as long as an experts' layer for one row on both."""
    model, report = ep(2, 1, ClosedLoop(1, 1, Lengths(1), Lengths(20), seed=0))
    ffn_s, transfer_s = model.ffn_times(16, 1 / 16)
    alone = model.template.replace(topology=Topology(1, 1))
    stage = RooflineStages(FACTORS).times(alone, 10, 1 / 8)
    layer_s = FACTORS.colocated_stretch * (stage.attention_s + ffn_s + transfer_s)
    expected_s = (1 + FACTORS.jitter) * (61 * layer_s + stage.head_s)
    assert report.tpot.mean_ms == pytest.approx(1e3 * expected_s, rel=0.02)


def test_every_request_is_answered_once_under_poisson_load():
    _, report = ep(2, 2, OpenLoop(60, 60.0, 0.5, Lengths(300, 0.5), Lengths(10, 0.5), seed=1))
    assert report.num_answered == 60 and not report.lost and 0.0 < report.attention_busy <= 1.0

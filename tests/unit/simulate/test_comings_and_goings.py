"""Weights that load, and rollouts: what happens when, by hand, and what clients see of it."""

from __future__ import annotations

import pytest

from afd.cluster.autoscale.decision import Policy
from afd.errors import ConfigError
from afd.plan.catalog import load_chips, load_models
from afd.plan.deployment import Deployment
from afd.plan.efficiency import Efficiency
from afd.simulate.advice import Advice, limits_of
from afd.simulate.arrivals import Lengths, OpenLoop
from afd.simulate.cluster import Simulation
from afd.simulate.loading import LoadTimes
from afd.simulate.planned import Failure, PlannedRollout, PlannedScaling
from afd.simulate.times import ConstantStages
from afd.types import Topology
from tests.unit.simulate.cluster_under_test import settings, stage

TIMES = ConstantStages(stage(120, 100, 10, 10))
STEADY = OpenLoop(60, 40.0, 4.0, Lengths(20), Lengths(30), seed=0)  # 1.5 s


def run(topology, **changes):
    return Simulation(settings(topology, TIMES, detail="ends", **changes), STEADY).run()


def test_a_successor_reads_the_weights_of_its_instance_once():
    chips, model = load_chips(), load_models()["step3"]
    shape = Deployment(
        model=model, attention_chip=chips["h20"], ffn_chip=chips["h800"], topology=Topology.parse("4A2F")
    )
    load = LoadTimes.of(shape, Efficiency(), gb_per_s=2.0, start_s=10.0)
    ffn_bytes = sum(group.layers * group.total_weights(model.hidden) for group in model.ffn)  # 8 bits each
    assert load.ffn_s == pytest.approx(10 + ffn_bytes / 2 / 2e9) == pytest.approx(86.0, rel=0.05)
    attention_bytes = model.linear_weights + 2 * model.embedding_weights
    assert load.attention_s == pytest.approx(10 + attention_bytes / 2e9)
    failure = Failure.parse("ffn:1@30+load", shape.topology, load)
    assert failure.restart_s == load.ffn_s and failure.at_s == 30


def test_ffn_ranks_are_replaced_one_after_the_other_and_everybody_waits():
    report = run("1A2F", rollouts=(PlannedRollout("ffn", 0.25),), load=LoadTimes(9.0, 0.5))
    assert report.timeline == (
        (0.25, "rollout of ffn begins"),
        (0.25, "ffn/1 is lost"),
        (0.75, "ffn/1 serves"),
        (0.75, "ffn/0 is lost"),
        (1.25, "ffn/0 serves"),
        (1.25, "rollout of ffn is over"),
    )
    assert report.num_answered == 60 and not report.lost and not report.refused
    assert report.tpot.p99_ms * 29 > 450, "whoever ran stood still for half a second at a time"


def test_attention_workers_drain_and_nobody_is_lost():
    report = run("2A1F", rollouts=(PlannedRollout("attention", 0.25),), load=LoadTimes(0.2, 9.0))
    what = [text for _, text in report.timeline]
    assert what == [
        "rollout of attention begins",
        *[f"attention/{rank} {does}" for rank in (1, 0) for does in ("drains", "serves")],
        "rollout of attention is over",
    ]
    begun_s, first_s, first_back_s, second_s, second_back_s, over_s = (at_s for at_s, _ in report.timeline)
    assert begun_s == first_s == 0.25 and first_back_s >= first_s + 0.2
    assert second_s == first_back_s and over_s == second_back_s >= second_s + 0.2
    assert report.num_answered == 60 and not report.lost and not report.refused
    assert report.migrated == 0, "they had ten seconds to finish"


def test_a_worker_that_has_no_time_to_drain_hands_over():
    report = run("2A1F", rollouts=(PlannedRollout("attention", 0.25),), load=LoadTimes(0.3, 9.0), drain_s=0.0)
    assert report.num_answered == 60 and report.migrated > 0 and not report.lost


def test_what_did_not_happen_is_said():
    report = run("2A1F", failures=(Failure("attention", 0, 99.0, None),), rollouts=(PlannedRollout("ffn", 77.0),))
    assert report.timeline == (
        (99.0, "not reached: the loss of attention/0"),
        (77.0, "not reached: the rollout of ffn"),
    )


@pytest.mark.parametrize("text", ["ffn", "gateway@3", "ffn@", "ffn@3+4"])
def test_what_is_no_rollout_is_said(text):
    with pytest.raises(ConfigError, match="is not ROLE@SECONDS"):
        PlannedRollout.parse(text)


def test_attention_workers_are_added_when_they_have_loaded_and_drain_when_there_are_too_many():
    """1.5 s: one worker, three from 0.5 s on (asked for at 0.2), two of them again from 1.0 s on."""
    scalings = (PlannedScaling(3, 0.2), PlannedScaling(2, 1.0))
    report = run("1A1F", scalings=scalings, load=LoadTimes(0.3, 9.0))
    assert report.timeline[:4] == (
        (0.2, "1 attention workers should be 3"),
        (0.5, "attention/1 serves"),
        (0.5, "attention/2 serves"),
        (1.0, "3 attention workers should be 2"),
    )
    assert report.timeline[4] == (1.0, "attention/2 drains")
    assert report.num_answered == 60 and not report.lost and not report.refused
    least, most = 1 + 2 * 0.5 / report.duration_s, 1 + 2 * (report.duration_s - 0.5) / report.duration_s
    assert least < report.attention_workers < most and 0.0 < report.attention_busy < 1.0


def test_a_newcomer_that_is_not_wanted_any_more_does_not_come():
    report = run("1A1F", scalings=(PlannedScaling(2, 0.2), PlannedScaling(1, 0.3)), load=LoadTimes(0.3, 9.0))
    assert report.timeline == ((0.2, "1 attention workers should be 2"), (0.3, "2 attention workers should be 1"))
    assert report.attention_workers == pytest.approx(1.0) and report.num_answered == 60


def test_the_number_of_attention_workers_follows_the_autoscaler():
    """60 requests/s for 50 tokens each; one worker serves about 1,800 tokens/s, two serve them all."""
    slow = settings("1A1F", ConstantStages(stage(400, 100)), detail="ends", advises=True, load=LoadTimes(1.0, 9.0))
    policy = Policy(max_num_seqs=64, grow_s=3.0, settle_s=2.0)
    advice = Advice(slow, limits_of("1A1F:4A1F"), policy=policy, follow=True)
    arrivals = OpenLoop(600, 60.0, 4.0, Lengths(1), Lengths(50), seed=0)
    report = Simulation(slow, arrivals, advice=advice).run()
    (asked_s, asked), (serves_s, serves) = report.timeline
    assert asked == "1 attention workers should be 2" and serves == "attention/1 serves"
    assert policy.grow_s <= asked_s < 2 * policy.grow_s and serves_s == asked_s + 1.0
    assert report.num_answered == 600 and advice.text().startswith("autoscale: 2A1F -> 2A1F")

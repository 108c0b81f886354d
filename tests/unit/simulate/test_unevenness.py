"""Workers, links and experts that are not alike: each against what a hand calculation gives."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from afd.errors import ConfigError
from afd.plan.catalog import load_chips, load_models
from afd.plan.deployment import Deployment
from afd.plan.efficiency import Efficiency
from afd.simulate.arrivals import ClosedLoop, Lengths
from afd.simulate.cluster import Simulation
from afd.simulate.experts import chosen, expert_imbalance, popularity, runs
from afd.simulate.fabric import Fabric
from afd.simulate.slowdowns import Pace, Slowdown
from afd.simulate.times import ConstantStages, StepTimes
from afd.types import Topology
from tests.unit.simulate.cluster_under_test import LAYERS, deployment, run, settings, stage

BOTH = pytest.mark.parametrize("detail", ["layers", "ends"])


def slow(*texts, topology):
    shape = Topology.parse(topology)
    return Pace(tuple(Slowdown.parse(text, shape) for text in texts), shape.num_ffn)


@BOTH
@pytest.mark.parametrize(
    ("texts", "layer_us"),
    [
        ((), 200 + 150),
        (("attention:1*1.5",), 300 + 150),  # a gang moves as its slowest member
        (("ffn:1*2",), 200 + 300),  # every layer needs every FFN rank
        (("attention:0*1.5", "ffn:0*2", "ffn:1*1.2"), 300 + 300),
    ],
)
def test_everybody_waits_for_the_slowest(detail, texts, layer_us):
    report = run("2A2F", stage(200, 150), streams=1, detail=detail, pace=slow(*texts, topology="2A2F"))
    assert report.tpot.mean_ms == pytest.approx(LAYERS * layer_us / 1e3, rel=0.03)


@BOTH
def test_the_slow_rank_is_busy_for_longer_than_the_others(detail):
    """One stream: F takes 150 us at one rank and 300 at the other, 225 on average, of 500."""
    report = run("1A2F", stage(200, 150), streams=1, detail=detail, pace=slow("ffn:1*2", topology="1A2F"))
    assert report.ffn_busy == pytest.approx(225 / 500, rel=0.02)


@BOTH
def test_a_slow_time_ends(detail):
    """One stream, 10.5 ms a step as it is and 16.5 ms while attention is slow."""
    pace = slow("attention:0*2@0.2+0.165", topology="1A1F")
    report = run("1A1F", stage(200, 150), streams=1, num_output=101, detail=detail, pace=pace)
    assert report.tpot.mean_ms == pytest.approx((10.5 * 90 + 16.5 * 10) / 100, rel=0.005)


def test_slowdowns_of_one_worker_multiply():
    pace = slow("ffn:1*2@1+4", "ffn:1*1.5@3", topology="1A4F")
    assert [pace.ffn(1, now) for now in (0.5, 2, 4, 6)] == [1, 2, 3, 1.5] and pace.ffn(0, 4) == 1
    assert pace.ffn_span(4) == (1.5, 3) and pace.attention(1, 4) == 1


@pytest.mark.parametrize(
    "text", ["ffn:1", "ffn:1*0.5", "ffn:2*2", "gateway:0*2", "ffn:0*2000", "ffn:0*2@", "ffn:0*2+3"]
)
def test_what_is_no_slowdown_is_said(text):
    with pytest.raises(ConfigError, match="--slow '"):
        Slowdown.parse(text, Topology.parse("1A2F"))


@BOTH
@pytest.mark.parametrize(("out_us", "back_us"), [(20, 5), (5, 20)])
def test_all_workers_rows_cross_one_fabric(detail, out_us, back_us):
    """Two workers, three streams of two rows each: 12 rows a layer at 20 us the slower way, above any stage."""
    times, shape = stage(50, 40), deployment("2A1F")
    fabric = Fabric(out_us * 1e-6, back_us * 1e-6)
    changed = settings(
        "2A1F", ConstantStages(times), detail=detail, times=StepTimes(ConstantStages(times), shape, fabric)
    )
    clients = ClosedLoop(12, 12, Lengths(1), Lengths(50), seed=0)
    crowded = Simulation(changed, clients).run()
    assert crowded.tpot.mean_ms == pytest.approx(LAYERS * 12 * 0.020, rel=0.03)


def test_what_a_row_takes_of_an_oversubscribed_fabric():
    chips, model = load_chips(), load_models()["step3"]
    shape = Deployment(
        model=model, attention_chip=chips["h20"], ffn_chip=chips["h800"], topology=Topology.parse("3A2F")
    )
    factors = Efficiency(jitter=0.0)
    row_bytes = 7168 + 4 * 56 + 8 * 3  # fp8 values, a scale for each 128, three experts
    fabric = Fabric.of(shape, factors, 4.0)
    assert fabric.to_ffn_s == pytest.approx(2 * row_bytes / (2 * 8 * 50e9 * 0.8 / 4))
    assert fabric.to_attention_s == pytest.approx(2 * 2 * 7168 / (2 * 8 * 50e9 * 0.8 / 4))


def test_crowded_experts_by_hand():
    assert popularity(3, 1.0) == pytest.approx([6 / 11, 3 / 11, 2 / 11])
    assert chosen([6 / 11, 3 / 11, 2 / 11], 1) == pytest.approx([6 / 11, 3 / 11, 2 / 11])
    # Two of three: the first always, since twice its share is above 1, and 3 : 2 of the other place.
    assert chosen([6 / 11, 3 / 11, 2 / 11], 2) == pytest.approx([1.0, 0.6, 0.4])
    assert [len(run) for run in runs(range(48), 11)].count(5) == 4
    step3 = load_models()["step3"]
    assert expert_imbalance(step3, 2, 0.0, seed=0) == pytest.approx(1.0)
    assert expert_imbalance(step3, 1, 1.0, seed=0) == pytest.approx(1.0), "one holder has all of them"
    # 48 holders of an expert each: the busiest holds the first, which gets three times its share of every token.
    first = 3 / sum(1 / rank for rank in range(1, 49))
    assert expert_imbalance(step3, 48, 1.0, seed=0) == pytest.approx(first / (3 / 48))
    skewed = [expert_imbalance(step3, 4, skew, seed=0) for skew in (0.0, 0.3, 0.6, 1.0)]
    assert skewed == sorted(skewed) and skewed[-1] > 1.2
    assert expert_imbalance(load_models()["smollm2-135m-instruct"], 4, 1.0, seed=0) == 1.0


@given(st.integers(1, 60), st.floats(0, 3), st.data())
def test_a_token_goes_to_as_many_experts_as_it_asks_for(num_experts, skew, data):
    top_k = data.draw(st.integers(1, num_experts))
    chances = chosen(popularity(num_experts, skew), top_k)
    assert sum(chances) == pytest.approx(top_k) and all(0.0 < chance <= 1.0 + 1e-9 for chance in chances)
    assert chances == sorted(chances, reverse=True)

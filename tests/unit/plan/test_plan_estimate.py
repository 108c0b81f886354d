"""One deployment: throughput identities, Table 8, and the best batch against exhaustive enumeration."""

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from afd.errors import ConfigError
from afd.plan.catalog import load_chips, load_models
from afd.plan.deployment import Deployment, KvDtype
from afd.plan.efficiency import Efficiency
from afd.plan.estimate import Estimator, Objective
from afd.plan.memory import max_requests
from afd.plan.pipeline import Bound, PipelineKind
from afd.plan.stages import RooflineStages
from afd.types import Topology
from tests.unit.plan.report_tables import TABLE_8, TGS_2A2F_AVERAGE

MODELS, CHIPS = load_models(), load_chips()
ESTIMATOR = Estimator(RooflineStages(Efficiency()), Efficiency())


def deployment(topology, kv_dtype=KvDtype.FP8, **changes):
    settings = {"model": MODELS["step3"], "attention_chip": CHIPS["h800"], "ffn_chip": CHIPS["h800"]}
    return Deployment(**{**settings, "topology": Topology.parse(topology), "kv_dtype": kv_dtype, **changes})


@pytest.mark.parametrize(("topology", "context", "dtype", "batch", "tgs"), TABLE_8)
def test_table_8_within_5_percent(topology, context, dtype, batch, tgs):
    """At the report's batch and at the best one; a peak minute is one without jitter, and within 3 % of it."""
    point, objective = deployment(topology, KvDtype(dtype)), Objective(context, 0.050)
    plan, best = ESTIMATOR.at_batch(point, objective, batch), ESTIMATOR.best(point, objective)
    assert plan.holds_sla
    assert plan.tgs == pytest.approx(tgs, rel=0.05)
    assert plan.tgs * (1 + Efficiency().jitter) == pytest.approx(tgs, rel=0.03)
    assert best.tgs == pytest.approx(tgs, rel=0.05)
    assert best.batch == pytest.approx(batch, rel=0.05)


def test_the_long_term_average_of_table_8_within_2_percent():
    plan = ESTIMATOR.at_batch(deployment("2A2F"), Objective(4096, 0.050), 6144)
    assert plan.tgs == pytest.approx(TGS_2A2F_AVERAGE, rel=0.02)


def test_table_8_is_ranked_as_published():
    plans = [
        ESTIMATOR.best(deployment(topology, KvDtype(dtype)), Objective(context, 0.050)).tgs
        for topology, context, dtype, _, _ in TABLE_8
    ]
    assert plans == sorted(plans, reverse=True)


def test_identities():
    plan = ESTIMATOR.estimate(deployment("3A2F"), Objective(4096, 0.050), 84)
    assert (plan.micro_batch, plan.batch, plan.requests_per_chip) == (84 * 24, 3 * 84 * 24, 252)
    assert plan.tgs == plan.batch / (40 * plan.tpot_s)
    assert plan.usd_per_mtok == pytest.approx(2.0 / 3600 / plan.tgs * 1e6)
    assert plan.headroom == pytest.approx(1 - plan.tpot_s / 0.050)
    assert plan.barrier_tpot_s > plan.tpot_s


def test_tokens_per_second_cost_what_the_report_derives():
    """4039 tokens/GPU/s on H800 at 2 USD an hour: 0.138 USD per 1e6 tokens."""
    plan = ESTIMATOR.best(deployment("2A2F"), Objective(4096, 0.050))
    assert plan.usd_per_mtok == pytest.approx(0.138, rel=0.10)


def test_16_bit_attention_is_memory_bound():
    plan = ESTIMATOR.best(deployment("3A2F", KvDtype.BF16), Objective(4096, 0.050))
    assert plan.bound is Bound.MEMORY
    assert plan.num_tokens == 84


def test_an_unpriced_chip_gives_no_cost():
    plan = ESTIMATOR.estimate(deployment("2A6F", ffn_chip=CHIPS["l20"]), Objective(4096, 0.050), 1)
    assert plan.usd_per_mtok is None


def test_nothing_holds_an_impossible_sla():
    assert ESTIMATOR.best(deployment("2A2F"), Objective(4096, 0.010)) is None
    assert ESTIMATOR.best(deployment("1A1F", ffn_chip=CHIPS["l4"]), Objective(4096, 10.0)) is None


def test_a_looser_sla_is_never_slower():
    plans = [ESTIMATOR.best(deployment("2A2F"), Objective(4096, ms * 1e-3)).tgs for ms in (40, 50, 60, 80, 120)]
    assert plans == sorted(plans)


@pytest.mark.parametrize(
    ("batch", "message"),
    [(6143, "multiple of 48"), (47, "multiple of 48"), (48 * 1000, "holds 508"), (0, "multiple of 48")],
)
def test_batches_that_cannot_be(batch, message):
    with pytest.raises(ConfigError, match=message):
        ESTIMATOR.at_batch(deployment("2A2F"), Objective(4096, 0.050), batch)


def test_memory_report_adds_up():
    plan = ESTIMATOR.estimate(deployment("2A2F"), Objective(4096, 0.050), 128)
    use = ESTIMATOR.memory_report(plan)["attention"]
    workspace = Efficiency().workspace_bytes
    usable = use["capacity_bytes"] * Efficiency().memory
    assert use["weight_bytes"] + use["kv_bytes"] + use["free_bytes"] + workspace == pytest.approx(usable)


@settings(max_examples=150, derandomize=True, deadline=None)
@given(
    name=st.sampled_from(["step3", "deepseek-v3", "qwen3-235b-a22b", "qwen3-32b", "step3.5-flash", "minimax-m1"]),
    chips=st.tuples(*[st.sampled_from(["h800", "h20", "a800", "b200"])] * 2),
    shape=st.tuples(st.integers(1, 12), st.integers(1, 6)),
    streams=st.integers(1, 4),
    context=st.integers(8_000, 65_536),
    sla_ms=st.floats(20, 200),
    kind=st.sampled_from(PipelineKind),
)
def test_best_batch_equals_exhaustive_enumeration(name, chips, shape, streams, context, sla_ms, kind):
    point = Deployment(
        model=MODELS[name],
        attention_chip=CHIPS[chips[0]],
        ffn_chip=CHIPS[chips[1]],
        topology=Topology(*shape),
        streams=streams,
    )
    objective = Objective(context, sla_ms * 1e-3, kind)
    capacity = max_requests(point, ESTIMATOR.efficiency, context) // streams
    every = (ESTIMATOR.estimate(point, objective, tokens) for tokens in range(1, capacity + 1))
    expected = max((plan.tgs for plan in every if plan.holds_sla), default=None)
    found = ESTIMATOR.best(point, objective)
    assert (found is None) == (expected is None)
    if found is not None:
        assert found.holds_sla
        assert found.num_tokens <= capacity
        assert found.tgs == pytest.approx(expected, rel=1e-9)


@settings(max_examples=60, derandomize=True, deadline=None)
@given(
    name=st.sampled_from(["step3", "deepseek-v3", "qwen3-235b-a22b", "step3.5-flash", "kimi-k2"]),
    chips=st.tuples(*[st.sampled_from(["h800", "h20", "a800", "b200"])] * 2),
    shape=st.tuples(st.integers(1, 12), st.integers(1, 6)),
    streams=st.integers(1, 4),
    context=st.integers(1_000, 30_000),
    longer=st.integers(1, 30_000),
    gbit=st.floats(2.0, 400.0),
    slower=st.floats(0.1, 1.0),
)
def test_throughput_never_rises_with_context_nor_with_a_slower_network(
    name, chips, shape, streams, context, longer, gbit, slower
):
    def best(context, gbit):
        attention, ffn = (msgspec.structs.replace(CHIPS[chip], network_gbit_per_s=gbit) for chip in chips)
        point = Deployment(
            model=MODELS[name], attention_chip=attention, ffn_chip=ffn, topology=Topology(*shape), streams=streams
        )
        found = ESTIMATOR.best(point, Objective(context, 0.1))
        return 0.0 if found is None else found.tgs

    here = best(context, gbit)
    assert best(context + longer, gbit) <= here * (1 + 1e-9)
    assert best(context, gbit * slower) <= here * (1 + 1e-9)

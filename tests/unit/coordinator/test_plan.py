"""The pipeline plan: from cost curves to numbers, without flapping, within what the configuration allows."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from afd.config import AttentionConfig, ClusterConfig, FfnConfig, SlaConfig
from afd.coordinator.forecast import TRUSTED_STEPS, forecast
from afd.coordinator.plan import INTERVAL_S, Planner, PlanRules
from afd.messages.membership import Plan, StepCosts
from tests.unit.coordinator.scenario import Scenario, formed

BASE = Plan(max_streams=3, max_step_tokens=256, gang_window_s=0.01)


def costs(*, a=(4e-3, 2e-4, 0.0), f=(4e-3, 2e-4), c=1e-3, tokens=32.0, num_steps=1000, **changes) -> StepCosts:
    """A worker whose head costs nothing."""
    return StepCosts(
        attention=a,
        head=(0.0, 0.0),
        ffn=f,
        transfer_s=c,
        num_steps=num_steps,
        num_seqs=int(tokens),
        tokens=tokens,
        rows=tokens,
        **changes,
    )


def far(num_workers: int = 1) -> StepCosts:
    """A wire of half of A's time: three streams take 7/6 of it, four hide it all."""
    return costs(a=(1e-6, 2e-3, 0.0), f=(1e-6, 2e-3 / num_workers), c=32e-3, gang_size=float(num_workers))


def decided(*workers: StepCosts, plan: Plan = BASE, rules: PlanRules | None = None) -> Plan:
    return Planner(rules or PlanRules(BASE)).decide(plan, workers, 0.0)


# -- forecasts ------------------------------------------------------------------------------------------------


def test_one_worker_by_hand():
    got = forecast([costs()], 2)
    assert got.attention_s == pytest.approx(2 * 4e-3 + 32 * 2e-4)
    assert got.ffn_s == pytest.approx(2 * 4e-3 + 32 * 2e-4)
    assert got.latency_s == pytest.approx((4e-3 + 16 * 2e-4) * 2 + 1e-3)
    assert got.cycle_s == pytest.approx(max(got.attention_s, got.ffn_s, got.latency_s))


def test_a_gang_reads_the_ffns_weights_once_and_broken_gangs_more_often():
    whole = forecast([costs(gang_size=3.0)] * 3, 1)
    assert whole.ffn_s == pytest.approx(4e-3 + 96 * 2e-4)
    alone = forecast([costs(gang_size=1.0)] * 3, 1)
    assert alone.ffn_s == pytest.approx(3 * 4e-3 + 96 * 2e-4)


def test_the_slowest_member_decides_and_measurement_corrects():
    slow = costs(a=(40e-3, 2e-4, 0.0), corrections={2: 1.5})
    both = forecast([costs(corrections={2: 1.5}), slow], 2)
    assert both.attention_s == forecast([slow], 2).attention_s
    assert both.cycle_s == pytest.approx(1.5 * max(both.attention_s, both.ffn_s, both.latency_s))


def test_streams_without_sequences_cost_nothing():
    lone = [forecast([costs(tokens=1.0)], m).cycle_s for m in (1, 2, 3, 4)]
    assert len(set(lone)) == 1


# -- decisions ------------------------------------------------------------------------------------------------


def test_a_slow_wire_is_worth_more_streams():
    plan = decided(far())
    assert plan.max_streams == 4 and plan.version == BASE.version + 1


def test_numbers_that_are_bound_to_lose_are_closed():
    assert decided(costs(a=(20e-3, 1e-5, 0.0), f=(1e-3, 1e-5), c=1e-4)).max_streams == 1


def test_a_small_gain_changes_nothing():
    assert decided(costs()).max_streams == BASE.max_streams


def test_what_the_configuration_fixes_stays():
    config = ClusterConfig(attention=AttentionConfig(streams=2), ffn=FfnConfig(gang_window_ms=1.0))
    rules = PlanRules.of(config)
    for worker in (far(2), costs(a=(20e-3, 1e-5, 0.0), f=(1e-3, 1e-5))):
        plan = decided(worker, worker, plan=rules.base, rules=rules)
        assert (plan.max_streams, plan.max_step_tokens, plan.gang_window_s) == (2, 256, 0.001)


def test_the_window_follows_the_predicted_cycle_up_to_the_configured_one():
    short = decided(*[costs(a=(1e-3, 0.0, 0.0), f=(1e-3, 0.0), gang_size=2.0)] * 2)
    assert 0.0 < short.gang_window_s < 0.001
    assert decided(*[costs(a=(0.1, 0.0, 0.0))] * 2).gang_window_s == 0.01


def test_idle_and_inexperienced_workers_say_nothing():
    assert decided() is BASE
    assert decided(msgspec.structs.replace(far(), tokens=0.0)) is BASE
    assert decided(msgspec.structs.replace(far(), num_steps=TRUSTED_STEPS - 1)) is BASE
    newcomer = costs(num_steps=3)
    assert decided(far(2), far(2), newcomer) is BASE, "what it costs the others is not known yet"
    assert decided(far(), costs(tokens=0.0, num_steps=3)).max_streams == 4


def test_under_enforce_tokens_shrink_to_the_target_and_grow_again():
    """Four workers: a prefill step of each costs the others the FFN's time of all four."""
    config = ClusterConfig(
        sla=SlaConfig(policy="enforce", tpot_ms=100.0), attention=AttentionConfig(min_chunk_tokens=64)
    )
    rules = PlanRules.of(config)
    planner, plan, sizes = Planner(rules), rules.base, []
    for f_token_s in [2e-4] * 3 + [1e-5] * 3:
        now = len(sizes) * INTERVAL_S
        worker = costs(a=(4e-3, 1e-4, 0.0), f=(4e-3, f_token_s), gang_size=4.0, num_streams=2)
        plan = planner.decide(plan, [worker] * 4, now)
        sizes.append(plan.max_step_tokens)
    assert sizes == [128, 128, 128, 256, 256, 256], "80 tokens, a stream's decodes and a chunk, must find room"
    observed = PlanRules.of(ClusterConfig(sla=SlaConfig(policy="observe", tpot_ms=100.0)))
    assert decided(*[costs(gang_size=4.0)] * 4, plan=observed.base, rules=observed).max_step_tokens == 256


def test_at_most_one_version_an_interval():
    planner = Planner(PlanRules(BASE))
    first = planner.decide(BASE, [far()], 0.0)
    assert first.version == BASE.version + 1
    assert planner.decide(first, [costs(a=(20e-3, 0.0, 0.0), c=0.0)], INTERVAL_S - 0.1) is first
    assert planner.decide(first, [costs(a=(20e-3, 0.0, 0.0), c=0.0)], INTERVAL_S).version == first.version + 1


cost = st.floats(1e-5, 2e-2)
workers_of = st.lists(
    st.builds(
        lambda a0, a1, f0, f1, c, tokens, gang: costs(
            a=(a0, a1 / 50, 0.0), f=(f0, f1 / 50), c=c, tokens=float(tokens), gang_size=gang
        ),
        cost,
        cost,
        cost,
        cost,
        cost,
        st.integers(1, 200),
        st.floats(1, 4),
    ),
    min_size=1,
    max_size=4,
)


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(workers_of, st.integers(1, 4), st.floats(0.005, 0.2))
def test_a_steady_cluster_gets_a_steady_plan_within_the_rules(workers, max_streams, target_s):
    rules = PlanRules(BASE, target_s=target_s)
    planner, plan = Planner(rules), planner_start(max_streams)
    versions = []
    for turn in range(12):
        plan = planner.fit(planner.decide(plan, workers, turn * INTERVAL_S), len(workers))
        versions.append(plan.version)
        assert rules.least_streams <= plan.max_streams <= rules.most_streams
        assert 1 <= plan.max_step_tokens <= 256 and 0.0 <= plan.gang_window_s <= BASE.gang_window_s
    assert len(set(versions[-4:])) == 1, versions


def planner_start(max_streams: int) -> Plan:
    return Plan(max_streams=max_streams, max_step_tokens=256, gang_window_s=0.01)


# -- in the coordinator ---------------------------------------------------------------------------------------


def measured(scenario: Scenario, measured: StepCosts) -> None:
    for name in scenario.infos:
        if name.startswith("a"):
            scenario.sync(name, costs=measured)


def test_a_plan_is_published_without_an_epoch_and_said_to_the_operator():
    scenario = formed("2A1F", rules=PlanRules(BASE))
    before = scenario.view
    measured(scenario, far(2))
    scenario.wait(1.0)
    view = scenario.view
    assert view.plan.max_streams == 4 and view.plan.version == before.plan.version + 1
    assert view.epoch == before.epoch and view.version == before.version + 1
    assert scenario.views["f0"].plan == scenario.views["a1"].plan == view.plan
    assert f"plan {view.plan.version}: up to 4 streams of 256 tokens" in scenario.log()
    forecasts = scenario.state.status(scenario.now).forecasts
    assert [f.num_streams for f in forecasts] == [1, 2, 3, 4] and forecasts[0].num_workers == 2


def test_a_plan_does_not_change_while_the_cluster_is_broken_nor_twice_in_an_interval():
    scenario = formed("2A1F", rules=PlanRules(BASE))
    scenario.sync("f0", leaving=True)
    scenario.silent.add("f0")
    measured(scenario, far(2))
    scenario.wait(1.0)
    assert scenario.view.plan.max_streams == 3
    scenario.register("f1")
    scenario.sync("f1", ready=True)
    scenario.wait(1.0)
    assert scenario.view.plan.max_streams == 4
    version = scenario.view.plan.version
    measured(scenario, costs(a=(40e-3, 1e-5, 0.0), f=(1e-3, 1e-5), c=0.0))
    scenario.wait(INTERVAL_S - 2.0)
    assert scenario.view.plan.version == version
    scenario.wait(3.0)
    assert scenario.view.plan.version == version + 1 and scenario.view.plan.max_streams < 4


def test_a_restarted_coordinator_goes_on_with_the_plan():
    scenario = formed("2A1F", rules=PlanRules(BASE))
    measured(scenario, far(2))
    scenario.wait(1.0)
    plan = scenario.view.plan
    scenario.restart_coordinator()
    for name in list(scenario.infos):
        scenario.register(name, rank=int(name[1:]), again=True)
    scenario.wait(1.0)
    assert scenario.view.plan == plan

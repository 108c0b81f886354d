"""The search finds the report's topologies by itself, and the answer around them is consistent."""

import dataclasses

import msgspec
import pytest

from afd.errors import ConfigError
from afd.plan.advice import advise, closed_form_ratio
from afd.plan.colocated import ColocatedModel, server_sizes
from afd.plan.deployment import Deployment, KvDtype
from afd.plan.efficiency import Efficiency
from afd.plan.estimate import Objective
from afd.plan.search import TIE, SearchSpace, rank, search
from afd.plan.tcp import link_rows, tcp_fallback
from afd.types import Topology
from tests.unit.plan.report_tables import DEEPSEEK_PROFILE, TCP_ROWS

SLA = 0.050


def space_of(models, chips, model="step3", attention=("h800",), ffn=("h800",), **changes):
    return SearchSpace(
        model=models[model],
        attention_chips=[chips[name] for name in attention],
        ffn_chips=[chips[name] for name in ffn],
        **changes,
    )


@pytest.mark.parametrize(
    ("context", "topology", "gpus"),
    [(4096, "2A2F", 32), (8192, "4A2F", 48), (16384, "8A2F", 80), (32768, "16A2F", 144)],
)
def test_attention_count_follows_context_as_in_the_report(models, chips, estimator, context, topology, gpus):
    best = search(space_of(models, chips, streams=(3,)), estimator, Objective(context, SLA))[0]
    assert str(best.deployment.topology) == topology
    assert best.deployment.num_chips == gpus
    assert best.deployment.streams == 3


def test_the_reports_batch_is_found_too(models, chips, estimator):
    best = search(space_of(models, chips), estimator, Objective(4096, SLA))[0]
    assert best.num_tokens == pytest.approx(128, abs=1)
    assert (best.micro_batch, best.batch) == (16 * best.num_tokens, 48 * best.num_tokens)


def test_every_plan_holds_the_sla_and_the_chip_limit(models, chips, estimator):
    plans = search(space_of(models, chips, max_chips=64), estimator, Objective(4096, SLA))
    assert plans
    assert all(plan.holds_sla and plan.deployment.num_chips <= 64 for plan in plans)
    assert len({plan.deployment.topology for plan in plans}) == len(plans)


def test_pruning_loses_nothing_near_the_top(models, chips, estimator):
    space, objective = space_of(models, chips, max_chips=96), Objective(8192, SLA)
    h800 = chips["h800"]
    every = [
        estimator.best(space.deployment(h800, h800, Topology(a, f), 3), objective)
        for a in range(1, 12)
        for f in range(1, 12)
        if a + f <= 12
    ]
    best_tgs = max(plan.tgs for plan in every if plan is not None)
    found = {plan.deployment.topology for plan in search(space, estimator, objective)}
    for plan in every:
        if plan is not None and plan.tgs > 0.6 * best_tgs:
            assert plan.deployment.topology in found


def test_ties_go_to_the_smaller_deployment(models, chips, estimator):
    objective, h800 = Objective(4096, SLA), chips["h800"]
    space = space_of(models, chips)
    small, big, worse = (estimator.best(space.deployment(h800, h800, Topology(x, x), 3), objective) for x in (2, 3, 4))
    assert abs(small.tgs / big.tgs - 1) < TIE
    assert rank([big, worse, small])[0] is small
    assert rank([worse, big])[0] is big
    assert rank([]) == []


def test_the_depth_is_chosen_unless_it_is_given(models, chips, estimator):
    objective = Objective(32768, SLA)
    fixed = search(space_of(models, chips, streams=(3,)), estimator, objective)
    free = search(space_of(models, chips), estimator, objective)
    assert max(p.tgs for p in free) >= max(p.tgs for p in fixed)
    assert {p.deployment.streams for p in free} > {3}


def test_heterogeneous_search_puts_attention_on_h20(models, chips, estimator):
    both = ("h800", "h20")
    best = search(space_of(models, chips, attention=both, ffn=both), estimator, Objective(8192, SLA))[0]
    assert (best.deployment.attention_chip.name, best.deployment.ffn_chip.name) == ("h20", "h800")
    uniform = search(space_of(models, chips), estimator, Objective(8192, SLA))[0]
    assert best.usd_per_mtok < uniform.usd_per_mtok


def test_without_prices_tokens_per_chip_decide(models, chips, estimator):
    free = msgspec.structs.replace(chips["h800"], usd_per_hour=None)
    space = SearchSpace(model=models["step3"], attention_chips=[free], ffn_chips=[free])
    best = search(space, estimator, Objective(4096, SLA))[0]
    assert best.usd_per_mtok is None
    assert str(best.deployment.topology) == "2A2F"


def test_impossible_searches(models, chips, estimator):
    with pytest.raises(ConfigError, match=r"--max-gpus 15: the smallest topology, 1A1F, has 16"):
        search(space_of(models, chips, max_chips=15), estimator, Objective(4096, SLA))
    with pytest.raises(ConfigError, match="past the limit of step3"):
        search(space_of(models, chips), estimator, Objective(100_000, SLA))
    odd = msgspec.structs.replace(chips["h20"], chips_per_server=16)
    mixed = SearchSpace(model=models["step3"], attention_chips=[odd], ffn_chips=[chips["h800"]])
    with pytest.raises(ConfigError, match="--ranks-per-instance"):
        search(mixed, estimator, Objective(4096, SLA))
    assert search(dataclasses.replace(mixed, ranks_per_instance=8), estimator, Objective(4096, SLA))


def test_colocated_model_meets_deepseeks_profile(models, chips):
    gpus, context, requests, tgs = DEEPSEEK_PROFILE
    template = Deployment(
        model=models["deepseek-v3"],
        attention_chip=chips["h800"],
        ffn_chip=chips["h800"],
        topology=Topology(1, 1),
        kv_dtype=KvDtype.BF16,
    )
    model = ColocatedModel(template, Efficiency())
    assert requests / model.tpot(gpus, context, requests // 2, micro_batches=2) == pytest.approx(tgs, rel=0.01)
    assert model.capacity(gpus, context) >= requests


def test_colocated_best_batch_equals_enumeration(models, chips):
    template = Deployment(
        model=models["step3"], attention_chip=chips["h800"], ffn_chip=chips["h800"], topology=Topology(1, 1)
    )
    model, objective = ColocatedModel(template, Efficiency()), Objective(8192, SLA)
    sizes = server_sizes(8, 64)
    expected = max(
        n * b / tpot
        for size in sizes
        for n in (1, 2)
        for b in range(1, model.capacity(size, 8192) // n + 1)
        if (tpot := model.tpot(size, 8192, b, n)) <= SLA
    )
    assert model.best(objective, sizes).tgs == pytest.approx(expected)
    assert model.best(Objective(8192, 1e-4), sizes) is None


def test_afd_pays_for_step3_from_2k_and_its_gain_is_the_product_of_its_factors(models, chips, estimator):
    advice = advise(space_of(models, chips), estimator, Objective(4096, SLA))
    comparison = advice.comparison
    assert comparison.gain > 1
    product = comparison.batch_ratio * comparison.attention_share * comparison.step_ratio
    assert comparison.gain == pytest.approx(product)
    assert comparison.gain == pytest.approx(advice.plans[0].tgs / advice.colocated.tgs)
    assert comparison.batch_ratio > comparison.break_even_batch_ratio
    assert comparison.break_even_context == 2048
    assert not comparison.curve[0].afd_ahead


def test_afd_does_not_pay_for_deepseek_at_4k_on_h800(models, chips, estimator):
    """Negative evidence is a valid result: 256 small experts are below the H800's minimum sparsity."""
    advice = advise(space_of(models, chips, model="deepseek-v3"), estimator, Objective(4096, SLA))
    assert advice.comparison.gain < 1
    assert advice.comparison.break_even_context == 8192
    assert advice.comparison.batch_ratio < advice.comparison.break_even_batch_ratio


def test_advice_without_a_plan_says_how_far_off(models, chips, estimator):
    advice = advise(space_of(models, chips), estimator, Objective(4096, 0.010))
    assert advice.plans == ()
    assert "holds 10 ms: the closest, 1A" in advice.reason
    nothing = advise(space_of(models, chips, ffn=("l4",), max_chips=16), estimator, Objective(4096, SLA))
    assert nothing.reason.endswith("holds the weights of step3 and a request of 4096 tokens")


def test_closed_form_ratio_is_near_the_searched_one(models, chips, estimator):
    for context, ratio in ((4096, 1), (8192, 2), (32768, 8)):
        h800 = chips["h800"]
        balanced = space_of(models, chips).deployment(h800, h800, Topology(2 * ratio, 2), 3)
        plan = estimator.best(balanced, Objective(context, SLA))
        assert closed_form_ratio(estimator, plan) == pytest.approx(ratio, rel=0.25)


def test_an_ffn_that_reads_its_weights_anyway_has_no_finite_ratio(models, chips, estimator):
    h800 = chips["h800"]
    tiny = space_of(models, chips, model="smollm2-135m-instruct", ranks_per_instance=1)
    plan = estimator.estimate(tiny.deployment(h800, h800, Topology(1, 1), 3), Objective(512, SLA), num_tokens=1)
    assert closed_form_ratio(estimator, plan) is None


@pytest.mark.parametrize("gbit", TCP_ROWS)
def test_rows_that_a_link_carries(gbit):
    rows = link_rows(gbit, hidden=7168, num_layers=61, streams=3, tpot_s=SLA)
    assert rows == pytest.approx(TCP_ROWS[gbit], abs=1 + 0.01 * TCP_ROWS[gbit])


def test_tcp_cannot_hold_the_plan_but_a_smaller_micro_batch_can(models, chips, estimator):
    plan = search(space_of(models, chips), estimator, Objective(4096, SLA))[0]
    by_rate = {fallback.gbit_per_s: fallback for fallback in tcp_fallback(plan, estimator)}
    assert not by_rate[10].holds
    assert not by_rate[100].holds
    assert by_rate[400].holds
    assert 0 < by_rate[10].micro_batch < by_rate[25].micro_batch < by_rate[100].micro_batch < plan.micro_batch
    for rate, fallback in by_rate.items():
        rows_per_link = fallback.micro_batch / plan.deployment.ranks_per_instance
        in_series = link_rows(rate, 7168, 61, 3, SLA)  # 3 bytes an element; the way back, 2 of them, is what binds
        assert rows_per_link <= 1.5 * in_series + 1

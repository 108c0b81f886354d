"""Two kinds of chips in one role: what each of them does, and that the search finds what they are good for."""

import dataclasses
import itertools

import pytest

from afd.errors import ConfigError
from afd.plan.accuracy import accuracy_of
from afd.plan.advice import advise, describe
from afd.plan.catalog import load_chips, load_models
from afd.plan.chips import with_network
from afd.plan.deploy import deploy_of
from afd.plan.deployment import Deployment, Part
from afd.plan.efficiency import Efficiency
from afd.plan.estimate import Estimator, Objective
from afd.plan.memory import ffn_memory, max_requests
from afd.plan.mixed import MixedSearch, parse_counts
from afd.plan.search import SearchSpace, search
from afd.plan.stages import RooflineStages, attention_time, ffn_time, transfer_times
from afd.plan.tcp import tcp_fallback
from afd.plan.text import advice_text
from afd.types import Topology

MODELS, CHIPS = load_models(), load_chips()
STAGES = RooflineStages(Efficiency())
ESTIMATOR = Estimator(STAGES, Efficiency())
OBJECTIVE = Objective(8192, 0.05)


def space(h20=24, h800=16, **changes):
    chips = [CHIPS["h20"], CHIPS["h800"]]
    return SearchSpace(
        model=MODELS["step3"],
        attention_chips=chips,
        ffn_chips=chips,
        max_chips=h20 + h800,
        inventory={"h20": h20, "h800": h800},
        streams=(3,),
        **changes,
    )


def step3(topology, attention="h800", ffn="h800", **changes):
    return Deployment(
        model=MODELS["step3"],
        attention_chip=CHIPS[attention],
        ffn_chip=CHIPS[ffn],
        topology=Topology.parse(topology),
        **changes,
    )


def mixed(attention, ffn):
    return MixedSearch(space(40, 40), ESTIMATOR, OBJECTIVE).best(attention, ffn, (3,))


def test_a_mix_of_a_chip_with_itself_is_that_chip():
    plain = step3("4A2F")
    same = step3("4A2F", attention_more=(Part(CHIPS["h800"], 1),), ffn_more=(Part(CHIPS["h800"], 1),))
    assert STAGES.times(same, 8192, 40) == STAGES.times(plain, 8192, 40)
    assert max_requests(same, Efficiency(), 8192) == max_requests(plain, Efficiency(), 8192)
    assert (same.chips, same.usd_per_hour) == ({"h800": 48}, plain.usd_per_hour)
    assert ESTIMATOR.best(same, OBJECTIVE).tgs == pytest.approx(ESTIMATOR.best(plain, OBJECTIVE).tgs)


def test_attention_of_two_kinds_by_hand():
    """4 x H20 + 1 x H800, 49 tokens a chip in the mean: as many on the H800 as make it take as long as the others.

    H20: 8192 x 65,536 FLOP at 0.65 x 296 TFLOP/s, 2.79 us a token; projections 1.76 us a token. H800: 8192 x 512 B at
    0.57 x 3.35 TB/s, 2.20 us a token; projections 78 us. So 46 and 60 (4 x 46 + 60 = 5 x 49): 210 us both, and 35.
    """
    plan = mixed((("h20", 4), ("h800", 1)), (("h800", 2),))
    deployment = plan.deployment
    loads = {part.chip.name: part.load for part in deployment.attention_parts}
    assert (4 * loads["h20"] + loads["h800"]) / 5 == pytest.approx(1.0)
    times = [
        attention_time(view, Efficiency(), 8192, plan.num_tokens * load) for view, load in deployment.attention_views()
    ]
    assert times[0] == pytest.approx(times[1], rel=0.04)
    assert plan.stage.attention_s == max(times)
    by_hand_s = [46 * (2.79e-6 + 1.76e-6) + 35e-6, 60 * 2.20e-6 + 78e-6 + 35e-6]
    assert by_hand_s == pytest.approx(times, rel=0.02)
    assert [round(loads[name] * plan.num_tokens) for name in ("h20", "h800")] == [46, 60]
    assert plan.batch == plan.num_tokens * 40 * 3
    assert deployment.chips == {"h20": 32, "h800": 24}
    assert deployment.usd_per_hour == pytest.approx(32 * 0.8 + 24 * 2.0)


def test_ffn_of_two_kinds_by_hand():
    """1 x H20 + 1 x H800 by peak: 296 against 1980 TFLOP/s, so 13 % and 87 % of what every token uses, and of 48
    experts 7 (6.24 rounded up) and 42."""
    shapes = MixedSearch(space(40, 40), ESTIMATOR, OBJECTIVE).shapes((("h20", 4),), (("h20", 1), ("h800", 1)), 3)
    by_peak = min(shapes, key=lambda shape: shape.ffn_parts[0].load)
    loads = {part.chip.name: part.load for part in by_peak.ffn_parts}
    assert loads["h800"] / 2 == pytest.approx(1980 / (1980 + 296))
    assert [by_peak.fullest_share(48, load) * 48 for load in (loads["h20"], loads["h800"])] == [7, 42]
    memory = ffn_memory(*((view, Efficiency(), load) for view, load in by_peak.ffn_views() if load < 1).__next__())
    shared = 56 * 3 * 7168 * 5120 + 5 * 3 * 7168 * 18432
    by_hand = 56 * 7 / 8 * 3 * 7168 * 5120 + shared * 296 / (1980 + 296) / 8
    assert memory.weight_bytes == pytest.approx(by_hand)
    slowest = max(ffn_time(view, Efficiency(), 40, load) for view, load in by_peak.ffn_views())
    assert STAGES.times(by_peak, 8192, 40).ffn_s == slowest


def test_links_carry_what_each_kind_sends():
    """An attention chip with 1.5 times the mean's requests sends 1.5 times the rows."""
    point = step3("2A1F", attention_more=(Part(CHIPS["h800"], 1, 1.5),))
    _, back_s = transfer_times(point, Efficiency(), 40)
    assert back_s == pytest.approx(5e-6 + 40 * 2 * 2 * 7168 / (0.8 * 50e9)), "the FFN's end, two instances' rows"
    _, back_s = transfer_times(dataclasses.replace(point, topology=Topology(2, 2)), Efficiency(), 40)
    assert back_s == pytest.approx(5e-6 + 1.5 * 40 * 2 * 2 * 7168 / (0.8 * 50e9))


def test_memory_is_that_of_the_kind_that_is_full_first():
    uneven = step3("2A2F", attention_more=(Part(CHIPS["h800"], 1, 1.5),))
    assert max_requests(uneven, Efficiency(), 8192) == int(max_requests(step3("2A2F"), Efficiency(), 8192) / 1.5)
    with pytest.raises(ConfigError, match="attention instances of each kind"):
        step3("2A2F", attention_more=(Part(CHIPS["h20"], 2),))
    with pytest.raises(ConfigError, match="FFN instances of each kind"):
        step3("2A2F", ffn_more=(Part(CHIPS["h20"], 1, 2.5),))


def test_the_search_finds_what_enumeration_finds():
    mine = space()
    every = MixedSearch(mine, ESTIMATOR, OBJECTIVE)
    pure = search(mine, ESTIMATOR, OBJECTIVE)
    best = max(mine.tokens_per_s(plan) for plan in (*pure, *every.plans(pure)))
    enumerated = 0.0
    for a20, a800, f20, f800 in itertools.product(range(4), range(3), range(4), range(3)):
        if a20 + f20 <= 3 and a800 + f800 <= 2 and a20 + a800 and f20 + f800:
            sides = [tuple((n, c) for n, c in (("h20", x), ("h800", y)) if c) for x, y in ((a20, a800), (f20, f800))]
            plan = every.best(*sides, (3,))
            enumerated = max(enumerated, 0.0 if plan is None else mine.tokens_per_s(plan))
    assert best == pytest.approx(enumerated, rel=0.01)
    assert best >= mine.tokens_per_s(pure[0])


def test_five_h20_and_three_h800_servers_serve_more_when_one_h800_attends():
    """The third H800 server is idle in 5A2F, and attends in 6A2F: 127.3 against 112.2 thousand tokens a second."""
    pure = ESTIMATOR.best(step3("5A2F", "h20"), OBJECTIVE)
    both = mixed((("h20", 5), ("h800", 1)), (("h800", 2),))
    assert both.deployment.num_chips * both.tgs > 1.1 * pure.deployment.num_chips * pure.tgs
    bar = accuracy_of(both)
    assert bar.low_tgs < both.tgs < bar.high_tgs
    assert "H20 and H800" in bar.reason
    assert describe(both.deployment) == "6A2F (A on 5 x H20 + 1 x H800, F on H800, 64 chips)"
    obstacles = deploy_of(both, ESTIMATOR, "step3").obstacles
    assert any("several kinds of chips" in line and "--attention h20 --ffn h800" in line for line in obstacles)
    rates = [fallback.tpot_ms for fallback in tcp_fallback(both, ESTIMATOR)]
    assert rates == sorted(rates, reverse=True)
    assert rates[0] > 1.5 * rates[2], "the links of every kind are slower"


def test_without_a_second_kind_nothing_is_mixed():
    one = dataclasses.replace(space(), inventory={"h20": 24}, attention_chips=[CHIPS["h20"]], ffn_chips=[CHIPS["h20"]])
    assert MixedSearch(one, ESTIMATOR, OBJECTIVE).plans(search(one, ESTIMATOR, OBJECTIVE)) == []
    assert not any(p.deployment.mixed for p in advise(one, ESTIMATOR, OBJECTIVE).plans)


def test_counts_of_instances():
    assert parse_counts(["h20:4", "h800:1"], "--attention") == {"h20": 4, "h800": 1}
    assert parse_counts(["h20", "h800"], "--attention") == {}
    for names in (["h20:4", "h800"], ["h20:0"], ["h20:x"], ["h20:1", "h20:2"]):
        with pytest.raises(ConfigError, match=r"--ffn .*expected instances of each kind"):
            parse_counts(names, "--ffn")


def test_a_mix_serves_no_more_at_longer_contexts_nor_behind_slower_links():
    def best(context, gbit):
        slow = with_network({name: CHIPS[name] for name in ("h20", "h800")}, str(gbit))
        mine = dataclasses.replace(space(40, 40), attention_chips=list(slow.values()), ffn_chips=list(slow.values()))
        search_here = MixedSearch(mine, ESTIMATOR, Objective(context, 0.05))
        found = search_here.best((("h20", 4), ("h800", 1)), (("h20", 1), ("h800", 1)), (3,))
        return 0.0 if found is None else found.tgs

    for rates in (
        [best(context, 400) for context in (2048, 8192, 32768)],
        [best(8192, gbit) for gbit in (400, 50, 10)],
    ):
        assert rates == sorted(rates, reverse=True)
        assert rates[0] > rates[-1] > 0.0


def test_what_can_be_started_today_has_one_kind_of_chips_a_role():
    advice = advise(space(16, 16, ranks_per_instance=1), ESTIMATOR, OBJECTIVE)
    (mix,) = [plan for plan in advice.plans if plan.deployment.mixed][:1]
    assert advice.today
    assert not any(plan.deployment.mixed for plan in advice.today)
    for first, start in (
        (advice.plans[0], "instances of one chip, as `afd up` and the chart start them today:"),
        (mix, "runs today (instances of one chip): "),
    ):
        asked = dataclasses.replace(advice, plans=(first,), copies=1)
        assert advice_text(asked, ESTIMATOR, "step3", 1).startswith(start)

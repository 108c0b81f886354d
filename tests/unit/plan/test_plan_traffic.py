"""Requests a second and their lengths: prefill beside decodes, on a pool, and how many of what they take."""

import dataclasses
import math

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from afd.errors import ConfigError
from afd.plan.catalog import load_chips, load_models
from afd.plan.colocated import ColocatedModel
from afd.plan.deployment import Deployment, KvDtype
from afd.plan.drafts import Drafts
from afd.plan.efficiency import Efficiency
from afd.plan.estimate import Estimator, Objective
from afd.plan.prefill import PrefillUnit, prefill_units
from afd.plan.request_rate import BatchLimits, RequestShape, served_rate
from afd.plan.search import SearchSpace, search
from afd.plan.stages import RooflineStages
from afd.plan.tensor_parallel import TensorParallelModel
from afd.plan.traffic import Traffic, serve
from afd.plan.waiting import waiting
from afd.types import Topology

MODELS, CHIPS = load_models(), load_chips()
STAGES = RooflineStages(Efficiency())
ESTIMATOR = Estimator(STAGES, Efficiency())
REQUESTS = RequestShape(2000, 500)
OBJECTIVE = Objective(REQUESTS.context, 0.05, requests=REQUESTS)


def step3(shape="1A2F", model="step3", chip="h800", **changes):
    return Deployment(
        model=MODELS[model],
        attention_chip=CHIPS[chip],
        ffn_chip=CHIPS[chip],
        topology=Topology.parse(shape),
        **changes,
    )


def space(names=("h800",), max_chips=32, **changes):
    chips = [CHIPS[name] for name in names]
    return SearchSpace(
        model=MODELS["step3"], attention_chips=chips, ffn_chips=chips, max_chips=max_chips, streams=(3,), **changes
    )


def served(mine, rate=0.0, ttft_s=5.0, utilisation=0.8, requests=REQUESTS, **changes):
    objective = dataclasses.replace(OBJECTIVE, context=requests.context, requests=requests)
    plans = search(mine, ESTIMATOR, objective)
    single = [ESTIMATOR.best(step3("12A12F", ranks_per_instance=1), objective)]
    return serve(mine, ESTIMATOR, objective, Traffic(requests, rate, ttft_s, utilisation), plans, single)


def test_every_decode_brings_the_prompt_rows_that_keep_up_with_it():
    """Answers of 500 tokens are 499 decodes: 2000 / 499 = 4.008 rows each; 59 decodes of a chip come with 236 rows."""
    plan = ESTIMATOR.best(step3(), OBJECTIVE)
    assert plan.prefill.num_tokens == pytest.approx(plan.num_tokens * 2000 / 499)
    assert plan.requests_per_s == pytest.approx(plan.batch / 499 / plan.tpot_s)
    prompt_rows_per_s = plan.prefill.num_tokens * 8 * 3 / plan.step_s
    assert prompt_rows_per_s == pytest.approx(2000 * plan.requests_per_s)


def test_stages_of_a_mixed_step_by_hand():
    """1A2F, 59 decodes and 236.5 prompt rows a chip: the FFN sees 8 x 295.5 rows, 3 of 48 experts each.

    56 layers read 24 experts of 3 x 7168 x 5120, half of the shared one, and 5 dense layers half of 3 x 7168 x 18432:
    19.01 GB a rank in 8ths at 3.35 TB/s x 0.65, over 61 layers 143 us; 8 x 295.5 rows x 53.3 GFLOP / 16 chips at
    1.98 PFLOP/s x 0.65 over 61 layers are 100 us, so reading binds; launch 35 us; collectives 0.3 x 3 x 8 x 295.5 x
    7168 x 7 / 8 bytes at 160 GB/s, 83 us.
    """
    plan = ESTIMATOR.best(step3(), OBJECTIVE)
    rows = plan.num_tokens * (1 + 2000 / 499)
    read_s = (56 * (24 + 0.5) * 3 * 7168 * 5120 + 5 * 0.5 * 3 * 7168 * 18432) / 8 / 3.35e12 / 0.65 / 61
    flop = 56 * (3 + 1) * 3 * 7168 * 5120 + 5 * 3 * 7168 * 18432
    computed_s = 2 * rows * 8 * flop / 16 / 1.98e15 / 0.65 / 61
    gather_s = rows * 8 * 7168 * 7 / 8 / (0.8 * 200e9)
    assert plan.stage.ffn_s == pytest.approx(max(read_s, computed_s) + 35e-6 + 0.3 * 3 * gather_s, rel=1e-3)
    back_s = 5e-6 + rows * 2 * 2 * 7168 / (0.8 * 50e9)
    assert plan.stage.to_attention_s == pytest.approx(back_s)


def test_the_rate_equals_that_of_the_simulators_forecast():
    for shape in ("1A2F", "2A2F", "4A2F"):
        plan = ESTIMATOR.best(step3(shape), OBJECTIVE)
        forecast = served_rate(STAGES, Efficiency(), step3(shape), REQUESTS, BatchLimits(1e6, 1e3), 0.05)
        assert plan.requests_per_s == pytest.approx(forecast.rate, rel=0.03)


def test_lanes_serve_prompts_as_fast_as_answers_leave():
    """A prompt's chunk is what the decodes of an instance and stream bring; more than a prompt is several prompts."""
    for shape in (REQUESTS, RequestShape(100, 20), RequestShape(4000, 4000)):
        plan = ESTIMATOR.best(step3(), dataclasses.replace(OBJECTIVE, requests=shape))
        assert plan.lanes / plan.prompt_s == pytest.approx(plan.requests_per_s)
        assert plan.prompt_s >= plan.step_s
        assert plan.lanes >= 3


@pytest.mark.parametrize("kind", ["expert", "tensor"])
def test_colocated_layouts_prefill_in_their_steps_too(kind):
    template = step3("1A1F")
    with_prompts, without = (
        ColocatedModel(template, Efficiency(), 1, requests).best(OBJECTIVE, [32])
        if kind == "expert"
        else TensorParallelModel(template, Efficiency(), 1, requests).best(OBJECTIVE)
        for requests in (REQUESTS, None)
    )
    assert with_prompts.tgs < without.tgs
    rate = with_prompts.batch / 499 / with_prompts.tpot_s
    assert with_prompts.lanes / with_prompts.prompt_s == pytest.approx(rate)
    assert (without.lanes, without.prompt_s) == (0.0, 0.0)


def test_drafts_bring_more_prompts():
    point = step3("2A2F", "deepseek-v3", drafts=Drafts.of(1, (0.8,)))
    plan = ESTIMATOR.estimate(point, OBJECTIVE, 16)
    assert plan.prefill.num_tokens == pytest.approx(16 * 1.8 * 2000 / 499)
    assert plan.lanes / plan.prompt_s == pytest.approx(plan.requests_per_s)


def test_waiting_by_hand():
    """M/D/1 at load 0.8, 100 ms: 0.8 / (2 x 0.2) x 100 ms = 200 ms, and e^-x tails; ten servers hardly wait."""
    one = waiting(8.0, 0.1, 1)
    assert one.mean_s == pytest.approx(0.2)
    assert one.p99_s == pytest.approx(math.log(80) * 0.25)
    ten = waiting(80.0, 0.1, 10)
    assert ten.mean_s == pytest.approx(0.8 ** (math.sqrt(22) - 1) * 0.1 / (2 * 10 * 0.2))
    assert waiting(0.0, 0.1, 3).p99_s == 0.0
    assert waiting(30.0, 0.1, 3).mean_s == math.inf


@settings(max_examples=50, derandomize=True, deadline=None)
@given(load=st.floats(0.01, 0.95), more=st.floats(0.0, 0.04), servers=st.integers(1, 500))
def test_waits_grow_with_load_and_shrink_with_servers(load, more, servers):
    here = waiting(load * servers, 1.0, servers)
    assert waiting((load + more) * servers, 1.0, servers).mean_s >= here.mean_s
    assert waiting(2 * load * servers, 1.0, 2 * servers).mean_s <= here.mean_s
    assert here.p99_s >= here.mean_s or here.p99_s == 0.0 or load < 0.5


def test_a_prefill_pass_by_hand():
    """Step-3, 8 prompts of 2000 tokens on 8 H800: 2000 rows a chip, half at a time.

    38.1 G weights a row, 2 FLOP each, at 1.98 PFLOP/s x 0.65; the core sees 1000 keys x 65,536 FLOP x 61 layers at the
    same; launches 2 x 35 us a layer; each dense layer's gather and scatter; all x 1.28 x 1.036.
    """
    unit = PrefillUnit(step3("1A1F"), Efficiency(), 8, 8, 2000)
    model = MODELS["step3"]
    flops = 2 * (model.linear_weights + model.ffn_active_weights) + 61 * 1000 * 4 * 64 * 256
    computing_s = 2000 * flops / 1.98e15 / 0.65
    dense_s = 5 * 0.3 * 3 * (8 * 2000 * 7168 * 7 / 8 / (0.8 * 200e9))
    moved_s = 56 * 2000 * 3 * (7168 + 4 * 56 + 8 * 3 + 2 * 7168) * 7 / 8 / (0.8 * 200e9)
    compute_s = computing_s + dense_s + 61 * 2 * 2 * 35e-6
    assert moved_s < compute_s, "the interconnect hides"
    assert unit.pass_s == pytest.approx(compute_s * 1.28 * 1.036, rel=0.02)
    assert unit.tokens_per_s == pytest.approx(8 * 2000 / unit.pass_s / 8)


@pytest.mark.parametrize("published", [62_713, 59_337])
def test_prefill_of_deepseek_v3_is_near_what_was_published(published):
    """Tokens a second of an 8-GPU server, 4K prompts, EP32: DeepSeek's profile on H800; SGLang on H100, balanced."""
    template = step3("1A1F", "deepseek-v3")
    unit = PrefillUnit(template, Efficiency(), 32, 128, 4096)
    assert unit.fits()
    assert 8 * unit.tokens_per_s == pytest.approx(published, rel=0.20)


def test_pools_have_units_that_hold_the_model():
    sizes = {unit.num_chips for unit in prefill_units(step3("1A1F", "deepseek-v3"), Efficiency(), 4096, 64)}
    assert sizes == {16, 32, 64}, "8 H800 do not hold 671 GB"
    assert {unit.num_chips for unit in prefill_units(step3("1A1F"), Efficiency(), 4096, 16)} == {8, 16}
    passes = list(prefill_units(step3("1A1F"), Efficiency(), 4096, 8))
    assert [u.tokens_per_s for u in passes] == sorted(u.tokens_per_s for u in passes), "larger passes serve more"
    assert [u.pass_s for u in passes] == sorted(u.pass_s for u in passes)


def test_mla_prefills_at_full_width_in_a_pool():
    """128 heads x 2 x (128 + 64 + 128) FLOP a key instead of 4 x 128 x 576."""
    (group,) = MODELS["deepseek-v3"].attention
    assert group.prefill_flops(4096) == group.layers * 2048 * 128 * 2 * 320
    assert group.core_flops(2048) == group.layers * 2048 * 128 * 4 * 576


def test_windows_bound_what_a_prompts_rows_see():
    """A window of 100 in a prompt of 1000: 99 rows see fewer, (100 x 50 + 900 x 100) / 1000 = 95 on average."""
    group = msgspec.structs.replace(MODELS["qwen3-32b"].attention[0], window=100, layers=1)
    assert group.prefill_flops(1000) == pytest.approx(95 * group.flops_per_key)
    assert group.prefill_flops(60) == 30 * group.flops_per_key


def test_500_requests_a_second_by_hand():
    """Copies: 500 over 0.8 x what a full batch answers; units of a pool: 500 passes' share over 0.8."""
    answer = served(space(), rate=500.0)
    assert answer.enough
    assert {fleet.way for fleet in answer.ways} == {
        "AFD", "AFD + prefill pool", "colocated", "colocated + prefill pool",
    }  # fmt: skip
    assert [fleet.cost for fleet in answer.ways] == sorted(fleet.cost for fleet in answer.ways)
    for fleet in (*answer.ways, answer.today):
        decode = fleet.decode
        one = decode.batch / 499 / decode.tpot_s
        assert fleet.copies == math.ceil(500 / (0.8 * one))
        assert fleet.rate == 500 <= fleet.max_rate
        assert fleet.ttft_s <= fleet.ttft_p99_s <= 5.0
        assert 0.0 < fleet.prefill_share < 1.0
        assert fleet.usd_per_hour == pytest.approx(2.0 * fleet.num_chips)
        if fleet.pool is not None:
            assert fleet.units == math.ceil(500 * fleet.pool.pass_s / fleet.pool.num_prompts / 0.8)
            assert fleet.num_chips == fleet.copies * sum(decode.chips.values()) + fleet.units * fleet.pool.num_chips
    assert answer.today.decode.deployment.ranks_per_instance == 1


def test_ttft_of_both_ways_by_hand():
    answer = served(space(), rate=200.0)
    by_way = {fleet.way: fleet for fleet in answer.ways}
    inside = by_way["AFD"]
    plan, copies = inside.decode, inside.copies
    queue = waiting(200.0, plan.prompt_s, copies * plan.lanes)
    steps = math.ceil(2000 / (plan.prefill.num_tokens * 8))
    assert inside.ttft_s == pytest.approx(queue.mean_s + (0.5 + steps) * plan.step_s)
    assert plan.ttft_s == pytest.approx((0.5 + steps) * plan.step_s)
    beside = by_way["AFD + prefill pool"]
    cache_s = 61 * 512 * 2000 / (0.8 * 50e9)
    queue = waiting(200.0 / beside.pool.num_prompts, beside.pool.pass_s, beside.units)
    assert beside.ttft_s == pytest.approx(queue.mean_s + beside.pool.pass_s + cache_s)


def test_a_tighter_ttft_takes_smaller_passes_or_more_chips_and_ends_in_no():
    loose, tight = (served(space(), rate=200.0, ttft_s=ttft_s) for ttft_s in (5.0, 0.3))
    by_way = {fleet.way: fleet for fleet in tight.ways}
    for fleet in loose.ways:
        if fleet.way in by_way:
            assert by_way[fleet.way].ttft_p99_s <= 0.3
            assert by_way[fleet.way].cost >= 0.99 * fleet.cost
    assert "AFD + prefill pool" in by_way
    never = served(space(), rate=200.0, ttft_s=0.001)
    assert (never.ways, never.enough) == ((), False)


def test_an_inventory_serves_what_it_can_and_says_when_that_is_less():
    mine = space(("h20", "h800"), max_chips=32, inventory={"h20": 16, "h800": 16})
    most = served(mine)
    assert most.enough
    for fleet in most.ways:
        assert fleet.chips.get("h20", 0) <= 16
        assert fleet.chips.get("h800", 0) <= 16
        assert fleet.rate == fleet.max_rate
    assert [fleet.max_rate for fleet in most.ways] == sorted((f.max_rate for f in most.ways), reverse=True)
    short = served(mine, rate=2 * most.ways[0].max_rate)
    assert not short.enough
    assert short.ways[0].max_rate == pytest.approx(most.ways[0].max_rate)


@settings(max_examples=40, derandomize=True, deadline=None)
@given(
    name=st.sampled_from(["step3", "deepseek-v3", "qwen3-235b-a22b", "step3.5-flash"]),
    chips=st.tuples(*[st.sampled_from(["h800", "h20", "a800", "b200"])] * 2),
    shape=st.tuples(st.integers(1, 8), st.integers(1, 4)),
    streams=st.integers(1, 4),
    prompt=st.integers(1, 20_000),
    output=st.integers(2, 4_000),
    longer=st.integers(1, 10_000),
    slower=st.floats(0.1, 1.0),
    part=st.sampled_from(["network_gbit_per_s", "memory_gb_per_s", "interconnect_gb_per_s", "bf16_tflops"]),
)
def test_served_requests_never_rise_with_longer_prompts_nor_with_slower_chips(
    name, chips, shape, streams, prompt, output, longer, slower, part
):
    def rate(prompt, factor):
        slow = [msgspec.structs.replace(CHIPS[c], **{part: getattr(CHIPS[c], part) * factor}) for c in chips]
        point = Deployment(
            model=MODELS[name],
            attention_chip=slow[0],
            ffn_chip=slow[1],
            topology=Topology(*shape),
            streams=streams,
            kv_dtype=KvDtype.FP8,
        )
        requests = RequestShape(prompt, output)
        found = ESTIMATOR.best(point, Objective(requests.context, 0.1, requests=requests))
        return 0.0 if found is None else found.requests_per_s

    here = rate(prompt, 1.0)
    assert rate(prompt + longer, 1.0) <= here * 1.02  # whole tokens of a batch
    assert rate(prompt, slower) <= here * (1 + 1e-9)


def test_impossible_requests():
    with pytest.raises(ConfigError, match="65800 is past the limit of step3"):
        search(space(), ESTIMATOR, dataclasses.replace(OBJECTIVE, requests=RequestShape(65_000, 800)))

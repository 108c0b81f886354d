"""Stage times: against the report's measured attention layers, its communication budget, and plain arithmetic."""

import math

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from afd.errors import ConfigError
from afd.plan.catalog import load_chips, load_models
from afd.plan.deployment import Deployment, Dispatch, KvDtype
from afd.plan.efficiency import Efficiency
from afd.plan.memory import attention_memory, ffn_memory, max_requests, require_weights_fit
from afd.plan.stages import (
    RooflineStages,
    attention_time,
    collective_times,
    core_time,
    dispatch_row_bytes,
    ffn_time,
    gemm_time,
    transfer_times,
)
from afd.types import Topology
from tests.unit.plan.report_tables import COMBINE_BYTES, DISPATCH_BYTES, TABLE_9

PEAK = Efficiency(
    core_16bit=1, core_8bit=1, core_flops=1, gemm=1, network=1, interconnect=1, collective_exposed=0,
    launch_s=0, wire_s=0, jitter=0,
)  # fmt: skip

MODELS, CHIPS = load_models(), load_chips()


def step3(topology="2A2F", **changes):
    defaults = {"model": MODELS["step3"], "attention_chip": CHIPS["h800"], "ffn_chip": CHIPS["h800"]}
    return Deployment(**{**defaults, "topology": Topology.parse(topology), **changes})


def attention_layer(model, chip, context, efficiency):
    """Table 9's set-up: 16-bit KV; GQA over four chips, the others 64 requests a chip."""
    group, layers = model.attention[0], model.num_layers
    core_s = core_time(chip, efficiency, group, context, 64, kv_bytes=2.0)  # a quarter of the heads of 256 requests
    shards, tokens = (4, 256) if model.name.startswith("qwen3") else (1, 64)
    linear_s = gemm_time(chip, efficiency, model.linear_weights / shards, tokens * model.linear_flops / shards)
    return (core_s + linear_s) / layers + efficiency.launch_s


@pytest.mark.parametrize(("name", "context"), TABLE_9)
def test_table_9_on_h800_within_7_percent(name, context):
    measured_us = TABLE_9[name, context][0]
    ours = attention_layer(MODELS[name], CHIPS["h800"], context, Efficiency())
    assert ours * 1e6 == pytest.approx(measured_us, rel=0.07)


@pytest.mark.parametrize(("name", "context"), TABLE_9)
def test_table_9_on_a800_and_mfa_on_h20_within_20_percent(name, context):
    _, h20_us, a800_us = TABLE_9[name, context]
    if a800_us is not None:
        ours = attention_layer(MODELS[name], CHIPS["a800"], context, Efficiency())
        assert ours * 1e6 == pytest.approx(a800_us, rel=0.20)
    if name == "step3":
        ours = attention_layer(MODELS[name], CHIPS["h20"], context, Efficiency())
        assert ours * 1e6 == pytest.approx(h20_us, rel=0.20)


@pytest.mark.parametrize(
    ("name", "context", "low", "high"),
    [
        # The H20 reaches 84 % of its small compute peak on MLA but 36 % of its bandwidth on GQA: no factor fits both.
        ("deepseek-v3", 8192, 1.3, 1.5),
        ("deepseek-v3", 32768, 1.3, 1.5),
        ("qwen3-235b-a22b", 8192, 0.4, 0.5),
        ("qwen3-235b-a22b", 32768, 0.4, 0.5),
    ],
)
def test_table_9_known_outliers_on_h20(name, context, low, high):
    ours = attention_layer(MODELS[name], CHIPS["h20"], context, Efficiency()) * 1e6
    assert low < ours / TABLE_9[name, context][1] < high


@pytest.mark.parametrize(
    ("name", "context", "chip", "roofline_us"),
    [
        ("step3", 8192, "h800", 211),
        ("step3", 8192, "h20", 305),
        ("deepseek-v3", 8192, "h800", 236),
        ("qwen3-235b-a22b", 8192, "h800", 326),
        ("step3", 32768, "a800", 1158),
        ("qwen3-235b-a22b", 32768, "h800", 1287),
    ],
)
def test_rooflines_at_full_efficiency(name, context, chip, roofline_us):
    ours = attention_layer(MODELS[name], CHIPS[chip], context, PEAK)
    assert ours * 1e6 == pytest.approx(roofline_us, rel=0.02)


def test_stage_rooflines_of_2a2f():
    """80 us of KV and 51 us of projections on A; 94 us of weights on F (101 us in a MoE layer, dense ones are less)."""
    deployment = step3(kv_dtype=KvDtype.FP8)
    combine_s = 128 * 2 * 7168 * 4 / 3.35e12
    assert attention_time(deployment, PEAK, 4096, 128) - combine_s == pytest.approx(131e-6, rel=0.01)
    assert ffn_time(deployment, PEAK, 128) == pytest.approx(128.4e-6, rel=0.01)  # scatter over 200 GB/s NVLink
    fast = Efficiency(**{**{f: getattr(PEAK, f) for f in Efficiency.__struct_fields__}, "interconnect": 1.0})
    gather_s, scatter_s = collective_times(deployment, fast, 2048)
    assert (gather_s, scatter_s) == pytest.approx((64.2e-6, 128.4e-6), rel=0.01)


def test_communication_budget_of_2a2f():
    """Rows only: 1.835 MB to an FFN GPU and 3.670 MB back, 37 and 73 us at 400 Gbit/s."""
    to_ffn_s, to_attention_s = transfer_times(step3(), PEAK, 128)
    rows = 7168 / dispatch_row_bytes(step3())
    assert to_ffn_s * 50e9 * rows == pytest.approx(DISPATCH_BYTES, rel=0.001)
    assert to_attention_s * 50e9 == pytest.approx(COMBINE_BYTES, rel=0.001)
    assert dispatch_row_bytes(step3()) == 7168 + 224 + 24


def test_the_busier_end_sets_the_transfer_time():
    more_a, more_f = step3("4A2F"), step3("2A4F")
    assert transfer_times(more_a, PEAK, 64) == transfer_times(more_f, PEAK, 64)
    slow = CHIPS["a800"]
    assert transfer_times(step3("2A2F", ffn_chip=slow), PEAK, 64)[0] == 2 * transfer_times(step3(), PEAK, 64)[0]


def test_16_bit_cache_reads_twice_and_computes_at_the_16_bit_peak():
    group, h800 = MODELS["deepseek-v3"].attention[0], CHIPS["h800"]
    assert core_time(h800, PEAK, group, 4096, 1, 2.0) == pytest.approx(
        max(2 * group.moved_bytes(4096, 1) / 3.35e12, group.core_flops(4096) / 9.89e14)
    )
    assert core_time(CHIPS["a800"], PEAK, group, 4096, 1, 1.0) == group.core_flops(4096) / 3.12e14


def test_16_bit_weights_read_and_compute_twice_as_long():
    h800 = CHIPS["h800"]
    assert gemm_time(h800, PEAK, 1e9, 1.0, 2.0) == 2 * gemm_time(h800, PEAK, 1e9, 1.0, 1.0)
    assert gemm_time(h800, PEAK, 1.0, 1e12, 2.0) == 1e12 / 9.89e14
    assert gemm_time(CHIPS["a800"], PEAK, 1.0, 1e12, 1.0) == 1e12 / 3.12e14


def test_few_tokens_touch_few_experts():
    one = step3("1A1F", ranks_per_instance=1)
    assert ffn_time(one, PEAK, 1) < 0.2 * ffn_time(one, PEAK, 200)


def test_sparse_dispatch_sends_what_hits():
    mixture = {"model": MODELS["qwen3-235b-a22b"], "attention_chip": CHIPS["h800"], "ffn_chip": CHIPS["h800"]}
    broadcast = Deployment(**mixture, topology=Topology(4, 4))
    sparse = Deployment(**mixture, topology=Topology(4, 4), dispatch=Dispatch.SPARSE)
    assert broadcast.sent_share() == 1.0
    all_elsewhere = math.prod((96 - i) / (128 - i) for i in range(8))  # 8 draws, none of this instance's 32 of 128
    assert sparse.sent_share() == pytest.approx(1 - all_elsewhere)
    every_row_s, _ = transfer_times(broadcast, PEAK, 64)
    assert transfer_times(sparse, PEAK, 64)[0] == pytest.approx(sparse.sent_share() * every_row_s)


def test_sparse_dispatch_with_uneven_experts_averages_over_instances():
    mixture = {"model": MODELS["qwen3-235b-a22b"], "attention_chip": CHIPS["h800"], "ffn_chip": CHIPS["h800"]}
    sparse = Deployment(**mixture, topology=Topology(3, 3), dispatch=Dispatch.SPARSE)
    assert 0.95 < sparse.sent_share() < 1.0


@pytest.mark.parametrize(("name", "why"), [("step3", "has a shared expert"), ("qwen3-32b", "is dense")])
def test_sparse_dispatch_is_refused_where_every_rank_needs_every_row(name, why):
    with pytest.raises(ConfigError, match=why):
        step3(model=MODELS[name], dispatch=Dispatch.SPARSE)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"streams": 5}, "streams must be 1 to 4"),
        ({"ranks_per_instance": 0}, "ranks per instance"),
        ({"topology": "mono"}, "mono"),
    ],
)
def test_impossible_deployments(changes, message):
    with pytest.raises(ConfigError, match=message):
        step3(**{"topology": "1A1F", **changes})


def test_context_limits():
    step3().check_context(65536)
    for context, message in ((65537, "past the limit of step3: 65536"), (0, "must be positive")):
        with pytest.raises(ConfigError, match=message):
            step3().check_context(context)


def test_memory_of_2a2f_at_4k():
    """The report's 384 resident requests a GPU: 49 GB of KV beside 10.3 GB of weights; 19 GB of experts on F."""
    use = attention_memory(step3(kv_dtype=KvDtype.FP8), Efficiency(), 4096, 384)
    assert use.kv_bytes == pytest.approx(49.1e9, rel=0.002)
    assert use.weight_bytes == pytest.approx(10.33e9 + 2 * 1.847e9 / 8, rel=0.001)
    assert use.free_bytes > 0
    assert ffn_memory(step3(), Efficiency()).weight_bytes == pytest.approx(19.0e9, rel=0.001)


def test_16_bit_kv_at_4k_holds_the_252_requests_that_the_report_ran():
    assert max_requests(step3("3A2F", kv_dtype=KvDtype.BF16), Efficiency(), 4096) // 3 == 84


def test_weights_that_do_not_fit_name_the_role():
    with pytest.raises(ConfigError, match=r"1A1F: .*ffn weights per L4"):
        require_weights_fit(step3("1A1F", ffn_chip=CHIPS["l4"]), Efficiency())
    small = msgspec.structs.replace(CHIPS["l4"], memory_gib=16)
    with pytest.raises(ConfigError, match=r"attention weights per L4"):
        require_weights_fit(step3("1A4F", attention_chip=small, model=MODELS["step3"].weighted("bf16")), Efficiency())
    assert max_requests(step3("1A1F", ffn_chip=CHIPS["l4"]), Efficiency(), 4096) == 0
    require_weights_fit(step3(), Efficiency())


@settings(max_examples=60, derandomize=True, deadline=None)
@given(
    name=st.sampled_from(sorted(MODELS)),
    shape=st.tuples(st.integers(1, 20), st.integers(1, 8)),
    tokens=st.integers(1, 512),
    context=st.integers(1, 32768),
)
def test_stage_times_never_fall_with_tokens_or_context(name, shape, tokens, context):
    stages = RooflineStages(Efficiency())
    deployment = step3("{}A{}F".format(*shape), model=MODELS[name])
    here = stages.times(deployment, context, tokens)
    more, longer = stages.times(deployment, context, tokens + 1), stages.times(deployment, context + 100, tokens)
    assert more.attention_s >= here.attention_s > 0
    assert more.ffn_s >= here.ffn_s > 0
    assert more.transfer_s > here.transfer_s
    assert longer.attention_s >= here.attention_s
    assert (longer.ffn_s, longer.transfer_s) == (here.ffn_s, here.transfer_s)

"""Chips that an operator has: inventories, networks, whole experts, what they do without AFD, and error bars."""

import dataclasses

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from afd.errors import ConfigError
from afd.plan.accuracy import accuracy_of
from afd.plan.advice import advise
from afd.plan.baselines import colocated_on, side_by_side
from afd.plan.catalog import load_chips, load_models
from afd.plan.chips import parse_inventory, with_network
from afd.plan.deployment import Deployment, KvDtype
from afd.plan.efficiency import Efficiency
from afd.plan.estimate import Estimator, Objective
from afd.plan.memory import ffn_memory
from afd.plan.search import SearchSpace, search
from afd.plan.stages import RooflineStages, ffn_time, transfer_times
from afd.plan.tensor_parallel import TensorParallelModel
from afd.types import Topology

MODELS, CHIPS = load_models(), load_chips()
ESTIMATOR = Estimator(RooflineStages(Efficiency()), Efficiency())
SLA = 0.050


def space(model="step3", names=("h20", "h800"), catalog=None, **changes):
    chips = [(catalog or CHIPS)[name] for name in names]
    return SearchSpace(model=MODELS[model], attention_chips=chips, ffn_chips=chips, **changes)


def step3(topology="2A2F", **changes):
    defaults = {"model": MODELS["step3"], "attention_chip": CHIPS["h800"], "ffn_chip": CHIPS["h800"]}
    return Deployment(**{**defaults, "topology": Topology.parse(topology), **changes})


def test_four_h20_and_two_h800_servers_at_8k():
    """The whole inventory: 4A2F, 32 H20 and 16 H800 chips, ahead of the same chips without AFD."""
    mine = space(max_chips=48, inventory={"h20": 32, "h800": 16})
    advice = advise(mine, ESTIMATOR, Objective(8192, SLA))
    best = advice.plans[0]
    assert (str(best.deployment.topology), best.deployment.attention_chip.name, best.deployment.ffn_chip.name) == (
        "4A2F",
        "h20",
        "h800",
    )
    assert advice.copies == 1
    assert best.deployment.usd_per_hour == pytest.approx(32 * 0.8 + 16 * 2.0)
    total = advice.all_chips.tokens_per_s
    assert total == pytest.approx(sum(n * c.num_chips * c.tgs for c, n in advice.all_chips.parts))
    assert {c.chip.name for c, _ in advice.all_chips.parts} == {"h20", "h800"}
    assert advice.inventory_gain == pytest.approx(48 * best.tgs / total)
    assert advice.inventory_gain > 1.3
    assert advice.today[0].deployment.ranks_per_instance == 1
    assert advice.today[0].tgs < best.tgs


def test_an_inventory_bounds_each_kind_and_counts_copies():
    mine = space(max_chips=40, inventory={"h20": 32, "h800": 8})
    plans = search(mine, ESTIMATOR, Objective(8192, SLA))
    for plan in plans:
        used = dict.fromkeys(("h20", "h800"), 0)
        used[plan.deployment.attention_chip.name] += plan.deployment.attention_ranks
        used[plan.deployment.ffn_chip.name] += plan.deployment.ffn_ranks
        copies = mine.copies(plan.deployment)
        assert copies >= 1
        assert copies * used["h20"] <= 32
        assert copies * used["h800"] <= 8
    totals = [mine.tokens_per_s(plan) for plan in plans]
    assert totals[0] >= max(totals) * 0.99


@pytest.mark.parametrize("text", ["h20", "h20:0", "h20:x", "h20:8,h20:8", "h99:8", "h20:8,"])
def test_bad_inventories(text):
    with pytest.raises(ConfigError, match=r"--inventory|unknown chip"):
        parse_inventory(text, CHIPS)


def test_inventories_too_small_for_any_topology():
    with pytest.raises(ConfigError, match="--inventory h20:8: the smallest topology, 1A1F, has 16"):
        search(space(names=("h20",), max_chips=8, inventory={"h20": 8}), ESTIMATOR, Objective(8192, SLA))


@pytest.mark.parametrize(("text", "gbit"), [("12.5", 12.5), ("100/server", 12.5), ("400/chip", 400.0)])
def test_a_network_for_all_chips(text, gbit):
    assert with_network(CHIPS, text)["h20"].network_gbit_per_s == gbit
    assert with_network(CHIPS, None) == CHIPS


@pytest.mark.parametrize("text", ["0", "-1", "fast", "nan", "100/rack", "inf"])
def test_bad_networks(text):
    with pytest.raises(ConfigError, match="--network-gbit"):
        with_network(CHIPS, text)


def test_100_gbit_ethernet_a_server_is_what_binds():
    """2A2F, n rows a rank: 2 x n x 2 x 7168 bytes back at 0.8 x 12.5 Gbit/s, 22.94 us a row and 5 us."""
    slow = with_network(CHIPS, "100/server")
    point = step3(attention_chip=slow["h20"], ffn_chip=slow["h800"])
    _, back_s = transfer_times(point, Efficiency(), 10)
    assert back_s == pytest.approx(5e-6 + 10 * 2 * 2 * 7168 / (0.8 * 12.5e9 / 8))
    mine = space(catalog=slow, max_chips=48, inventory={"h20": 32, "h800": 16})
    best = search(mine, ESTIMATOR, Objective(8192, SLA))[0]
    assert best.bound in ("network", "latency")
    three = ESTIMATOR.best(point, Objective(8192, SLA))  # 257 us back, in turn: 61 x 3 x 257 us is the whole step
    assert (three.bound, three.num_tokens) == ("network", 11)
    assert three.tgs == pytest.approx(11 * 16 * 3 / 32 / (61 * 3 * 257.3e-6 * 1.036), rel=0.01)
    at_1k, at_64k = (search(mine, ESTIMATOR, Objective(context, SLA))[0] for context in (1024, 65536))
    assert at_1k.tgs >= best.tgs >= at_64k.tgs


def test_20_ms_have_an_answer_with_the_depth_that_they_need():
    plans = search(space(names=("h800",), max_chips=128), ESTIMATOR, Objective(4096, 0.020))
    assert plans
    assert plans[0].deployment.streams == 2
    assert plans[0].tpot_s <= 0.020


def test_experts_are_whole():
    """48 experts over 11 instances: the fullest has 5, not 4.36. Weights of a rank: 56 x 5 x 3 x 7168 x 5120, and an
    eleventh of what every token uses."""
    eleven = step3("11A11F", ranks_per_instance=1)
    assert eleven.fullest_share(48) == 5 / 48
    shared = 56 * 3 * 7168 * 5120 + 5 * 3 * 7168 * 18432
    assert ffn_memory(eleven, Efficiency()).weight_bytes == pytest.approx(56 * 5 * 3 * 7168 * 5120 + shared / 11)
    assert ffn_time(step3("11A12F", ranks_per_instance=1), Efficiency(), 8) < ffn_time(eleven, Efficiency(), 8)
    assert step3("2A60F", ranks_per_instance=1).fullest_share(48) == 1 / 48


def test_a_crowded_expert_counts_where_the_ffn_computes():
    crowded = dataclasses.replace(RooflineStages(Efficiency()), efficiency=Efficiency(expert_imbalance=1.5))
    even = RooflineStages(Efficiency())
    point = step3("8A2F", model=MODELS["step3"])
    assert crowded.times(point, 4096, 400).ffn_s > even.times(point, 4096, 400).ffn_s
    assert crowded.times(point, 4096, 1).ffn_s == even.times(point, 4096, 1).ffn_s  # reading weights binds


def test_tensor_parallel_step_by_hand():
    """Qwen3-32B on 8 H800, 64 requests of 8K: caches and weights over 8, two all-reduces a layer, 35 us twice."""
    template = step3("1A1F", model=MODELS["qwen3-32b"], kv_dtype=KvDtype.BF16)
    cache_s = 64 * 64 * 8192 * 2048 * 2 / 8 / 3.35e12 / 0.90
    weights = 64 * (5120 * (64 + 16) * 128 + 64 * 128 * 5120) + 64 * 3 * 5120 * 25600
    gemm_s = max(weights / 8 / 3.35e12, 2 * 64 * weights / 8 / 1.98e15) / 0.65
    reduce_s = 64 * 2 * (2 * 7 / 8 * 64 * 2 * 5120 / (200e9 * 0.8) + 35e-6)
    head_s = 2 * 151936 * 5120 / 8 / 3.35e12 / 0.65
    by_hand = ((cache_s + gemm_s + reduce_s) * 1.28 + head_s) * 1.036
    assert TensorParallelModel(template, Efficiency()).tpot(8192, 64) == pytest.approx(by_hand, rel=0.01)


def test_one_latent_is_held_by_every_chip_of_a_server():
    """MLA under TP 8 gains no room; GQA with 8 heads gains eightfold."""
    shares = {name: [g.kv_shards for g in MODELS[name].attention] for name in ("deepseek-v3", "step3", "qwen3-32b")}
    assert shares == {"deepseek-v3": [1], "step3": [1], "qwen3-32b": [8]}


def test_pipeline_stages_make_room_for_weights_that_one_server_does_not_hold():
    template = step3("1A1F", model=MODELS["kimi-k2"])
    one, four = (TensorParallelModel(template, Efficiency(), stages) for stages in (1, 4))
    assert one.capacity(4096) == 0
    assert four.capacity(4096) > 0
    assert four.best(Objective(4096, 0.2)).layout == "TP8 x PP4"


def test_baselines_are_named_and_on_whole_servers():
    found = colocated_on(
        space(names=("h800",), max_chips=64, ranks_per_instance=1), ESTIMATOR, Objective(4096, SLA), CHIPS["h800"]
    )
    assert found[0].layout.startswith("EP")
    assert {c.layout[:2] for c in found} == {"EP", "TP"}
    assert all(c.num_chips % 8 == 0 and c.tpot_s <= SLA for c in found)
    assert side_by_side(space(max_chips=64), ESTIMATOR, Objective(4096, SLA)) is None  # without an inventory


def test_the_comparison_stays_on_one_chip_over_contexts():
    advice = advise(space(max_chips=48, inventory={"h20": 32, "h800": 16}), ESTIMATOR, Objective(8192, SLA))
    chip = advice.comparison.colocated.chip
    for point in advice.comparison.curve:
        expected = 0.8 if chip.name == "h20" else 2.0
        assert point.colocated_usd_per_mtok == pytest.approx(expected / 3600 / point.colocated_tgs * 1e6)


def test_the_verdict_says_what_the_other_cache_width_changes():
    advice = advise(space("deepseek-v3", names=("h800",), max_chips=128), ESTIMATOR, Objective(4096, SLA))
    width, gain = advice.other_kv
    assert width is KvDtype.BF16
    assert gain > advice.comparison.gain


def test_one_domain_of_72_chips_moves_rows_over_its_interconnect():
    """9 servers of 8 that NVLink joins: 900 GB/s a direction instead of a NIC's 50."""
    rack = msgspec.structs.replace(CHIPS["b200"], chips_per_domain=72)
    inside, outside = (step3(shape, attention_chip=rack, ffn_chip=rack) for shape in ("4A4F", "5A5F"))
    assert (inside.one_domain, outside.one_domain) == (True, False)
    _, back_s = transfer_times(inside, Efficiency(), 100)
    assert back_s == pytest.approx(5e-6 + 100 * 4 * 2 * 7168 / (0.8 * 900e9))


@pytest.mark.parametrize(
    ("model", "attention", "low", "high", "width"),
    [
        ("step3", "h800", 0.90, 1.12, 1.1),
        ("qwen3-235b-a22b", "h20", 0.4, 1.1, 1.9),  # Table 9: 2.1 to 2.4 times its roofline
        ("deepseek-v3", "b200", 0.6, 1.35, 1.1),  # nobody has published it
    ],
)
def test_error_bars_follow_what_was_measured(model, attention, low, high, width):
    point = Deployment(
        model=MODELS[model], attention_chip=CHIPS[attention], ffn_chip=CHIPS["h800"], topology=Topology(4, 2)
    )
    plan = ESTIMATOR.best(point, Objective(8192, 0.1))
    bar = accuracy_of(plan)
    assert low * plan.tgs <= bar.low_tgs <= plan.tgs <= bar.high_tgs <= high * plan.tgs
    assert bar.low_tpot_s <= plan.tpot_s <= bar.high_tpot_s
    assert bar.high_tgs > width * bar.low_tgs


@settings(max_examples=30, derandomize=True, deadline=None)
@given(num=st.integers(1, 40), experts=st.integers(1, 400))
def test_no_instance_holds_less_than_its_share(num, experts):
    share = step3(f"1A{num}F", ranks_per_instance=1).fullest_share(experts)
    assert 1 / num <= share * (1 + 1e-12)
    assert share <= max(2 / num, 1 / experts)


def test_a_gpu_and_its_host_are_judged_as_one_machine():
    """A CPU is not worth a GPU: the verdict is over the whole inventory, where the host alone is what there is without
    AFD."""
    tiny = {"chips_per_server": 1, "usd_per_hour": None, "network_gbit_per_s": 200.0, "interconnect_gb_per_s": 25.0}
    gpu = msgspec.structs.replace(
        CHIPS["l20"], name="gpu", bf16_tflops=165.0, fp8_tflops=330.0, memory_gib=24.0, memory_gb_per_s=1008.0, **tiny
    )
    host = msgspec.structs.replace(
        CHIPS["l20"], name="host", bf16_tflops=8.0, fp8_tflops=None, memory_gib=512.0, memory_gb_per_s=400.0, **tiny
    )
    mine = SearchSpace(
        model=MODELS["qwen3-235b-a22b"].weighted("int4"),
        attention_chips=[gpu],
        ffn_chips=[host],
        max_chips=2,
        inventory={"gpu": 1, "host": 1},
        ranks_per_instance=1,
    )
    advice = advise(mine, ESTIMATOR, Objective(4096, 0.2))
    assert len(advice.all_chips.parts) == 1
    assert advice.comparison.gain < 1 < advice.inventory_gain

"""The cost model against the report: Tables 2, 3, 5, 6, 7, intensities, Fig. 3, Table 4's knees."""

import pytest

from afd.errors import ConfigError
from afd.plan.attention import Gqa
from afd.plan.cost import arithmetic_intensity, cheapest_split, homogeneous_costs, split_cost
from afd.plan.limits import feasibility, min_routed_experts, min_sparsity
from afd.plan.models import FfnGroup, ModelShape
from tests.unit.plan.report_tables import (
    ACTIVATED,
    AFD_TOTALS,
    CHIPS,
    FIGURE_3,
    INTENSITY,
    ROOFLINE,
    SPARSITY,
    SPARSITY_H800_AT_40_GB,
    TABLE_2,
    TABLE_3,
    TABLE_5,
    TABLE_6,
    TABLE_7,
)

CELLS = [
    (model, part, chip, cell)
    for model, parts in TABLE_6.items()
    for part, row in zip((8192, 32768, "ffn"), parts, strict=True)
    for chip, cell in zip(CHIPS, row, strict=True)
]


@pytest.mark.parametrize("name", TABLE_2)
def test_table_2_bytes_and_flops_at_8k(models, name):
    model = models[name]
    ours = (model.kv_bytes(8192), model.attention_flops(8192), model.linear_flops, model.ffn_flops)
    assert ours == pytest.approx(TABLE_2[name], rel=0.005)


@pytest.mark.parametrize("name", TABLE_3)
def test_table_3_bytes_and_flops_at_32k(models, name):
    model = models[name]
    assert (model.kv_bytes(32768), model.attention_flops(32768)) == pytest.approx(TABLE_3[name], rel=0.005)


@pytest.mark.parametrize("name", CHIPS)
def test_table_5_unit_costs_and_table_4_knees(chips, name):
    chip = chips[name]
    assert (chip.usd_per_flop, chip.usd_per_byte) == pytest.approx(TABLE_5[name], rel=0.0035)
    assert round(chip.ridge_flop_per_byte) == ROOFLINE[name]


def test_table_6_has_108_cells():
    assert len(CELLS) == 108


@pytest.mark.parametrize(("name", "part", "chip", "cell"), CELLS)
def test_table_6_cells_equal_at_three_decimals(models, chips, name, part, chip, cell):
    row = split_cost(models[name], chips[chip], chips[chip], 8192 if part == "ffn" else part)
    ours = row.ffn_usd_per_mtok if part == "ffn" else row.attention_usd_per_mtok
    assert f"{ours:.3f}" == f"{cell:.3f}"


@pytest.mark.parametrize("name", AFD_TOTALS)
def test_afd_totals_pick_the_cheapest_chip_for_each_part(models, chips, name):
    report_chips = [chips[chip] for chip in CHIPS]
    for context, total in zip((8192, 32768), AFD_TOTALS[name], strict=True):
        assert cheapest_split(models[name], report_chips, context).total_usd_per_mtok == pytest.approx(total, abs=6e-4)


def test_cheapest_chips_are_the_ones_the_report_names(models, chips):
    report_chips = [chips[chip] for chip in CHIPS]
    assert cheapest_split(models["step3"], report_chips, 8192).chip == "h20+h800"
    for name in ("deepseek-v3", "kimi-k2"):  # too compute-heavy for the H20: all on H800
        assert cheapest_split(models[name], report_chips, 32768).chip == "h800"


@pytest.mark.parametrize("name", FIGURE_3)
def test_figure_3_kv_and_cost_by_context(models, chips, name):
    sizes, costs = FIGURE_3[name]
    model, h800 = models[name], chips["h800"]
    for context, gigabytes, usd in zip((8192, 32768, 131072), sizes, costs, strict=True):
        assert model.kv_bytes(context) / 1e9 == pytest.approx(gigabytes, rel=0.006)
        assert split_cost(model, h800, h800, context).total_usd_per_mtok == pytest.approx(usd, abs=1.5e-3)


@pytest.mark.parametrize("name", INTENSITY)
def test_arithmetic_intensity(models, name):
    assert arithmetic_intensity(models[name], 8192) == pytest.approx(INTENSITY[name], rel=0.005)


@pytest.mark.parametrize("name", ACTIVATED)
def test_activated_parameters_quoted_and_counted(models, name):
    assert models[name].activated_params == ACTIVATED[name]
    assert models[name].active_params / 1e9 == pytest.approx(ACTIVATED[name], rel=0.05)


def test_parameter_totals_of_model_cards(models):
    assert models["step3"].total_params / 1e9 == pytest.approx(316, rel=0.001)
    assert models["step3"].linear_weights == 61 * 169_345_024
    assert models["deepseek-v3"].total_params / 1e9 == pytest.approx(671, rel=0.001)
    assert models["step3.5-flash"].total_params / 1e9 == pytest.approx(196.9, rel=0.001)
    assert models["smollm2-135m-instruct"].total_params / 1e6 == pytest.approx(134.5, rel=0.001)


def test_step3_holds_31232_bytes_of_kv_per_token(models):
    assert models["step3"].kv_resident_bytes(1) == 31_232
    assert models["step3"].kv_resident_bytes(1, kv_bytes=2) == 62_464


def test_sliding_window_bounds_what_a_query_reads(models):
    flash = models["step3.5-flash"]
    growth = flash.kv_bytes(20_001) - flash.kv_bytes(20_000)
    assert growth == 12 * 2048  # only the twelve full-attention layers grow
    assert flash.kv_bytes(512) == 45 * 2048 * 512


def test_lightning_state_is_read_and_written_but_held_once(models):
    m1 = models["minimax-m1"]
    state = 70 * 64 * 128 * 128 * 4
    assert m1.kv_bytes(8192) - m1.kv_resident_bytes(8192) == state


@pytest.mark.parametrize("name", TABLE_7)
def test_table_7_minimum_sparsity(chips, name):
    assert min_sparsity(chips[name], hidden=7168, num_layers=61) == pytest.approx(TABLE_7[name], abs=7e-4)


def test_minimum_sparsity_at_the_measured_nic_rate(chips, models):
    needed = min_sparsity(chips["h800"], 7168, 61, network_bytes_per_s=40e9)
    assert needed == pytest.approx(SPARSITY_H800_AT_40_GB, abs=5e-4)
    flash = min_sparsity(chips["h800"], hidden=4096, num_layers=45)
    assert flash == pytest.approx(0.0245, abs=2e-4)


def test_deepseek_would_need_14_routed_experts_on_h800(models):
    assert min_routed_experts(models["deepseek-v3"], 0.058) == 14
    assert min_routed_experts(models["qwen3-32b"], 0.058) == 0


@pytest.mark.parametrize("name", SPARSITY)
def test_sparsity_of_published_models(models, name):
    assert models[name].sparsity == pytest.approx(SPARSITY[name])


def test_weak_hardware_l20_takes_part_with_six_ffn_servers(models, chips):
    l20 = feasibility(models["step3"], chips["l20"])
    assert l20.stage_bytes == pytest.approx(235e6, rel=0.002)
    assert l20.linear_bytes == pytest.approx(66.6e6, rel=0.001)
    assert l20.attention_feasible
    assert l20.kv_tokens_per_chip == pytest.approx(328_000, rel=0.005)
    assert (l20.ffn_servers, l20.ffn_chips) == (6, 48)


def test_weak_hardware_l4_cannot_do_attention(models, chips):
    l4 = feasibility(models["step3"], chips["l4"])
    assert not l4.attention_feasible
    assert l4.kv_tokens_per_chip == 0
    # The report says 144 cards: the L20's 48 by the ratio of bandwidths, in whole servers. Straight from the formula it
    # is 16 servers.
    assert l4.ffn_chips == 128
    scaled = 48 * chips["l20"].memory_gb_per_s / chips["l4"].memory_gb_per_s
    assert -(-scaled // 8) * 8 == 144


def test_only_step3_is_sparse_enough_for_h800(models, chips):
    assert feasibility(models["step3"], chips["h800"]).sparse_enough
    assert not feasibility(models["deepseek-v3"], chips["h800"]).sparse_enough


def test_homogeneous_rows_are_model_by_context_by_chip(models, chips):
    rows = homogeneous_costs([models["step3"], models["kimi-k2"]], [chips["h800"], chips["h20"]], [8192, 32768])
    assert [(row.model, row.context, row.chip) for row in rows[:4]] == [
        ("step3", 8192, "h800"),
        ("step3", 8192, "h20"),
        ("step3", 32768, "h800"),
        ("step3", 32768, "h20"),
    ]
    assert len(rows) == 8
    assert all(row.total_usd_per_mtok == row.attention_usd_per_mtok + row.ffn_usd_per_mtok for row in rows)


def test_a_chip_without_price_has_no_cost(models, chips):
    with pytest.raises(ConfigError, match="--price l20=USD"):
        split_cost(models["step3"], chips["l20"], chips["l20"], 8192)


def test_shapes_that_contradict_themselves_are_refused():
    attention = Gqa(layers=2, heads=4, head_dim=64, kv_heads=2)
    with pytest.raises(ValueError, match="2 attention layers but 3 FFN layers"):
        ModelShape(
            name="x",
            title="x",
            hidden=256,
            vocab=100,
            max_context=128,
            attention=(attention,),
            ffn=(FfnGroup(layers=3, intermediate=512),),
            source="test",
        )
    with pytest.raises(ValueError, match="top_k 9"):
        FfnGroup(layers=1, intermediate=8, experts=8, top_k=9)
    with pytest.raises(ValueError, match="need experts"):
        FfnGroup(layers=1, intermediate=8, shared_intermediate=8)


def test_experts_hit_grows_to_all_of_them():
    group = FfnGroup(layers=1, intermediate=8, experts=48, top_k=3)
    assert group.experts_hit(0) == 0
    assert group.experts_hit(1) == pytest.approx(3)
    assert group.experts_hit(2048) == pytest.approx(48)
    assert FfnGroup(layers=1, intermediate=8).experts_hit(100) == 0

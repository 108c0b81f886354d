"""Data files: shipped ones are complete, user files extend or replace them, mistakes are one clear line."""

import pytest

from afd.errors import ConfigError
from afd.plan.catalog import find, load_chips, load_models
from afd.plan.efficiency import Efficiency

REPORT_MODELS = {
    "step3", "deepseek-v3", "kimi-k2", "qwen3-235b-a22b", "qwen3-32b", "llama4-maverick", "minimax-m1",
    "ernie-4.5-300b", "pangu-pro-moe",
}  # fmt: skip

CHIP = """
[mychip]
title = "My chip"
bf16_tflops = 100
memory_gib = 32
memory_gb_per_s = 1000
network_gbit_per_s = 100
interconnect_gb_per_s = 50
source = "mine"
"""


def test_shipped_names(chips, models):
    assert {"h800", "h20", "a800", "910b", "l20", "l4", "h100", "h200", "b200", "mi300x"} <= set(chips)
    assert set(models) >= REPORT_MODELS
    assert {"step3.5-flash", "step3-vl-10b"} <= set(models)


def test_every_shipped_figure_has_a_source(chips, models):
    assert all(chip.source for chip in chips.values())
    assert all(chip.price_source for chip in chips.values() if chip.usd_per_hour is not None)
    assert all(model.source for model in models.values())


def test_a_user_file_adds_and_replaces(tmp_path):
    path = tmp_path / "hardware.toml"
    path.write_text(CHIP + CHIP.replace("[mychip]", "[h800]"))
    chips = load_chips([str(path)])
    assert chips["mychip"].memory_bytes == 32 * 2**30
    assert chips["h800"].title == "My chip"
    assert chips["h20"].title == "H20"


def test_a_user_model_file(tmp_path):
    path = tmp_path / "models.toml"
    path.write_text(
        '[mine]\ntitle = "Mine"\nhidden = 64\nvocab = 100\nmax_context = 128\nsource = "mine"\n'
        '[[mine.attention]]\nkind = "gqa"\nlayers = 2\nheads = 4\nhead_dim = 16\nkv_heads = 2\n'
        "[[mine.ffn]]\nlayers = 2\nintermediate = 256\n"
    )
    assert load_models([str(path)])["mine"].kv_resident_bytes(1) == 2 * 2 * 2 * 16


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (CHIP + "colour = 1\n", "colour"),
        (CHIP.replace("bf16_tflops = 100", "bf16_tflops = -1"), "bf16_tflops"),
        (CHIP + "usd_per_hour = -2.0\n", "usd_per_hour"),
        (CHIP.replace('title = "My chip"\n', ""), "title"),
        ("nonsense", "not TOML"),
        ("x = 1\n", "must be a table"),
    ],
)
def test_bad_user_files_name_file_entry_and_key(tmp_path, text, message):
    path = tmp_path / "hardware.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        load_chips([str(path)])
    assert "hardware.toml" in str(caught.value)


def test_bad_model_file_names_the_contradiction(tmp_path):
    path = tmp_path / "models.toml"
    path.write_text(
        '[mine]\ntitle = "Mine"\nhidden = 64\nvocab = 100\nmax_context = 128\nsource = "mine"\n'
        '[[mine.attention]]\nkind = "gqa"\nlayers = 2\nheads = 4\nhead_dim = 16\nkv_heads = 2\n'
        "[[mine.ffn]]\nlayers = 1\nintermediate = 256\n"
    )
    with pytest.raises(ConfigError, match="2 attention layers but 1 FFN layers"):
        load_models([str(path)])


def test_a_missing_file():
    with pytest.raises(ConfigError, match="No such file"):
        load_chips(["/nonexistent/hardware.toml"])


def test_prices_can_be_set():
    assert load_chips(prices=["h800=3.5", "l20=0.4"])["l20"].price == 0.4


@pytest.mark.parametrize("text", ["h800=-1", "h800=0", "h800=nan", "h800=inf", "h800=", "h800=cheap"])
def test_bad_prices(text):
    with pytest.raises(ConfigError, match="--price"):
        load_chips(prices=[text])


def test_unknown_chip_lists_what_is_known(chips):
    with pytest.raises(ConfigError, match=r"unknown chip 'h900': known are .*h800"):
        find(chips, "h900", "chip")
    with pytest.raises(ConfigError, match="unknown chip"):
        load_chips(prices=["h900=1"])


def test_efficiency_overrides():
    changed = Efficiency().with_overrides(["gemm=0.5", "jitter=0"])
    assert (changed.gemm, changed.jitter, changed.network) == (0.5, 0.0, Efficiency().network)


@pytest.mark.parametrize(
    ("text", "message"),
    [("gem=1", "unknown factor"), ("gemm=x", "KEY=NUMBER"), ("gemm=1.5", "gemm"), ("gemm=0", "gemm"), ("gemm", "KEY")],
)
def test_bad_efficiency_overrides(text, message):
    with pytest.raises(ConfigError, match=message):
        Efficiency().with_overrides([text])

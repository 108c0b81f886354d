"""Multi-token prediction: rows that are verified, tokens that come of them, and what drafting costs."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from afd.errors import ConfigError
from afd.plan.catalog import load_chips, load_models
from afd.plan.deployment import Deployment, KvDtype
from afd.plan.drafts import Drafts
from afd.plan.efficiency import Efficiency
from afd.plan.estimate import Estimator, Objective
from afd.plan.hf_config import shape_from_hf_config
from afd.plan.stages import RooflineStages, draft_time
from afd.types import Topology
from tests.unit.plan.hf_configs import BY_NAME

H800 = load_chips()["h800"]
FLASH = load_models()["step3.5-flash"]
ESTIMATOR = Estimator(RooflineStages(Efficiency()), Efficiency())


def flash(count=0, **changes):
    return Deployment(
        **{
            "model": FLASH,
            "attention_chip": H800,
            "ffn_chip": H800,
            "topology": Topology(2, 1),
            "kv_dtype": KvDtype.FP8,
            "drafts": Drafts.of(count),
            **changes,
        }
    )


def test_tokens_of_a_step_by_hand():
    """1 + 0.82 + 0.82 x 0.75 + 0.82 x 0.75 x 0.78, near the accept length of 2.95 that is published with them."""
    assert Drafts.of(3).emitted == pytest.approx(1 + 0.82 + 0.615 + 0.4797)
    assert (Drafts.of(3).rows, Drafts.of(0).emitted) == (4, 1.0)
    assert Drafts.of(3, (0.5,)).emitted == 1.875
    with pytest.raises(ConfigError, match="from 0 to 1"):
        Drafts.of(1, (1.5,))


def test_rows_cross_the_wire_and_the_ffn_but_read_the_cache_once():
    plain, three = (ESTIMATOR.estimate(flash(n), Objective(8192, 0.05), 32).stage for n in (0, 3))
    assert three.to_attention_s - 5e-6 == pytest.approx(4 * (plain.to_attention_s - 5e-6))
    assert plain.attention_s < three.attention_s < 2 * plain.attention_s


def test_drafting_by_hand():
    """A dense layer of 2 x 4096^2 + 101.1e6 (attention, 512 keys) + 3 x 4096 x 11264 weights, and a head of
    128896 x 4096 in 16 bit over 8 chips, three times, each with 35 us of launches."""
    attention = 4096 * (96 + 16) * 128 + 96 * 128 * 4096 + 4096 * 96
    weights = 2 * 4096 * 4096 + attention + 3 * 4096 * 11264
    layer_s = weights / 3.35e12 / 0.65 + 35e-6 + 8 * 512 * 2048 / 3.35e12 / 0.57
    head_s = 2 * 128896 * 4096 / 8 / 3.35e12 / 0.65
    assert draft_time(flash(3), Efficiency(), 8192, 8) == pytest.approx(3 * (layer_s + head_s), rel=1e-6)
    assert draft_time(flash(0), Efficiency(), 8192, 8) == 0.0


def test_a_step_of_more_tokens_is_allowed_to_take_longer():
    plain, three = (ESTIMATOR.best(flash(n, streams=3), Objective(8192, 0.02)) for n in (0, 3))
    assert three.tgs > plain.tgs
    assert three.stage_budget_s == pytest.approx(plain.stage_budget_s * Drafts.of(3).emitted)


def test_a_draft_whose_ffn_is_a_mixture_is_a_layer_of_the_pipeline():
    deepseek = flash(1, model=load_models()["deepseek-v3"])
    assert deepseek.pipeline_layers == 62
    assert flash(3).pipeline_layers == 45


def test_a_model_without_such_layers_says_so():
    with pytest.raises(ConfigError, match="--mtp 3: step3 has no layers that predict"):
        flash(3, model=load_models()["step3"])


def test_a_config_names_its_layers():
    ours = shape_from_hf_config({**BY_NAME["step3.5-flash"], "num_nextn_predict_layers": 3}, "x", "config.json")
    assert ours.draft.dense_weights(4096) == FLASH.draft.dense_weights(4096)
    assert (ours.draft.attention.window, ours.draft.own_head, ours.draft.count) == (512, True, 3)
    mixture = shape_from_hf_config({**BY_NAME["deepseek-v3"], "num_nextn_predict_layers": 1}, "x", "config.json")
    assert mixture.draft.ffn.experts == 256


@settings(max_examples=40, derandomize=True, deadline=None)
@given(count=st.integers(1, 7), low=st.floats(0, 1), more=st.floats(0, 1))
def test_better_drafts_never_cost_throughput(count, low, more):
    high = low + (1 - low) * more
    worse, better = (
        ESTIMATOR.best(dataclasses.replace(flash(), drafts=Drafts.of(count, (p,))), Objective(8192, 0.1))
        for p in (low, high)
    )
    assert better.tgs >= worse.tgs * (1 - 1e-9)

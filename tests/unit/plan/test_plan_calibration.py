"""Measured stage times: fits recover what made them, calibrated plans equal the measurement where it was taken."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from afd.errors import ConfigError
from afd.plan.calibration import SCHEMA, CalibratedStages, Curve, Point, fit, load_calibration
from afd.plan.deployment import Deployment
from afd.plan.efficiency import Efficiency
from afd.plan.stages import RooflineStages
from afd.types import Topology

TOKENS = (1, 8, 32, 64)


def document(**changes):
    """A measurement of SmolLM2 on 1A1F: t_A = 100 us + 2 us a token + 1 ns a cached token, and so on."""
    values = {
        "schema": SCHEMA,
        "model": "smollm2-135m-instruct",
        "topology": "1A1F",
        "t_A": [
            {"tokens": n, "context": c, "seconds": 1e-4 + 2e-6 * n + 1e-9 * n * c} for n in TOKENS for c in (256, 2048)
        ],
        "t_F": [{"tokens": n, "seconds": 3e-4 + 5e-6 * n} for n in TOKENS],
        "t_C": [{"tokens": n, "seconds": 5e-5 + 1e-7 * n} for n in TOKENS],
        "t_head": [{"tokens": n, "seconds": 3e-3 + 1e-4 * n} for n in TOKENS],
        "jitter": 0.02,
    }
    return {**values, **changes}


@pytest.fixture
def write(tmp_path):
    def write_document(**changes):
        path = tmp_path / "calibration.json"
        path.write_text(json.dumps(document(**changes)))
        return str(path)

    return write_document


def cpu_plan(models, chips, topology="1A1F"):
    return Deployment(
        model=models["smollm2-135m-instruct"],
        attention_chip=chips["l4"],
        ffn_chip=chips["l4"],
        topology=Topology.parse(topology),
        ranks_per_instance=1,
    )


def calibrated(models, chips, path):
    return CalibratedStages.of(load_calibration(path), RooflineStages(Efficiency()), cpu_plan(models, chips))


def test_where_it_was_measured_the_model_equals_the_measurement(models, chips, write):
    stages = calibrated(models, chips, write())
    assert stages.jitter == 0.02
    for tokens in (1, 8, 20, 64):
        times = stages.times(cpu_plan(models, chips), 1000, tokens)
        assert times.attention_s == pytest.approx(1e-4 + 2e-6 * tokens + 1e-9 * tokens * 1000)
        assert times.ffn_s == pytest.approx(3e-4 + 5e-6 * tokens)
        assert times.transfer_s == pytest.approx(5e-5 + 1e-7 * tokens)
        assert times.head_s == pytest.approx(3e-3 + 1e-4 * tokens)


def test_a_gang_of_two_is_priced_at_its_whole_batch(models, chips, write):
    times = calibrated(models, chips, write()).times(cpu_plan(models, chips, "2A1F"), 1000, 16)
    assert times.ffn_s == pytest.approx(3e-4 + 5e-6 * 32)
    assert times.attention_s == pytest.approx(1e-4 + 2e-6 * 16 + 1e-9 * 16 * 1000)


def test_elsewhere_the_roofline_scales_it(models, chips, write):
    stages = calibrated(models, chips, write())
    one, two = (stages.times(cpu_plan(models, chips, shape), 1000, 64) for shape in ("1A1F", "1A2F"))
    assert two.ffn_s < one.ffn_s
    assert two.transfer_s > one.transfer_s


def test_without_a_head_the_roofline_stays(models, chips, write):
    base = RooflineStages(Efficiency()).times(cpu_plan(models, chips), 1000, 8)
    assert calibrated(models, chips, write(t_head=[])).times(cpu_plan(models, chips), 1000, 8).head_s == base.head_s


coefficients = st.tuples(st.floats(1e-6, 1e-3), st.floats(1e-8, 1e-4), st.floats(1e-11, 1e-7))


@settings(max_examples=100, derandomize=True, deadline=None)
@given(coefficients)
def test_fit_recovers_exact_curves(truth):
    base, per_token, per_token_context = truth
    points = [Point(n, base + n * (per_token + per_token_context * c), c) for n in TOKENS for c in (128, 1024, 4096)]
    found = fit(points)
    for point in points:
        assert found(point.tokens, point.context) == pytest.approx(point.seconds, rel=1e-6)
    assert min(found.base, found.per_token, found.per_token_context) >= 0


def test_fit_never_has_a_negative_term():
    falling = fit([Point(1, 2e-3), Point(64, 1e-3)])
    assert (falling.per_token, falling.per_token_context) == (0, 0)
    assert 1e-3 <= falling.base <= 2e-3
    through_origin = fit([Point(1, 1e-3), Point(2, 3e-3), Point(4, 7e-3)])
    assert through_origin.base == 0


def test_fit_of_one_point_is_proportional():
    assert fit([Point(8, 4e-3)])(16) == pytest.approx(8e-3)
    assert fit([Point(8, 4e-3, 1000)])(8, 2000) == pytest.approx(8e-3)


def test_one_context_attributes_the_slope_to_the_cache():
    found = fit([Point(1, 1e-4 + 1e-6, 1000), Point(10, 1e-4 + 1e-5, 1000)])
    assert found(10, 2000) == pytest.approx(1e-4 + 2e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema": "other/2"}, "schema 'other/2' is not"),
        ({"t_A": []}, "t_A"),
        ({"t_F": [{"tokens": 0, "seconds": 1.0}]}, "t_F"),
        ({"t_F": [{"tokens": 1, "seconds": -1.0}]}, "t_F"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_bad_files_name_the_key(write, changes, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load_calibration(write(**changes))
    assert "--calibrate" in str(caught.value)


def test_missing_file_and_wrong_model(models, chips, write):
    with pytest.raises(ConfigError, match="No such file"):
        load_calibration("/nonexistent.json")
    with pytest.raises(ConfigError, match=r"measured 'step3', the plan is for 'smollm2"):
        calibrated(models, chips, write(model="step3"))
    with pytest.raises(ConfigError, match="xAyF"):
        calibrated(models, chips, write(topology="2x2"))


def test_a_curve_goes_through_what_was_measured():
    """A measured curve that no straight line fits: exact at its sizes, between them in between, beyond them alike."""
    measured = [Point(8, 1e-3), Point(64, 2e-3), Point(72, 6e-3)]
    curve = Curve.through(measured)
    assert [curve(point.tokens) for point in measured] == pytest.approx([point.seconds for point in measured])
    assert 2e-3 < curve(68) < 6e-3
    assert curve(200) / curve.fit(200) == pytest.approx(curve.ratios[-1])
    assert curve(1) / curve.fit(1) == pytest.approx(curve.ratios[0])


def test_a_curve_of_two_contexts_keeps_their_difference():
    points = [Point(n, (1.0 + 0.2 * (n == 32)) * (1e-4 + 1e-9 * n * c), c) for n in TOKENS for c in (256, 2048)]
    curve = Curve.through(points)
    for point in points:
        assert curve(point.tokens, point.context) == pytest.approx(point.seconds, rel=0.05)

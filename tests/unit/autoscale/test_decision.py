"""One observation's wish, the steady advice over many, and the loop closed around a simulated cluster."""

from __future__ import annotations

import dataclasses
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from afd.cluster.autoscale.decision import Adviser, Limits, Observation, Policy, wish
from afd.errors import ConfigError
from afd.types import Topology
from tests.unit.autoscale.plant import TPOT_TARGET_S, Plant, simulate

POLICY = Policy(tpot_s=TPOT_TARGET_S)
QUIET = Observation(2, 2, attention_busy=0.75, ffn_busy=0.75, num_finished=100, tpot_p99_s=0.03)


def limits(smallest: str = "1A1F", largest: str = "16A8F") -> Limits:
    return Limits(Topology.parse(smallest), Topology.parse(largest))


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({}, (2, 2)),
        ({"attention_busy": 0.78, "ffn_busy": 0.72}, (2, 2)),  # within the tolerance
        ({"attention_busy": 0.95}, (3, 2)),
        ({"ffn_busy": 0.95}, (2, 3)),
        ({"attention_busy": 0.3}, (1, 2)),
        ({"ffn_busy": 0.3}, (2, 1)),
        ({"attention_busy": 0.3, "tpot_p99_s": 0.045}, (2, 2)),  # TPOT has no room
        ({"attention_busy": 0.3, "queued": 1}, (2, 2)),
        ({"attention_busy": 0.3, "kv_used": 0.6}, (2, 2)),  # one worker could not hold that KV
        ({"tpot_p99_s": 0.06, "attention_busy": 0.76}, (3, 2)),
        ({"tpot_p99_s": 0.06, "ffn_busy": 0.78}, (2, 3)),
        ({"tpot_p99_s": 0.06, "ffn_busy": 0.3}, (3, 2)),  # nothing shrinks while the target is missed
        ({"kv_used": 0.95, "ffn_busy": 0.78}, (3, 2)),  # memory is the attention side's
        ({"tpot_p99_s": 9.0, "num_finished": 3}, (2, 2)),  # too few to say
        ({"ttft_p99_s": 6.0, "attention_busy": 0.76}, (3, 2)),
        ({"queued": 5, "attention_busy": 0.1, "ffn_busy": 0.1}, (2, 1)),  # queued for another reason than load
    ],
)
def test_what_one_observation_asks_for(change: dict[str, float], wanted: tuple[int, int]) -> None:
    asked = wish(dataclasses.replace(QUIET, **change), POLICY)
    assert (asked.num_attention, asked.num_ffn) == wanted, asked.reason


def test_the_reason_names_the_target_that_is_missed() -> None:
    assert "TPOT p99 60 ms over 50 ms" in wish(dataclasses.replace(QUIET, tpot_p99_s=0.06), POLICY).reason
    assert "95% full" in wish(dataclasses.replace(QUIET, kv_used=0.95), POLICY).reason


def test_growth_waits_for_its_window_and_a_moment_of_calm_starts_it_again() -> None:
    adviser = Adviser(POLICY, limits())
    busy = dataclasses.replace(QUIET, attention_busy=1.0)
    advice = [adviser.observe(QUIET if step == 2 else busy, step * 15.0) for step in range(8)]
    assert [one.num_attention for one in advice] == [2, 2, 2, 2, 2, 2, 2, 3]
    assert [one.changed for one in advice] == [False] * 7 + [True]


def test_shrinking_waits_ten_minutes() -> None:
    adviser = Adviser(POLICY, limits())
    idle = dataclasses.replace(QUIET, ffn_busy=0.2)
    advice = [adviser.observe(idle, step * 30.0).num_ffn for step in range(21)]
    assert advice[:19] == [2] * 19 and advice[-1] == 1


def test_after_a_change_nothing_is_decided_until_it_has_settled() -> None:
    adviser = Adviser(POLICY, limits())
    busy = dataclasses.replace(QUIET, attention_busy=1.0)
    adviser.observe(busy, 0.0)
    grown = dataclasses.replace(busy, num_attention=3)
    advice = [adviser.observe(grown, 10.0 + step * 10.0) for step in range(18)]
    assert {one.num_attention for one in advice} == {3}
    assert advice[0].reason == "settling after a change"


def test_a_size_outside_the_limits_is_corrected_at_once() -> None:
    assert str(Adviser(POLICY, limits("4A2F")).observe(QUIET, 0.0)) == "4A2F"
    assert str(Adviser(POLICY, limits("1A1F", "1A1F")).observe(QUIET, 0.0)) == "1A1F"


def test_limits_that_exclude_everything_are_refused() -> None:
    with pytest.raises(ConfigError, match="--min 4A1F exceeds --max 2A2F"):
        limits("4A1F", "2A2F")
    with pytest.raises(ConfigError, match="of the form xAyF"):
        limits("mono")


@settings(max_examples=150, derandomize=True)
@given(
    st.lists(
        st.builds(
            Observation,
            num_attention=st.integers(1, 6),
            num_ffn=st.integers(1, 6),
            attention_busy=st.floats(0, 1),
            ffn_busy=st.floats(0, 1),
            kv_used=st.floats(0, 1),
            queued=st.integers(0, 100),
            num_finished=st.integers(0, 100),
            tpot_p99_s=st.floats(0, 1),
        ),
        min_size=1,
        max_size=40,
    )
)
def test_advice_stays_within_the_limits_and_is_news_only_once(seen: list[Observation]) -> None:
    adviser = Adviser(POLICY, limits("1A2F", "4A4F"))
    before = ""
    for step, one in enumerate(seen):
        advice = adviser.observe(one, step * 20.0)
        assert 1 <= advice.num_attention <= 4 and 2 <= advice.num_ffn <= 4
        wanted = str(advice) if str(advice) != f"{one.num_attention}A{one.num_ffn}F" else ""
        assert advice.changed == (wanted != before)
        before = wanted


def test_a_constant_load_finds_its_size_and_stays_there() -> None:
    """1,000 tokens/s at 4 ms of attention and 1.5 ms of FFN each: 4 and 1.5 workers' worth of work."""
    plant = Plant(attention_s=0.004, ffn_s=0.0015, num_attention=1, num_ffn=1)
    run = simulate(plant, Adviser(POLICY, limits()).observe, lambda now: 1000.0, seconds=4 * 3600)
    settled = run.sizes[len(run.sizes) // 2 :]
    assert len(set(settled)) == 1
    assert 5 <= plant.num_attention <= 7 and 2 <= plant.num_ffn <= 3
    assert run.missed_share(skip=len(run.seen) // 2) == 0.0
    assert plant.num_changes <= 8


@pytest.mark.parametrize(("attention_s", "ffn_s"), [(0.004, 0.001), (0.001, 0.004)])
def test_the_ratio_follows_the_work(attention_s: float, ffn_s: float) -> None:
    plant = Plant(attention_s, ffn_s, num_attention=3, num_ffn=3)
    simulate(plant, Adviser(POLICY, limits()).observe, lambda now: 800.0, seconds=2 * 3600)
    assert (plant.num_attention > plant.num_ffn) == (attention_s > ffn_s)
    assert plant.num_attention != plant.num_ffn


def test_a_step_up_is_answered_within_minutes() -> None:
    plant = Plant(attention_s=0.004, ffn_s=0.002, num_attention=2, num_ffn=1)
    run = simulate(plant, Adviser(POLICY, limits()).observe, lambda now: 300.0 if now < 1800 else 900.0, seconds=7200)
    held = [one.tpot_p99_s <= TPOT_TARGET_S and one.queued == 0 for one in run.seen]
    assert all(held[(1800 + 1500) // 15 :])
    assert plant.num_attention >= 4


def test_a_daily_wave_is_followed_without_flapping() -> None:
    def load(now: float) -> float:
        return 700.0 + 500.0 * math.sin(2 * math.pi * now / 28_800)

    plant = Plant(attention_s=0.004, ffn_s=0.002, num_attention=5, num_ffn=3)
    run = simulate(plant, Adviser(POLICY, limits()).observe, load, seconds=2 * 28_800)
    sizes = [size[0] for size in run.sizes]
    assert min(sizes[1000:]) <= 3 and max(sizes) >= 6
    assert plant.num_changes <= 40
    assert run.missed_share() < 0.02


def test_without_load_the_cluster_shrinks_to_its_minimum() -> None:
    plant = Plant(attention_s=0.004, ffn_s=0.002, num_attention=6, num_ffn=4)
    simulate(plant, Adviser(POLICY, limits("2A1F")).observe, lambda now: 0.0, seconds=2 * 3600)
    assert (plant.num_attention, plant.num_ffn) == (2, 1)

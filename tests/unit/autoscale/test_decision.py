"""One observation's wish, and the steady advice over many."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from afd.cluster.autoscale.capacity import CostModel, StepLine
from afd.cluster.autoscale.decision import Adviser, Demand, Limits, Observation, Policy, wish
from afd.errors import ConfigError
from afd.types import Topology


def costs(attention_ms: float = 4.0, ffn_ms: float = 2.0) -> CostModel:
    """Of 2A2F: milliseconds for each sequence on its attention worker, and on the FFN side; 1 for each of 3 streams."""
    return CostModel(
        size=Topology(2, 2),
        attention_s=1e-3,
        attention_seq_s=attention_ms * 1e-3,
        ffn={2: StepLine(1e-3, ffn_ms * 1e-3)},
        link_row_s=None,
        streams=range(3, 4),
    )


POLICY = Policy(tpot_s=0.05)
QUIET = Observation(  # asked for 0.8 of the 467 tokens/s that it serves within 45 ms
    Topology(2, 2),
    tokens_per_s=373.0,
    num_running=17,
    costs=costs(),
    num_finished=100,
    tpot_p99_s=0.044,
)
BUSY = dataclasses.replace(QUIET, tokens_per_s=440.0)


def limits(smallest: str = "1A1F", largest: str = "16A8F") -> Limits:
    return Limits(Topology.parse(smallest), Topology.parse(largest))


def wished(seen: Observation, allowed: Limits | None = None) -> str:
    return str(wish(seen, Demand.of(seen, POLICY), POLICY, allowed or limits()).size)


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({}, "2A2F"),
        ({"tokens_per_s": 430.0}, "2A2F"),  # not yet above `full`
        ({"tokens_per_s": 440.0}, "3A3F"),
        ({"tokens_per_s": 440.0, "costs": costs(ffn_ms=0.5)}, "3A1F"),  # one FFN worker was enough
        ({"tokens_per_s": 440.0, "costs": costs(attention_ms=1.0)}, "1A3F"),
        ({"tokens_per_s": 10.0}, "1A1F"),
        ({"tokens_per_s": 10.0, "attention_busy": 1.0, "ffn_busy": 1.0}, "1A1F"),  # busy is not full
        ({"tokens_per_s": 10.0, "tpot_p99_s": 0.046}, "2A2F"),  # TPOT has no room
        ({"tokens_per_s": 440.0, "tpot_p99_s": 0.03}, "2A2F"),  # what is measured counts for more
        ({"tokens_per_s": 140.0, "kv_used": 0.85, "num_running": 4}, "2A1F"),  # one could not hold their KV
        ({"tpot_p99_s": 0.06, "costs": costs(attention_ms=4.2)}, "3A2F"),  # one more of what binds
        ({"tpot_p99_s": 0.06, "costs": costs(ffn_ms=2.1)}, "2A3F"),
        ({"kv_used": 0.95, "costs": costs(ffn_ms=2.1)}, "3A2F"),  # memory is the attention side's
        ({"tpot_p99_s": 9.0, "num_finished": 3}, "2A2F"),  # too few to say
        ({"ttft_p99_s": 6.0, "costs": costs(attention_ms=4.2)}, "3A2F"),
        ({"costs": None}, "2A2F"),  # nothing is known of what runs
        ({"tokens_per_s": 0.0, "num_running": 0}, "1A1F"),
        ({"costs": None, "tokens_per_s": 0.0, "num_running": 0}, "1A1F"),
    ],
)
def test_what_one_observation_asks_for(change: dict[str, Any], wanted: str) -> None:
    assert wished(dataclasses.replace(QUIET, **change)) == wanted


def test_where_no_size_is_enough_the_cheapest_that_serves_about_as_much_as_any_is_asked_for() -> None:
    crowd = dataclasses.replace(QUIET, tokens_per_s=2000.0)
    assert wished(crowd, limits("1A1F", "9A3F")) == "3A3F", "three FFN workers bind"
    assert wished(crowd) == "3A4F", "no more than twice as many at once"


def test_a_cheaper_kind_of_worker_is_taken_where_both_would_do() -> None:
    free = costs(attention_ms=1.0, ffn_ms=0.5)
    seen = dataclasses.replace(QUIET, costs=dataclasses.replace(free, ffn={2: StepLine(8e-3, 0.5e-3)}))
    dear = dataclasses.replace(POLICY, ffn_cost=5.0)
    assert wish(seen, Demand.of(seen, dear), dear, limits()).size == Topology(1, 2)
    assert dear.cost(Topology(1, 2)) == 11.0


def test_the_reason_says_what_is_asked_what_is_served_and_what_binds() -> None:
    reason = wish(BUSY, Demand.of(BUSY, POLICY), POLICY, limits()).reason
    assert reason == (
        "440 tokens/s are asked for; within 45 ms 2A2F serves 466, 3A3F serves 618; the attention binds in 2A2F"
    )
    missed = dataclasses.replace(QUIET, tpot_p99_s=0.06)
    assert wish(missed, Demand.of(missed, POLICY), POLICY, limits()).reason.startswith("TPOT p99 60 ms over 50 ms; ")
    full = dataclasses.replace(QUIET, kv_used=0.95)
    assert "KV cache 95% full" in wish(full, Demand.of(full, POLICY), POLICY, limits()).reason


# -- over time ------------------------------------------------------------------------------------------------


def advised(adviser: Adviser, seen: list[Observation], every_s: float) -> list[str]:
    return [str(adviser.observe(one, step * every_s).size) for step, one in enumerate(seen)]


def test_growth_waits_for_its_window_and_a_moment_of_calm_starts_it_again() -> None:
    adviser = Adviser(POLICY, limits())
    advice = [adviser.observe(QUIET if step == 2 else BUSY, step * 15.0) for step in range(8)]
    assert [str(one.size) for one in advice] == ["2A2F"] * 7 + ["3A3F"]
    assert [one.changed for one in advice] == [False] * 7 + [True]


def test_shrinking_waits_ten_minutes() -> None:
    idle = dataclasses.replace(QUIET, tokens_per_s=10.0)
    advice = advised(Adviser(POLICY, limits()), [idle] * 21, 30.0)
    assert advice[:19] == ["2A2F"] * 19 and advice[-1] == "1A1F"


def test_advice_that_nobody_follows_stays_although_the_load_wavers() -> None:
    waver = [BUSY] * 5 + [QUIET, BUSY, QUIET, BUSY] * 20
    advice = advised(Adviser(POLICY, limits()), waver, 15.0)
    assert advice == ["2A2F"] * 4 + ["3A3F"] * (len(waver) - 4)


def test_after_a_change_nothing_is_decided_until_it_has_settled() -> None:
    adviser = Adviser(POLICY, limits())
    adviser.observe(BUSY, 0.0)
    grown = dataclasses.replace(BUSY, size=Topology(3, 2))
    advice = [adviser.observe(grown, 10.0 + step * 10.0) for step in range(18)]
    assert {str(one.size) for one in advice} == {"3A2F"}
    assert advice[0].reason == "settling after a change"


def test_a_size_that_missed_the_target_is_not_wished_for_again_until_the_load_has_fallen() -> None:
    adviser = Adviser(POLICY, limits())
    missed = dataclasses.replace(QUIET, tpot_p99_s=0.06)
    assert advised(adviser, [missed] * 5, 15.0)[-1] == "3A2F"
    grown = dataclasses.replace(QUIET, size=Topology(3, 2), costs=dataclasses.replace(costs(), size=Topology(3, 2)))
    quiet = [str(adviser.observe(grown, 100.0 + step * 30.0).size) for step in range(60)]
    assert set(quiet) == {"3A2F"}, "what steps cost says that 2A2F would do"
    calm = dataclasses.replace(grown, tokens_per_s=280.0)
    fallen = [str(adviser.observe(calm, 2000.0 + step * 30.0).size) for step in range(40)]
    assert fallen[-1] == "2A2F"


def test_a_backlog_that_is_worked_off_is_no_reason_to_grow() -> None:
    missed = dataclasses.replace(QUIET, tpot_p99_s=0.06)
    piled_up = [dataclasses.replace(missed, num_live=1000 - 20 * step) for step in range(10)]
    assert set(advised(Adviser(POLICY, limits()), piled_up, 15.0)) == {"2A2F"}


def test_a_size_outside_the_limits_is_corrected_at_once() -> None:
    assert str(Adviser(POLICY, limits("4A2F")).observe(QUIET, 0.0).size) == "4A2F"
    assert str(Adviser(POLICY, limits("1A1F", "1A1F")).observe(QUIET, 0.0).size) == "1A1F"


def test_what_can_be_set_while_a_cluster_runs_keeps_its_ffn_workers() -> None:
    """Another FFN worker is what it needs; more attention workers would not help."""
    seen = dataclasses.replace(BUSY, costs=costs(attention_ms=1.0))
    adviser = Adviser(POLICY, limits("1A1F", "4A4F"))
    assert advised(adviser, [seen] * 5, 15.0)[-1] == "1A3F"
    assert advised(adviser.for_running(), [seen] * 5, 15.0)[-1] == "2A2F"


def test_limits_that_exclude_everything_are_refused() -> None:
    with pytest.raises(ConfigError, match="--min 4A1F exceeds --max 2A2F"):
        limits("4A1F", "2A2F")
    with pytest.raises(ConfigError, match="of the form xAyF"):
        limits("mono")


@settings(max_examples=100, derandomize=True)
@given(
    st.lists(
        st.builds(
            Observation,
            size=st.builds(Topology, st.integers(1, 6), st.integers(1, 6)),
            tokens_per_s=st.floats(0, 3000),
            num_running=st.integers(0, 100),
            costs=st.just(None),
            kv_used=st.floats(0, 1),
            num_finished=st.integers(0, 100),
            tpot_p99_s=st.floats(0, 1),
        ),
        min_size=1,
        max_size=30,
    ),
    st.booleans(),
)
def test_advice_stays_within_the_limits_and_is_news_only_once(seen: list[Observation], known: bool) -> None:
    adviser = Adviser(POLICY, limits("1A2F", "4A4F"))
    before = ""
    for step, one in enumerate(seen):
        if known:
            line = {one.size.num_ffn: StepLine(1e-3, 2e-3)}
            one = dataclasses.replace(one, costs=dataclasses.replace(costs(), size=one.size, ffn=line))
        advice = adviser.observe(one, step * 20.0)
        assert 1 <= advice.size.num_attention <= 4 and 2 <= advice.size.num_ffn <= 4
        wanted = str(advice.size) if advice.size != one.size else ""
        assert advice.changed == (wanted != before)
        before = wanted

"""A death is known at once: by who started the process, or by the connection that closed."""

from __future__ import annotations

from afd.coordinator.state import MAX_LINES
from tests.unit.coordinator.scenario import BEAT_S, TIMING, Scenario, formed


def test_whoever_was_seen_to_end_is_lost_in_the_same_moment() -> None:
    scenario = formed("2A1F")
    scenario.state.ended("a1", "killed by SIGKILL", scenario.now)
    assert scenario.view.epoch == 2 and scenario.ranks("attention") == {"a0": 0}
    assert "attention/1 lost: killed by SIGKILL" in scenario.log()


def test_the_place_is_free_at_once() -> None:
    scenario = formed("1A1F")
    scenario.state.ended("f0", "exit code 1", scenario.now)
    assert not scenario.view.formed
    assert scenario.register("f1", rank=0).error == ""
    assert scenario.view.formed and scenario.view.epoch == 2


def test_a_registration_that_comes_after_the_end_is_refused() -> None:
    scenario = Scenario("1A1F")
    scenario.state.ended("a0", "killed by SIGKILL", scenario.now)
    assert "killed by SIGKILL" in scenario.register("a0").error
    assert scenario.state.status(scenario.now).members == []


def test_a_restarted_coordinator_that_was_told_does_not_resume_the_dead() -> None:
    scenario = formed("2A1F")
    scenario.wait(BEAT_S)
    scenario.restart_coordinator()
    scenario.state.ended("a1", "killed by SIGKILL", scenario.now)
    scenario.register("a0", again=True)
    assert scenario.ranks("attention") == {"a0": 0}


def test_a_closed_connection_is_a_loss_well_before_silence_is() -> None:
    scenario = formed("2A1F")
    line = scenario.state.follow("a1", scenario.now)
    assert line is not None
    scenario.silent.add("a1")
    scenario.state.unfollow(line, scenario.now)
    scenario.wait(TIMING.cut_patience_s)
    assert "a1" in scenario.ranks("attention")
    scenario.wait(BEAT_S)
    assert "a1" not in scenario.ranks("attention")
    assert "attention/1 lost: its connection closed" in scenario.log()
    assert TIMING.cut_patience_s + BEAT_S < TIMING.lost_after_s / 2


def test_who_is_heard_of_after_the_cut_lives() -> None:
    scenario = formed("2A1F")
    line = scenario.state.follow("a1", scenario.now)
    assert line is not None
    scenario.state.unfollow(line, scenario.now)
    scenario.wait(10.0)
    assert scenario.view.epoch == 1


def test_a_new_connection_beside_the_old_one_is_no_cut_when_that_closes() -> None:
    scenario = formed("2A1F")
    lines = [scenario.state.follow("a1", scenario.now) for _ in range(2)]
    assert all(lines)
    scenario.silent.add("a1")
    scenario.state.unfollow(lines[0], scenario.now)  # type: ignore[arg-type]
    scenario.wait(4 * TIMING.cut_patience_s)
    assert "a1" in scenario.ranks("attention")


def test_when_all_connections_close_at_once_it_is_the_network_and_nobodys_death() -> None:
    scenario = formed("2A1F")
    names = ["a0", "a1", "f0", "g0"]
    lines = [scenario.state.follow(name, scenario.now) for name in names]
    for name, line in zip(names, lines, strict=True):
        assert line is not None
        scenario.state.unfollow(line, scenario.now)
        scenario.silent.add(name)
    scenario.wait(TIMING.lost_after_s - BEAT_S)
    scenario.silent.clear()
    scenario.wait(10.0)
    assert scenario.view.epoch == 1 and len(scenario.view.members) == 4


def test_strangers_and_members_with_too_many_connections_are_not_followed() -> None:
    scenario = formed("1A1F")
    assert scenario.state.follow("nobody", scenario.now) is None
    lines = [scenario.state.follow("a0", scenario.now) for _ in range(MAX_LINES + 1)]
    assert all(lines[:MAX_LINES]) and lines[MAX_LINES] is None


def test_the_entry_of_one_that_was_lost_and_registered_again_is_another_one() -> None:
    scenario = formed("1A1F")
    line = scenario.state.follow("g0", scenario.now)
    assert line is not None and scenario.state.is_member(line)
    scenario.silent.add("g0")
    scenario.wait(TIMING.lost_after_s + BEAT_S)
    assert not scenario.state.is_member(line)
    scenario.register("g0")
    assert not scenario.state.is_member(line)
    scenario.state.unfollow(line, scenario.now)
    scenario.silent.clear()
    scenario.wait(5.0)
    assert len(scenario.view.of_role("gateway")) == 1

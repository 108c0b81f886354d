"""Who is not let in, and what it is told."""

from __future__ import annotations

from afd.messages.membership import ControlRequest
from tests.unit.coordinator.scenario import Scenario, formed


def test_another_model_is_refused_with_both_hashes_and_what_they_cover() -> None:
    scenario = formed("1A1F")
    reply = scenario.register("a1", config_hash="bb" * 16)
    assert reply.rank == -1 and reply.view is None and not reply.retry
    assert "aa" * 16 in reply.error and "bb" * 16 in reply.error
    assert "dtype" in reply.error and "FFN ranks" in reply.error
    assert "refused attention" in scenario.log()


def test_a_gateway_has_no_config_hash_to_check() -> None:
    scenario = formed("1A1F")
    assert scenario.register("g1", config_hash="").error == ""


def test_the_hash_is_free_again_when_no_worker_is_left() -> None:
    scenario = formed("1A1F")
    scenario.sync("a0", leaving=True)
    scenario.sync("f0", leaving=True)
    assert scenario.register("a1", config_hash="cc" * 16).error == ""
    assert scenario.view.config_hash == "cc" * 16


def test_the_rank_asked_for_is_honoured() -> None:
    scenario = Scenario("1A3F")
    assert scenario.register("f2", rank=2).rank == 2
    assert scenario.register("f0").rank == 0
    assert scenario.register("f1").rank == 1


def test_a_taken_rank_may_be_asked_for_again() -> None:
    scenario = formed("1A1F")
    scenario.silent.add("f0")
    reply = scenario.register("f1", rank=0)
    assert reply.retry and "held by another ffn worker" in reply.error
    scenario.wait(2.0)
    assert scenario.register("f1", rank=0).rank == 0


def test_a_full_role_may_be_asked_for_again() -> None:
    scenario = formed("1A1F")
    assert scenario.register("f1").retry


def test_a_rank_out_of_range_is_refused_for_good() -> None:
    scenario = formed("1A2F")
    reply = scenario.register("f2", rank=2)
    assert not reply.retry and "ranks end at 1" in reply.error


def test_an_unknown_role_is_refused() -> None:
    scenario = Scenario()
    assert "unknown role" in scenario.register("x", role="spy").error


def test_registering_again_changes_nothing() -> None:
    scenario = formed("1A1F")
    view = scenario.view
    assert scenario.register("a0", rank=7).rank == 0, "a live worker is never re-ranked"
    assert scenario.view.epoch == view.epoch
    assert "cannot become" in scenario.register("a0", role="ffn").error


def test_a_shard_of_another_cut_is_refused() -> None:
    old = formed("1A1F")
    new = Scenario("1A2F")
    new.views["f0"] = old.views["f0"]
    reply = new.register("f0", again=True)
    assert "one of 1 FFN ranks" in reply.error and not reply.retry


def test_nobody_joins_a_cluster_that_shuts_down() -> None:
    scenario = formed("1A1F")
    scenario.control("shutdown")
    assert "shutting down" in scenario.register("a1").error


def test_a_note_is_an_event_of_one_bounded_line() -> None:
    scenario = formed("1A1F")
    assert scenario.state.control(ControlRequest("note", "autoscale:\n3A1F " + "x" * 999), scenario.now).ok
    event = scenario.state.status(scenario.now).events[-1]
    assert event.endswith("x") and "autoscale: 3A1F x" in event and len(event) < 400

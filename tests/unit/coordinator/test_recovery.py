"""A restarted coordinator learns everything from its workers, and disturbs nobody."""

from __future__ import annotations

from tests.unit.coordinator.scenario import BEAT_S, TIMING, Scenario, formed


def come_back(scenario: Scenario, *names: str) -> None:
    """As a worker does it: a heartbeat, and a registration where the coordinator does not know it."""
    for name in names:
        if not scenario.sync(name).known:
            assert scenario.register(name, again=True).error == ""


def test_the_cluster_goes_on_in_the_same_epoch_with_the_same_ranks() -> None:
    scenario = formed("2A2F")
    before = scenario.view
    ranks = {role: scenario.ranks(role) for role in ("attention", "ffn", "gateway")}
    scenario.restart_coordinator(away_s=30.0)
    scenario.now += BEAT_S
    assert scenario.sync("f1").known is False
    scenario.register("f1", again=True)
    assert scenario.view.epoch == before.epoch
    assert scenario.view.cluster_id == before.cluster_id
    assert scenario.view.version > before.version
    scenario.wait(BEAT_S)  # the others need not even register: the resumed view knows them
    scenario.wait(20.0)
    assert scenario.view.epoch == before.epoch
    assert {role: scenario.ranks(role) for role in ranks} == ranks
    assert all(member.ready for member in scenario.view.members)


def test_a_newcomer_gets_no_rank_of_a_worker_that_has_yet_to_report() -> None:
    scenario = formed("2A1F")
    scenario.restart_coordinator()
    come_back(scenario, "f0")
    assert scenario.register("a9").rank == 2
    assert scenario.view.epoch == 2, "it joins as a third one"


def test_a_newcomer_that_was_faster_gives_way_to_the_live_worker() -> None:
    scenario = formed("1A1F")
    scenario.restart_coordinator()
    assert scenario.register("a9").rank == 0
    come_back(scenario, "a0")
    assert scenario.ranks("attention") == {"a0": 0}
    reply = scenario.sync("a9")
    assert reply.lost and "did not know" in reply.reason
    assert scenario.view.epoch == 1


def test_the_largest_epoch_wins_whoever_comes_first() -> None:
    scenario = formed("3A1F")
    old_view = scenario.views["a0"]
    scenario.silent.add("a2")
    scenario.wait(2.0)
    assert scenario.view.epoch == 2
    scenario.views["a0"] = old_view  # had not heard of epoch 2 yet
    scenario.restart_coordinator()
    come_back(scenario, "a0")
    assert scenario.view.epoch == 1
    come_back(scenario, "f0")
    assert scenario.view.epoch == 2
    scenario.wait(TIMING.restart_grace_s + 1.0)
    assert scenario.ranks("attention") == {"a0": 0, "a1": 1}
    assert scenario.view.epoch == 2, "resumed exactly as it was"


def test_epochs_go_on_above_what_anyone_has_seen() -> None:
    scenario = formed("2A1F")
    scenario.silent.add("a1")
    scenario.wait(2.0)
    epoch = scenario.view.epoch
    scenario.restart_coordinator()
    come_back(scenario, "a0", "f0")
    assert scenario.view.epoch == epoch
    scenario.register("a2")
    assert scenario.view.epoch == epoch + 1


def test_a_stray_worker_of_another_cluster_does_not_replace_a_formed_one() -> None:
    stray = formed("2A1F")
    stray.silent.add("a0")
    stray.wait(2.0)
    scenario = formed("1A1F")
    scenario.state = scenario.new_state("cluster-9")
    for name in ("a5", "f5"):
        scenario.register(name)
    scenario.views["a1"] = stray.views["a1"]
    assert scenario.register("a1", again=True).rank == 1
    assert scenario.view.cluster_id == "cluster-9"
    assert scenario.ranks("attention") == {"a5": 0, "a1": 1}
    assert scenario.view.epoch > stray.view.epoch, "nobody sees an epoch go back"


def test_a_shutdown_goes_on() -> None:
    scenario = formed("1A1F")
    scenario.control("shutdown")
    for name in ("a0", "f0", "g0"):
        scenario.sync(name)
    scenario.restart_coordinator()
    come_back(scenario, "f0", "a0")
    assert scenario.view.shutdown
    assert "shutting down" in scenario.register("a1").error


def test_draining_survives() -> None:
    scenario = Scenario("2A1F")
    for name in ("a0", "a1"):
        scenario.register(name)
    scenario.register("f0")
    for name in ("a0", "a1", "f0"):
        scenario.sync(name, ready=True)
    scenario.control("drain", "attention/1")
    scenario.wait(BEAT_S)
    scenario.restart_coordinator()
    come_back(scenario, "a0", "a1")
    assert [m.draining for m in scenario.view.of_role("attention")] == [False, True]

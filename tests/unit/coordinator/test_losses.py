"""Silence, stalls, broken links, and the coordinator's own absence."""

from __future__ import annotations

import pytest

from afd.coordinator.state import Lost, Stop
from afd.messages.membership import PairReport
from tests.unit.coordinator.scenario import BEAT_S, TIMING, formed


def test_heartbeats_keep_a_member_for_ever() -> None:
    scenario = formed("2A2F")
    scenario.wait(60.0)
    assert scenario.view.epoch == 1 and len(scenario.view.members) == 5


def test_silence_is_a_loss_after_its_limit_and_not_before() -> None:
    scenario = formed("2A1F")
    scenario.silent.add("a1")
    scenario.wait(TIMING.lost_after_s)
    assert "a1" in scenario.ranks("attention")
    scenario.wait(2 * BEAT_S)
    assert "a1" not in scenario.ranks("attention")
    assert [action.role for action in scenario.actions if isinstance(action, Lost)] == ["attention"]


def test_a_worker_that_loads_its_model_may_be_silent_for_longer() -> None:
    scenario = formed("2A1F")
    scenario.sync("a1", ready=False)
    scenario.silent.add("a1")
    scenario.wait(TIMING.lost_after_s * 3)
    assert "a1" in scenario.ranks("attention")
    scenario.wait(2 * BEAT_S)
    assert "a1" not in scenario.ranks("attention")


def test_the_lost_one_is_told_and_may_not_come_back() -> None:
    scenario = formed("2A1F")
    scenario.silent.add("a1")
    scenario.wait(2.0)
    reply = scenario.sync("a1")
    assert not reply.known and reply.lost and "no heartbeat" in reply.reason
    assert "declared lost" in scenario.register("a1", again=True).error


def test_an_idle_worker_or_one_that_moves_is_not_stalled() -> None:
    scenario = formed("2A1F")
    scenario.sync("a0", pending=False, progress=7)
    for progress in range(8):
        scenario.sync("a1", pending=True, progress=progress)
        scenario.wait(TIMING.stall_timeout_s - 1.0)
    assert len(scenario.ranks("attention")) == 2


def test_the_time_before_work_arrived_does_not_count_as_a_stall() -> None:
    scenario = formed("2A1F")
    scenario.sync("a1", pending=False, progress=7)
    scenario.wait(20.0)
    scenario.sync("a1", pending=True)
    scenario.wait(TIMING.stall_timeout_s - BEAT_S)
    assert "a1" in scenario.ranks("attention")


def test_a_tie_goes_against_the_attention_worker() -> None:
    scenario = formed("2A2F")
    scenario.report("f1", "attention/0")
    scenario.wait(TIMING.lost_after_s + 2 * BEAT_S)
    assert scenario.ranks("attention") == {"a1": 1}
    assert len(scenario.ranks("ffn")) == 2


def test_of_a_tie_the_end_whose_main_loop_stands_still_leaves() -> None:
    """An FFN worker that hangs in a computation sends heartbeats, and has no work pending as far as it knows."""
    scenario = formed("1A1F")
    for turn in range(40):
        scenario.sync("a0", progress=turn)
        scenario.sync("f0", progress=min(turn, 3))
        if turn == 10:
            scenario.report("a0", "ffn/0")
        scenario.wait(BEAT_S)
    assert scenario.ranks("ffn") == {} and scenario.ranks("attention") == {"a0": 0}
    assert "ffn/0 lost: its links to attention/0 are broken" in scenario.log()


def test_an_ffn_worker_that_is_not_ready_yet_has_no_broken_links() -> None:
    """It has announced where it listens, and nobody answers there while it loads the model."""
    scenario = formed("1A1F")
    scenario.sync("f0", leaving=True)
    scenario.silent.add("f0")
    scenario.register("f1")
    scenario.report("a0", "ffn/0")
    scenario.wait(20.0)
    assert scenario.ranks("attention") == {"a0": 0} and scenario.ranks("ffn") == {"f1": 0}
    scenario.sync("f1", ready=True)
    scenario.wait(TIMING.lost_after_s - BEAT_S)
    assert scenario.ranks("attention") == {"a0": 0} and scenario.ranks("ffn") == {"f1": 0}
    scenario.wait(3 * BEAT_S)
    assert scenario.ranks("attention") == {} and scenario.ranks("ffn") == {"f1": 0}


def test_a_pair_that_heals_in_time_costs_nobody() -> None:
    scenario = formed("2A1F")
    scenario.report("a0", "ffn/0")
    scenario.wait(TIMING.lost_after_s - 2 * BEAT_S)
    scenario.report("a0")
    scenario.wait(5.0)
    assert scenario.view.epoch == 1


def test_a_dead_peer_is_found_by_its_silence_not_blamed_on_the_reporter() -> None:
    scenario = formed("1A1F")
    scenario.silent.add("f0")
    scenario.report("a0", "ffn/0")
    scenario.wait(3.0)
    assert scenario.ranks("attention") == {"a0": 0} and scenario.ranks("ffn") == {}
    scenario.register("f1")
    scenario.report("a0")
    scenario.wait(5.0)
    assert scenario.view.formed and scenario.view.epoch == 2


def test_complaints_about_strangers_and_about_ones_own_role_do_not_count() -> None:
    scenario = formed("2A1F")
    scenario.report("a0", "ffn/9", "attention/1", "gateway/0", "nonsense")
    scenario.report("g0", "ffn/0")
    scenario.wait(5.0)
    assert scenario.view.epoch == 1


def test_a_coordinator_that_was_stopped_itself_blames_nobody() -> None:
    scenario = formed("2A1F")
    scenario.sync("a0", pending=True, progress=3)
    scenario.now += 60.0
    scenario.state.tick(scenario.now)
    assert len(scenario.view.members) == 4
    assert "nobody could be heard for 60.0 s" in scenario.log()
    scenario.silent.add("a1")
    scenario.wait(2.0)
    assert scenario.ranks("attention") == {"a0": 0}


@pytest.mark.parametrize("rounds", [1, 6])
def test_a_coordinator_whose_port_was_shut_blames_nobody_and_finds_the_dead_one_afterwards(rounds: int) -> None:
    """Its clock ticks, but no call comes through: for long, or in rounds with a short gap."""
    scenario = formed("2A1F")
    scenario.report("a0", "ffn/0")
    for progress in range(rounds):
        scenario.sync("a0", pending=True, progress=progress)
        for _ in range(int(30.0 / BEAT_S)):
            scenario.now += BEAT_S
            scenario.state.tick(scenario.now)
        scenario.report("a0")
        scenario.wait(1.0)
    assert scenario.view.epoch == 1 and len(scenario.view.members) == 4
    scenario.silent.add("a1")
    scenario.wait(TIMING.lost_after_s + 2 * BEAT_S)
    assert scenario.ranks("attention") == {"a0": 0}


def test_the_last_caller_before_a_deafness_is_not_the_only_one_forgiven() -> None:
    """Members beat at different times: the one heard first must not be over its limit when deafness is noticed."""
    scenario = formed("2A1F")
    scenario.sync("a0")
    scenario.now += BEAT_S
    scenario.sync("a1")
    for _ in range(100):
        scenario.now += 0.1
        scenario.state.tick(scenario.now)
    assert len(scenario.view.members) == 4


def test_who_dies_while_nobody_else_is_there_is_found_when_somebody_comes() -> None:
    scenario = formed("1A1F")
    scenario.silent.update(("a0", "f0", "g0"))
    scenario.wait(600.0)
    status = {member.member.info.role: member.age_s for member in scenario.state.status(scenario.now).members}
    assert status["attention"] >= 600.0  # as an operator must see it
    assert "held by another" in scenario.register("a1", rank=0).error
    for _ in range(int((TIMING.lost_after_s + 1.0) / BEAT_S)):
        scenario.now += BEAT_S
        scenario.register("a1", rank=0)
        scenario.state.tick(scenario.now)
    assert scenario.register("a1", rank=0).rank == 0


def test_a_lost_gateway_may_come_back_as_it_is() -> None:
    scenario = formed("1A1F")
    scenario.silent.add("g0")
    scenario.wait(2.0)
    assert scenario.ranks("gateway") == {}
    assert scenario.register("g1").rank == 0
    reply = scenario.sync("g0")
    assert not reply.known and not reply.lost
    assert scenario.register("g0", again=True).rank == 1
    scenario.silent.clear()
    scenario.wait(60.0)
    assert scenario.ranks("gateway") == {"g1": 0, "g0": 1}


def test_drain_is_published_and_refused_for_ffn() -> None:
    scenario = formed("2A1F")
    assert scenario.control("drain", "attention/1").ok
    assert [m.draining for m in scenario.view.of_role("attention")] == [False, True]
    assert scenario.view.epoch == 1
    assert "every FFN rank" in scenario.control("drain", "ffn/0").error
    assert "attention/0" in scenario.control("drain", "attention/7").error
    assert "known: shutdown, drain" in scenario.control("explode").error


@pytest.mark.parametrize("other", ["draining", "not ready", "gone"])
def test_the_last_one_that_serves_is_not_drained(other: str) -> None:
    scenario = formed("2A1F")
    if other == "draining":
        assert scenario.control("drain", "attention/0").ok
    elif other == "not ready":
        scenario.sync("a0", ready=False)
    else:
        scenario.sync("a0", leaving=True)
    assert "attention/1 is the only one that serves" in scenario.control("drain", "attention/1").error
    assert [m.draining for m in scenario.view.of_role("attention") if m.rank == 1] == [False]


def test_shutdown_stops_the_coordinator_when_the_last_member_has_left() -> None:
    scenario = formed("1A1F")
    assert scenario.control("shutdown").ok
    assert scenario.view.shutdown
    for name in ("g0", "a0", "f0"):
        scenario.wait(BEAT_S)
        assert Stop() not in scenario.actions
        scenario.sync(name, leaving=True)
        scenario.silent.add(name)
    scenario.wait(BEAT_S)
    assert scenario.actions.count(Stop()) == 1


def test_shutdown_does_not_wait_for_ever() -> None:
    scenario = formed("1A1F")
    scenario.control("shutdown")
    scenario.wait(2 * TIMING.drain_s + 1.0)
    assert scenario.actions.count(Stop()) == 1


def test_status_has_every_member_with_what_it_said() -> None:
    scenario = formed("1A1F")
    scenario.register("f1", bound=False)
    scenario.sync("a0", stats={"running": 3.0}, loading=1.0)
    scenario.now += 0.5
    status = scenario.state.status(scenario.now)
    assert [(m.member.info.role, m.member.rank) for m in status.members] == [
        ("attention", 0),
        ("ffn", 0),
        ("gateway", 0),
    ]
    assert status.members[0].stats == {"running": 3.0}
    assert status.members[0].age_s == 0.5


def test_what_members_and_operators_say_is_plain_text_in_the_events() -> None:
    scenario = formed("1A1F")
    scenario.control("note", "look\x1b[31m here\x9b\nand there")
    scenario.report("a0", "ffn/0")
    scenario.sync("a0", pairs=[PairReport("ffn/0", broken=True, reason="\x1b]0;x\x07")])
    scenario.wait(TIMING.lost_after_s + 2 * BEAT_S)
    assert "x1b]0;x" in scenario.log()
    for line in scenario.log().split("\n"):
        assert line.isprintable()


def test_the_event_history_is_bounded() -> None:
    scenario = formed("1A1F")
    for idx in range(300):
        scenario.register(f"g{idx + 1}")
        scenario.sync(f"g{idx + 1}", leaving=True)
    assert len(scenario.state.status(scenario.now).events) == 200

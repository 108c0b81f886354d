"""When an epoch forms, rises, and waits."""

from __future__ import annotations

import pytest

from tests.unit.coordinator.scenario import Scenario, formed


@pytest.mark.parametrize("order", [("a0", "a1", "f0"), ("f0", "a1", "a0"), ("a1", "f0", "a0")])
def test_first_epoch_forms_in_any_order_with_the_last_one(order: tuple[str, ...]) -> None:
    scenario = Scenario("2A1F")
    for name in order[:-1]:
        scenario.register(name)
        assert scenario.view.epoch == 0 and not scenario.view.formed
    scenario.register(order[-1])
    assert scenario.view.epoch == 1 and scenario.view.formed


def test_a_worker_without_addresses_has_a_rank_but_is_not_published() -> None:
    scenario = Scenario("1A1F")
    scenario.register("a0")
    reply = scenario.register("f0", bound=False)
    assert reply.rank == 0
    assert scenario.view.epoch == 0 and scenario.ranks("ffn") == {}
    assert scenario.register("f0").rank == 0
    assert scenario.view.epoch == 1 and scenario.ranks("ffn") == {"f0": 0}


def test_losing_an_attention_worker_raises_the_epoch_at_once() -> None:
    scenario = formed("2A1F")
    scenario.silent.add("a1")
    scenario.wait(2.0)
    assert scenario.view.epoch == 2 and scenario.view.formed
    assert scenario.ranks("attention") == {"a0": 0}
    assert "attention/1 lost: no heartbeat" in scenario.log()


def test_losing_both_kinds_is_one_epoch_when_complete_again() -> None:
    scenario = formed("2A1F")
    scenario.silent |= {"a0", "f0"}
    scenario.wait(2.0)
    assert scenario.view.epoch == 1 and not scenario.view.formed
    scenario.register("f1")
    assert scenario.view.epoch == 2 and scenario.ranks("attention") == {"a1": 1}


def test_losing_every_attention_worker_is_not_formed_and_one_is_enough_to_go_on() -> None:
    scenario = formed("2A1F")
    scenario.silent |= {"a0", "a1"}
    scenario.wait(2.0)
    assert not scenario.view.formed
    scenario.register("a2")
    assert scenario.view.formed and scenario.view.epoch == 2


def test_two_losses_found_at_once_are_one_epoch() -> None:
    scenario = formed("3A1F")
    scenario.silent |= {"a1", "a2"}
    scenario.wait(2.0)
    assert scenario.view.epoch == 2


def test_goodbye_raises_the_epoch_without_waiting() -> None:
    scenario = formed("2A1F")
    scenario.sync("a1", leaving=True)
    assert scenario.view.epoch == 2
    assert scenario.sync("a1").known is False


def test_a_gateway_never_touches_the_epoch() -> None:
    scenario = formed("1A1F")
    version = scenario.view.version
    scenario.register("g1")
    assert scenario.view.epoch == 1 and scenario.view.version > version
    assert scenario.ranks("gateway") == {"g0": 0, "g1": 1}
    scenario.silent.add("g0")
    scenario.wait(2.0)
    assert scenario.view.epoch == 1 and scenario.ranks("gateway") == {"g1": 1}


def test_mono_forms_with_one_worker_that_has_a_serving_endpoint() -> None:
    scenario = Scenario("mono")
    assert scenario.register("a0", bound=False).rank == 0
    assert scenario.view.formed and scenario.view.epoch == 1
    assert "no FFN workers" in scenario.register("f0").error
    assert scenario.register("a1").retry, "one place only"


def test_version_rises_exactly_with_changes() -> None:
    scenario = formed("1A1F")
    version = scenario.view.version
    scenario.wait(1.0)
    assert scenario.view.version == version
    scenario.sync("a0", ready=False)
    assert scenario.view.version == version + 1
    assert scenario.sync("f0").view is scenario.view
    assert scenario.sync("f0").view is None, "sent once"


def test_the_plan_has_a_gang_window_only_with_company() -> None:
    scenario = formed("1A1F")
    assert scenario.view.plan.gang_window_s == 0.0
    before = scenario.view.plan.version
    scenario.register("a1")
    assert scenario.view.plan.gang_window_s == 0.005
    assert scenario.view.plan.version == before + 1


def test_a_cluster_that_ends_waits_for_nobody() -> None:
    scenario = formed("1A1F")
    for who in ("g0", "f0", "a0"):
        scenario.sync(who, leaving=True)
    assert "the cluster waits for an FFN worker" not in scenario.log()


def test_a_worker_that_leaves_is_waited_for_while_there_is_a_gateway() -> None:
    scenario = formed("1A1F")
    scenario.sync("f0", leaving=True)
    assert "the cluster waits for an FFN worker" in scenario.log()

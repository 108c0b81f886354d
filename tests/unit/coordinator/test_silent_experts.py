"""Experts that receive tokens and give nothing: warned of once each, shown for as long as a worker reports them."""

from __future__ import annotations

import logging

import pytest

from afd.coordinator.members import FFN
from afd.coordinator.state import MAX_SILENT_WARNED, Log
from afd.messages.codec import MessageError, encode
from afd.messages.membership import MAX_SILENT_EXPERTS, SyncRequest, sync_request_decoder
from tests.unit.coordinator.scenario import BEAT_S, Scenario, formed


def warnings(scenario: Scenario) -> list[str]:
    """The texts about experts, so far."""
    scenario.actions += scenario.state.take_actions()
    texts = [action.text for action in scenario.actions if isinstance(action, Log) and action.level == logging.WARNING]
    return [text for text in texts if "receives tokens and gives nothing" in text]


def test_each_expert_is_warned_of_once_a_line_for_each_layer() -> None:
    scenario = formed("1A2F")
    scenario.sync("f0", silent_experts=[(3, 1), (3, 4), (7, 0)])
    assert [text.partition(" receives")[0] for text in warnings(scenario)] == [
        "ffn/0: layer 3: expert 1, 4",
        "ffn/0: layer 7: expert 0",
    ]
    scenario.wait(4 * BEAT_S)
    scenario.sync("f1", silent_experts=[(3, 4)])  # tensor parallel: each rank sees its slice of the same expert
    assert len(warnings(scenario)) == 2
    scenario.sync("f0", silent_experts=[(3, 1), (3, 2), (3, 4), (7, 0)])
    assert warnings(scenario)[2:] == [
        "ffn/0: layer 3: expert 2 receives tokens and gives nothing beside the others; "
        "check the checkpoint with `afd inspect`"
    ]
    assert "layer 3: expert 2 receives" in scenario.log()


def test_the_status_shows_what_each_worker_reports_now() -> None:
    scenario = formed("1A2F")
    scenario.sync("f1", silent_experts=[(3, 1)])
    members = scenario.state.status(scenario.now).members
    reported = {status.member.rank: status.silent_experts for status in members if status.member.info.role == FFN}
    assert reported == {0: [], 1: [(3, 1)]}


def test_a_successor_is_not_news() -> None:
    scenario = formed("1A1F")
    scenario.sync("f0", silent_experts=[(1, 1)])
    scenario.sync("f0", leaving=True)
    scenario.register("f1")
    scenario.sync("f1", silent_experts=[(1, 1)])
    assert len(warnings(scenario)) == 1


def test_only_ffn_workers_know_experts() -> None:
    scenario = formed("1A1F")
    scenario.sync("a0", silent_experts=[(1, 1)])
    assert warnings(scenario) == []


def test_a_worker_that_invents_experts_fills_nothing_up() -> None:
    scenario = formed("1A1F")
    for layer in range(2 * MAX_SILENT_WARNED // MAX_SILENT_EXPERTS):
        scenario.sync("f0", silent_experts=[(layer, expert) for expert in range(MAX_SILENT_EXPERTS)])
    assert len(warnings(scenario)) == MAX_SILENT_WARNED // MAX_SILENT_EXPERTS


@pytest.mark.parametrize("experts", [[(0, 0)] * (MAX_SILENT_EXPERTS + 1), [(-1, 0)], [(0, 1 << 17)]])
def test_the_report_is_bounded(experts: list[tuple[int, int]]) -> None:
    with pytest.raises(MessageError):
        sync_request_decoder.decode(encode(SyncRequest("ffn", "f0", 0, silent_experts=experts)))

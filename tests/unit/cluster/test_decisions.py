"""The supervisor's pure decisions: restarts, the order of a stop, a view that tells a process to end."""

from __future__ import annotations

import signal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from afd.cluster.launch import EXIT_CONFIG, EXIT_FAILURE, EXIT_LOST, EXIT_OK
from afd.cluster.restart import MAX_RESTARTS, WINDOW_S, RestartPolicy, worth_restarting
from afd.cluster.shutdown import Phase, StopSequence, phases
from afd.cluster.stop_policy import why_stop
from afd.messages.membership import ClusterView, Member, Plan, WorkerInfo

ALIVE = [("coordinator", "coordinator"), ("attention/0", "attention"), ("ffn/0", "ffn"), ("gateway/0", "gateway")]


def test_restarts_back_off_and_end() -> None:
    policy = RestartPolicy()
    delays = []
    for now in (0.0, 10.0, 20.0):
        due = policy.next_start(now)
        assert due is not None
        delays.append(due - now)
    assert delays == sorted(delays) and delays[0] < 1.0
    assert policy.next_start(30.0) is None


def test_a_quiet_minute_clears_the_account() -> None:
    policy = RestartPolicy()
    for now in (0.0, 1.0, 2.0):
        policy.next_start(now)
    assert policy.next_start(3.0) is None
    assert policy.next_start(2.0 + WINDOW_S + 0.1) is not None


@given(st.lists(st.floats(0.0, 30.0), max_size=40))
@settings(max_examples=100, derandomize=True, database=None)
def test_never_more_than_the_limit_in_any_window(gaps: list[float]) -> None:
    policy, now, starts = RestartPolicy(), 0.0, []
    for gap in gaps:
        now += gap
        if policy.next_start(now) is not None:
            starts.append(now)
    for begin in starts:
        assert sum(begin <= start < begin + WINDOW_S for start in starts) <= MAX_RESTARTS


@pytest.mark.parametrize(
    ("exit_code", "worth"),
    [(EXIT_OK, False), (EXIT_CONFIG, False), (EXIT_FAILURE, True), (EXIT_LOST, True), (-9, True)],
)
def test_which_ends_are_worth_another_start(exit_code: int, worth: bool) -> None:
    assert worth_restarting(exit_code) is worth


def test_a_stop_goes_gateway_workers_coordinator() -> None:
    sequence = StopSequence(phases(drain_s=10.0))
    assert sequence.step(ALIVE, 0.0) == [("gateway/0", signal.SIGTERM)]
    assert sequence.step(ALIVE, 5.0) == []
    assert sequence.step(ALIVE[:3], 6.0) == [("attention/0", signal.SIGTERM), ("ffn/0", signal.SIGTERM)]
    assert sequence.step([ALIVE[0], ALIVE[2]], 7.0) == []
    assert sequence.step(ALIVE[:1], 8.0) == [("coordinator", signal.SIGTERM)]
    assert sequence.step([], 9.0) == []


def test_a_stage_that_takes_too_long_is_killed() -> None:
    sequence = StopSequence(phases(drain_s=10.0))
    sequence.step(ALIVE, 0.0)
    assert sequence.step(ALIVE, 12.9) == []
    assert sequence.step(ALIVE, 13.0) == [("gateway/0", signal.SIGKILL)]
    assert sequence.step(ALIVE, 13.1) == []
    assert sequence.step(ALIVE[:3], 13.2) == [("attention/0", signal.SIGTERM), ("ffn/0", signal.SIGTERM)]


def test_stages_without_processes_are_skipped() -> None:
    assert StopSequence(phases(1.0)).step(ALIVE[:1], 0.0) == [("coordinator", signal.SIGTERM)]
    assert StopSequence((Phase(("gateway",), 1.0),)).step(ALIVE[:1], 0.0) == []


def test_out_of_patience_everything_is_killed_at_once() -> None:
    sequence = StopSequence(phases(1.0))
    sequence.step(ALIVE, 0.0)
    assert sequence.kill(ALIVE) == [(name, signal.SIGKILL) for name, _ in ALIVE]
    assert sequence.killing and sequence.step(ALIVE, 100.0) == []


def view(*members: Member, shutdown: bool = False) -> ClusterView:
    return ClusterView("c", 1, 1, 1, 1, "m", "", "hybrid", Plan(), list(members), shutdown)


def member(role: str, incarnation: str, *, draining: bool = False) -> Member:
    return Member(WorkerInfo(role, incarnation, "host", 1, ""), 0, draining=draining)


def test_in_a_shutdown_the_roles_leave_in_the_order_of_need() -> None:
    everyone = [member("attention", "a"), member("ffn", "f"), member("gateway", "g")]
    reasons = [why_stop(view(*everyone, shutdown=True), role, role[0]) for role in ("gateway", "attention", "ffn")]
    assert reasons == ["the cluster is shutting down", None, None]
    assert why_stop(view(*everyone[:2], shutdown=True), "attention", "a")
    assert why_stop(view(everyone[1], shutdown=True), "ffn", "f")


def test_only_the_drained_one_stops() -> None:
    drained = view(member("attention", "a", draining=True), member("attention", "b"))
    assert why_stop(drained, "attention", "a") == "drain asked by the operator"
    assert why_stop(drained, "attention", "b") is None
    assert why_stop(view(member("ffn", "f", draining=True)), "ffn", "f") is None

"""The supervisor's pure decisions: restarts, the order of a stop, a view that tells a process to end."""

from __future__ import annotations

import signal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from afd.cluster.launch import EXIT_CONFIG, EXIT_FAILURE, EXIT_LOST, EXIT_OK
from afd.cluster.restart import RestartPolicy, worth_restarting
from afd.cluster.shutdown import Phase, StopSequence, phases
from afd.cluster.stop_policy import why_stop
from afd.messages.membership import ClusterView, Member, Plan, WorkerInfo

ALIVE = [("coordinator", "coordinator"), ("attention/0", "attention"), ("ffn/0", "ffn"), ("gateway/0", "gateway")]


def delays_of(policy: RestartPolicy, lives_s: list[float]) -> list[float]:
    """The delays of a child that is ready at once and lives so long, time after time."""
    now, delays = 100.0, []
    for life_s in lives_s:
        policy.ready(now)
        now += life_s
        due = policy.next_start(now)
        delays.append(round(due - now, 6))
        now = due
    return delays


def test_what_dies_again_and_again_is_started_ever_later_for_ever() -> None:
    delays = delays_of(RestartPolicy(), [0.5] * 12)
    assert delays == [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 25.6, 30.0, 30.0, 30.0]


def test_one_that_is_never_ready_waits_longer_too() -> None:
    policy = RestartPolicy()
    assert [policy.next_start(now) - now for now in (0.0, 100.0, 200.0)] == pytest.approx([0.1, 0.2, 0.4])


def test_every_two_seconds_of_readiness_make_one_death_forgotten() -> None:
    assert delays_of(RestartPolicy(), [0.0, 0.0, 0.0, 4.5, 60.0]) == [0.1, 0.2, 0.4, 0.2, 0.1]


@given(st.lists(st.floats(0.0, 30.0), max_size=40))
@settings(max_examples=100, derandomize=True, database=None)
def test_the_delay_is_never_longer_than_the_longest_nor_shorter_than_the_first(lives_s: list[float]) -> None:
    assert all(0.1 <= delay <= 30.0 for delay in delays_of(RestartPolicy(), lives_s))


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

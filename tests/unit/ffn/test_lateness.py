"""Who comes later than the gang's first, as a share of a step."""

from __future__ import annotations

import pytest

from afd.ffn.gang import Arrival
from afd.ffn.lateness import Lateness, straggler_scores
from afd.telemetry.recent import Growth, RecentSums


def arrival(rank: int, at_s: float) -> Arrival:
    return Arrival(rank, 0, 1, 1, 7, 0b11, 4, at_s)


def test_a_worker_that_is_late_by_a_tenth_of_a_layer_makes_its_gang_wait_a_tenth_of_the_step() -> None:
    lateness = Lateness(num_layers=10)
    recent = RecentSums(lateness.sums, iter((0.0, 1.0)).__next__)
    for layer in range(20):
        at_s = layer * 0.01
        lateness.add([arrival(0, at_s), arrival(1, at_s + 0.001)], step_s=0.1)
    assert straggler_scores(recent.look()) == pytest.approx({0: 0.0, 1: 0.1})
    assert lateness.late_s == pytest.approx({0: 0.0, 1: 0.02})


def test_a_gang_of_one_and_a_step_that_is_not_known_tell_nothing() -> None:
    lateness = Lateness(num_layers=10)
    lateness.add([arrival(0, 5.0)], step_s=0.1)
    lateness.add([arrival(0, 5.0), arrival(1, 6.0)], step_s=0.0)
    assert lateness.sums() == {} and straggler_scores(Growth(10.0, {})) == {}


def test_who_shared_no_batch_of_late_has_no_score() -> None:
    lateness = Lateness(num_layers=1)
    lateness.add([arrival(0, 0.0), arrival(1, 0.5)], step_s=1.0)
    recent = RecentSums(lateness.sums, iter((0.0, 1.0)).__next__)
    lateness.add([arrival(0, 0.0), arrival(2, 0.5)], step_s=1.0)
    assert straggler_scores(recent.look()) == {0: 0.0, 2: 0.5}

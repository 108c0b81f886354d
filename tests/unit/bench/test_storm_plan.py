"""bench/storm/plan.py: the same seed breaks the same processes, and only such as there are."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from afd.types import Topology
from bench.storm.plan import Loss, draw_losses

ROLES = ["attention", "ffn", "coordinator", "both", "attention+attention", "attention/1+attention", "ffn/0+coordinator"]


@given(
    st.builds(Topology, st.integers(2, 4), st.integers(1, 3)),
    st.integers(0, 30),
    st.integers(),
    st.lists(st.sampled_from(ROLES), min_size=1),
    st.lists(st.sampled_from(["kill", "stop:0.5", "keep:8"]), min_size=1),
)
def test_a_seed_says_all(topology, num, seed, roles, hows):
    losses = draw_losses(topology, num, seed, roles, hows, haste=0.3)
    assert losses == draw_losses(topology, num, seed, roles, hows, haste=0.3)
    assert len(losses) == num
    for loss in losses:
        assert len(set(loss.targets)) == len(loss.targets) > 0
        for target in loss.targets:
            role, _, rank = target.partition("/")
            places = {"attention": topology.num_attention, "ffn": topology.num_ffn, "coordinator": 0}[role]
            assert int(rank) in range(places) if places else target == "coordinator"


def test_every_process_and_every_way_has_its_turn():
    losses = draw_losses(Topology(3, 2), 200, 1, ["attention", "ffn", "both"], ["kill", "stop:1"], haste=0.5)
    assert {target for loss in losses for target in loss.targets} == {
        *("attention/0", "attention/1", "attention/2", "ffn/0", "ffn/1")
    }
    kinds = {loss.kind for loss in losses}
    assert {"attention killed", "ffn stopped 1 s in haste", "attention + ffn killed in haste"} < kinds
    assert len(kinds) == 3 * 2 * 2


def test_another_seed_is_another_storm():
    assert draw_losses(Topology(3, 2), 20, 1) != draw_losses(Topology(3, 2), 20, 2)


@pytest.mark.parametrize(
    "roles", ["attention+attention", "encoder", "ffn+ffn", "attention+", "", "ffn/1", "attention/0+attention"]
)
def test_what_the_topology_has_not_is_refused(roles):
    with pytest.raises(ValueError, match="1A1F has"):
        draw_losses(Topology(1, 1), 1, 1, [roles])


@pytest.mark.parametrize(
    "how", ["", "stop", "stop:", "stop:0", "stop:-1", "stop:nan", "stop:x", "kill:1", "hang:1", "keep"]
)
def test_a_way_that_is_none_is_refused(how):
    with pytest.raises(ValueError, match="is none of"):
        draw_losses(Topology(1, 1), 1, 1, hows=[how])


def test_a_kind_says_what_is_lost_together_and_how():
    assert Loss(("attention/0", "attention/1")).kind == "attention + attention killed"
    assert Loss(("coordinator",), "stop", 5.0, hasty=True).kind == "coordinator stopped 5 s in haste"
    assert Loss(("coordinator",), "keep", 60.0).kind == "coordinator gone for 60 s"

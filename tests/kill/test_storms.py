"""Storms of killed and stopped processes over real clusters under streaming load: no stream ends in an error, none is
refused, no token is wrong. `make test-kill` runs AFD_KILLS losses of each sort; without it, a dozen.

Only counts are judged here; how long the pauses are is for `python -m bench.recovery`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import pytest

from afd.types import Topology
from bench.storm.plan import draw_losses
from bench.storm.run import Load, run_storm
from bench.storm.undisturbed import Undisturbed
from tests.e2e.conftest import STEP3_TINY
from tests.e2e.local_cluster import LocalCluster

KILLS = int(os.environ.get("AFD_KILLS", "0"))
SEED = int(os.environ.get("AFD_KILL_SEED", "1"))
STARTUP_S = 40.0
LOSS_S = 30.0


@dataclass(frozen=True, slots=True)
class Case:
    """roles, hows: as `draw_losses` has them."""

    topology: str
    roles: tuple[str, ...]
    hows: tuple[str, ...] = ("kill",)
    haste: float = 0.0
    num_losses: int = KILLS
    up: tuple[str, ...] = ()

    def __str__(self) -> str:
        return "-".join((self.topology, *self.roles, *self.hows, *self.up))


EVERY_ROLE = ("attention", "ffn", "both", "coordinator")
SHORT = [Case("2A2F", EVERY_ROLE, num_losses=12)]
LONG = [
    Case("2A1F", ("attention",), ("kill", "stop:1"), haste=0.1),
    Case("2A1F", ("attention/0",), num_losses=20),
    Case("3A2F", ("attention", "coordinator"), ("kill", "stop:1", "stop:6")),
    Case("2A2F", EVERY_ROLE, haste=0.1),
    Case("1A2F", ("ffn",), up=("--standby-ffn", "1")),
    Case("2A2F", ("both",), up=("--standby-ffn", "1")),
    Case("1A1F", ("ffn", "attention", "both"), ("kill", "stop:1")),
    Case("2A1F", ("coordinator",), ("keep:60",), num_losses=2),
]


@pytest.fixture(scope="module")
def undisturbed() -> Undisturbed:
    return Undisturbed(STEP3_TINY)


@pytest.mark.timeout(STARTUP_S + max(20, KILLS) * LOSS_S)
@pytest.mark.parametrize("case", LONG if KILLS else SHORT, ids=str)
def test_a_storm_loses_nothing(case: Case, undisturbed: Undisturbed, tmp_path) -> None:
    delay_s = (0.1, 2.0) if KILLS else (0.1, 0.5)
    losses = draw_losses(
        Topology.parse(case.topology), case.num_losses, SEED, case.roles, case.hows, case.haste, delay_s
    )
    load = Load(num_users=6, num_prompts=12, num_tokens=150 if KILLS else 50, calm_s=1.0)
    flags = ("--topology", case.topology, "--model", STEP3_TINY, "--dtype", "float32", "--log-level", "debug", *case.up)
    with LocalCluster(tmp_path, *flags) as cluster:
        storm = run_storm(cluster, undisturbed, losses, load, print)
        print(f"\n{case}, seed {SEED}\n{storm.text}")
    assert not storm.errors, storm.errors[:5]
    assert storm.num_wrong == 0
    assert not storm.ended and len(storm.happened) == case.num_losses
    assert not sum(line.num_unhealed for line in storm.lines)
    assert not storm.num_unplaced

"""Which scenario happens in which world: the folder names it."""

from __future__ import annotations

from pathlib import Path

from tests.scenarios.autoscale_world import AutoscaleWorld
from tests.scenarios.coordinator_world import CoordinatorWorld
from tests.scenarios.dispatcher_world import DispatcherWorld
from tests.scenarios.gangs_world import GangsWorld
from tests.scenarios.script import World
from tests.scenarios.worker_world import WorkerWorld

FOLDER = Path(__file__).parent
WORLDS: dict[str, type[World]] = {
    "autoscale": AutoscaleWorld,
    "coordinator": CoordinatorWorld,
    "dispatcher": DispatcherWorld,
    "gangs": GangsWorld,
    "worker": WorkerWorld,
}


def scenarios() -> list[Path]:
    """All scenario files."""
    return sorted(FOLDER.glob("*/*.txt"))


def world_of(path: Path) -> World:
    """A fresh world for the scenario in this file."""
    return WORLDS[path.parent.name]()

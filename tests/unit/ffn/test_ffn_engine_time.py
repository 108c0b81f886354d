"""Where an FFN worker's time goes, what it exports: a scripted mesh, a clock that only the script moves."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from prometheus_client import CollectorRegistry

from afd.ffn.engine import FFNEngine
from afd.ffn.gang import GangTable
from afd.ffn.health import RecentFFN
from afd.ffn.metrics import FFNMetrics
from afd.ffn.python_path import PythonPath
from afd.model.loading import resolve_model
from stepmesh.layout import PayloadLayout
from stepmesh.types import DispatchArrived, DispatchParts, Header, IdleNotice, RankId, Role, WireDtype

COMPUTE_S, ANSWER_S, HIDDEN = 3.0, 0.5, 4


class Scene:
    """An FFN engine between a mesh and a half that only take time."""

    def __init__(self) -> None:
        self.now = 0.0
        self.script: list[tuple[float, list[object]]] = []
        self.spec = resolve_model("dummy:llama-tiny").spec  # dense layers: no routing in a dispatch
        self.dtype = torch.float32
        layout = PayloadLayout(HIDDEN, 8, 0, WireDtype.FP32, WireDtype.FP32)
        self.gangs = GangTable(0, 1, max_window_s=100.0, straggler_s=100.0)
        path = PythonPath(self, self, layout, clock=lambda: self.now)
        self.engine = FFNEngine(self, self, self.gangs, path, clock=lambda: self.now)

    def turn(self, after_s: float, *events: object) -> None:
        """The engine blocks for so long, then these events are there."""
        self.script.append((after_s, list(events)))
        self.engine.run_once(1000.0)

    # -- mesh ---------------------------------------------------------------------------------------------

    def progress(self, timeout_s: float) -> list[object]:
        if timeout_s <= 0.0 or not self.script:
            return []
        after_s, events = self.script.pop(0)
        self.now += after_s
        return events

    def combine(self, arrival: object, meta: object, rows: object) -> None:
        self.now += ANSWER_S

    def stats(self) -> dict[str, object]:
        return {}

    # -- half ---------------------------------------------------------------------------------------------

    def layer(self, dispatch):
        self.now += COMPUTE_S
        return dispatch.rows

    def expert_loads(self) -> dict[int, object]:
        return {}


def dispatch(rank: int, layer: int = 0, *, gang: int = 0, mask: int = 0) -> DispatchArrived:
    header = Header(b"", 1, 1, 0, 1, 1, 1, 1, gang, 0, mask, 0, 2, 0, 0, 0, 0, layer, 0, 0, 0)
    rows = np.zeros((2, HIDDEN), np.float32)
    return DispatchArrived(RankId(Role.ATTENTION, rank), header, DispatchParts(rows))


def test_waiting_counts_while_a_step_is_under_way_and_not_before_or_after() -> None:
    scene = Scene()
    scene.turn(50.0, dispatch(0))  # idle until then
    scene.turn(7.0, dispatch(0, 1, gang=1, mask=1))  # the attention worker computes
    scene.turn(1.0, IdleNotice(RankId(Role.ATTENTION, 0), 0, 2))
    scene.turn(90.0)
    totals = scene.engine.totals
    assert totals.wait_s == 8.0 and totals.gang_wait_s == 0.0
    assert totals.busy_s == 2 * COMPUTE_S and totals.answer_s == 2 * ANSWER_S and totals.other_s == 0.0
    waits = [s for s in scene.engine.ring.snapshot() if s.name == "wait"]
    assert sum(s.end_s - s.start_s for s in waits) == totals.wait_s


def test_waiting_for_a_member_is_told_apart_and_the_late_one_is_scored() -> None:
    scene = Scene()
    step_s = 7.0 + COMPUTE_S + 2 * ANSWER_S
    for _ in range(3):  # both at once: now the step is known
        scene.turn(7.0, dispatch(0), dispatch(1))
    registry, recent = CollectorRegistry(), RecentFFN(scene.engine, lambda: scene.now)
    FFNMetrics(registry, scene.engine, scene, recent)
    for _ in range(3):  # as long, but the second one comes 2 s after the first
        scene.turn(5.0, dispatch(0))
        scene.turn(2.0, dispatch(1))
    totals = scene.engine.totals
    assert totals.gang_wait_s == 6.0 and totals.wait_s == 5 * 7.0
    assert totals.num_members / totals.num_batches == 2.0

    def sample(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(name, labels)

    assert sample("afd_gang_straggler_score", peer="attention/0") == 0.0
    # Every batch here is a layer 0, and each stands for one layer of a step.
    layer_s = step_s / scene.spec.num_layers
    assert sample("afd_gang_straggler_score", peer="attention/1") == pytest.approx(2.0 / layer_s)
    assert sample("afd_gang_lateness_seconds_total", peer="attention/1") == 6.0
    assert sample("afd_bubble_ratio", role="ffn") == pytest.approx(7.0 / step_s)
    assert sample("afd_gang_size", role="ffn") == 2.0
    assert sample("afd_stage_seconds_total", role="ffn", stage="gang_wait") == 6.0

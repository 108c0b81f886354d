"""Which experts of a checkpoint still do something: norms of their matrices, and what they answer to a probe.

"Dead" experts (Step-3's blog reports them in training) receive tokens and give nothing: their output norm vanishes
against their layer's. The weights are read expert by expert, so the memory needed is that of one expert.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from afd.model.inventory import TensorSpec, inventory
from afd.model.spec import FfnKind
from afd.model.weights.checkpoint import Checkpoint, as_float32

DEAD_SHARE = 0.01
"""An expert is called dead when its output RMS is below this share of its layer's median."""

PROBE_ROWS = 16
PROBE_SEED = 0

Matrix = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class ExpertHealth:
    """Frobenius norms of an expert's matrices; output_rms: of its answer to seeded rows of RMS 1."""

    layer: int
    expert: int
    gate_norm: float
    up_norm: float
    down_norm: float
    output_rms: float
    dead: bool = False


def expert_health(checkpoint: Checkpoint) -> Iterator[list[ExpertHealth]]:
    """The experts of each MoE layer in turn; reads the layer's weights."""
    tensors = {(t.part, t.layer): t for t in inventory(checkpoint.spec)}
    probe = np.random.default_rng(PROBE_SEED).standard_normal((PROBE_ROWS, checkpoint.spec.hidden), np.float32)
    for idx, layer in enumerate(checkpoint.spec.layers):
        if layer.ffn.kind is not FfnKind.MOE:
            continue
        parts = [tensors[f"expert_{part}", idx] for part in ("gate", "up", "down")]
        rows = [_probe_expert(checkpoint, parts, idx, expert, probe) for expert in range(layer.ffn.num_experts)]
        yield mark_dead(rows)


def mark_dead(rows: list[ExpertHealth]) -> list[ExpertHealth]:
    """The experts of one layer with `dead` set."""
    limit = DEAD_SHARE * float(np.nanmedian([row.output_rms for row in rows]))
    return [
        ExpertHealth(r.layer, r.expert, r.gate_norm, r.up_norm, r.down_norm, r.output_rms, not r.output_rms > limit)
        for r in rows
    ]


def _probe_expert(
    checkpoint: Checkpoint, parts: list[TensorSpec], layer: int, expert: int, probe: Matrix
) -> ExpertHealth:
    gate, up, down = (as_float32(checkpoint.read(part, (slice(expert, expert + 1),)))[0] for part in parts)
    gated = probe @ gate.T
    output = (gated / (1 + np.exp(-np.clip(gated, -80, 80))) * (probe @ up.T)) @ down.T
    gate_norm, up_norm, down_norm = (float(np.linalg.norm(matrix)) for matrix in (gate, up, down))
    return ExpertHealth(layer, expert, gate_norm, up_norm, down_norm, float(np.sqrt(np.mean(output * output))))

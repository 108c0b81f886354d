"""How far a forecast may be off: what published measurements say of the rooflines behind it.

A stage's range is measured over forecast. Where the report measured the same kind of attention on the same chip
(Table 9), it is what was found there; where nobody has published figures, it is wide. docs/planning.md has the figures.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from afd.plan.attention import Gqa, Mfa, Mla
from afd.plan.deployment import Deployment
from afd.plan.estimate import Estimate
from afd.plan.pipeline import step_time

ATTENTION = {
    ("h800", Mfa): (0.94, 1.03),
    ("h800", Mla): (1.02, 1.04),
    ("h800", Gqa): (0.94, 0.97),
    ("a800", Mfa): (1.09, 1.15),
    ("a800", Gqa): (1.16, 1.23),
    ("h20", Mfa): (0.86, 0.93),
    ("h20", Mla): (0.70, 0.74),
    ("h20", Gqa): (2.1, 2.4),
}
"""Measured over forecast of an attention layer, 8K and 32K (Table 9)."""

FFN = {"h800": (0.95, 1.05)}
"""Measured over forecast of the FFN stage (Table 8)."""

UNMEASURED = (0.8, 1.4)
MARGIN = 0.05
"""Around what was measured: another batch, context and precision than there."""


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Between which figures a forecast is believed to lie, at its batch.

    reason: of the width.
    """

    low_tgs: float
    high_tgs: float
    low_tpot_s: float
    high_tpot_s: float
    reason: str


def accuracy_of(estimate: Estimate) -> Accuracy:
    """The range of a forecast from rooflines; calibrated stages are measured, and none of this applies to them."""
    attention, ffn = _attention_range(estimate.deployment), _ffn_range(estimate.deployment)
    fast, slow = (_tpot(estimate, attention[i], ffn[i]) for i in (0, 1))
    return Accuracy(
        low_tgs=estimate.tgs * estimate.tpot_s / slow,
        high_tgs=estimate.tgs * estimate.tpot_s / fast,
        low_tpot_s=fast,
        high_tpot_s=slow,
        reason=_reason(estimate.deployment),
    )


def _tpot(estimate: Estimate, attention: float, ffn: float) -> float:
    """TPOT with both stages scaled; what the forecast adds to the plain step (jitter) stays a share of it."""
    deployment, stage, kind = estimate.deployment, estimate.stage, estimate.objective.pipeline
    shape = (deployment.streams, deployment.pipeline_layers, kind)
    scaled = replace(stage, attention_s=stage.attention_s * attention, ffn_s=stage.ffn_s * ffn)
    return estimate.tpot_s * step_time(scaled, *shape) / step_time(stage, *shape)


def _attention_range(deployment: Deployment) -> tuple[float, float]:
    chips = [part.chip.name for part in deployment.attention_parts]
    found = [ATTENTION.get((chip, type(group)), UNMEASURED) for chip in chips for group in deployment.model.attention]
    low, high = min(low for low, _ in found), max(high for _, high in found)
    return min(1.0, low) * (1 - MARGIN), max(1.0, high) * (1 + MARGIN)


def _ffn_range(deployment: Deployment) -> tuple[float, float]:
    found = [FFN.get(part.chip.name, UNMEASURED) for part in deployment.ffn_parts]
    return min(low for low, _ in found), max(high for _, high in found)


def _reason(deployment: Deployment) -> str:
    kinds = sorted({type(group).__name__.upper() for group in deployment.model.attention})
    chips = [part.chip for part in deployment.attention_parts]
    unknown = [c.title for c in chips if any((c.name, type(g)) not in ATTENTION for g in deployment.model.attention)]
    low, high = _attention_range(deployment)
    parts = []
    if unknown:
        parts.append(f"nobody has published {' or '.join(kinds)} on {' or '.join(unknown)}")
    elif low < 0.85 or high > 1.2:
        where = " and ".join(chip.title for chip in chips)
        parts.append(f"{' and '.join(kinds)} on {where}: {low:.2f} to {high:.2f} of the forecast where it was measured")
    if strange := [part.chip.title for part in deployment.ffn_parts if part.chip.name not in FFN]:
        parts.append(f"nobody has published an FFN stage on {' or '.join(strange)}")
    return "; ".join(parts) or "both stages are near published measurements"

"""The same scenario with several seeds: means, and how far from them the truth may lie. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from afd.errors import ConfigError

_T95 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
    2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
"""Student's t, two-sided 95 %, for 1 to 30 degrees of freedom."""

MAX_SEEDS = len(_T95) + 1


@dataclass(frozen=True, slots=True)
class Interval:
    """The mean of independent runs, and what to add and take away for the 95 % confidence interval of the truth."""

    mean: float
    ci95: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Interval:
        """At least two values."""
        return cls(fmean(values), _T95[len(values) - 2] * stdev(values) / len(values) ** 0.5)


def check_seeds(num_seeds: int) -> None:
    """ConfigError where an interval cannot be given."""
    if not 2 <= num_seeds <= MAX_SEEDS:
        raise ConfigError(f"--seeds must be 2 to {MAX_SEEDS}: an interval needs two runs, and 31 tell what more would")


def intervals(payloads: Sequence[Mapping[str, Any]]) -> dict[str, Interval]:
    """Every number that all runs have, under its name."""
    return {
        name: Interval.of([payload[name] for payload in payloads])
        for name in payloads[0]
        if all(isinstance(payload[name], int | float) for payload in payloads)
    }

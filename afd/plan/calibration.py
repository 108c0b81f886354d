"""Stage times measured on a running cluster, in place of factors from data sheets.

File (JSON), as a benchmark or trace writes it; seconds are per layer and micro-batch, measured in situ (partner and
load running):

    {"schema": "afd-calibration/1", "model": "smollm2-135m-instruct", "topology": "1A1F", "ranks_per_instance": 1,
     "t_A": [{"tokens": 8, "context": 512, "seconds": 4.1e-4}, ...],   tokens of one attention rank
     "t_F": [{"tokens": 8, "seconds": 3.0e-4}, ...],                   tokens of the gang, over all attention ranks
     "t_C": [{"tokens": 8, "seconds": 6.0e-5}, ...],                   both directions, tokens of one attention rank
     "t_head": [{"tokens": 8, "seconds": 3.0e-3}, ...],                optional: LM head and sampling, per step
     "jitter": 0.03}                                                   optional: mean TPOT over the sum of stages - 1
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np

from afd.errors import ConfigError
from afd.plan.deployment import Deployment
from afd.plan.stages import Prefill, StageModel, StageTimes
from afd.types import Topology

SCHEMA = "afd-calibration/1"

PositiveFloat = Annotated[float, msgspec.Meta(gt=0)]


class Point(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One measured stage time. context: of t_A only."""

    tokens: Annotated[int, msgspec.Meta(ge=1)]
    seconds: PositiveFloat
    context: Annotated[int, msgspec.Meta(ge=0)] = 0


class Calibration(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The file's contents; `bench` may add free-form `machine` and `commit`."""

    schema: str
    model: str
    topology: str
    t_A: Annotated[list[Point], msgspec.Meta(min_length=1)]
    t_F: Annotated[list[Point], msgspec.Meta(min_length=1)]
    t_C: Annotated[list[Point], msgspec.Meta(min_length=1)]
    t_head: list[Point] = []
    ranks_per_instance: Annotated[int, msgspec.Meta(ge=1)] = 1
    jitter: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.0
    machine: str = ""
    commit: str = ""


def load_calibration(path: str) -> Calibration:
    """The file at `path`; ConfigError naming the key at fault."""
    try:
        calibration = msgspec.json.decode(Path(path).read_bytes(), type=Calibration)
    except OSError as error:
        raise ConfigError(f"--calibrate {path}: {error.strerror or error}") from None
    except msgspec.DecodeError as error:
        raise ConfigError(f"--calibrate {path}: {error}") from None
    if calibration.schema != SCHEMA:
        raise ConfigError(f"--calibrate {path}: schema {calibration.schema!r} is not {SCHEMA!r}")
    return calibration


@dataclass(frozen=True, slots=True)
class Fit:
    """seconds = base + per_token * tokens + per_token_context * tokens * context, no coefficient negative."""

    base: float
    per_token: float
    per_token_context: float

    def __call__(self, num_tokens: float, context: float = 0.0) -> float:
        return self.base + num_tokens * (self.per_token + self.per_token_context * context)


def fit(points: Sequence[Point]) -> Fit:
    """Least squares of relative errors with non-negative coefficients; as many terms as the points can tell apart.

    With one context only, the slope cannot be split into a token's work and its cache reads; it is then taken as cache
    reads when a context is given (attention is memory bound), as tokens otherwise.
    """
    contexts = {point.context for point in points}
    terms: list[int] = [0] if len({point.tokens for point in points}) > 1 or len(contexts) > 1 else []
    if len(contexts) > 1:
        terms += [1, 2]
    else:
        terms.append(2 if contexts != {0} else 1)
    while True:
        coefficients = _least_squares(points, terms)
        negative = [term for term, value in zip(terms, coefficients, strict=True) if value < 0]
        if not negative:
            values = dict(zip(terms, coefficients, strict=True))
            return Fit(values.get(0, 0.0), values.get(1, 0.0), values.get(2, 0.0))
        terms.remove(negative[0])


def _least_squares(points: Sequence[Point], terms: Sequence[int]) -> list[float]:
    """Minimises sum ((prediction - seconds) / seconds)^2 over the coefficients of `terms`."""
    rows = np.array([[_features(point)[term] / point.seconds for term in terms] for point in points])
    scale = rows.max(axis=0)
    solution = np.linalg.lstsq(rows / scale, np.ones(len(points)), rcond=None)[0] / scale
    return [float(value) for value in solution]


def _features(point: Point) -> tuple[float, float, float]:
    return 1.0, float(point.tokens), float(point.tokens * point.context)


@dataclass(frozen=True, slots=True)
class Curve:
    """A fit that goes through what was measured: times the ratio of the two, linear between sizes, constant beyond.

    sizes: rising.
    ratios: measured over fitted at each, the mean of its contexts.
    """

    fit: Fit
    sizes: tuple[int, ...]
    ratios: tuple[float, ...]

    @classmethod
    def through(cls, points: Sequence[Point]) -> Curve:
        fitted = fit(points)
        ratios: dict[int, list[float]] = {}
        for point in points:
            ratios.setdefault(point.tokens, []).append(point.seconds / fitted(point.tokens, point.context))
        sizes = tuple(sorted(ratios))
        return cls(fitted, sizes, tuple(sum(ratios[size]) / len(ratios[size]) for size in sizes))

    def __call__(self, num_tokens: float, context: float = 0.0) -> float:
        return self.fit(num_tokens, context) * self._ratio(num_tokens)

    def _ratio(self, num_tokens: float) -> float:
        above = bisect_right(self.sizes, num_tokens)
        if above == 0:
            return self.ratios[0]
        if above == len(self.sizes):
            return self.ratios[-1]
        low, high = self.sizes[above - 1], self.sizes[above]
        share = (num_tokens - low) / (high - low)
        return (1.0 - share) * self.ratios[above - 1] + share * self.ratios[above]


@dataclass(frozen=True, slots=True)
class CalibratedStages:
    """A `StageModel`: the measured curve, scaled by what the roofline says of the difference to the measured topology.

    At the measured topology it equals the curve. Chips and model must be those that were measured.
    """

    base: StageModel
    measured: Deployment
    attention: Curve
    ffn: Curve
    transfer: Curve
    head: Curve | None
    jitter: float

    @classmethod
    def of(cls, calibration: Calibration, base: StageModel, deployment: Deployment) -> CalibratedStages:
        """Stage times of a file, for `deployment`'s model and chips; ConfigError when it measured another model."""
        if calibration.model != deployment.model.name:
            raise ConfigError(
                f"--calibrate: the file measured {calibration.model!r}, the plan is for {deployment.model.name!r}"
            )
        return cls(
            base=base,
            measured=Deployment(
                model=deployment.model,
                attention_chip=deployment.attention_chip,
                ffn_chip=deployment.ffn_chip,
                topology=Topology.parse(calibration.topology),
                kv_dtype=deployment.kv_dtype,
                ranks_per_instance=calibration.ranks_per_instance,
            ),
            attention=Curve.through(calibration.t_A),
            ffn=Curve.through(calibration.t_F),
            transfer=Curve.through(calibration.t_C),
            head=Curve.through(calibration.t_head) if calibration.t_head else None,
            jitter=calibration.jitter,
        )

    def times(
        self, deployment: Deployment, context: int, num_tokens: float, prefill: Prefill | None = None
    ) -> StageTimes:
        """The measured curves know rows and what they attend to: prefill rows count as they did when measured."""
        if prefill is not None:
            pairs = num_tokens * context + prefill.num_tokens * prefill.context
            num_tokens += prefill.num_tokens
            context = max(1, round(pairs / num_tokens))
        here = self.base.times(deployment, context, num_tokens)
        there = self.base.times(self.measured, context, num_tokens)
        # The FFN's roofline is compared at the same gang batch, which the measured topology reaches with other tokens
        # per rank.
        gang = num_tokens * deployment.attention_ranks
        per_rank = max(1, round(gang / self.measured.attention_ranks))
        ffn_there = self.base.times(self.measured, context, per_rank)
        transfer = self.transfer(num_tokens) / there.transfer_s
        return StageTimes(
            attention_s=self.attention(num_tokens, context) * here.attention_s / there.attention_s,
            ffn_s=self.ffn(gang) * here.ffn_s / ffn_there.ffn_s,
            to_ffn_s=here.to_ffn_s * transfer,
            to_attention_s=here.to_attention_s * transfer,
            head_s=here.head_s if self.head is None else self.head(num_tokens) * here.head_s / there.head_s,
        )

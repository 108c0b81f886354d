"""Drawing tokens from rows of logits: the rule, in numpy. Written to be read; docs/sampling.md has it in words.

Every number that decides is exact or computed by IEEE operations in a fixed order, so that another implementation can
give the same ids: float32 weights by a polynomial, filters by whole numbers, the race in float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from afd.ops.philox import exponentials, logarithm
from afd.types import SamplingParams

Row = npt.NDArray[np.float32]
RowLogprobs = tuple[float, list[tuple[int, float]]]
"""(log-probability of the sampled token, top k of (token id, log-probability), most likely first)."""

ONE_MASS = 1 << 28
"""The mass of the largest logit."""
LOG2_E = 1.4426950408889634


class SampleRow(NamedTuple):
    """How the token of one row is drawn.

    position: the output index of that token.

    prompt_ids, output_ids: the tokens so far; needed where `params.needs_history`.
    """

    params: SamplingParams
    position: int
    prompt_ids: Sequence[int] = ()
    output_ids: Sequence[int] = ()

    @property
    def masked_ids(self) -> tuple[int, ...]:
        """Tokens that must not be drawn yet."""
        return self.params.stop_token_ids if self.position < self.params.min_tokens else ()

    @property
    def scale(self) -> float:
        """What a difference of logits is multiplied by for a power of two; 0 where the largest logit is taken."""
        return 0.0 if self.params.greedy else LOG2_E / self.params.temperature

    @property
    def least_mass(self) -> int:
        """min_p: tokens of a lesser mass are left out."""
        return math.ceil(self.params.min_p * ONE_MASS)


class SampledRows(NamedTuple):
    """One entry per row.

    ids: -1 where the logits hold a NaN or no finite largest one.
    """

    ids: list[int]
    logprobs: list[RowLogprobs | None]


def sample_row(logits: Row, row: SampleRow) -> tuple[int, RowLogprobs | None]:
    """logits [vocab], not changed -> the token, and its log-probabilities where they are asked for."""
    largest = logits.max()  # NaN if there is one
    if not np.isfinite(largest):
        return -1, None
    token = _draw(adjusted(logits, row), row)
    return token, row_logprobs(logits, token, row.params.logprobs) if row.params.logprobs >= 0 else None


def adjusted(logits: Row, row: SampleRow) -> Row:
    """The logits after logit_bias, penalties and min_tokens.

    Repetition penalty: CTRL's, over prompt and output (Keskar et al. 2019); presence and frequency: over the output.
    """
    params, x = row.params, logits.copy()
    for token, bias in params.logit_bias:
        x[token] += np.float32(bias)
    if params.needs_history:
        with np.errstate(over="ignore"):
            _penalise(x, row)
    x[list(row.masked_ids)] = -np.inf
    return x


def _penalise(x: Row, row: SampleRow) -> None:
    params = row.params
    prompt, output = (np.asarray(ids, np.int64) for ids in (row.prompt_ids, row.output_ids))
    if params.repetition_penalty != 1.0:
        seen, penalty = np.unique(np.concatenate((prompt, output))), np.float32(params.repetition_penalty)
        x[seen] = np.where(x[seen] > 0, x[seen] / penalty, x[seen] * penalty)
    tokens, counts = np.unique(output, return_counts=True)
    x[tokens] -= (params.frequency_penalty * counts + params.presence_penalty).astype(np.float32)


def _draw(x: Row, row: SampleRow) -> int:
    """One token of adjusted logits."""
    largest = x.max()
    if row.params.greedy or not np.isfinite(largest):
        return int(x.argmax())
    weights = weights_of(x, largest, row.scale)
    kept = filtered(x, weights, row) & (weights > 0)
    ids = np.flatnonzero(kept)
    numbers = exponentials(row.params.seed, row.params.choice, row.position, len(x))
    return int(ids[np.argmin(numbers[ids] / weights[ids])])


def filtered(x: Row, weights: Row, row: SampleRow) -> npt.NDArray[np.bool_]:
    """Which tokens top_k, min_p and top_p leave, each of what those before it left; at least one."""
    params, masses = row.params, masses_of(weights)
    kept = masses >= row.least_mass
    if params.top_k == 0 and params.top_p >= 1.0:
        return kept
    order = np.argsort(-x, kind="stable")  # falling; of equal logits the lower id comes first
    if params.top_k:
        order = order[: params.top_k]
    if params.top_p < 1.0:
        cumulative = np.cumsum(np.where(kept, masses, 0)[order])
        need = math.ceil(params.top_p * float(cumulative[-1]))
        order = order[: int(np.searchsorted(cumulative, need)) + 1]
    first = np.zeros_like(kept)
    first[order] = True
    return first & kept


def weights_of(x: Row, largest: np.float32, scale: float) -> Row:
    """2^((x - largest) * scale), the unnormalised probabilities: 1 for the largest logit, 0 below 2^-125."""
    with np.errstate(over="ignore"):
        power = (x - largest) * np.float32(scale)
    bounded = np.maximum(power, _LEAST_POWER)
    shifted = bounded + _MAGIC
    r = bounded - (shifted - _MAGIC)
    squared = r * r
    first, second, third, fourth, fifth = _POLYNOMIAL
    y = (np.float32(1.0) + first * r) + squared * ((second + third * r) + squared * (fourth + fifth * r))
    weights: Row = (y.view(np.int32) + (shifted.view(np.int32) << 23)).view(np.float32)
    weights[power < _LEAST_POWER] = 0.0
    return weights


_LEAST_POWER = np.float32(-125.0)
_MAGIC = np.float32(12582912.0)  # 1.5 * 2^23: adding it rounds to a whole number, which is then in the lowest bits
_POLYNOMIAL = np.array([6.93147004e-1, 2.40222424e-1, 5.55073358e-2, 9.67151299e-3, 1.32647273e-3], np.float32)
"""2^r = 1 + first * r + ... for r in [-1/2, 1/2], relative error below 2.2e-7."""


def masses_of(weights: Row) -> npt.NDArray[np.int64]:
    """Weights as whole numbers, whose sums do not depend on their order."""
    masses: npt.NDArray[np.int64] = np.rint(weights * np.float32(ONE_MASS)).astype(np.int64)
    return masses


def row_logprobs(logits: Row, token: int, top: int) -> RowLogprobs:
    """The log-probabilities of the model's own logits."""
    largest = logits.max()
    total = masses_of(weights_of(logits, largest, LOG2_E)).sum()
    normaliser = float(largest) + float(logarithm(np.array([float(total) / ONE_MASS]))[0])
    best = np.argsort(-logits, kind="stable")[:top]
    return float(logits[token]) - normaliser, [(int(i), float(logits[i]) - normaliser) for i in best]

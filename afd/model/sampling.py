"""Drawing the next token of every row of a batch.

Each row's result depends on that row's logits, parameters, history and output position only, never on the rows beside
it: all sums run over one row in numpy (whose row reductions do not depend on the number of rows), random numbers
are counter-based, and ties in the logits, ordinary in bfloat16, go to the lower token id.

Order of operations: logit_bias, repetition penalty (prompt and output), frequency and presence penalties (output),
min_tokens (stop ids masked); then temperature, top_k, min_p, top_p, each over what the ones before it left.
Log-probabilities are of the model's own logits, before any of these.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import log

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from afd import kernels
from afd.kernels import RowMax
from afd.model.philox import uniforms
from afd.types import SamplingParams

Row = npt.NDArray[np.float32]
History = tuple[Sequence[int], Sequence[int]]
"""(prompt_ids, output_ids) of one request."""
RowLogprobs = tuple[float, list[tuple[int, float]]]
"""(log-probability of the sampled token, top k of (token id, log-probability), most likely first)."""

FIRST_CANDIDATES = 512
"""Largest logits looked at first for top_p; a row whose nucleus is larger is sorted whole."""
_CHUNK = 256


@dataclass(frozen=True, slots=True)
class SampledBatch:
    """One entry per row.  ids: -1 where the logits hold NaN or no finite value (`invalid` lists those rows).

    top2_gaps: difference of the two largest raw logits, where asked for (the equality rule's measure).
    """

    ids: list[int]
    logprobs: list[RowLogprobs | None]
    invalid: tuple[int, ...] = ()
    top2_gaps: list[float] | None = None


def takes_largest(params: SamplingParams, position: int) -> bool:
    """True where the row's largest logit is all that matters (`Sampler.largest`)."""
    return params.greedy and params.logprobs < 0 and not _adjusts(params, position)


class Sampler:
    """Stateless; one instance per worker."""

    def largest(self, best: RowMax) -> SampledBatch:
        """The tokens of rows that all take their largest logit."""
        ids, valid = best.idx.numpy(), np.isfinite(best.largest.numpy())
        return SampledBatch(np.where(valid, ids, -1).tolist(), [None] * len(ids), _invalid(valid))

    def sample(
        self,
        logits: Tensor,
        params: Sequence[SamplingParams],
        positions: Sequence[int],
        histories: Sequence[History] | None = None,
        *,
        with_gaps: bool = False,
    ) -> SampledBatch:
        """logits [m, vocab] float32, not changed.  positions: output index of the token that each row draws.

        histories: needed where any row has `needs_history`; may be None otherwise.
        """
        logits = logits.detach().cpu()
        rows = logits.numpy()
        best = kernels.row_max(logits, torch.get_num_threads())
        ids, valid = best.idx.numpy(), np.isfinite(best.largest.numpy())
        drawn = [i for i, p in enumerate(params) if valid[i] and not (p.greedy and not _adjusts(p, positions[i]))]
        random = uniforms(
            [params[i].seed for i in drawn], [params[i].choice for i in drawn], [positions[i] for i in drawn]
        )
        for i, u in zip(drawn, random, strict=True):
            history = histories[i] if histories is not None else None
            row = _adjusted(rows[i], params[i], positions[i], history)
            ids[i] = row.argmax() if params[i].greedy else _draw(row, params[i], float(u))
        ids[~valid] = -1
        logprobs = [
            _row_logprobs(rows[i], int(ids[i]), p.logprobs) if p.logprobs >= 0 and valid[i] else None
            for i, p in enumerate(params)
        ]
        gaps = [_top2_gap(row) for row in rows] if with_gaps else None
        return SampledBatch(ids.tolist(), logprobs, _invalid(valid), gaps)


def _invalid(valid: npt.NDArray[np.bool_]) -> tuple[int, ...]:
    return tuple(np.flatnonzero(~valid).tolist())


def _adjusts(params: SamplingParams, position: int) -> bool:
    """True when the logits must be changed before anything is drawn."""
    return bool(params.needs_history or params.logit_bias or position < params.min_tokens)


def _adjusted(row: Row, params: SamplingParams, position: int, history: History | None) -> Row:
    """Bias, penalties and min_tokens on a copy of the row; the row itself if there are none."""
    if not _adjusts(params, position):
        return row
    row = row.copy()
    for token, bias in params.logit_bias:
        row[token] += bias
    if params.needs_history:
        assert history is not None, "penalties need the request's tokens"
        _penalise(row, params, history)
    if position < params.min_tokens and params.stop_token_ids:
        row[list(params.stop_token_ids)] = -np.inf
    return row


def _penalise(row: Row, params: SamplingParams, history: History) -> None:
    """Repetition over prompt and output (CTRL, Keskar et al. 2019); presence and frequency over the output."""
    prompt, output = (np.asarray(ids, np.int64) for ids in history)
    if params.repetition_penalty != 1.0:
        seen = np.unique(np.concatenate((prompt, output)))
        values = row[seen]
        row[seen] = np.where(values > 0, values / params.repetition_penalty, values * params.repetition_penalty)
    if len(output):
        tokens, counts = np.unique(output, return_counts=True)
        row[tokens] -= (params.frequency_penalty * counts + params.presence_penalty).astype(np.float32)


def _draw(row: Row, params: SamplingParams, u: float) -> int:
    """One token from an adjusted row, by inverting the cumulative distribution at u in [0, 1)."""
    largest = float(row.max())
    if params.top_k == 0 and params.top_p >= 1.0 and params.min_p == 0.0:
        weights = _weights(row, largest, params.temperature)
        return _invert(weights, u)
    values, kept = _candidates(row, params, largest)
    rank = _invert(kept, u)
    # Only values were sorted; of equal logits, the one of the right rank by token id is meant.
    value = values[rank]
    first = int(np.searchsorted(-values, -value))
    return int(np.flatnonzero(row == value)[rank - first])


def _candidates(row: Row, params: SamplingParams, largest: float) -> tuple[Row, Row]:
    """(logits in falling order, weights of those kept): what top_k, min_p and top_p leave, at least one."""
    vocab = len(row)
    num_first = min(params.top_k or FIRST_CANDIDATES, vocab)
    values = -np.sort(-np.partition(row, vocab - num_first)[vocab - num_first :])
    weights = _weights(values, largest, params.temperature)
    if params.top_k == 0 and num_first < vocab:
        floor = weights[-1] >= params.min_p  # weights are relative to the largest: it has weight 1
        total = _weights(row, largest, params.temperature)
        mass = _total(total[total >= params.min_p])
        if floor and _total(weights) < params.top_p * mass:
            values = -np.sort(-row)
            weights = _weights(values, largest, params.temperature)
    else:
        mass = _total(weights[weights >= params.min_p])
    num_kept = max(int(np.count_nonzero(weights >= params.min_p)), 1)
    if params.top_p < 1.0:
        cumulative = np.cumsum(weights[:num_kept], dtype=np.float64)
        num_kept = min(int(np.searchsorted(cumulative, params.top_p * mass)) + 1, num_kept)
    return values, weights[:num_kept]


def _weights(values: Row, largest: float, temperature: float) -> Row:
    """exp((value - largest) / temperature): unnormalised probabilities, 1 for the largest."""
    with np.errstate(over="ignore"):  # a tiny temperature sends all but the largest to exp(-inf) = 0
        weights: Row = np.exp((values - np.float32(largest)) / np.float32(temperature))
        return weights


def _invert(weights: Row, u: float) -> int:
    """Smallest index whose cumulative weight exceeds u * total; sums chunks first, so that little is cumulated."""
    chunks = np.add.reduceat(weights, np.arange(0, len(weights), _CHUNK), dtype=np.float64)
    cumulative = np.cumsum(chunks)
    target = u * cumulative[-1]
    chunk = min(int(np.searchsorted(cumulative, target, side="right")), len(chunks) - 1)
    start = chunk * _CHUNK
    inside = np.cumsum(weights[start : start + _CHUNK], dtype=np.float64) + (cumulative[chunk - 1] if chunk else 0.0)
    index = min(start + int(np.searchsorted(inside, target, side="right")), len(weights) - 1)
    while index and weights[index] == 0.0:  # rounding at the very end must not name an impossible token
        index -= 1
    return index


def _row_logprobs(row: Row, token: int, top: int) -> RowLogprobs:
    largest = row.max()
    normaliser = float(largest) + log(_total(np.exp(row - largest)))
    best = _top_ids(row, top)
    return float(row[token]) - normaliser, [(int(i), float(row[i]) - normaliser) for i in best]


def _total(weights: Row) -> float:
    return float(weights.sum(dtype=np.float64))


def _top_ids(row: Row, count: int) -> npt.NDArray[np.int64]:
    """Ids of the `count` largest logits, largest first, ties by id."""
    count = min(count, len(row))
    if count == 0:
        return np.empty(0, np.int64)
    threshold = np.partition(row, len(row) - count)[len(row) - count]
    ids = np.flatnonzero(row >= threshold)
    return ids[np.argsort(-row[ids], kind="stable")][:count]


def _top2_gap(row: Row) -> float:
    second, first = np.partition(row, len(row) - 2)[-2:]
    return float(first - second)

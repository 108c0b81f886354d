"""The sampler of an attention worker: the next token of every row of a batch.

The rule, docs/sampling.md, is carried out by `Ops.sample`: a token is a pure function of (seed, choice, output
position, logits, parameters), whatever rows are beside it, and on whatever processor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from afd.ops.ops import Ops, RowMax
from afd.ops.sample_rows import RowLogprobs, SampleRow
from afd.types import SamplingParams

History = tuple[Sequence[int], Sequence[int]]
"""(prompt_ids, output_ids) of one request."""

__all__ = ["History", "RowLogprobs", "SampledBatch", "Sampler", "takes_largest"]


@dataclass(frozen=True, slots=True)
class SampledBatch:
    """One entry per row.

    ids: -1 where the logits hold NaN or no finite value (`invalid` lists those rows).

    top2_gaps: difference of the two largest raw logits, where asked for (the equality rule's measure).
    """

    ids: list[int]
    logprobs: list[RowLogprobs | None]
    invalid: tuple[int, ...] = ()
    top2_gaps: list[float] | None = None


def takes_largest(params: SamplingParams, position: int) -> bool:
    """True where the row's largest logit is all that matters (`Sampler.largest`)."""
    adjusts = params.needs_history or params.logit_bias or position < params.min_tokens
    return params.greedy and params.logprobs < 0 and not adjusts


class Sampler:
    """Stateless; one instance per worker."""

    def __init__(self, ops: Ops):
        self._ops = ops

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
        """logits [m, vocab] float32, not changed.

        positions: output index of the token that each row draws.

        histories: needed where any row has `needs_history`; may be None otherwise.
        """
        if histories is None:
            assert not any(p.needs_history for p in params), "penalties need the request's tokens"
            rows = [SampleRow(p, position) for p, position in zip(params, positions, strict=True)]
        else:
            rows = [SampleRow(p, at, *ids) for p, at, ids in zip(params, positions, histories, strict=True)]
        ids, logprobs = self._ops.sample(logits, rows)
        gaps = [_top2_gap(row) for row in logits] if with_gaps else None
        return SampledBatch(ids, logprobs, tuple(i for i, token in enumerate(ids) if token < 0), gaps)


def _invalid(valid: np.ndarray[tuple[int], np.dtype[np.bool_]]) -> tuple[int, ...]:
    return tuple(np.flatnonzero(~valid).tolist())


def _top2_gap(row: Tensor) -> float:
    first, second = row.topk(2).values.tolist()
    return float(first - second)

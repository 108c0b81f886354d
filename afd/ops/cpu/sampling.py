"""Sampling by the C++ library: rows of parameters as its structures."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence
from ctypes import c_int32

import numpy as np
from torch import Tensor

from afd.ops.cpu.abi import OUT_OF_MEMORY, AfdSampled, AfdSampleRow
from afd.ops.sample_rows import RowLogprobs, SampledRows, SampleRow

_LOW, _WORD, _MOST = 0xFFFFFFFFFFFFFFFF, 0xFFFFFFFF, 0x7FFFFFFF


def sample(library: ctypes.CDLL, isa: int, logits: Tensor, rows: Sequence[SampleRow], num_threads: int) -> SampledRows:
    """See `Ops.sample`. IndexError for a token that is not in the vocabulary."""
    lists: list[array[int] | array[float]] = []  # kept alive until the call is over
    native = (AfdSampleRow * len(rows))(*[_row(row, lists) for row in rows])
    num_top = max([row.params.logprobs for row in rows], default=0)
    tokens = np.empty(len(rows), np.int64)
    logprobs = np.empty((len(rows), 1 + max(num_top, 0)))
    top_ids = np.empty((len(rows), max(num_top, 0)), np.int32)
    results = AfdSampled(tokens.ctypes.data, logprobs.ctypes.data, top_ids.ctypes.data, max(num_top, 0))
    detail = (c_int32 * 2)()
    status = library.afd_sample(
        isa,
        num_threads,
        logits.data_ptr(),
        logits.stride(0),
        logits.shape[1],
        native,
        len(rows),
        ctypes.byref(results),
        detail,
    )
    if status == OUT_OF_MEMORY:
        raise MemoryError("no memory to sample in")
    if status:
        raise IndexError(f"row {detail[0]} names token {detail[1]} of a vocabulary of {logits.shape[1]}")
    ids = tokens.tolist()
    found: list[RowLogprobs | None] = [None] * len(rows)
    for i, row in enumerate(rows):
        if row.params.logprobs >= 0 and ids[i] >= 0:
            num = min(row.params.logprobs, logits.shape[1])
            values = logprobs[i].tolist()
            found[i] = values[0], list(zip(top_ids[i, :num].tolist(), values[1 : 1 + num], strict=True))
    return SampledRows(ids, found)


def _row(row: SampleRow, lists: list[array[int] | array[float]]) -> AfdSampleRow:
    def pointer(values: array[int] | array[float]) -> int | None:
        if not values:
            return None
        lists.append(values)
        return values.buffer_info()[0]

    params = row.params
    prompt: Sequence[int] = row.prompt_ids if params.repetition_penalty != 1.0 else ()
    output: Sequence[int] = row.output_ids if params.needs_history else ()
    return AfdSampleRow(
        pointer(array("i", prompt)) if prompt else None,
        pointer(array("i", output)) if output else None,
        pointer(array("i", [token for token, _ in params.logit_bias])) if params.logit_bias else None,
        pointer(array("f", [bias for _, bias in params.logit_bias])) if params.logit_bias else None,
        pointer(array("i", row.masked_ids)) if row.masked_ids else None,
        len(prompt),
        len(output),
        len(params.logit_bias),
        len(row.masked_ids),
        params.seed & _LOW,
        row.position & _WORD,
        params.choice & _WORD,
        params.top_p,
        params.frequency_penalty,
        params.presence_penalty,
        params.repetition_penalty,
        row.scale,
        min(params.top_k, _MOST),
        row.least_mass,
        params.logprobs,
    )

"""Decode stages of a GPU's attention worker as CUDA graphs: a layer's dozens of launches become one.

What lies between combine and dispatch (`AttentionHalf.layer`) is captured for each layer, size of batch, length of
block tables and pipeline stream. A graph reads and writes fixed memory, so a step moves into that of its shape: what is
copied once a step are the batch and the residual, once a layer the partials; results are sent from where the graph puts
them. Sizes are rounded up: rows beyond the batch compute on what is there, and write to the cache's spare block.

A shape's first steps run as without graphs (libraries set themselves up, memory gets its size, and it may not come
again), the next one captures, later ones replay. Unverified on hardware (docs/operations.md).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from afd.kv.cache import KVCache
from afd.model.batch import AttentionBatch
from afd.model.halves import AttentionHalf, Dispatch

if TYPE_CHECKING:
    from torch.cuda import _POOL_HANDLE

log = logging.getLogger(__name__)

MAX_ROWS = 256
"""Sequences of the largest batch: with more, a layer computes longer than its launches take."""

MAX_SHAPES = 24
"""Captured shapes of one pipeline stream at most; the one that was used least recently makes room."""

LAUNCHED_STEPS = 4
"""Steps of a shape before it is captured, which waits for the GPU once a layer."""


def rounded(size: int) -> int:
    """The next of 1, 2, 3, 4, 6, 8, 12, 16, ...: few shapes, and never more than half as much again to compute."""
    power = 1 << (size - 1).bit_length()
    return 3 * power // 4 if size <= 3 * power // 4 and power >= 4 else power


@dataclass(slots=True)
class _Stage:
    """A layer of a shape. captured: the graph, and what it writes to."""

    num_launched: int = 0
    captured: tuple[torch.cuda.CUDAGraph, Dispatch] | None = None


@dataclass(slots=True)
class _Shape:
    """Fixed memory of one pipeline stream's batches of a size.

    batch: block tables of `columns` blocks.  x [rows, hidden].
    partials: as many as there were at a time.
    results: by whether experts are chosen: what all layers of that kind write to.
    stages: by layer and number of partials.
    """

    batch: AttentionBatch
    x: Tensor
    partials: list[Tensor] = field(default_factory=list)
    results: dict[bool, Dispatch] = field(default_factory=dict)
    stages: dict[tuple[int, int], _Stage] = field(default_factory=dict)


class DecodeGraphs:
    """Captured decode steps of one attention worker.

    Main thread only, within `CudaDevice.stage` of the stream, in torch.inference_mode().

    cache: with a spare block.
    launched_steps: see LAUNCHED_STEPS; at least 1.
    """

    def __init__(self, half: AttentionHalf, cache: KVCache, launched_steps: int = LAUNCHED_STEPS):
        self.num_captured = 0
        self.num_replayed = 0
        self._half = half
        self._cache = cache
        self._launched_steps = launched_steps
        self._shapes: dict[int, dict[tuple[int, int], _Shape]] = {}  # by stream; by rows and columns, oldest use first
        self._steps: dict[int, _Shape] = {}  # by stream: of the step that is under way
        self._pools: dict[int, _POOL_HANDLE] = {}  # by stream: its graphs run one after the other and share memory
        self._given_up = False

    def takes(self, batch: AttentionBatch) -> bool:
        """Whether `layer` is for this batch: one token of each sequence."""
        return not self._given_up and batch.max_query_len == 1 and batch.num_tokens <= MAX_ROWS

    def layer(
        self, stream: int, layer_idx: int, x: Tensor, batch: AttentionBatch, partials: Sequence[Tensor]
    ) -> tuple[Tensor, Dispatch]:
        """What `AttentionHalf.layer` returns; and the residual [n, hidden], which has moved if the step began here.

        The results are overwritten by the stream's next layer.
        """
        if layer_idx == 0:
            shape = self._steps[stream] = self._enter(stream, x, batch)
        else:
            shape = self._steps[stream]
        num_rows = batch.num_tokens
        self._place(shape, partials)
        key = layer_idx, len(partials)
        stage = shape.stages.setdefault(key, _Stage())
        if stage.captured is None and stage.num_launched >= self._launched_steps:
            stage.captured = self._capture(stream, shape, key)
        if stage.captured is None:
            dispatch = self._compute(shape, key)
            shape.results.setdefault(dispatch.expert_ids is not None, dispatch)
            stage.num_launched += 1
        else:
            graph, dispatch = stage.captured
            graph.replay()
            self.num_replayed += 1
        return shape.x[:num_rows], _first_rows(dispatch, layer_idx, num_rows)

    def _enter(self, stream: int, x: Tensor, batch: AttentionBatch) -> _Shape:
        """Move a step that begins into the memory of its shape."""
        num_rows, columns = batch.block_table.shape
        key = rounded(num_rows), rounded(columns)
        shapes = self._shapes.setdefault(stream, {})
        shape = shapes.pop(key, None)
        if shape is None:
            if len(shapes) >= MAX_SHAPES:  # nothing of this stream runs: its last step was fetched
                del shapes[next(iter(shapes))]
            shape = _Shape(batch.with_room(*key), x.new_zeros(key[0], x.shape[1]))
        shapes[key] = shape
        shape.batch.assign(batch, self._cache.spare_slots)
        shape.x.zero_()  # rows beyond the batch do not grow from step to step
        shape.x[:num_rows].copy_(x)
        return shape

    def _place(self, shape: _Shape, partials: Sequence[Tensor]) -> None:
        for idx, partial in enumerate(partials):
            if idx == len(shape.partials):
                shape.partials.append(partial.new_zeros(shape.x.shape))
            shape.partials[idx][: partial.shape[0]].copy_(partial)

    def _compute(self, shape: _Shape, key: tuple[int, int]) -> Dispatch:
        layer_idx, num_partials = key
        return self._half.layer(layer_idx, shape.x, shape.batch, self._cache, shape.partials[:num_partials])

    def _capture(
        self, stream: int, shape: _Shape, key: tuple[int, int]
    ) -> tuple[torch.cuda.CUDAGraph, Dispatch] | None:
        """The graph of a layer, and what it writes to; nothing is computed. None: there will be no graphs."""
        pool = self._pools.setdefault(stream, torch.cuda.graph_pool_handle())
        graph = torch.cuda.CUDAGraph()
        self.num_captured += 1
        try:
            with torch.cuda.graph(
                graph, pool=pool, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"
            ):
                made = self._compute(shape, key)
                results = shape.results[made.expert_ids is not None]
                for kept, new in zip(_tensors(results), _tensors(made), strict=True):
                    kept.copy_(new)
        except RuntimeError as error:
            self._give_up(key[0], error)
            return None
        return graph, results

    def _give_up(self, layer_idx: int, error: RuntimeError) -> None:
        """Launch everything from now on; steps under way hold what they need."""
        cause = error.__context__ or error  # the end of a capture that had failed raises, too
        self._given_up = True
        log.warning("CUDA graphs are off, layer %d cannot be captured: %s", layer_idx, cause)
        torch.cuda.synchronize()
        self._shapes.clear()
        self._steps.clear()
        self._pools.clear()


def _tensors(dispatch: Dispatch) -> list[Tensor]:
    parts = (dispatch.rows, dispatch.expert_ids, dispatch.expert_weights)
    return [part for part in parts if part is not None]


def _first_rows(dispatch: Dispatch, layer_idx: int, num_rows: int) -> Dispatch:
    ids, weights = dispatch.expert_ids, dispatch.expert_weights
    return Dispatch(
        layer_idx,
        dispatch.rows[:num_rows],
        None if ids is None else ids[:num_rows],
        None if weights is None else weights[:num_rows],
    )

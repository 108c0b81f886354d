"""A transfer slot seen as arrays: cached numpy views of the payload sections, so that a transfer allocates none."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from stepmesh.errors import ConfigError
from stepmesh.layout import HEADER_BYTES, PayloadLayout, frame_bytes
from stepmesh.types import DispatchParts, RowIdx, Rows, WireDtype

_MAX_CACHED_SHAPES = 64  # a decoding stream changes its shape slowly, a prefill a few times, sparse ones all the time


class DispatchView(NamedTuple):
    """Sections of a dispatch in a slot, and the sizes of payload and frame."""

    parts: DispatchParts
    payload_bytes: int
    frame_bytes: int


class CombineView(NamedTuple):
    """Sections of a combine in a slot, and the sizes of payload and frame."""

    rows: Rows  # [num_tokens, hidden]
    scales: npt.NDArray[np.float32] | None  # [num_tokens, ceil(hidden / 128)], FP8 only
    payload_bytes: int
    frame_bytes: int


class Slot:
    """Views of one slot's memory. The same shape gives the same view objects until the cache turns over."""

    __slots__ = ("_combine", "_dispatch", "_layout", "memory", "payload")

    def __init__(self, memory: memoryview, layout: PayloadLayout) -> None:
        self.memory = memory
        self.payload = memory[HEADER_BYTES:]
        self._layout = layout
        self._dispatch: dict[tuple[int, int, bool], DispatchView] = {}
        self._combine: dict[int, CombineView] = {}

    def dispatch(self, num_tokens: int, top_k: int, sparse: bool = False) -> DispatchView:
        """Views of a dispatch's sections. Raises ConfigError when the shape exceeds the slot."""
        view = self._dispatch.get((num_tokens, top_k, sparse))
        if view is None:
            view = self._map_dispatch(num_tokens, top_k, sparse)
            if len(self._dispatch) >= _MAX_CACHED_SHAPES:
                self._dispatch.clear()
            self._dispatch[num_tokens, top_k, sparse] = view
        return view

    def combine(self, num_tokens: int) -> CombineView:
        """Views of a combine's sections. Raises ConfigError when the shape exceeds the slot."""
        view = self._combine.get(num_tokens)
        if view is None:
            view = self._map_combine(num_tokens)
            if len(self._combine) >= _MAX_CACHED_SHAPES:
                self._combine.clear()
            self._combine[num_tokens] = view
        return view

    def _map_dispatch(self, num_tokens: int, top_k: int, sparse: bool) -> DispatchView:
        layout = self._layout
        if not 0 <= num_tokens <= layout.max_tokens or not 0 <= top_k <= layout.max_top_k:
            raise ConfigError(
                f"{num_tokens} tokens x top_k {top_k} exceed the slot ({layout.max_tokens} x {layout.max_top_k})"
            )
        at = layout.dispatch(num_tokens, top_k, sparse=sparse)
        scales = expert_ids = expert_weights = row_idx = None
        if layout.dispatch_dtype is WireDtype.FP8_E4M3:
            scales = self._array(at.scales, np.float32, num_tokens, layout.num_scale_groups)
        if top_k:
            expert_ids = self._array(at.expert_ids, np.int32, num_tokens, top_k)
            expert_weights = self._array(at.expert_weights, np.float32, num_tokens, top_k)
        if sparse:
            row_idx = np.frombuffer(self.payload, dtype=np.int32, count=num_tokens, offset=at.row_idx)
        rows = self._array(at.rows, layout.dispatch_dtype.numpy, num_tokens, layout.hidden)
        return DispatchView(
            DispatchParts(rows, scales, expert_ids, expert_weights, row_idx), at.total, frame_bytes(at.total)
        )

    def _map_combine(self, num_tokens: int) -> CombineView:
        layout = self._layout
        if not 0 <= num_tokens <= layout.max_tokens:
            raise ConfigError(f"{num_tokens} tokens exceed the slot ({layout.max_tokens})")
        at = layout.combine(num_tokens)
        scales = None
        if layout.combine_dtype is WireDtype.FP8_E4M3:
            scales = self._array(at.scales, np.float32, num_tokens, layout.num_scale_groups)
        rows = self._array(at.rows, layout.combine_dtype.numpy, num_tokens, layout.hidden)
        return CombineView(rows, scales, at.total, frame_bytes(at.total))

    def _array(self, offset: int, dtype: npt.DTypeLike, rows: int, columns: int) -> npt.NDArray[Any]:
        flat = np.frombuffer(self.payload, dtype=dtype, count=rows * columns, offset=offset)
        return flat.reshape(rows, columns)


def copy_parts(target: DispatchParts, source: DispatchParts) -> None:
    """Copy all sections into a slot. Raises ConfigError before the first difference is written."""
    rows, scales, expert_ids, expert_weights, row_idx = source
    to_rows, to_scales, to_expert_ids, to_expert_weights, to_row_idx = target
    copy_section(to_rows, rows, "rows")
    # What this layout and shape lack is None at both ends: no call for that.
    if scales is not to_scales:
        copy_section(to_scales, scales, "scales")
    if expert_ids is not to_expert_ids:
        copy_section(to_expert_ids, expert_ids, "expert_ids")
    if expert_weights is not to_expert_weights:
        copy_section(to_expert_weights, expert_weights, "expert_weights")
    if row_idx is not to_row_idx:
        copy_section(to_row_idx, row_idx, "row_idx")


def take_parts(target: DispatchParts, source: DispatchParts, row_idx: RowIdx) -> None:
    """Gather the rows `row_idx` (checked before) of all sections into a sparse dispatch's slot. Raises ConfigError."""
    _take_section(target.rows, source.rows, row_idx, "rows")
    _take_section(target.scales, source.scales, row_idx, "scales")
    _take_section(target.expert_ids, source.expert_ids, row_idx, "expert_ids")
    _take_section(target.expert_weights, source.expert_weights, row_idx, "expert_weights")
    assert target.row_idx is not None
    target.row_idx[...] = row_idx


def rises_below(row_idx: RowIdx, limit: int) -> bool:
    """Whether they are indices that rise strictly from 0 or more and stay below `limit`."""
    if row_idx.ndim != 1 or row_idx.dtype.kind != "i":
        return False
    if row_idx.size == 0:
        return True
    return bool(row_idx[0] >= 0 and row_idx[-1] < limit and (row_idx[1:] > row_idx[:-1]).all())


def copy_section(target: npt.NDArray[Any] | None, source: npt.NDArray[Any] | None, name: str) -> None:
    """Copy one section unless it lies there already. Raises ConfigError for a missing part, shape or dtype."""
    if source is target:
        return
    if source is None or target is None:
        raise ConfigError(f"{name} must {'not ' if target is None else ''}be given for this layout and shape")
    if source.shape != target.shape or source.dtype != target.dtype:
        raise ConfigError(f"{name} is {source.dtype}{list(source.shape)}, expected {target.dtype}{list(target.shape)}")
    target[...] = source  # half the overhead of np.copyto


def _take_section(target: npt.NDArray[Any] | None, source: npt.NDArray[Any] | None, row_idx: RowIdx, name: str) -> None:
    if source is None and target is None:
        return
    if source is None or target is None:
        raise ConfigError(f"{name} must {'not ' if target is None else ''}be given for this layout and shape")
    if source.shape[1:] != target.shape[1:] or source.dtype != target.dtype:
        raise ConfigError(
            f"{name} is {source.dtype}{list(source.shape)}, expected {target.dtype}[num_tokens, {target.shape[1]}]"
        )
    # "clip" writes straight into the slot; "raise" would go through a buffer, and the indices are checked already.
    np.take(source, row_idx, axis=0, out=target, mode="clip")

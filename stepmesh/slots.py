"""A transfer slot seen as arrays: cached numpy views of the payload sections, so that a transfer allocates none."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from stepmesh.errors import ConfigError
from stepmesh.layout import HEADER_BYTES, PayloadLayout
from stepmesh.types import DispatchParts, Rows, WireDtype

_MAX_CACHED_SHAPES = 16  # a decoding stream changes its shape slowly; a prefill only a few times


class DispatchView(NamedTuple):
    """Sections of a dispatch in a slot, and the payload's size."""

    parts: DispatchParts
    payload_bytes: int


class CombineView(NamedTuple):
    """Sections of a combine in a slot, and the payload's size."""

    rows: Rows  # [num_tokens, hidden]
    scales: npt.NDArray[np.float32] | None  # [num_tokens, ceil(hidden / 128)], FP8 only
    payload_bytes: int


class Slot:
    """Views of one slot's memory. The same shape gives the same view objects until the cache turns over."""

    __slots__ = ("_combine", "_dispatch", "_layout", "memory", "payload")

    def __init__(self, memory: memoryview, layout: PayloadLayout) -> None:
        self.memory = memory
        self.payload = memory[HEADER_BYTES:]
        self._layout = layout
        self._dispatch: dict[tuple[int, int], DispatchView] = {}
        self._combine: dict[int, CombineView] = {}

    def dispatch(self, num_tokens: int, top_k: int) -> DispatchView:
        """Views of a dispatch's sections. Raises ConfigError when the shape exceeds the slot."""
        view = self._dispatch.get((num_tokens, top_k))
        if view is None:
            view = self._map_dispatch(num_tokens, top_k)
            if len(self._dispatch) >= _MAX_CACHED_SHAPES:
                self._dispatch.clear()
            self._dispatch[num_tokens, top_k] = view
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

    def _map_dispatch(self, num_tokens: int, top_k: int) -> DispatchView:
        layout = self._layout
        if not 0 <= num_tokens <= layout.max_tokens or not 0 <= top_k <= layout.max_top_k:
            raise ConfigError(
                f"{num_tokens} tokens x top_k {top_k} exceed the slot ({layout.max_tokens} x {layout.max_top_k})"
            )
        at = layout.dispatch(num_tokens, top_k)
        scales = expert_ids = expert_weights = None
        if layout.dispatch_dtype is WireDtype.FP8_E4M3:
            scales = self._array(at.scales, np.float32, num_tokens, layout.num_scale_groups)
        if top_k:
            expert_ids = self._array(at.expert_ids, np.int32, num_tokens, top_k)
            expert_weights = self._array(at.expert_weights, np.float32, num_tokens, top_k)
        rows = self._array(at.rows, layout.dispatch_dtype.numpy, num_tokens, layout.hidden)
        return DispatchView(DispatchParts(rows, scales, expert_ids, expert_weights), at.total)

    def _map_combine(self, num_tokens: int) -> CombineView:
        layout = self._layout
        if not 0 <= num_tokens <= layout.max_tokens:
            raise ConfigError(f"{num_tokens} tokens exceed the slot ({layout.max_tokens})")
        at = layout.combine(num_tokens)
        scales = None
        if layout.combine_dtype is WireDtype.FP8_E4M3:
            scales = self._array(at.scales, np.float32, num_tokens, layout.num_scale_groups)
        rows = self._array(at.rows, layout.combine_dtype.numpy, num_tokens, layout.hidden)
        return CombineView(rows, scales, at.total)

    def _array(self, offset: int, dtype: npt.DTypeLike, rows: int, columns: int) -> npt.NDArray[Any]:
        flat = np.frombuffer(self.payload, dtype=dtype, count=rows * columns, offset=offset)
        return flat.reshape(rows, columns)


def copy_section(target: npt.NDArray[Any] | None, source: npt.NDArray[Any] | None, name: str) -> None:
    """Copy one section unless it lies there already. Raises ConfigError for a missing part, shape or dtype."""
    if source is target:
        return
    if source is None or target is None:
        raise ConfigError(f"{name} must {'not ' if target is None else ''}be given for this layout and shape")
    if source.shape != target.shape or source.dtype != target.dtype:
        raise ConfigError(f"{name} is {source.dtype}{list(source.shape)}, expected {target.dtype}{list(target.shape)}")
    np.copyto(target, source)

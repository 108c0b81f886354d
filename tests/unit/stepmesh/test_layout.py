"""Sections never overlap, are aligned, and fit their slot; the arithmetic is known to the docs."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stepmesh.errors import ConfigError
from stepmesh.layout import (
    HEADER_BYTES,
    PAGE_BYTES,
    SECTION_ALIGN,
    PayloadLayout,
    align,
    frame_bytes,
    trailer_offset,
)
from stepmesh.types import WireDtype

layouts = st.builds(
    PayloadLayout,
    hidden=st.integers(1, 8192),
    max_tokens=st.integers(1, 512),
    max_top_k=st.integers(0, 16),
    dispatch_dtype=st.sampled_from(WireDtype),
    combine_dtype=st.sampled_from(WireDtype),
)


@given(layouts, st.data())
@settings(max_examples=150, derandomize=True, deadline=None)
def test_sections_are_aligned_disjoint_and_fit(layout: PayloadLayout, data: st.DataObject) -> None:
    num_tokens = data.draw(st.integers(0, layout.max_tokens))
    top_k = data.draw(st.integers(0, layout.max_top_k))
    sparse = data.draw(st.booleans())
    at = layout.dispatch(num_tokens, top_k, sparse=sparse)
    sizes = [
        (at.rows, num_tokens * layout.hidden * layout.dispatch_dtype.itemsize),
        (at.scales, num_tokens * layout.num_scale_groups * 4 if layout.dispatch_dtype is WireDtype.FP8_E4M3 else 0),
        (at.expert_ids, num_tokens * top_k * 4),
        (at.expert_weights, num_tokens * top_k * 4),
        (at.row_idx, num_tokens * 4 if sparse else 0),
    ]
    end = 0
    for offset, size in sizes:
        assert offset % SECTION_ALIGN == 0
        if size:
            assert end <= offset < end + SECTION_ALIGN
            end = offset + size
    assert at.total == end
    assert frame_bytes(at.total) <= layout.dispatch_slot_bytes
    combine = layout.combine(num_tokens)
    assert frame_bytes(combine.total) <= layout.combine_slot_bytes
    assert layout.dispatch_slot_bytes % PAGE_BYTES == layout.combine_slot_bytes % PAGE_BYTES == 0


def test_the_worked_example_of_the_docstring() -> None:
    layout = PayloadLayout(576, 3, 2, WireDtype.FP8_E4M3, WireDtype.BF16)
    assert layout.num_scale_groups == 5  # the last group is short: 576 = 4.5 x 128
    assert tuple(layout.dispatch(3, 2)) == (0, 1728, 1792, 1856, 1920, 1880)
    assert tuple(layout.dispatch(3, 2, sparse=True)) == (0, 1728, 1792, 1856, 1920, 1932)
    assert trailer_offset(1880) == HEADER_BYTES + 1880
    assert layout.combine(3) == (0, align(3 * 576 * 2, 64), 3 * 576 * 2)


def test_no_tokens_take_no_bytes() -> None:
    layout = PayloadLayout(7168, 128, 8, WireDtype.FP8_E4M3, WireDtype.BF16)
    assert layout.dispatch(0, 8).total == layout.combine(0).total == 0
    assert frame_bytes(0) == HEADER_BYTES + 8


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ((0, 1, 0), "hidden 0"),
        ((1, 0, 0), "max_tokens 0"),
        ((1, 1, -1), "max_top_k -1"),
        ((1 << 20, 1 << 20, 0), "does not fit the header's 32 bits"),
    ],
)
def test_impossible_layouts_are_refused(fields: tuple[int, int, int], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        PayloadLayout(*fields, WireDtype.FP32, WireDtype.FP32)


@given(st.integers(0, 1 << 40), st.sampled_from([1, 8, 64, 4096]))
@settings(max_examples=50, derandomize=True)
def test_align_is_the_least_multiple_not_below(offset: int, to: int) -> None:
    aligned = align(offset, to)
    assert aligned % to == 0
    assert 0 <= aligned - offset < to

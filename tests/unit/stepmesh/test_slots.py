"""Views of a slot: cached, exact, and never broadcast."""

from __future__ import annotations

import numpy as np
import pytest

from stepmesh.errors import ConfigError
from stepmesh.layout import PayloadLayout, frame_bytes
from stepmesh.slots import Slot, copy_section
from stepmesh.types import WireDtype

LAYOUT = PayloadLayout(200, 8, 3, WireDtype.FP8_E4M3, WireDtype.BF16)


def slot() -> Slot:
    return Slot(memoryview(bytearray(LAYOUT.dispatch_slot_bytes)), LAYOUT)


def test_views_lie_where_the_layout_says() -> None:
    one = slot()
    view, payload_bytes, whole = one.dispatch(5, 3)
    at = LAYOUT.dispatch(5, 3)
    assert (payload_bytes, whole) == (at.total, frame_bytes(at.total))
    assert view.rows.shape == (5, 200)
    assert view.scales is not None and view.scales.shape == (5, 2)
    assert view.expert_ids is not None and view.expert_weights is not None
    view.rows[...], view.scales[...], view.expert_ids[...], view.expert_weights[...] = 7, 1.5, -3, 0.25
    assert bytes(one.payload[:1000]) == b"\x07" * 1000
    assert np.frombuffer(one.payload, np.float32, 10, at.scales).tolist() == [1.5] * 10
    assert np.frombuffer(one.payload, np.int32, 15, at.expert_ids).tolist() == [-3] * 15
    assert np.frombuffer(one.payload, np.float32, 15, at.expert_weights).tolist() == [0.25] * 15


def test_a_combine_view() -> None:
    view = slot().combine(4)
    assert (view.rows.shape, view.rows.dtype, view.scales) == ((4, 200), np.uint16, None)
    assert view.payload_bytes == 4 * 200 * 2


def test_the_same_shape_gives_the_same_objects() -> None:
    one = slot()
    assert one.dispatch(5, 3) is one.dispatch(5, 3)
    assert one.combine(5) is one.combine(5)
    assert one.dispatch(5, 3) is not one.dispatch(4, 3)


def test_the_cache_is_bounded() -> None:
    layout = PayloadLayout(4, 100, 0, WireDtype.FP32, WireDtype.FP32)
    one = Slot(memoryview(bytearray(layout.dispatch_slot_bytes)), layout)
    for num_tokens in range(101):
        one.dispatch(num_tokens, 0)
        one.combine(num_tokens)
    assert len(one._dispatch) <= 64
    assert len(one._combine) <= 64


@pytest.mark.parametrize(("num_tokens", "top_k"), [(9, 0), (-1, 0), (1, 4), (1, -1)])
def test_shapes_beyond_the_slot_are_refused(num_tokens: int, top_k: int) -> None:
    with pytest.raises(ConfigError, match="exceed the slot"):
        slot().dispatch(num_tokens, top_k)
    if top_k == 0:
        with pytest.raises(ConfigError, match="exceed the slot"):
            slot().combine(num_tokens)


def test_copies_are_exact_or_refused() -> None:
    target = np.zeros((2, 3), np.float32)
    copy_section(target, np.ones((2, 3), np.float32), "rows")
    assert target.sum() == 6
    copy_section(target, target, "rows")
    copy_section(None, None, "scales")
    with pytest.raises(ConfigError, match=r"rows is float32\[1, 3\], expected float32\[2, 3\]"):
        copy_section(target, np.ones((1, 3), np.float32), "rows")  # numpy alone would repeat it
    with pytest.raises(ConfigError, match="float64"):
        copy_section(target, np.ones((2, 3)), "rows")
    with pytest.raises(ConfigError, match="must be given"):
        copy_section(target, None, "rows")
    with pytest.raises(ConfigError, match="must not be given"):
        copy_section(None, target, "scales")

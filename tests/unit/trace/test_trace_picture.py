"""The picture: drawn, repeatable, and what it cannot do is said."""

from __future__ import annotations

import struct

import pytest

from afd.telemetry.ring import Stage
from afd.trace.errors import TraceError
from afd.trace.timeline import Timeline, Worker
from afd.trace.window import choose_window
from tests.fakes.trace import two_to_one

pytest.importorskip("matplotlib")

from matplotlib.colors import to_hex

from afd.trace.picture import EXPOSED_COLOUR, draw, pipeline_figure


def test_equal_timelines_give_equal_pictures(tmp_path):
    timeline = two_to_one()
    pictures = []
    for name in ("a.png", "b.png"):
        draw(timeline, *choose_window(timeline), str(tmp_path / name))
        pictures.append((tmp_path / name).read_bytes())
    assert pictures[0] == pictures[1] and pictures[0].startswith(b"\x89PNG")
    width, height = struct.unpack(">II", pictures[0][16:24])
    assert width > 1500 and 300 < height < width


def test_workers_layers_and_gangs_are_labelled():
    timeline = two_to_one()
    axes = pipeline_figure(timeline, 0.0, 0.0155).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["attention/0", "attention/1", "ffn/0"]
    texts = [text.get_text() for text in axes.texts]
    assert "gang 1: A0+A1" in texts and "gang 2: A0+A1" in texts
    assert {"0", "1", "2", "3"} <= set(texts) and "head" in texts


def test_odd_timelines_can_be_drawn(tmp_path):
    stranger = Worker(
        "ffn", 0, 1, (Stage("ffn", 0.1, 0.2, 9, 0, 1), Stage("unknown", 0.1, 0.2), Stage("exchange", 0.1, 0.3))
    )
    for workers in ((stranger,), (Worker("attention", 0, 1, ()),), ()):
        draw(Timeline(workers, 1.0), 0.0, 1.0, str(tmp_path / "odd.png"))


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(TraceError, match=r"--png .*nowhere/x\.png: No such file"):
        draw(two_to_one(), 0.0, 0.05, str(tmp_path / "nowhere" / "x.png"))


def test_exposed_waiting_has_its_own_colour_and_only_attention_workers_have_it():
    rows = (0, 0, 8, 0, 1 << 48 | 1, 1, 1)
    attention = Worker("attention", 0, 1, (Stage("wait", 0.001, 0.009), Stage("exchange", 0.001, 0.009, *rows)))
    ffn = Worker("ffn", 0, 2, (Stage("wait", 0.0, 0.003), Stage("ffn", 0.003, 0.008, *rows)))
    axes = pipeline_figure(Timeline((attention, ffn), 0.01), 0.0, 0.01).axes[0]
    red = [c for c in axes.collections if len(c.get_facecolor()) and to_hex(c.get_facecolor()[0]) == EXPOSED_COLOUR]
    spans = [tuple(path.get_extents().intervalx) for c in red for path in c.get_paths()]
    assert sorted(spans) == [pytest.approx((1.0, 3.0)), pytest.approx((8.0, 9.0))]

"""Dumps on one axis, who crossed to whom, lanes without overlap."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from afd.telemetry.ring import Stage
from afd.trace.clocks import Bounds, Offset
from afd.trace.timeline import Dump, build, gang_members, gang_name, gang_of_name, hops, lanes
from tests.fakes.trace import gang_of, two_to_one


def dump(role, rank, now_s, offset_s, *stages, kept_since_s=0.0):
    bounds = Bounds(offset_s - 0.001, offset_s + 0.001)
    return Dump(role, rank, 7, now_s, kept_since_s, stages, Offset(bounds, bounds))


def test_each_clock_is_moved_to_the_common_end():
    timeline = build(
        [
            dump("ffn", 0, 50.0, 100.0, Stage("ffn", 49.0, 49.5, 0, 1), Stage("ffn", 10.0, 11.0, 0, 1)),
            dump("attention", 0, 1150.5, -1000.0, Stage("attention", 1148.5, 1149.25, 0, 1)),
        ],
        2.0,
    )
    # Ours: the FFN worker was read at 150.0, the attention worker at 150.5; the trace is 148.0 .. 150.0.
    assert [worker.name for worker in timeline.workers] == ["attention/0", "ffn/0"]
    [attention], [ffn] = (worker.stages for worker in timeline.workers)
    assert (attention.start_s, attention.end_s) == pytest.approx((0.5, 1.25))
    assert (ffn.start_s, ffn.end_s) == pytest.approx((1.0, 1.5))
    assert [worker.clock_error_s for worker in timeline.workers] == pytest.approx([0.001, 0.001])


def test_a_ring_that_is_too_short_is_said():
    timeline = build([dump("ffn", 0, 50.0, 0.0, kept_since_s=49.25)], 2.0)
    assert timeline.workers[0].complete_from_s == pytest.approx(1.25)
    assert build([dump("ffn", 0, 50.0, 0.0, kept_since_s=2.0)], 2.0).workers[0].complete_from_s == 0.0
    assert build([dump("ffn", 0, 50.0, 0.0)], 2.0).workers[0].complete_from_s == 0.0


def test_every_batch_finds_its_members():
    timeline = two_to_one(num_steps=2, num_layers=3)
    found = list(hops(timeline))
    assert len(found) == 2 * 2 * 3 * 2  # steps, streams, layers, attention workers
    for hop in found:
        assert hop.dispatch is not None and hop.answer is not None and hop.combine is not None
        assert hop.dispatch.end_s <= hop.ffn.start_s < hop.ffn.end_s == hop.answer.start_s <= hop.combine.start_s
        assert hop.dispatch.layer == hop.ffn.layer == hop.combine.layer
        assert hop.dispatch.stream == hop.ffn.stream == hop.combine.stream
    assert gang_members(timeline) == {gang_of(step, stream): "A0+A1" for step in (0, 1) for stream in (0, 1)}


def test_what_is_cut_off_is_missing_not_wrong():
    whole = two_to_one(num_steps=1, num_layers=2, num_streams=1)
    attention = whole.workers[0]
    no_dispatch = tuple(s for s in attention.stages if s.name != "dispatch")
    cut = type(whole)((type(attention)("attention", 0, 1, no_dispatch), *whole.workers[1:]), 0.2)
    mine = [hop for hop in hops(cut) if hop.attention.rank == 0]
    assert mine and all(hop.dispatch is None and hop.combine is not None for hop in mine)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(0, 50), st.integers(1, 10)), max_size=40))
def test_lanes_never_overlap_and_are_as_few_as_can_be(spans):
    stages = sorted((Stage("x", float(a), float(a + n)) for a, n in spans), key=lambda s: (s.start_s, s.end_s))
    chosen = lanes(stages)
    for lane in set(chosen):
        own = [stage for stage, at in zip(stages, chosen, strict=True) if at == lane]
        assert all(before.end_s <= after.start_s for before, after in itertools.pairwise(own))
    depth = max((sum(s.start_s <= t < s.end_s for s in stages) for t in range(61)), default=0)
    assert len(set(chosen)) == depth


@given(st.integers(0, 0xFFFF), st.integers(0, 0xFFFF), st.integers(0, 0xFFFFFFFF))
@settings(max_examples=30, deadline=None, derandomize=True)
def test_gang_names_can_be_read_back(epoch, rank, count):
    gang = epoch << 48 | rank << 32 | count
    assert gang_of_name(gang_name(gang)) == gang
    assert gang_name(0) == ""

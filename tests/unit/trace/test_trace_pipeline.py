"""What a trace says of the pipeline: exposed waiting, and the closed form from stages that are known."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from afd.telemetry.ring import Stage
from afd.trace.pipeline import Pipeline, exposed_spans, layer_transfer_s, pipeline_of, total, without
from afd.trace.summary import summary_text
from afd.trace.timeline import Timeline, Worker
from tests.fakes.trace import two_to_one

A, F, C, HEAD, GAP, GANG = 3e-3, 4e-3, 5e-4, 2e-3, 2.5e-4, 1 << 48 | 1
"""Seconds of the scripted worker: attention of a layer, FFN, one way, head, nothing before each attention."""


def one_stream(num_steps: int = 30, num_layers: int = 2) -> Timeline:
    """1A1F with one stream: everything one after another."""
    attention, ffn, t = [], [], 0.0
    for step in range(num_steps):
        gang = GANG + step
        for layer in range(num_layers):
            t += GAP
            attention.append(Stage("combine" if layer else "embed", t, t, 0, layer - 1, 8, step))
            attention.append(Stage("attention", t, t + A, 0, layer, 8, step))
            t += A
            attention.append(Stage("dispatch", t, t, 0, layer, 8, step))
            where = (0, layer, 8, 0, gang, 1, 1)
            free_s = ffn[-1].end_s if ffn else 0.0
            ffn.append(Stage("wait", free_s, t + C))
            ffn.append(Stage("gang_wait", t + C, t + C, *where))
            ffn.append(Stage("ffn", t + C, t + C + F, *where))
            ffn.append(Stage("combine", t + C + F, t + C + F, *where))
            back_s = t + 2 * C + F
            attention.append(Stage("wait", t, back_s))
            attention.append(Stage("exchange", t, back_s, 0, layer, 8, step, gang, 1, 1))
            t = back_s
        attention.append(Stage("head", t, t + HEAD, 0, -1, 8, step))
        t += HEAD
    ffn.append(Stage("wait", ffn[-1].end_s, t))
    return Timeline((Worker("attention", 0, 1, tuple(attention)), Worker("ffn", 0, 2, tuple(ffn))), t)


def test_one_stream_exposes_exactly_the_way_there_and_back():
    timeline = one_stream()
    [attention] = timeline.of_role("attention")
    assert total(exposed_spans(timeline, attention), timeline.seconds) == pytest.approx(30 * 2 * 2 * C)
    assert layer_transfer_s(timeline) == pytest.approx(2 * C)


def test_one_streams_step_is_what_the_closed_form_says():
    found = pipeline_of(one_stream())
    assert found is not None and (found.num_streams, found.num_layers) == (1, 2)
    step_s = 2 * (GAP + A + 2 * C + F) + HEAD
    assert found.cycle_s == pytest.approx(step_s) and found.predicted_s == pytest.approx(step_s)
    assert found.bound == "latency"
    assert (found.own_s, found.head_s, found.other_s) == pytest.approx((2 * A, HEAD, 2 * GAP))
    assert (found.ffn_s, found.transfer_s) == pytest.approx((2 * F, 4 * C))
    assert found.exposed == pytest.approx(4 * C / step_s)
    assert found.bubble == pytest.approx(2 * (F + 2 * C) / step_s)
    assert found.ffn_bubble == pytest.approx(1 - 2 * F / step_s)
    assert found.idle == pytest.approx((4 * C + 2 * GAP) / step_s)
    assert (found.gang_size, found.ffn_rows) == (1.0, 8.0)


def test_a_pause_is_no_part_of_a_step():
    busy = one_stream()
    paused = Timeline(busy.workers, busy.seconds + 1.0)
    found = pipeline_of(paused)
    assert found is not None and found.cycle_s == pytest.approx(pipeline_of(busy).cycle_s)
    assert found.idle == pytest.approx(pipeline_of(busy).idle)


def test_without_one_of_the_sides_nothing_is_said():
    attention, ffn = one_stream().workers
    assert pipeline_of(Timeline((attention,), 10.0)) is None
    assert pipeline_of(Timeline((ffn,), 10.0)) is None
    assert pipeline_of(Timeline((), 10.0)) is None


def test_gangs_and_streams_are_counted():
    found = pipeline_of(two_to_one())
    assert found is not None and found.num_streams == 2 and found.gang_size == 2.0 and found.ffn_rows == 16.0


def test_looking_ahead_takes_the_place_of_waiting():
    plain = one_stream()
    attention, ffn = plain.workers
    ahead = [
        Stage("look_ahead", wait.start_s, wait.start_s + C) if wait.name == "wait" else wait
        for wait in attention.stages
    ]
    waits = [Stage("wait", w.start_s + C, w.end_s) for w in attention.stages if w.name == "wait"]
    stages = tuple(sorted((*ahead, *waits), key=lambda stage: stage.end_s))
    found, before = pipeline_of(Timeline((Worker("attention", 0, 1, stages), ffn), plain.seconds)), pipeline_of(plain)
    assert found is not None and before is not None
    assert found.ahead_s == pytest.approx(2 * C) and found.other_s == pytest.approx(before.other_s)
    assert found.terms == pytest.approx(before.terms)
    assert found.bubble == pytest.approx(before.bubble - 2 * C / found.cycle_s)


def test_the_summary_names_exposed_waiting_and_the_bound():
    text = summary_text(one_stream())
    assert "EXPOSED" in text.splitlines()[0]
    assert "1 stream makes a step in 18.5 ms; closed form: 18.5 ms" in text


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(1, 6)), max_size=12),
    st.lists(st.tuples(st.integers(0, 40), st.integers(1, 6)), max_size=12),
)
def test_what_is_left_is_every_moment_that_nothing_covers(lengths, covered):
    spans, end = [], 0
    for gap, length in lengths:
        spans.append((float(end + gap), float(end + gap + length)))
        end += gap + length
    holes = [(float(start), float(start + length)) for start, length in covered]
    left = without(spans, holes)
    moments = [n + 0.5 for n in range(end + 50)]
    wanted = [t for t in moments if any(a < t < b for a, b in spans) and not any(a < t < b for a, b in holes)]
    assert [t for t in moments if any(a < t < b for a, b in left)] == wanted


def measured(num_streams: int, *, a: float, f: float, c: float, head: float) -> Pipeline:
    """Per layer of a hundred, ms; the FFN worker does nothing but compute."""
    return Pipeline(
        num_streams=num_streams,
        num_layers=100,
        cycle_s=1.0,
        own_s=a / 10,
        head_s=head / 10,
        ahead_s=0.0,
        other_s=0.0,
        ffn_s=f / 10,
        answer_s=0.0,
        ffn_other_s=0.0,
        transfer_s=c / 10,
        bubble=0.0,
        ffn_bubble=0.0,
        idle=0.0,
        exposed=0.0,
        gang_size=1.0,
        ffn_rows=1.0,
    )


@pytest.mark.parametrize(
    ("found", "bound", "closed_form_s", "predicted_s"),
    [
        # Attention bound: heads are the attention worker's own time and cost nothing else.
        (measured(2, a=4.0, f=1.0, c=0.5, head=1.0), "attention", 1.0, 1.0),
        # FFN bound: two streams keep it busy while the head of a third is computed beside their layers.
        (measured(3, a=2.0, f=4.0, c=1.0, head=0.5), "ffn", 1.2, 1.2),
        # One does not: 7 ms a layer for it, of which 5 are left for the head, instead of 8 for both. So 14 ms for the
        # two heads of 5 ms, in which 2 layers of the 200 are made, and 4 ms for each of the others.
        (measured(2, a=2.0, f=4.0, c=1.0, head=0.05), "ffn", 0.8, 0.014 + 0.198 * 4),
        # Attention bound, though its heads find no waiting to fill: it is always at a layer or at a head.
        (measured(3, a=4.0, f=1.0, c=0.5, head=1.0), "attention", 1.5, 1.5),
        # Heads take 100 ms of the 3 in 4 that one stream leaves: 267 ms, in which it makes 67 of the 200 layers.
        (measured(2, a=1.0, f=1.0, c=2.0, head=1.0), "latency", 0.5, 0.8 / 3 + 0.4 * 2 / 3),
        # There is always one stream at its head.
        (measured(2, a=1.0, f=1.0, c=2.0, head=3.5), "attention", 0.9, 0.9),
        # Balanced, and too few streams to hide the transfer.
        (measured(2, a=2.0, f=2.0, c=4.0, head=0.0), "latency", 0.8, 0.8),
        (measured(1, a=2.0, f=4.0, c=1.0, head=0.5), "latency", 0.75, 0.75),
    ],
)
def test_the_closed_form_without_and_with_heads_lengths(found, bound, closed_form_s, predicted_s):
    assert found.bound == bound
    assert found.closed_form_s == pytest.approx(closed_form_s) and found.predicted_s == pytest.approx(predicted_s)

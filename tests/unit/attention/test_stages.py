"""Where a step's time goes: every moment is counted once, and exposed is what nobody computed."""

from __future__ import annotations

import pytest

from afd.attention.exchange import Combined, Gang
from afd.attention.health import RecentAttention
from afd.attention.path import Lap, Leg, Spans
from afd.attention.python_path import leg_of_one
from afd.attention.stages import StageClock
from afd.sched.sequence import MicroBatch

STEP = MicroBatch(stream=0, step=1, items=[])
OTHER_STREAM = MicroBatch(stream=1, step=1, items=[])


class Scene:
    """A stage clock whose time moves only when the test says so."""

    def __init__(self) -> None:
        self.now = 0.0
        self.stages = StageClock(lambda: self.now)

    @property
    def totals(self):
        return self.stages.totals

    def idle(self, seconds: float) -> None:
        """Time that is no stage's."""
        self.now += seconds

    def attention(self, batch: MicroBatch, layer: int, seconds: float, *, typical: bool = True) -> None:
        begun_s = self.now
        self.now += seconds
        times = (begun_s, begun_s, self.now, self.now)
        self.stages.book(batch, leg_of_one(batch.stream, layer, times, typical=typical))

    def wait(self, seconds: float, *arrived: Combined) -> None:
        begun_s = self.now
        self.now += seconds
        self.stages.wait(begun_s, arrived)
        for combined in arrived:
            self.stages.answered(begun_s, combined, 0, 1)

    def head(self, batch: MicroBatch, seconds: float, *, started_s: float, more: bool) -> None:
        begun_s = self.now
        self.now += seconds
        self.stages.finish(batch.stream, batch, begun_s, started_s, more=more)


def answer(stream: int, compute_s: float, *, local: bool = False) -> Combined:
    return Combined(stream, (), gang=Gang(size=2), compute_s=compute_s, local=local)


def test_waiting_beyond_the_ffns_computing_is_exposed():
    scene = Scene()
    scene.attention(STEP, 0, 1.0)
    scene.wait(5.0, answer(0, 3.0))
    assert scene.totals.wait_s == 5.0 and scene.totals.exposed_s == 2.0


def test_an_ffn_that_computed_all_along_leaves_nothing_exposed():
    scene = Scene()
    scene.attention(STEP, 0, 1.0)
    scene.wait(2.0, answer(0, 3.0))
    assert scene.totals.exposed_s == 0.0


def test_waits_that_bring_no_answer_belong_to_the_next_answer():
    scene = Scene()
    scene.attention(STEP, 0, 1.0)
    for _ in range(3):
        scene.wait(1.0)  # woken by something else
    scene.wait(1.0, answer(0, 3.0))
    assert scene.totals.wait_s == 4.0 and scene.totals.exposed_s == 1.0


def test_an_answer_noticed_while_another_stage_ran_covers_what_was_waited_before():
    scene = Scene()
    scene.attention(STEP, 0, 1.0)
    scene.wait(4.0)
    scene.attention(OTHER_STREAM, 0, 1.0)
    scene.stages.answered(1.0, answer(0, 3.0), 0, 1)
    assert scene.totals.exposed_s == 1.0


def test_two_answers_of_one_wait_were_computed_one_after_the_other():
    scene = Scene()
    for batch in (STEP, OTHER_STREAM):
        scene.attention(batch, 0, 1.0)
    scene.wait(5.0, answer(0, 2.0), answer(1, 2.0))
    assert scene.totals.exposed_s == 1.0


def test_computing_in_this_process_is_neither_waiting_nor_exposed():
    scene = Scene()
    scene.attention(STEP, 0, 1.0)
    scene.wait(3.0, answer(0, 3.0, local=True))
    assert scene.totals.wait_s == 0.0 and scene.totals.exposed_s == 0.0


def test_what_lies_between_stages_is_other_but_not_what_lies_between_jobs():
    scene = Scene()
    scene.idle(100.0)
    scene.attention(STEP, 0, 1.0)
    scene.idle(0.25)
    scene.wait(2.0, answer(0, 1.0))
    scene.idle(0.5)
    scene.head(STEP, 1.0, started_s=100.0, more=True)
    scene.idle(0.25)
    scene.attention(STEP, 0, 1.0)
    scene.head(STEP, 1.0, started_s=104.75, more=False)
    assert scene.totals.other_s == 1.0
    scene.idle(100.0)
    scene.attention(STEP, 0, 1.0)
    assert scene.totals.other_s == 1.0
    totals = scene.totals
    counted_s = totals.attention_s + totals.head_s + totals.wait_s + totals.other_s
    assert counted_s == pytest.approx(scene.now - 200.0)


def test_a_lost_step_takes_its_times_with_it():
    scene = Scene()
    scene.attention(STEP, 0, 1.0)
    scene.wait(3.0)
    scene.stages.reset()
    scene.idle(50.0)
    scene.attention(STEP, 0, 1.0)
    scene.wait(1.0, answer(0, 1.0))
    assert scene.totals.exposed_s == 0.0 and scene.totals.other_s == 0.0


def test_recent_shares_are_of_the_wall_clock_and_of_the_step():
    scene = Scene()
    recent = RecentAttention(scene.totals, lambda: scene.now)
    assert (recent.look().bubble, recent.look().exposed, recent.look().gang_size) == (0.0, 0.0, 0.0)
    scene.attention(STEP, 0, 1.0)
    scene.wait(4.0, answer(0, 3.0))
    scene.head(STEP, 5.0, started_s=0.0, more=False)
    scene.idle(10.0)
    found = recent.look()
    assert found.bubble == pytest.approx(0.2) and found.exposed == pytest.approx(0.1) and found.gang_size == 2.0


def long_leg(began_s: float, laps: list[tuple[float, float, float | None, float]], open_wait_s: float = 0.0) -> Leg:
    """From layer 1 on. Laps of (computing, posting, waiting, of it the FFN's computing); waiting None: not answered."""
    now, times = began_s, []
    for compute_s, post_s, wait_s, _ in laps:
        posted_s = now + compute_s + post_s
        times.append(Lap(None, now, now + compute_s, posted_s, None if wait_s is None else posted_s + wait_s))
        now = posted_s + (wait_s or 0.0)
    waits = [(wait_s, ffn_s) for _, _, wait_s, ffn_s in laps if wait_s is not None]
    spans = Spans(
        began_s,
        now,
        sum(compute_s + post_s for compute_s, post_s, _, _ in laps),
        len(laps),
        lambda: times,
        num_answered=len(waits),
        wait_s=sum(wait_s for wait_s, _ in waits),
        ffn_s=sum(ffn_s for _, ffn_s in waits),
        exposed_s=sum(wait_s - ffn_s for wait_s, ffn_s in waits),
        open_wait_s=open_wait_s,
        gang=Gang(8, 2),
    )
    return Leg(0, 1, spans)


def test_layers_of_one_leg_count_like_layers_of_several():
    scene = Scene()
    scene.attention(STEP, 0, 1.0)
    scene.wait(5.0, answer(0, 3.0))
    scene.idle(0.5)
    leg = long_leg(scene.now, [(1.0, 0.25, 4.0, 3.0), (1.0, 0.25, 5.0, 4.5)])
    scene.stages.book(STEP, leg)
    totals = scene.totals
    assert (totals.attention_s, totals.wait_s, totals.exposed_s, totals.other_s) == (3.5, 14.0, 3.5, 0.5)
    assert (totals.ffn_s, totals.exchange_s, totals.num_exchanges, totals.num_gang_members) == (10.5, 14.0, 3, 6)
    scene.now = leg.spans.ended_s
    scene.head(STEP, 1.0, started_s=0.0, more=False)
    assert totals.step_s == scene.now and totals.step_exposed_s == 3.5
    of_leg = [s for s in scene.stages.ring.snapshot() if s.layer > 0]
    names = ("attention", "dispatch", "exchange")
    assert [(s.name, s.layer) for s in of_leg] == [(n, i) for i in (1, 2) for n in names]
    assert [s.num_tokens for s in of_leg if s.name == "exchange"] == [8, 8]
    assert of_leg[-1].end_s == leg.spans.ended_s


def test_waiting_in_vain_for_a_legs_last_answer_is_waiting_for_that_answer():
    scene = Scene()
    scene.attention(STEP, 0, 1.0)
    scene.wait(5.0, answer(0, 5.0))
    leg = long_leg(scene.now, [(1.0, 0.0, 4.0, 4.0), (1.0, 0.0, None, 0.0)], open_wait_s=2.0)
    scene.stages.book(STEP, leg)
    scene.now = leg.spans.ended_s + 2.0
    scene.wait(3.0, answer(0, 4.0))  # 5 s after it was sent, of which the FFN computed 4
    assert (scene.totals.wait_s, scene.totals.exposed_s, scene.totals.other_s) == (14.0, 1.0, 0.0)
    assert sum(s.end_s - s.start_s for s in scene.stages.ring.snapshot() if s.name == "wait") == 14.0


def test_beside_what_was_launched_there_is_no_waiting_and_no_looking_ahead():
    scene = Scene()
    stages, totals = scene.stages, scene.totals
    stages.launched(0)
    scene.idle(1.0)
    stages.looked_ahead(STEP, 4, 0.5)
    assert totals.ahead_s == totals.other_s == 0.0
    scene.idle(1.0)
    stages.wait(0.2, [])
    assert totals.wait_s == totals.attention_s == 0.0
    stages.book(STEP, leg_of_one(0, 0, (0.5, 0.5, 2.0, 2.0)))
    assert totals.attention_s == 1.5
    scene.idle(1.0)
    stages.wait(0.2, [answer(0, 0.0)])  # it began while something was computed: waiting is what remains
    assert totals.wait_s == 1.0
    scene.idle(0.25)
    stages.looked_ahead(STEP, 4, 3.0)
    assert totals.ahead_s == 0.25 and totals.other_s == 0.0
    stages.launched(0)  # the head
    scene.idle(1.75)
    stages.wait(3.25, [])
    assert totals.wait_s == 1.0
    assert stages.landed(0) == 5.0
    spans = [(stage.name, stage.start_s, stage.end_s) for stage in stages.ring.snapshot()]
    stage_spans = [("embed", 0.5, 0.5), ("attention", 0.5, 2.0), ("dispatch", 2.0, 2.0)]
    assert spans == [*stage_spans, ("wait", 2.0, 3.0), ("look_ahead", 3.0, 3.25)]
    stages.launched(1)
    stages.reset()
    scene.idle(1.0)
    stages.wait(5.5, [])
    assert totals.wait_s == 1.5


def test_a_step_with_a_leg_that_is_not_typical_teaches_nothing():
    scene, samples = Scene(), []
    scene.stages.observer = samples.append
    for typical in (True, False, True):
        scene.attention(STEP, 0, 1.0, typical=typical)
        scene.attention(STEP, 1, 1.0)
        scene.head(STEP, 1.0, started_s=scene.now - 2.0, more=True)
    scene.stages.deliver()
    assert len(samples) == 2 and scene.totals.num_steps == 3


def test_a_step_is_alone_only_if_no_other_stream_was_at_work_during_it():
    """Streams whose heads come together: the last one to end is in flight by itself then."""
    scene, samples = Scene(), []
    scene.stages.observer = samples.append
    for batch in (STEP, OTHER_STREAM):
        scene.attention(batch, 0, 1.0)
    for batch in (STEP, OTHER_STREAM):
        scene.head(batch, 1.0, started_s=0.0, more=True)
    scene.attention(STEP, 0, 1.0)
    scene.head(STEP, 1.0, started_s=4.0, more=True)
    scene.stages.deliver()
    assert [set(sample.in_flight) for sample in samples] == [{0, 1}, {0, 1}, {0}]

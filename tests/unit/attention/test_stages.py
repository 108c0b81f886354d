"""Where a step's time goes: every moment is counted once, and exposed is what nobody computed."""

from __future__ import annotations

import numpy as np
import pytest

from afd.attention.exchange import Combined
from afd.attention.health import RecentAttention
from afd.attention.stages import StageClock
from afd.kernels.relay import Outcome, Relayed
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

    def attention(self, batch: MicroBatch, layer: int, seconds: float) -> float:
        begun_s = self.now
        self.now += seconds
        return self.stages.attention(batch.stream, layer, batch, begun_s, begun_s, self.now)

    def wait(self, seconds: float, *arrived: Combined) -> None:
        begun_s = self.now
        self.now += seconds
        self.stages.wait(begun_s, arrived)
        for combined in arrived:
            self.stages.exchange(begun_s, combined, 0, 1)

    def head(self, batch: MicroBatch, seconds: float, *, started_s: float, more: bool) -> None:
        begun_s = self.now
        self.now += seconds
        self.stages.finish(batch.stream, batch, begun_s, started_s, more=more)


def answer(stream: int, compute_s: float, *, local: bool = False) -> Combined:
    return Combined(stream, (), gang_size=2, compute_s=compute_s, local=local)


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
    scene.stages.exchange(1.0, answer(0, 3.0), 0, 1)
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


def relayed(began_s: float, laps: list[tuple[float, float, float, float | None]], open_wait_s: float = 0.0) -> Relayed:
    """Laps of (computing, posting, waiting, of it the FFN's computing); waiting None: its answer is still to come."""
    now, rows, sums = began_s, [], {"compute": 0.0, "post": 0.0, "wait": 0.0, "ffn": 0.0, "exposed": 0.0}
    for compute_s, post_s, wait_s, ffn_s in laps:
        rows.append([now, now + compute_s, now + compute_s + post_s, 0.0])
        now += compute_s + post_s
        sums["compute"] += compute_s
        sums["post"] += post_s
        if wait_s is not None:
            now += wait_s
            rows[-1][3] = now
            sums["wait"] += wait_s
            sums["ffn"] += ffn_s
            sums["exposed"] += wait_s - ffn_s
    record = np.rint(np.array(rows) * 1e9).astype(np.int64).tobytes()
    num_answered = sum(wait_s is not None for _, _, wait_s, _ in laps)
    outcome = Outcome.DONE if num_answered == len(laps) else Outcome.LATE
    return Relayed(len(laps), num_answered, outcome, 8, began_s, now, *sums.values(), open_wait_s, record)


def test_layers_that_native_code_went_through_count_like_any_others():
    scene = Scene()
    scene.attention(STEP, 0, 1.0)
    scene.wait(5.0, answer(0, 3.0))
    scene.idle(0.5)
    done = relayed(scene.now, [(1.0, 0.25, 4.0, 3.0), (1.0, 0.25, 5.0, 4.5)])
    scene.stages.relayed(0, STEP, 1, done, answer(0, 0.0))
    totals = scene.totals
    assert (totals.attention_s, totals.wait_s, totals.exposed_s, totals.other_s) == (3.5, 14.0, 3.5, 0.5)
    assert (totals.ffn_s, totals.exchange_s, totals.num_exchanges, totals.num_gang_members) == (10.5, 14.0, 3, 6)
    scene.now = done.ended_s
    scene.head(STEP, 1.0, started_s=0.0, more=False)
    assert totals.step_s == scene.now and totals.step_exposed_s == 3.5
    native = [s for s in scene.stages.ring.snapshot() if s.layer > 0]
    assert [(s.name, s.layer) for s in native] == [
        (n, i) for i in (1, 2) for n in ("attention", "dispatch", "exchange")
    ]
    assert [s.end_s for s in native][-1] == pytest.approx(done.ended_s)


def test_waiting_in_vain_for_a_relays_last_answer_is_waiting_for_that_answer():
    scene = Scene()
    scene.attention(STEP, 0, 1.0)
    scene.wait(5.0, answer(0, 5.0))
    done = relayed(scene.now, [(1.0, 0.0, 4.0, 4.0), (1.0, 0.0, None, 0.0)], open_wait_s=2.0)
    scene.stages.relayed(0, STEP, 1, done, answer(0, 0.0))
    scene.now = done.ended_s + 2.0
    scene.wait(3.0, answer(0, 4.0))  # 5 s after it was sent, of which the FFN computed 4
    assert (scene.totals.wait_s, scene.totals.exposed_s, scene.totals.other_s) == (14.0, 1.0, 0.0)
    assert sum(s.end_s - s.start_s for s in scene.stages.ring.snapshot() if s.name == "wait") == 14.0


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

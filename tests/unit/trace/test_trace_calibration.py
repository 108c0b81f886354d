"""Stage times out of a trace whose every stage is known."""

from __future__ import annotations

import json
from dataclasses import replace

import msgspec
import pytest

from afd.cli.main import main
from afd.plan.calibration import load_calibration
from afd.telemetry.ring import Stage
from afd.trace.calibration import calibration, points
from afd.trace.chrome import to_chrome
from afd.trace.errors import TraceError
from afd.trace.timeline import ATTENTION, FFN, Timeline, Worker

MS = 1e-3


def one_pair(num_steps: int = 10, num_layers: int = 4) -> Timeline:
    """One stream, 8 rows. A layer: 0.2 ms of scheduling, 0.1 combine, 0.9 attention, 0.1 dispatch, then away for
    1.5 ms, 1.2 of them at the FFN worker (0.1 until it begins, 1.0 computing, 0.1 answering). A head takes 0.4 ms."""
    own, ffn, t = [], [], 0.0
    for step in range(num_steps):
        gang = 1 << 48 | step + 1
        for layer in range(num_layers + 1):
            begun = t + 0.2 * MS
            own.append(Stage("combine" if layer else "embed", begun, begun + 0.1 * MS, 0, layer - 1, 8, step))
            if layer == num_layers:
                own.append(Stage("head", begun + 0.1 * MS, begun + 0.5 * MS, 0, -1, 8, step))
                t = begun + 0.5 * MS
                break
            own.append(Stage("attention", begun + 0.1 * MS, begun + 1.0 * MS, 0, layer, 8, step))
            own.append(Stage("dispatch", begun + 1.0 * MS, begun + 1.1 * MS, 0, layer, 8, step))
            sent = begun + 1.1 * MS
            where = (0, layer, 8, 0, gang, 1, 1)
            ffn.append(Stage("gang_wait", sent + 0.2 * MS, sent + 0.3 * MS, *where))
            ffn.append(Stage("ffn", sent + 0.3 * MS, sent + 1.3 * MS, *where))
            ffn.append(Stage("combine", sent + 1.3 * MS, sent + 1.4 * MS, *where))
            t = sent + 1.5 * MS
            own.append(Stage("wait", sent, t))
            own.append(Stage("exchange", sent, t, 0, layer, 8, step, gang, 1, 1))
    return Timeline(
        (Worker(ATTENTION, 0, 1, tuple(own)), Worker(FFN, 0, 2, tuple(ffn))), t, "1A1F smollm2-135m-instruct"
    )


def test_every_stage_with_the_work_around_it():
    found = calibration(one_pair(), model="m", topology="1A1F", context=100)
    assert found["t_A"] == [{"tokens": 8, "context": 100, "seconds": pytest.approx(1.3 * MS, rel=0.02)}]
    assert found["t_F"] == [{"tokens": 8, "seconds": pytest.approx(1.1 * MS)}]
    assert found["t_C"] == [{"tokens": 8, "seconds": pytest.approx(0.4 * MS)}]
    assert found["t_head"] == [{"tokens": 8, "seconds": pytest.approx(0.7 * MS)}]


def two_streams(num_batches: int = 40) -> Timeline:
    """The FFN worker is never idle, 1.0 ms a batch, whose rows left half a batch before it was free for them. The
    attention worker notices an answer after 0.05 ms and works 0.45 ms on it."""
    own, ffn = [], []
    for idx in range(num_batches):
        t, stream, where = idx * MS, idx % 2, (idx % 2, 1, 8, 0, idx + 1, 1, 1)
        ffn.append(Stage("gang_wait", t + 0.05 * MS, t + 0.1 * MS, *where))
        ffn.append(Stage("ffn", t + 0.1 * MS, t + 0.9 * MS, *where))
        ffn.append(Stage("combine", t + 0.9 * MS, t + 1.0 * MS, *where))
        own.append(Stage("dispatch", t - 0.6 * MS, t - 0.5 * MS, stream, 1, 8, idx))
        own.append(Stage("wait", t + 0.5 * MS, t + 1.05 * MS))
        own.append(Stage("exchange", t - 0.5 * MS, t + 1.05 * MS, stream, 1, 8, idx, idx + 1, 1, 1))
        own.append(Stage("attention", t + 1.05 * MS, t + 1.4 * MS, stream, 2, 8, idx))
    own.append(Stage("head", (num_batches + 1) * MS, (num_batches + 1.1) * MS, 0, -1, 8, num_batches))
    return Timeline((Worker(ATTENTION, 0, 1, tuple(own)), Worker(FFN, 0, 2, tuple(ffn))), num_batches * MS)


def test_a_queue_at_the_ffn_is_neither_work_nor_wire():
    """Rows that were there while another batch was computed: their way was hidden, and their stay begins after it."""
    found = calibration(two_streams(), model="m", topology="1A1F")
    assert found["t_F"] == [{"tokens": 8, "seconds": pytest.approx(1.0 * MS)}]
    assert found["t_A"][0]["seconds"] == pytest.approx(0.45 * MS, rel=0.02)
    assert found["t_C"] == [{"tokens": 8, "seconds": pytest.approx(0.15 * MS)}]  # what is left of both ways


def a_gang_of_two(num_layers: int = 40) -> Timeline:
    """Two workers of 8 rows each; the second one's leave 0.3 ms after the first one's. 0.1 ms later the FFN worker
    begins, for 1.0 ms; the answer is noticed after 0.05 ms and worked on for 0.5 or 0.8 ms."""
    own: list[list[Stage]] = [[], []]
    ffn = []
    for layer in range(num_layers):
        t = (layer + 1) * 1.95 * MS
        for rank, late in enumerate((0.0, 0.3 * MS)):
            own[rank].append(Stage("combine", t - 0.5 * MS, t - 0.5 * MS, 0, layer - 1, 8, 1))
            own[rank].append(Stage("attention", t - 0.5 * MS, t + late - 0.05 * MS, 0, layer, 8, 1))
            own[rank].append(Stage("dispatch", t + late - 0.05 * MS, t + late, 0, layer, 8, 1))
            own[rank].append(Stage("wait", t + late, t + 1.45 * MS))
            own[rank].append(Stage("exchange", t + late, t + 1.45 * MS, 0, layer, 16, 1, 7, 2, 1))
        ffn.append(Stage("gang_wait", t + 0.02 * MS, t + 0.4 * MS, 0, layer, 16, 0, 7, 2, 1))
        ffn.append(Stage("ffn", t + 0.4 * MS, t + 1.3 * MS, 0, layer, 16, 0, 7, 2, 1))
        ffn.append(Stage("combine", t + 1.3 * MS, t + 1.4 * MS, 0, layer, 16, 0, 7, 2, 1))
    end = (num_layers + 1) * 1.95 * MS
    for stages in own:
        stages.append(Stage("head", end, end + MS, 0, -1, 8, 1))
    workers = [Worker(ATTENTION, rank, rank, tuple(stages)) for rank, stages in enumerate(own)]
    return Timeline((*workers, Worker(FFN, 0, 3, tuple(ffn))), end)


def test_the_last_member_of_a_gang_is_the_one_that_was_waited_for():
    found = calibration(a_gang_of_two(), model="m", topology="2A1F")
    assert found["t_F"] == [{"tokens": 16, "seconds": pytest.approx(1.0 * MS)}]
    assert found["t_C"] == [{"tokens": 8, "seconds": pytest.approx(0.15 * MS)}]
    assert found["t_A"][0]["seconds"] == pytest.approx(0.65 * MS, rel=0.01)  # of both workers


def test_only_what_every_worker_has_kept_counts():
    whole = a_gang_of_two()
    slow = replace(whole.workers[2], complete_from_s=40 * MS)
    longer = [  # less waiting, more work, where the FFN worker's stages are gone
        msgspec.structs.replace(s, end_s=s.end_s - 0.4 * MS) if s.name == "wait" and s.end_s < 40 * MS else s
        for s in whole.workers[0].stages
    ]
    cut = replace(whole, workers=(replace(whole.workers[0], stages=tuple(longer)), whole.workers[1], slow))
    assert calibration(cut, model="m", topology="2A1F")["t_A"][0]["seconds"] == pytest.approx(0.65 * MS, rel=0.02)


def test_gaps_while_a_step_is_in_flight_are_work_around_it():
    """A worker that lost its processor for 20 ms is not idle; one without a step is."""
    head = [Stage("head", 0.0, 1 * MS, 0, -1, 8, 0)]
    first = [Stage("embed", 30 * MS, 31 * MS, 0, -1, 8, 1), Stage("dispatch", 31 * MS, 32 * MS, 0, 0, 8, 1)]
    second = [Stage("combine", 52 * MS, 53 * MS, 0, 0, 8, 1), Stage("dispatch", 53 * MS, 54 * MS, 0, 1, 8, 1)]
    timeline = one_pair()
    worker = Worker(ATTENTION, 1, 3, (*head, *first, *second))
    both = Timeline((worker, timeline.workers[1], timeline.workers[0]), 1.0)
    own = calibration(both, model="m", topology="2A1F")["t_A"]
    plain = calibration(timeline, model="m", topology="1A1F")["t_A"]
    num_plain = 40
    sum_s = own[0]["seconds"] * (num_plain + 2) - plain[0]["seconds"] * num_plain
    assert sum_s == pytest.approx((2 + 22) * MS)


def test_rare_sizes_are_left_out_and_like_sizes_merged():
    samples = [(24, 1.0)] * 30 + [(25, 2.0)] * 30 + [(64, 5.0)] * 3
    assert points(samples) == [{"tokens": 24, "seconds": 1.5}]
    assert points([(64, 5.0)] * 3) == [{"tokens": 64, "seconds": 5.0}]


def test_a_trace_without_work_is_refused():
    idle = Timeline((Worker(ATTENTION, 0, 1, ()), Worker(FFN, 0, 2, ())), 1.0)
    with pytest.raises(TraceError, match="no attention stages"):
        calibration(idle, model="m", topology="1A1F")


def test_the_command_writes_what_the_planner_reads(tmp_path, capsys):
    trace, file = tmp_path / "trace.json", tmp_path / "measured.json"
    trace.write_text("".join(to_chrome(one_pair())))
    assert main(["trace", "--input", str(trace), "--calibrate", str(file), "--context", "64"]) == 0
    assert load_calibration(str(file)).t_A[0].context == 64
    assert json.loads(file.read_text())["topology"] == "1A1F"
    assert main(["trace", "--input", str(trace), "--context", "64"]) == 2
    assert "--context is for --calibrate" in capsys.readouterr().err

"""Stage times out of a trace whose every stage is known."""

from __future__ import annotations

import json

import pytest

from afd.cli.main import main
from afd.events import Stage
from afd.plan.calibration import load_calibration
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
    assert found["t_C"] == [{"tokens": 8, "seconds": pytest.approx(0.3 * MS)}]
    assert found["t_head"] == [{"tokens": 8, "seconds": pytest.approx(0.7 * MS)}]


def test_a_queue_at_the_ffn_is_neither_work_nor_wire():
    """A batch that was here while another was computed counts from where the worker was free."""
    stages = []
    for idx in range(30):
        t, where = idx * 1.0 * MS, (idx % 2, 0, 8, 0, idx + 1, 1, 1)
        stages.append(Stage("gang_wait", t - 0.8 * MS, t + 0.1 * MS, *where))
        stages.append(Stage("ffn", t + 0.1 * MS, t + 0.9 * MS, *where))
        stages.append(Stage("combine", t + 0.9 * MS, t + 1.0 * MS, *where))
    own = one_pair().workers[0]
    timeline = Timeline((own, Worker(FFN, 0, 2, (*one_pair().workers[1].stages, *stages))), 1.0)
    assert calibration(timeline, model="m", topology="1A1F")["t_F"][0]["seconds"] == pytest.approx(1.05 * MS, rel=0.1)


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

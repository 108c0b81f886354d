"""`afd trace` beside a real 2A1F cluster: every stage is there, in an order that can have happened."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from afd.trace.chrome import from_chrome
from afd.trace.timeline import ATTENTION, FFN, hops
from tests.e2e.local_cluster import LocalCluster, eventually

MODEL = str(Path(__file__).parent.parent / "fixtures" / "step3-tiny")
MAX_TOKENS = 40


def record(cluster: LocalCluster, path: Path, *flags: str) -> str:
    """`afd trace` -> what it printed."""
    command = [sys.executable, "-m", "afd", "trace", "--seconds", "100", "-o", str(path), *flags]
    done = subprocess.run(command, env=cluster.env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.timeout(120)
def test_a_real_run_is_told_as_it_happened(tmp_path):
    path, picture = tmp_path / "trace.json", tmp_path / "trace.png"
    flags = ("--model", MODEL, "--dtype", "float32", "--topology", "2A1F", "--streams", "2", "--threads", "1")
    with LocalCluster(tmp_path, *flags) as cluster:
        serving = {f'afd_gateway_worker_up{{rank="{rank}"}}' for rank in range(2)}  # one makes it ready

        def both_serve() -> bool:
            samples = cluster.metrics("gateway")
            return all(samples.get(name) == 1.0 for name in serving)

        eventually(both_serve, 10.0, "the gateway has heard of both attention workers")
        assert len(cluster.greedy_ids_of_all([[5 + idx, 6, 7] for idx in range(8)], MAX_TOKENS)) == 8
        text = record(cluster, path, "--png", str(picture))
    assert picture.read_bytes().startswith(b"\x89PNG")
    for name in ("attention/0", "attention/1", "ffn/0"):
        assert f"clock of {name}: " in text and "(the same clock as here)" in text

    timeline = from_chrome(path.read_bytes(), str(path))
    assert timeline.title.startswith("2A1F ") and not timeline.missing
    assert [worker.name for worker in timeline.workers] == ["attention/0", "attention/1", "ffn/0"]
    num_tokens = 0
    for worker in timeline.of_role(ATTENTION):
        names = {stage.name for stage in worker.stages}
        # It looks ahead only where an answer is not there at once.
        assert names - {"look_ahead"} == {"embed", "attention", "dispatch", "exchange", "combine", "head", "wait"}
        num_tokens += sum(stage.num_tokens for stage in worker.stages if stage.name == "head")
        for stream in (0, 1):
            stages = [stage for stage in worker.stages if stage.stream == stream]
            check_stream([stage for stage in stages if stage.name != "look_ahead"])  # of the step after
    assert num_tokens >= 8 * MAX_TOKENS
    [ffn] = timeline.of_role(FFN)
    assert {stage.name for stage in ffn.stages} == {"wait", "gang_wait", "ffn", "combine"}
    crossings = list(hops(timeline))
    assert crossings
    for hop in crossings:
        # One machine, one clock: no answer before its question, to the nanosecond.
        assert hop.dispatch is None or hop.dispatch.start_s <= hop.ffn.start_s
        assert hop.combine is None or hop.ffn.end_s <= hop.combine.start_s
    assert max(stage.gang_size for stage in ffn.stages) <= 2
    assert all(stage.gang_id and stage.epoch for stage in ffn.stages if stage.name != "wait")


def check_stream(stages):
    """One stream is in one place at a time, and goes embed, attention, dispatch, exchange, combine, ..., head."""
    follows = {
        "embed": {"attention"},
        "attention": {"dispatch"},
        "dispatch": {"exchange"},
        "exchange": {"combine"},
        "combine": {"attention", "head"},
        "head": {"embed"},
    }
    assert stages
    for before, after in pairwise(stages):
        assert before.end_s <= after.start_s + 1e-9, (before, after)
        assert after.name in follows[before.name], (before, after)
        if before.name in ("attention", "dispatch"):
            assert (before.layer, before.step) == (after.layer, after.step)

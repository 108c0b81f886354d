"""Record a real run with `afd trace` and draw it: `python -m bench.trace_picture` makes docs/figures/trace_2a1f.png,
and with `--topology 1A1F --streams 3 --num-seqs 96 --png docs/figures/trace_1a1f.png` the other one.

Several recordings are taken of one run. The picture shows their least disturbed part in which a step ends: the window
in which the FFN workers answer most. Whoever else uses the machine's cores shows up as stages that are stretched.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tempfile
from bisect import bisect_left
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from pathlib import Path

from afd.telemetry.ring import Stage
from afd.trace.chrome import from_chrome
from afd.trace.picture import draw
from afd.trace.summary import summary_text
from afd.trace.timeline import ATTENTION, FFN, Timeline
from bench.local import BenchCluster, run_round

VOCABULARY = (100, 30_000)  # prompt ids: away from the special tokens at either end
PROMPT_LEN = 32
LEAD = 0.45  # the step ends this far into the window


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--topology", default="2A1F")
    parser.add_argument("--streams", type=int, default=2)
    parser.add_argument("--num-seqs", type=int, default=32)
    parser.add_argument("--recordings", type=int, default=12)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each recording")
    parser.add_argument("--for-ms", type=float, default=40.0)
    parser.add_argument("--png", default="docs/figures/trace_2a1f.png")
    args = parser.parse_args()
    timeline, start_s = least_disturbed(record(args), args.for_ms / 1e3)
    print(summary_text(timeline))
    draw(timeline, start_s, start_s + args.for_ms / 1e3, args.png)
    print(f"{args.png}: {args.for_ms:g} ms from {start_s * 1e3:.4g} ms on")
    return 0


def record(args: argparse.Namespace) -> list[Timeline]:
    """Recordings one after another while requests run that outlast them."""
    rng = random.Random(0)
    prompts = [[rng.randrange(*VOCABULARY) for _ in range(PROMPT_LEN)] for _ in range(args.num_seqs)]
    flags = ("--model", args.model, "--topology", args.topology, "--streams", str(args.streams), "--threads", "1")
    timelines: list[Timeline] = []
    with (
        BenchCluster(*flags) as cluster,
        tempfile.TemporaryDirectory(prefix="afd-trace-") as folder,
        ThreadPoolExecutor(1) as pool,
    ):
        run_round(cluster, prompts, output_len=8)  # warm-up: weights touched, gangs formed once
        while len(timelines) < args.recordings:
            load = pool.submit(run_round, cluster, prompts, 200)
            while not load.done() and len(timelines) < args.recordings:
                path = Path(folder) / f"{len(timelines)}.json"
                command = [sys.executable, "-m", "afd", "trace", "--seconds", str(args.seconds), "-o", str(path)]
                subprocess.run(command, env=cluster.env, check=True, stdout=subprocess.DEVNULL, timeout=60)
                timelines.append(from_chrome(path.read_bytes(), str(path)))
            load.result()
    return timelines


def least_disturbed(timelines: list[Timeline], span_s: float) -> tuple[Timeline, float]:
    """The recording and where its window begins."""
    candidates: list[tuple[int, int, float]] = []
    for idx, timeline in enumerate(timelines):
        batches = sorted((s for w in timeline.of_role(FFN) for s in w.stages if s.name == "ffn"), key=_start_s)
        answers = [0, *accumulate(max(1, s.gang_size) for s in batches)]
        for worker in timeline.of_role(ATTENTION):
            for head in worker.stages:
                start_s = head.start_s - LEAD * span_s
                if head.name == "head" and 0.0 <= start_s <= timeline.seconds - span_s:
                    begin, end = (bisect_left(batches, at_s, key=_start_s) for at_s in (start_s, start_s + span_s))
                    count = answers[end] - answers[begin]
                    candidates.append((count, -idx, start_s))
    if not candidates:
        raise RuntimeError("no step ended inside any recording: record longer (--seconds), or draw less (--for-ms)")
    _, idx, start_s = max(candidates)
    return timelines[-idx], start_s


def _start_s(stage: Stage) -> float:
    return stage.start_s


if __name__ == "__main__":
    sys.exit(main())

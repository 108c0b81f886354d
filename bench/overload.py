"""Overload: an open loop at a multiple of the capacity, with each SLA policy, against a modelled worker.

    python -m bench.overload            # capacity first, then twice as much with enforce, observe, off
    python -m bench.overload --quick    # a few seconds each: does it run

Real processes (`afd up --topology mono`), real HTTP, `afd bench` as the load; only the model is a formula, so that two
cores show what a large machine would. Capacity is what it completes per second under enforce when far more is offered.
Memory is the resident set of all cluster processes; its growth is that of the run's second half, when queues and caches
are as full as they get: what grows then is a leak. The last line of the output is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil

from bench.local import BenchCluster

AT_ONCE_S = 0.1


def flags_of(args: argparse.Namespace, policy: str) -> list[str]:
    return [
        *("--topology", "mono", "--sla-policy", policy),
        *("--sla-tpot-ms", str(args.tpot_ms), "--sla-ttft-ms", str(args.ttft_ms)),
        *("--set", f"attention.modelled={args.modelled}"),
        *("--set", f"attention.min_chunk_tokens={args.min_chunk}"),
    ]


class MemoryWatch:
    """Resident bytes of a process and its children, sampled in a thread. A context manager."""

    def __init__(self, pid: int, interval_s: float = 0.5):
        root = psutil.Process(pid)
        self._processes = [root, *root.children(recursive=True)]
        self._interval_s = interval_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self.samples: list[tuple[float, int]] = []
        self.lost = ""

    def __enter__(self) -> MemoryWatch:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        while True:
            try:
                self.samples.append((time.monotonic(), sum(p.memory_info().rss for p in self._processes)))
            except psutil.NoSuchProcess as error:
                self.lost = str(error)
                return
            if self._stop.wait(self._interval_s):
                return

    def summary(self) -> dict[str, float]:
        """MiB at the start, in the middle and at the end, and growth of the second half in MiB per minute."""
        late = self.samples[len(self.samples) // 2 :]
        growth = 0.0
        if len(late) > 2:
            times, sizes = zip(*late, strict=True)
            growth = statistics.linear_regression(times, sizes).slope * 60 / 2**20
        mib = [size / 2**20 for _, size in self.samples]
        return {"begin": mib[0], "middle": mib[len(mib) // 2], "end": mib[-1], "growth_per_minute": growth}


def load(url: str, args: argparse.Namespace, *shape: str) -> dict:
    """One `afd bench` in its own process -> its JSON, arrays included."""
    with tempfile.TemporaryDirectory(prefix="afd-overload-") as folder:
        result = Path(folder) / "result.json"
        command = [sys.executable, "-m", "afd", "bench", "--url", url, "--quiet", "--json", "--save-detailed"]
        command += ["--input-len", str(args.input_len), "--output-len", str(args.output_len), "--range-ratio", "0.5"]
        command += ["--goodput", f"tpot:{args.tpot_ms}", f"ttft:{args.ttft_ms}", "--save-result", str(result), *shape]
        done = subprocess.run(command, capture_output=True, text=True)
        if not result.exists():
            raise RuntimeError(f"afd bench failed: {done.stderr[-2000:]}")
        return json.loads(result.read_text())


def measure_capacity(args: argparse.Namespace) -> float:
    """Requests per second in the middle of an open loop at `probe_rate` under enforce."""
    with BenchCluster(*flags_of(args, "enforce")) as cluster:
        count = round(args.probe_rate * args.probe_s)
        found = load(cluster.url, args, "--rate", str(args.probe_rate), "--num-prompts", str(count))
    return found["steady_output_throughput"] / (found["total_output_tokens"] / found["completed"])


def overload(args: argparse.Namespace, policy: str, rate: float) -> dict[str, float]:
    """One run with one policy -> a row of the table."""
    count = max(20, round(rate * args.seconds))
    with BenchCluster(*flags_of(args, policy)) as cluster:
        load(
            cluster.url, args, "--concurrency", "4", "--num-prompts", "16"
        )  # the model of step times has seen something
        with MemoryWatch(cluster.process.pid) as memory:
            found = load(cluster.url, args, "--rate", str(rate), "--num-prompts", str(count))
        if memory.lost:
            raise RuntimeError(
                f"{policy}: a process of the cluster ended: {memory.lost}\n" + "\n".join(cluster.lines[-30:])
            )
        counted = cluster.stats("attention")[0]
    refusals = [s for s, error in zip(found["latencies"], found["errors"], strict=True) if error]
    attained = found["slo_attainment"] or {}
    return {
        "policy": policy,
        "rate": rate,
        "sent": count,
        "completed": found["completed"],
        "refused": found["refused"],
        "other_failures": found["failed"] - found["refused"],
        "refused_with_retry_after": found["refused_with_retry_after"],
        "refused_at_once": sum(s <= AT_ONCE_S for s in refusals),
        "p99_refusal_ms": found.get("p99_refusal_ms"),
        "p50_tpot_ms": found["p50_tpot_ms"],
        "p99_tpot_ms": found["p99_tpot_ms"],
        "p99_ttft_ms": found["p99_ttft_ms"],
        "tpot_attainment": attained.get("tpot"),
        "ttft_attainment": attained.get("ttft"),
        "goodput": found["request_goodput"],
        "output_throughput": found["output_throughput"],
        "would_refuse": counted["refused"],
        "memory_mib": memory.summary(),
    }


def table(rows: list[dict], tpot_ms: float) -> str:
    head = ("policy", "sent", "served", "503", "at once", "TPOT p50", "p99", "of target", "met", "TTFT p99", "met")
    head += ("goodput/s", "tok/s", "MiB", "MiB/min")
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        memory = row["memory_mib"]
        cells = [
            row["policy"],
            row["sent"],
            row["completed"],
            row["refused"],
            row["refused_at_once"] if row["refused"] else "-",
            f"{row['p50_tpot_ms']:.1f}",
            f"{row['p99_tpot_ms']:.1f}",
            f"{row['p99_tpot_ms'] / tpot_ms:.2f}",
            f"{row['tpot_attainment']:.1%}",
            f"{row['p99_ttft_ms']:.0f}",
            f"{row['ttft_attainment']:.1%}",
            f"{row['goodput']:.1f}",
            f"{row['output_throughput']:.0f}",
            f"{memory['begin']:.0f} - {memory['end']:.0f}",
            f"{memory['growth_per_minute']:+.1f}",
        ]
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policies", default="enforce,observe,off")
    parser.add_argument("--modelled", default="base_ms=6,token_us=600,context_us=0.2", help="attention.modelled")
    parser.add_argument("--min-chunk", type=int, default=16, help="prefill tokens that each step can afford")
    parser.add_argument("--tpot-ms", type=float, default=50.0)
    parser.add_argument("--ttft-ms", type=float, default=2000.0)
    parser.add_argument("--input-len", type=int, default=32)
    parser.add_argument("--output-len", type=int, default=64)
    parser.add_argument("--factor", type=float, default=2.0, help="offered load / capacity")
    parser.add_argument("--capacity", type=float, help="requests/s; measured if not given")
    parser.add_argument("--probe-rate", type=float, default=60.0, help="requests/s that measure the capacity")
    parser.add_argument("--probe-s", type=float, default=20.0)
    parser.add_argument("--seconds", type=float, default=60.0, help="of arrivals, per policy")
    parser.add_argument("--quick", action="store_true", help="4 s per policy, capacity not measured")
    args = parser.parse_args()
    if args.quick:
        args.seconds, args.capacity = 4.0, args.capacity or 12.0
    capacity = args.capacity or measure_capacity(args)
    print(f"capacity {capacity:.1f} requests/s; offered {args.factor * capacity:.1f}/s for {args.seconds:.0f} s each")
    rows = []
    for policy in args.policies.split(","):
        rows.append(overload(args, policy, args.factor * capacity))
        print(f"  {policy}: done", flush=True)
    print("\n" + table(rows, args.tpot_ms) + "\n")
    machine = {"cpu": platform.machine(), "cores": os.cpu_count(), "load": os.getloadavg()[0]}
    print(json.dumps({"bench": "overload", **vars(args), "capacity": capacity, "rows": rows, "machine": machine}))


if __name__ == "__main__":
    main()

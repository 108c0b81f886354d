"""The SLA on a real cluster, below its capacity and above it: who is served, in time, and what the others are told.

    python -m bench.overload                         # 1A1F: capacity first, then half, 0.8 and twice of it
    python -m bench.overload --topologies 1A1F,2A1F --seconds 120
    python -m bench.overload --quick                 # a few seconds each, on a modelled worker: does it run

Real processes (`afd up` with its defaults), the real default model, real HTTP, `afd bench` as the load (Poisson
arrivals). Policies take turns at each load. Goodput is what is completed per second within both targets while arrivals
go on; capacity is what is completed per second, while they go on, under enforce when far more is offered. A machine
that needs most of the TPOT target for a single sequence has next to no capacity: give it a looser one (`--tpot-ms`) or
a worker that is modelled (`--modelled`), which shows the gateway and admission alone.

Retry-After is compared with what the last request that was let in before the refusal waited for its first token. Memory
is the resident set of all cluster processes; its growth is that of the run's second half. The last line of the output
is one JSON object.
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


def flags_of(args: argparse.Namespace, topology: str, policy: str) -> list[str]:
    flags = ["--topology", topology, "--sla-policy", policy]
    flags += ["--sla-tpot-ms", str(args.tpot_ms), "--sla-ttft-ms", str(args.ttft_ms)]
    return flags + (["--set", f"attention.modelled={args.modelled}"] if args.modelled else [])


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


def warm_up(cluster: BenchCluster, args: argparse.Namespace) -> None:
    """The model of step times has seen something."""
    load(cluster.url, args, "--concurrency", "2", "--num-prompts", "6")


def measure_capacity(args: argparse.Namespace, topology: str) -> float:
    """Requests per second in the middle of an open loop that offers far too much, under enforce."""
    with BenchCluster(*flags_of(args, topology, "enforce")) as cluster:
        warm_up(cluster, args)
        rate = args.probe_rate
        if not rate:
            most = load(cluster.url, args, "--concurrency", "16", "--num-prompts", "32")
            rate = max(0.5, 3.0 * most["request_throughput"])
        found = load(cluster.url, args, "--rate", str(rate), "--num-prompts", str(max(20, round(rate * args.probe_s))))
    return found["steady_output_throughput"] / (found["total_output_tokens"] / found["completed"])


def steady_goodput(found: dict) -> float | None:
    """Requests per second that meet all goals while arrivals go on; None if the run was too short for a steady part."""
    if not found["completed"] or not found["steady_output_throughput"]:
        return None
    share_good = found["request_goodput"] * found["duration"] / found["completed"]
    return share_good * found["steady_output_throughput"] / (found["total_output_tokens"] / found["completed"])


def retry_after_ratios(found: dict) -> list[float]:
    """Retry-After of each refusal over the TTFT of the last request that was sent before it and let in."""
    ratios, waited_s = [], None
    rows = zip(found["start_times"], found["errors"], found["ttfts"], found["retry_afters"], strict=True)
    for _, error, ttft_s, retry_after_s in sorted(rows, key=lambda row: row[0]):
        if not error:
            waited_s = ttft_s
        elif retry_after_s and waited_s:
            ratios.append(retry_after_s / waited_s)
    return ratios


def measure(args: argparse.Namespace, topology: str, policy: str, load_share: float, rate: float) -> dict:
    """One run with one policy -> a row of the table."""
    count = max(10, round(rate * args.seconds))
    with BenchCluster(*flags_of(args, topology, policy)) as cluster:
        warm_up(cluster, args)
        with MemoryWatch(cluster.process.pid) as memory:
            found = load(cluster.url, args, "--rate", str(rate), "--num-prompts", str(count))
        if memory.lost:
            lines = "\n".join(cluster.lines[-30:])
            raise RuntimeError(f"{policy}: a process of the cluster ended: {memory.lost}\n{lines}")
    refusals = [s for s, error in zip(found["latencies"], found["errors"], strict=True) if error]
    attained = found["slo_attainment"] or {}
    ratios = retry_after_ratios(found)
    return {
        "topology": topology,
        "load": load_share,
        "policy": policy,
        "rate": rate,
        "sent": count,
        "completed": found["completed"],
        "refused": found["refused"],
        "other_failures": found["failed"] - found["refused"],
        "refused_at_once": sum(s <= AT_ONCE_S for s in refusals),
        "p99_refusal_ms": found.get("p99_refusal_ms"),
        "retry_after_ratio": statistics.median(ratios) if ratios else None,
        "retry_after_within_2": sum(0.5 <= ratio <= 2.0 for ratio in ratios) / len(ratios) if ratios else None,
        "p50_tpot_ms": found["p50_tpot_ms"],
        "p99_tpot_ms": found["p99_tpot_ms"],
        "p99_ttft_ms": found["p99_ttft_ms"],
        "tpot_attainment": attained.get("tpot"),
        "ttft_attainment": attained.get("ttft"),
        "goodput": steady_goodput(found),
        "output_throughput": found["output_throughput"],
        "memory_mib": memory.summary(),
    }


def table(rows: list[dict]) -> str:
    head = (
        "topology",
        "load",
        "policy",
        "sent",
        "served",
        "503",
        "at once",
        "Retry-After",
        "within 2",
        "TPOT p50",
        "p99",
    )
    head += ("met", "TTFT p99", "met", "goodput / capacity", "tok/s", "MiB")
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        capacity, goodput = row["rate"] / row["load"], row["goodput"]
        memory, refused, ratio = row["memory_mib"], row["refused"], row["retry_after_ratio"]
        cells = [
            row["topology"],
            f"{row['load']:.1f}",
            row["policy"],
            row["sent"],
            row["completed"],
            refused,
            row["refused_at_once"] if refused else "-",
            f"x {ratio:.2f}" if ratio else "-",
            f"{row['retry_after_within_2']:.0%}" if ratio else "-",
            f"{row['p50_tpot_ms']:.1f}",
            f"{row['p99_tpot_ms']:.1f}",
            f"{row['tpot_attainment']:.1%}",
            f"{row['p99_ttft_ms']:.0f}",
            f"{row['ttft_attainment']:.1%}",
            f"{goodput / capacity:.2f}" if goodput else "-",
            f"{row['output_throughput']:.0f}",
            f"{memory['begin']:.0f} - {memory['end']:.0f}",
        ]
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topologies", default="1A1F")
    parser.add_argument("--policies", default="observe,enforce")
    parser.add_argument("--loads", default="0.5,0.8,2", help="offered load / capacity")
    parser.add_argument(
        "--modelled", help="attention.modelled, in topology mono: base_ms=6,token_us=600,context_us=0.2"
    )
    parser.add_argument("--tpot-ms", type=float, default=50.0)
    parser.add_argument("--ttft-ms", type=float, default=5000.0)
    parser.add_argument("--input-len", type=int, default=64)
    parser.add_argument("--output-len", type=int, default=64)
    parser.add_argument("--capacity", type=float, help="requests/s; measured if not given")
    parser.add_argument("--probe-rate", type=float, help="requests/s that measure the capacity (found out)")
    parser.add_argument("--probe-s", type=float, default=30.0)
    parser.add_argument("--seconds", type=float, default=60.0, help="of arrivals in each run")
    parser.add_argument("--quick", action="store_true", help="4 s a run on a modelled worker, capacity not measured")
    args = parser.parse_args()
    if args.quick:
        args.seconds, args.capacity = 4.0, args.capacity or 8.0
        args.modelled = args.modelled or "base_ms=6,token_us=600,context_us=0.2"
    rows = []
    for topology in ["mono"] if args.modelled else args.topologies.split(","):
        capacity = args.capacity or measure_capacity(args, topology)
        print(f"{topology}: capacity {capacity:.2f} requests/s", flush=True)
        for share in map(float, args.loads.split(",")):
            for policy in args.policies.split(","):
                rows.append(measure(args, topology, policy, share, share * capacity))
                print(table(rows[-1:]).splitlines()[-1], flush=True)
    print("\n" + table(rows) + "\n")
    machine = {"cpu": platform.machine(), "cores": os.cpu_count(), "load": os.getloadavg()[0]}
    print(json.dumps({"bench": "overload", **vars(args), "rows": rows, "machine": machine}))


if __name__ == "__main__":
    main()

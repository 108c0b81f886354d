"""The simulator against the real cluster: throughput and TPOT of the same load.

    python -m bench.simulation            # six loads, the default model, 1A1F
    python -m bench.simulation --quick    # two short ones: does it run
    python -m bench.simulation --loads 3 --keep FOLDER    # a part of a longer run; --loads 0: simulate what is there
    python -m bench.simulation --cost     # what a simulation costs, by requests and workers (no cluster)

Each load is measured with `afd bench`; when it is over, its stage times are traced (partner, gateway and load generator
were running; tracing disturbs nothing). Loads differ by the seed of their requests. Then each is simulated twice: with
the stage times of its own trace ("simulated"), which tells how good the simulator is, and with those of the load before
("forecast"), which has the machine's moods in it too. Medians; the last line of the output is one JSON object.
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
import time
from pathlib import Path
from typing import Any

from bench.local import BenchCluster

METRICS = ("output_throughput", "median_tpot_ms")
SIDES = ("simulated", "forecast")
COST_CASES = [
    ("4A2F", 2000), ("64A8F", 2000), ("4A2F", 10000), ("16A4F", 10000), ("64A8F", 10000), ("64A8F", 100_000),
]  # fmt: skip
SETTINGS = ("model", "topology", "streams", "requests", "concurrency", "input_len", "output_len", "range_ratio")


def load_flags(args: argparse.Namespace) -> list[str]:
    """What the real and the simulated load have in common."""
    lengths = ["--input-len", str(args.input_len), "--output-len", str(args.output_len)]
    return [*lengths, "--range-ratio", str(args.range_ratio), "--concurrency", str(args.concurrency)]


def bench_command(cluster: BenchCluster, args: argparse.Namespace, seed: int) -> list[str]:
    command = [sys.executable, "-m", "afd", "bench", "--url", cluster.url, "--num-prompts", str(args.requests)]
    return [*command, *load_flags(args), "--seed", str(seed), "--num-warmups", "0", "--json", "--quiet"]


def measure(cluster: BenchCluster, args: argparse.Namespace, seed: int) -> dict[str, Any]:
    done = subprocess.run(bench_command(cluster, args, seed), check=True, stdout=subprocess.PIPE, timeout=600)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def calibration_of(cluster: BenchCluster, seconds: float) -> dict[str, Any]:
    """Stage times of the last seconds: each worker keeps its last stages, so they need not be taken under load."""
    with tempfile.NamedTemporaryFile() as file:
        command = [sys.executable, "-m", "afd", "trace", "--seconds", f"{seconds:.1f}", "--calibrate", file.name]
        subprocess.run(command, env=cluster.env, check=True, stdout=subprocess.DEVNULL, timeout=60)
        result: dict[str, Any] = json.loads(Path(file.name).read_bytes())
        return result


def simulate(args: argparse.Namespace, calibration: dict[str, Any], seed: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "afd", "simulate", "--topology", args.topology, "--model", args.plan_model]
    command += ["--ranks-per-instance", "1", "--streams", str(args.streams), "--sla-policy", "off"]
    command += ["--detail", "layers", "--requests", str(args.requests), "--seed", str(seed), "--json"]
    with tempfile.NamedTemporaryFile("w") as file:
        json.dump(calibration, file)
        file.flush()
        command += ["--calibrate", file.name, *load_flags(args)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, timeout=600)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def cost(args: argparse.Namespace) -> None:
    """CPU time and memory of simulations, each in a process of its own."""
    rows = []
    print(f"{'topology':>9} {'requests':>9} {'tokens':>11} {'wall s':>8} {'cpu s':>8} {'us/token':>9} {'MiB':>6}")
    for topology, num_requests in COST_CASES[: 2 if args.quick else None]:
        command = [sys.executable, "-m", "afd", "simulate", "--topology", topology, "--requests", str(num_requests)]
        with tempfile.TemporaryFile("w+") as output:
            process = subprocess.Popen([*command, "--range-ratio", "0.5", "--json"], stdout=output)
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            if process.returncode:
                raise RuntimeError(f"{' '.join(command)} exited with {process.returncode}")
            output.seek(0)
            result = json.load(output)
        cpu_s, tokens = usage.ru_utime + usage.ru_stime, result["output_tokens"]
        row = {"topology": topology, "requests": num_requests, "tokens": tokens, "wall_s": result["simulated_in_s"]}
        rows.append({**row, "cpu_s": cpu_s, "mib": usage.ru_maxrss / 1024, "tpot_ms": result["median_tpot_ms"]})
        print(
            f"{topology:>9} {num_requests:>9} {tokens:>11} {result['simulated_in_s']:8.1f} {cpu_s:8.1f} "
            f"{cpu_s / tokens * 1e6:9.1f} {usage.ru_maxrss / 1024:6.0f}",
            flush=True,
        )
    print(json.dumps({"bench": "simulation-cost", "rows": rows}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct", help="as `afd up`")
    parser.add_argument("--plan-model", default="smollm2-135m-instruct", help="the same for `afd plan`")
    parser.add_argument("--topology", default="1A1F")
    parser.add_argument("--streams", type=int, default=2)
    parser.add_argument("--requests", type=int, default=32, help="few enough for a worker to keep all stages")
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--input-len", type=int, default=64)
    parser.add_argument("--output-len", type=int, default=64)
    parser.add_argument("--range-ratio", type=float, default=0.25)
    parser.add_argument("--loads", type=int, default=6, help="to measure now; their seeds go on from those kept")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="loads with the same settings: read, and added to")
    parser.add_argument("--quick", action="store_true", help="two short loads: does it run")
    parser.add_argument("--cost", action="store_true", help="time the simulator alone")
    args = parser.parse_args()
    if args.cost:
        cost(args)
        return
    if args.quick:
        args.loads, args.requests, args.concurrency = 2, 24, 8
    with tempfile.TemporaryDirectory() as folder:
        keep: Path = args.keep or Path(folder)
        keep.mkdir(parents=True, exist_ok=True)
        if args.loads:
            run_loads(args, keep)
        report(args, kept_loads(args, keep))


def run_loads(args: argparse.Namespace, keep: Path) -> None:
    """One file for each load: settings, seed, what was measured, stage times."""
    first = len(kept_loads(args, keep))
    flags = ["--topology", args.topology, "--model", args.model, "--streams", str(args.streams)]
    with BenchCluster(*flags, "--sla-policy", "off") as cluster:
        measure(cluster, argparse.Namespace(**{**vars(args), "requests": args.concurrency, "output_len": 8}), seed=99)
        for seed in range(first, first + args.loads):
            begun_s = time.perf_counter()
            result = measure(cluster, args, seed)
            calibration = calibration_of(cluster, time.perf_counter() - begun_s)
            real = {name: result[name] for name in METRICS}
            load = {"settings": settings_of(args), "seed": seed, "real": real, "calibration": calibration}
            (keep / f"load-{seed:03}.json").write_text(json.dumps(load))
            print(f"load {seed}: " + ", ".join(f"{name} {real[name]:.1f}" for name in METRICS), flush=True)


def kept_loads(args: argparse.Namespace, keep: Path) -> list[dict[str, Any]]:
    """In order. ValueError when one had other settings."""
    loads = [json.loads(file.read_bytes()) for file in sorted(keep.glob("load-*.json"))]
    for load in loads:
        if load["settings"] != settings_of(args):
            raise ValueError(f"{keep} has loads with other settings: {load['settings']}")
    return loads


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(args, name) for name in SETTINGS}


def report(args: argparse.Namespace, loads: list[dict[str, Any]]) -> None:
    """Every load simulated with its own stage times and with those of the load before; medians of each."""
    print(f"\n{args.model} {args.topology}, {args.streams} streams, {args.concurrency} clients: {len(loads)} loads")
    rounds = []
    for before, load in zip([None, *loads], loads, strict=False):
        found = {"real": load["real"], "simulated": simulate(args, load["calibration"], load["seed"])}
        if before is not None:
            found["forecast"] = simulate(args, before["calibration"], load["seed"])
        rounds.append({side: {name: values[name] for name in METRICS} for side, values in found.items()})
    medians = {}
    for name in METRICS:
        real = statistics.median(found["real"][name] for found in rounds)
        medians[name] = {"real": real}
        print(f"{name:>18}  real {real:8.2f}", end="")
        for side in SIDES:
            having = [found for found in rounds if side in found]
            if having:
                value = statistics.median(found[side][name] for found in having)
                error = value / statistics.median(found["real"][name] for found in having) - 1
                medians[name] |= {side: value, f"{side}_error": error}
                print(f"  {side} {value:8.2f} {error:+6.1%}", end="")
        print()
    machine = {"machine": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    result = {"bench": "simulation", **machine, "settings": settings_of(args), "medians": medians, "rounds": rounds}
    print(json.dumps(result))


if __name__ == "__main__":
    main()

"""The simulator against the real cluster: throughput and TPOT of the same load, in interleaved rounds.

    python -m bench.simulation            # five rounds, the default model, 1A1F
    python -m bench.simulation --quick    # one short round: does it run
    python -m bench.simulation --rounds 2 --keep rounds.jsonl    # one more part of a longer run
    python -m bench.simulation --cost     # what a simulation costs, by requests and workers (no cluster)

Each round: a load is run and its stage times are traced (partner, gateway and load generator running); a second one,
the same but for its seed, is measured with `afd bench`; the simulator runs that one with the first one's stage times.
Medians over the rounds, those of earlier runs in --keep FILE included; the last line of the output is one JSON object.
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


def calibrate(cluster: BenchCluster, args: argparse.Namespace, file: Path, seed: int) -> None:
    """Stage times of a load, taken when it is over: each worker keeps its last stages, so tracing disturbs nothing."""
    begun_s = time.perf_counter()
    measure(cluster, args, seed)
    seconds = min(time.perf_counter() - begun_s, args.trace_s)
    command = [sys.executable, "-m", "afd", "trace", "--seconds", f"{seconds:.1f}", "--calibrate", str(file)]
    subprocess.run(command, env=cluster.env, check=True, stdout=subprocess.DEVNULL, timeout=60)


def measure(cluster: BenchCluster, args: argparse.Namespace, seed: int) -> dict[str, float]:
    done = subprocess.run(bench_command(cluster, args, seed), check=True, stdout=subprocess.PIPE, timeout=600)
    return json.loads(done.stdout)


def simulate(args: argparse.Namespace, file: Path, seed: int) -> dict[str, float]:
    command = [sys.executable, "-m", "afd", "simulate", "--topology", args.topology, "--model", args.plan_model]
    command += ["--ranks-per-instance", "1", "--streams", str(args.streams), "--sla-policy", "off"]
    command += ["--detail", "layers", "--requests", str(args.requests), "--seed", str(seed)]
    command += ["--calibrate", str(file), *load_flags(args), "--json"]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, timeout=600).stdout)


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
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--input-len", type=int, default=64)
    parser.add_argument("--output-len", type=int, default=64)
    parser.add_argument("--range-ratio", type=float, default=0.25)
    parser.add_argument("--trace-s", type=float, default=60.0, help="calibrate with so many last seconds at most")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--keep", type=Path, help="file of rounds with the same settings: read, and added to")
    parser.add_argument("--quick", action="store_true", help="one short round: does it run")
    parser.add_argument("--cost", action="store_true", help="time the simulator alone")
    args = parser.parse_args()
    if args.cost:
        cost(args)
        return
    if args.quick:
        args.rounds, args.requests, args.concurrency = 1, 24, 8
    rounds = kept_rounds(args)
    flags = ["--topology", args.topology, "--model", args.model, "--streams", str(args.streams)]
    with tempfile.TemporaryDirectory() as folder, BenchCluster(*flags, "--sla-policy", "off") as cluster:
        measure(cluster, argparse.Namespace(**{**vars(args), "requests": args.concurrency, "output_len": 8}), seed=99)
        for idx in range(len(rounds), len(rounds) + args.rounds):
            file = Path(folder) / f"round-{idx}.json"
            calibrate(cluster, args, file, seed=100 + idx)
            real = measure(cluster, args, seed=idx)
            simulated = simulate(args, file, seed=idx)
            found = {name: {"real": real[name], "simulated": simulated[name]} for name in METRICS}
            found["stages"] = {name: json.loads(file.read_text())[name] for name in ("t_A", "t_F", "t_C", "t_head")}
            rounds.append(found)
            keep_round(args, found)
            shown = ", ".join(f"{name} {real[name]:.1f} real, {simulated[name]:.1f} simulated" for name in METRICS)
            print(f"round {idx}: {shown}", flush=True)
    report(args, rounds)


def kept_rounds(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Rounds of earlier runs; ValueError when one of them had other settings."""
    if args.keep is None or not args.keep.exists():
        return []
    rounds = []
    for line in args.keep.read_text().splitlines():
        kept = json.loads(line)
        if kept["settings"] != settings_of(args):
            raise ValueError(f"{args.keep} has rounds with other settings: {kept['settings']}")
        rounds.append(kept["round"])
    return rounds


def keep_round(args: argparse.Namespace, found: dict[str, Any]) -> None:
    if args.keep is not None:
        with args.keep.open("a") as file:
            file.write(json.dumps({"settings": settings_of(args), "round": found}) + "\n")


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(args, name) for name in SETTINGS}


def report(args: argparse.Namespace, rounds: list[dict[str, Any]]) -> None:
    """Medians over all rounds."""
    print(f"\n{args.model} {args.topology}, {args.streams} streams, {args.concurrency} clients: {len(rounds)} rounds")
    medians = {}
    for name in METRICS:
        values = {side: statistics.median(found[name][side] for found in rounds) for side in ("real", "simulated")}
        values["error"] = values["simulated"] / values["real"] - 1
        medians[name] = values
        print(f"{name:>18}  real {values['real']:9.2f}  simulated {values['simulated']:9.2f}  {values['error']:+.1%}")
    machine = {"machine": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    result = {"bench": "simulation", **machine, "settings": settings_of(args), "medians": medians, "rounds": rounds}
    print(json.dumps(result))


if __name__ == "__main__":
    main()

"""The simulator against the real cluster: throughput and TPOT of the same load, in interleaved rounds.

    python -m bench.simulation            # five rounds, the default model, 1A1F
    python -m bench.simulation --quick    # one short round: does it run
    python -m bench.simulation --cost     # what a simulation costs, by requests and workers (no cluster)

Each round: the cluster under load is traced for its stage times (partner, gateway and load generator running); the
same load is measured with `afd bench`; the simulator runs it with those stage times. Requests of the two loads differ
by their seed. Medians over the rounds; the last line of the output is one JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from bench.local import BenchCluster

METRICS = ("output_throughput", "median_tpot_ms")
COST_CASES = [
    ("4A2F", 2000), ("64A8F", 2000), ("4A2F", 10000), ("16A4F", 10000), ("64A8F", 10000), ("64A8F", 100_000),
]  # fmt: skip
FULL = 0.75  # of the clients' requests run when the trace begins


def load_flags(args: argparse.Namespace) -> list[str]:
    """What the real and the simulated load have in common."""
    lengths = ["--input-len", str(args.input_len), "--output-len", str(args.output_len)]
    return [*lengths, "--range-ratio", str(args.range_ratio), "--concurrency", str(args.concurrency)]


def bench_command(cluster: BenchCluster, args: argparse.Namespace, seed: int) -> list[str]:
    command = [sys.executable, "-m", "afd", "bench", "--url", cluster.url, "--num-prompts", str(args.requests)]
    return [*command, *load_flags(args), "--seed", str(seed), "--num-warmups", "0", "--json", "--quiet"]


def calibrate(cluster: BenchCluster, args: argparse.Namespace, file: Path, seed: int) -> None:
    """Trace the cluster in the middle of a load."""
    load = subprocess.Popen(bench_command(cluster, args, seed), stdout=subprocess.DEVNULL)
    try:
        while sum(stats["running"] for stats in cluster.stats("attention")) < FULL * args.concurrency:
            if load.poll() is not None:
                raise RuntimeError(f"the load was over (exit code {load.returncode}) before it was traced: --requests")
        with contextlib.suppress(subprocess.TimeoutExpired):
            load.wait(args.trace_s)
        command = [sys.executable, "-m", "afd", "trace", "--seconds", str(args.trace_s), "--calibrate", str(file)]
        subprocess.run(command, env=cluster.env, check=True, stdout=subprocess.DEVNULL, timeout=60)
        load.wait(600)
    finally:
        if load.poll() is None:
            load.kill()
            load.wait()


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
    parser.add_argument("--requests", type=int, default=160)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--input-len", type=int, default=64)
    parser.add_argument("--output-len", type=int, default=64)
    parser.add_argument("--range-ratio", type=float, default=0.25)
    parser.add_argument("--trace-s", type=float, default=8.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="one short round: does it run")
    parser.add_argument("--cost", action="store_true", help="time the simulator alone")
    args = parser.parse_args()
    if args.cost:
        cost(args)
        return
    if args.quick:
        args.rounds, args.requests, args.concurrency, args.trace_s = 1, 64, 8, 5.0
    flags = ["--topology", args.topology, "--model", args.model, "--streams", str(args.streams)]
    rounds: list[dict[str, dict[str, float]]] = []
    with tempfile.TemporaryDirectory() as folder, BenchCluster(*flags, "--sla-policy", "off") as cluster:
        measure(cluster, args, seed=99)  # warm
        for idx in range(args.rounds):
            file = Path(folder) / f"round-{idx}.json"
            calibrate(cluster, args, file, seed=100 + idx)
            real = measure(cluster, args, seed=idx)
            simulated = simulate(args, file, seed=idx)
            rounds.append({name: {"real": real[name], "simulated": simulated[name]} for name in METRICS})
            shown = ", ".join(f"{name} {real[name]:.1f} real, {simulated[name]:.1f} simulated" for name in METRICS)
            print(f"round {idx}: {shown}", flush=True)
            if idx == 0:
                stages = json.loads(file.read_text())
                print({name: stages[name] for name in ("t_A", "t_F", "t_C", "t_head")})
    report(args, rounds)


def report(args: argparse.Namespace, rounds: list[dict[str, dict[str, float]]]) -> None:
    medians = {
        name: {side: statistics.median(found[name][side] for found in rounds) for side in ("real", "simulated")}
        for name in METRICS
    }
    print(
        f"\n{args.model} {args.topology}, {args.streams} streams, {args.concurrency} clients: medians of {args.rounds}"
    )
    for name, values in medians.items():
        error = values["simulated"] / values["real"] - 1
        values["error"] = error
        print(f"{name:>18}  real {values['real']:9.2f}  simulated {values['simulated']:9.2f}  {error:+.1%}")
    machine = {"machine": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    print(json.dumps({"bench": "simulation", **machine, "arguments": vars(args), "medians": medians, "rounds": rounds}))


if __name__ == "__main__":
    main()

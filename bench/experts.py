"""Grouped expert compute against its floor: the bare GEMMs that the same routing needs, one thread.

    python bench/experts.py                     # dummy:step3-mini, bfloat16, 1 to 256 tokens
    python bench/experts.py --model dummy:qwen3-moe-tiny --dtype float32 --skew

Gate first: the layer equals one expert at a time. Then, for each number of tokens, layer and floor are timed in turns
and the medians compared. The floor has a GEMM pair for each expert that has tokens, on rows that lie ready: no sorting,
gathering, activation, weighting or adding. --skew sends all tokens to the same experts. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from afd.model.ffn import Dispatch, MoeFfn
from afd.model.loading import load_ffn_half, resolve_model
from afd.model.sharding import ShardSpec
from afd.model.spec import WEIGHT_TYPES, FfnKind
from afd.ops.ops import Ops
from afd.ops.select import select

TOKENS = (1, 4, 16, 64, 128, 256)


def routing(num_tokens: int, num_experts: int, top_k: int, skew: bool) -> tuple[Tensor, Tensor]:
    """(ids, weights) of random distinct experts, or of the same ones for all tokens."""
    if skew:
        ids = torch.arange(top_k).repeat(num_tokens, 1)
    else:
        ids = torch.rand(num_tokens, num_experts).topk(top_k, dim=1).indices
    return ids.to(torch.int32), torch.rand(num_tokens, top_k)


def one_at_a_time(layer: MoeFfn, dispatch: Dispatch) -> Tensor:
    """The obvious form: every (token, expert) pair by itself."""
    out = torch.zeros(dispatch.rows.shape)
    assert dispatch.expert_ids is not None and dispatch.expert_weights is not None
    for token, row in enumerate(dispatch.rows):
        for expert, weight in zip(dispatch.expert_ids[token], dispatch.expert_weights[token], strict=True):
            out[token] += weight * layer._experts[int(expert)](row[None])[0].float()
    return out


def floor(ops: Ops, layer: MoeFfn, dispatch: Dispatch) -> Callable[[], None]:
    """The bare GEMMs of this routing."""
    assert dispatch.expert_ids is not None
    counts = torch.bincount(dispatch.expert_ids.flatten().long(), minlength=len(layer._experts)).tolist()
    width, hidden = layer._experts[0].down.shape[1], layer._experts[0].down.shape[0]
    dtype = dispatch.rows.dtype
    inputs = {n: (torch.randn(n, hidden).to(dtype), torch.randn(n, width).to(dtype)) for n in set(counts) if n}

    def run() -> None:
        for expert, count in zip(layer._experts, counts, strict=True):
            if count:
                rows, gated = inputs[count]
                ops.linear(rows, expert.gate_up)
                ops.linear(gated, expert.down)

    return run


def medians(works: list[Callable[[], object]], rounds: int) -> list[float]:
    """Median seconds of each, measured in turns; the first round is dropped."""
    times: list[list[float]] = [[] for _ in works]
    for _ in range(rounds + 1):
        for work, taken in zip(works, times, strict=True):
            begun = time.perf_counter()
            work()
            taken.append(time.perf_counter() - begun)
    return [statistics.median(taken[1:]) for taken in times]


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="dummy:step3-mini")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--weights", choices=WEIGHT_TYPES, default="auto")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--skew", action="store_true", help="all tokens to the same experts")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    folder = resolve_model(args.model)
    spec = folder.spec
    idx = next(i for i, layer in enumerate(spec.layers) if layer.ffn.kind is FfnKind.MOE)
    ffn = spec.layers[idx].ffn
    ops = select("cpu", args.dtype)
    half = load_ffn_half(folder, ShardSpec(), ops, weights=args.weights)
    layer = half.layers[idx]
    assert isinstance(layer, MoeFfn)
    layer._shared = None  # routed experts only
    dtype = half.dtype

    def dispatch_of(num_tokens: int) -> Dispatch:
        ids, weights = routing(num_tokens, ffn.num_experts, ffn.top_k, args.skew)
        return Dispatch(idx, torch.randn(num_tokens, spec.hidden).to(dtype), ids, weights)

    gate = dispatch_of(5)
    torch.testing.assert_close(layer(gate), one_at_a_time(layer, gate), rtol=2e-2, atol=2e-2)
    print(f"{args.model}, layer {idx}: {ffn.num_experts} experts x {ffn.intermediate}, top {ffn.top_k}, {args.dtype}")
    print("tokens  experts   layer ms   floor ms   ratio   weights GB/s")
    results = []
    for num_tokens in TOKENS:
        dispatch = dispatch_of(num_tokens)
        assert dispatch.expert_ids is not None
        active = dispatch.expert_ids.unique().numel()
        layer_s, floor_s = medians([lambda d=dispatch: layer(d), floor(ops, layer, dispatch)], args.rounds)
        read = active * 3 * spec.hidden * ffn.intermediate * (dtype.itemsize if args.weights == "auto" else 1)
        results.append({"tokens": num_tokens, "experts": active, "layer_s": layer_s, "floor_s": floor_s})
        print(
            f"{num_tokens:>6} {active:>8} {layer_s * 1e3:>10.3f} {floor_s * 1e3:>10.3f} {layer_s / floor_s:>7.2f} "
            f"{read / layer_s / 1e9:>10.1f}"
        )
    print(json.dumps({"bench": "experts", "model": args.model, "dtype": args.dtype, "results": results}))


if __name__ == "__main__":
    main()

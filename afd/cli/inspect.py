"""`afd inspect MODEL`: what a model is and takes, and whether its experts are alive."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from dataclasses import asdict
from statistics import median

from afd.model.expert_health import DEAD_SHARE, ExpertHealth, expert_health
from afd.model.inspect import LayerGroup, ModelReport, describe
from afd.model.loading import DEFAULT_MODEL, ModelFolder, resolve_model
from afd.model.spec import WEIGHT_TYPES
from afd.types import FfnParallel, Topology

MAX_RANGES_SHOWN = 5
_SERVES = {
    "chat": "text and chat",
    "text": "text; no chat, as there is no chat template",
    "token ids": "token ids only, as there is no tokenizer that is read",
}

_DESCRIPTION = """\
Shapes, parameters, KV bytes per token and the memory of each worker, from the model's headers. For a checkpoint with
experts it then reads their weights, one expert at a time, and lists each one's norms; those that give nothing beside
their layer are called dead."""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("inspect", help="what a model is and what it takes", description=_DESCRIPTION)
    parser.add_argument("model", nargs="?", default=DEFAULT_MODEL, help=f"as for --model (default: {DEFAULT_MODEL})")
    parser.add_argument("--topology", default="1A1F", help="xAyF or mono, for the memory of each role (default: 1A1F)")
    parser.add_argument(
        "--ffn-parallel", choices=[str(p) for p in FfnParallel], default=str(FfnParallel.HYBRID), help="cut of the FFN"
    )
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--weights", choices=WEIGHT_TYPES, default="auto", help="as model.weights")
    parser.add_argument("--no-experts", action="store_true", help="do not read the experts' weights")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.set_defaults(func=_run)


def _run(args: argparse.Namespace) -> int:
    folder = resolve_model(args.model)
    topology, parallel = Topology.parse(args.topology), FfnParallel(args.ffn_parallel)
    report = describe(folder, topology, parallel, args.dtype, args.weights)
    layers = () if args.no_experts else _experts(folder)
    if args.json:
        print(json.dumps({**asdict(report), "experts": [asdict(expert) for layer in layers for expert in layer]}))
        return 0
    print(_text(report))
    for layer in layers:
        print(_layer_text(layer), flush=True)
    return 0


def _experts(folder: ModelFolder) -> Iterable[list[ExpertHealth]]:
    """Health of a checkpoint's experts. A dummy has none: its weights are random, and making them could take days."""
    return () if folder.path is None else expert_health(folder.checkpoint)


def _text(report: ModelReport) -> str:
    counts = report.parameters
    kv = ", ".join(f"{size:,} B in {dtype}" for dtype, size in report.kv_bytes.items())
    lines = [
        f"{report.name}: family {report.family}, hidden {report.hidden}, vocabulary {report.vocab_size}, "
        f"context {report.max_context}",
        f"serves        {_SERVES[report.serves]}",
        *(_group_text(group) for group in report.layers),
        f"parameters    {_billions(counts.total)} total, {_billions(counts.active)} active; "
        f"attention {_billions(counts.attention)}, FFN {_billions(counts.ffn)}",
        f"KV per token  {report.kv_elements:,} elements; {kv}",
    ]
    if report.windowed_kv_bytes:
        lines.append(f"              {report.windowed_kv_bytes:,} B of them ({report.dtype}) in sliding-window layers")
    suffix = f", model.weights {report.weights}" if report.weights != "auto" else ""
    lines.append(f"weights in {report.topology} ({report.dtype}{suffix}):")
    lines += [f"  {role.role:<12}  {role.weight_bytes / 2**30:.3f} GiB" for role in report.roles]
    return "\n".join(lines)


def _group_text(group: LayerGroup) -> str:
    count = len(group.layers)
    return (
        f"{count:>3} {'layer' if count == 1 else 'layers'} ({_ranges(group.layers)}): {group.attention}; {group.ffn}; "
        f"{group.kv_elements} KV elements per token"
    )


def _ranges(numbers: tuple[int, ...]) -> str:
    """(0, 1, 2, 5) -> "0-2, 5", cut short when there are many."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1][-1] = number
        else:
            runs.append([number, number])
    texts = [f"{first}" if first == last else f"{first}-{last}" for first, last in runs]
    if len(texts) > MAX_RANGES_SHOWN:
        texts[2:-1] = ["..."]
    return ", ".join(texts)


def _layer_text(layer: list[ExpertHealth]) -> str:
    """One line a layer, one more for each dead expert; all experts' norms are in --json."""
    outputs = [expert.output_rms for expert in layer]
    lines = [
        f"layer {layer[0].layer:<3} {len(layer)} experts: output RMS {min(outputs):.3g} to {max(outputs):.3g}, "
        f"median {median(outputs):.3g}; norms gate {_span(e.gate_norm for e in layer)}, "
        f"up {_span(e.up_norm for e in layer)}, down {_span(e.down_norm for e in layer)}"
    ]
    lines += [
        f"  DEAD expert {e.expert}: output RMS {e.output_rms:.3g} is below {DEAD_SHARE:.0%} of the median; norms "
        f"{e.gate_norm:.3g}, {e.up_norm:.3g}, {e.down_norm:.3g}"
        for e in layer
        if e.dead
    ]
    return "\n".join(lines)


def _span(values: Iterable[float]) -> str:
    found = list(values)
    return f"{min(found):.3g}-{max(found):.3g}"


def _billions(count: int) -> str:
    return f"{count / 1e9:.1f} B" if count >= 1e9 else f"{count / 1e6:.1f} M"

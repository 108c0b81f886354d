"""The command line of `afd plan`: flags, and one call into the planner."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from afd.cli.parser import one_of, positive, positive_number
from afd.plan import commands
from afd.plan.deployment import Dispatch, KvDtype
from afd.plan.pipeline import PipelineKind
from afd.plan.weights import BYTES_OF
from afd.types import MAX_STREAMS

Command = Callable[[argparse.Namespace], int]


_DESCRIPTION = """\
Which xAyF topology, on which hardware, for which model and context, and is AFD worth it. Without a sub-command:
searches the topologies that hold a TPOT target, ranks them, compares them with colocated expert parallelism, and
prints how to start the winner."""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds `plan` and its sub-commands; each sets `func`, a callable from the Namespace to an exit code.

    `func` raises ConfigError on bad input; the caller prints it (one line) and exits with 2.
    """
    parser = subparsers.add_parser(
        "plan", help="size a cluster: cost, throughput and topology", description=_DESCRIPTION
    )
    _build(parser)


def _build(parser: argparse.ArgumentParser) -> None:
    _add_output(parser, default=False)
    _add_catalog(parser, default=True)
    _add_target(parser)
    parser.add_argument("--max-gpus", type=positive, default=256, metavar="N", help="chips in all (256)")
    parser.add_argument(
        "--inventory",
        default=None,
        metavar="CHIP:N,..",
        help="the chips there are: h20:32,h800:16 (no --max-gpus then)",
    )
    parser.add_argument("--rate", type=positive_number, default=None, metavar="R", help="requests a second to serve")
    parser.add_argument(
        "--sla-ttft-ms", type=positive_number, default=5000.0, metavar="MS", help="99th percentile of TTFT (5000)"
    )
    parser.add_argument(
        "--utilisation", type=positive_number, default=0.8, metavar="SHARE", help="planned load of servers (0.8)"
    )
    parser.add_argument(
        "--heterogeneous", action="store_true", help="also try every pair of the named and of the report's four chips"
    )
    parser.add_argument("--top", type=positive, default=10, metavar="N", help="plans to print (10)")
    parser.set_defaults(func=commands.run_search)

    subcommands = parser.add_subparsers(title="sub-commands", metavar="COMMAND", dest="plan_command")
    cost = subcommands.add_parser("cost", help="theoretical USD per 1e6 decoded tokens, by model and chip")
    _add_output(cost)
    _add_catalog(cost)
    cost.add_argument("--model", type=_names, default=None, metavar="A,B", help="models (the report's nine)")
    cost.add_argument("--chip", type=_names, default=None, metavar="A,B", help="chips (the report's four)")
    cost.add_argument("--context", type=_contexts, default=[8192, 32768], metavar="N,N", help="tokens (8192,32768)")
    cost.add_argument(
        "--deployment",
        choices=("homogeneous", "afd"),
        default="homogeneous",
        help="both parts on each chip, or each part on its cheapest chip",
    )
    cost.set_defaults(func=commands.run_cost)

    tgs = subcommands.add_parser("tgs", help="throughput of one topology under the SLA")
    _add_output(tgs)
    _add_catalog(tgs)
    _add_target(tgs)
    tgs.add_argument("--topology", required=True, metavar="xAyF")
    tgs.add_argument("--batch", type=positive, default=None, metavar="N", help="requests in all (the best)")
    tgs.set_defaults(func=commands.run_tgs)

    limits = subcommands.add_parser("limits", help="minimum MoE sparsity, and which chips can take part at all")
    _add_output(limits)
    _add_catalog(limits)
    limits.add_argument("--model", default="step3", metavar="NAME|PATH")
    limits.add_argument("--chip", type=_names, default=None, metavar="A,B", help="chips (all)")
    limits.add_argument("--stage-ms", type=positive_number, default=16.6, help="one pipeline stage of a step (16.6)")
    limits.set_defaults(func=commands.run_limits)

    figures = subcommands.add_parser("figures", help="draw the figures of docs/planning.md (needs matplotlib)")
    _add_output(figures)
    _add_catalog(figures)
    figures.add_argument("--out", default="docs/figures", metavar="DIR")
    figures.set_defaults(func=commands.run_figures)


def _add_output(parser: argparse.ArgumentParser, default: bool | str = argparse.SUPPRESS) -> None:
    parser.add_argument("--json", action="store_true", default=default, help="print JSON")


def _add_catalog(parser: argparse.ArgumentParser, default: bool = False) -> None:
    """Options that sub-commands share with `afd plan` itself: only the outer parser sets their defaults."""
    empty: list[str] | str = [] if default else argparse.SUPPRESS
    for option, metavar, text in (
        ("--hardware-file", "FILE", "TOML with more chips (repeatable)"),
        ("--model-file", "FILE", "TOML with more models (repeatable)"),
        ("--price", "CHIP=USD", "rent per chip and hour (repeatable)"),
    ):
        parser.add_argument(option, action="append", default=empty, metavar=metavar, help=text)


def _add_target(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default=None, metavar="NAME|PATH", help="a known model, or a config.json")
    parser.add_argument(
        "--context",
        type=positive,
        default=None,
        metavar="N",
        help="cached tokens per request (4096, or by the lengths)",
    )
    parser.add_argument(
        "--input-len", type=positive, default=None, metavar="N", help="tokens of a prompt: prefill is planned too"
    )
    parser.add_argument("--output-len", type=positive, default=None, metavar="N", help="tokens of an answer")
    parser.add_argument("--sla-tpot-ms", type=positive_number, default=50.0, metavar="MS", help="mean TPOT (50)")
    parser.add_argument("--attention", type=_names, default=None, metavar="CHIP[,CHIP]", help="chips for A (h800)")
    parser.add_argument("--ffn", type=_names, default=None, metavar="CHIP[,CHIP]", help="chips for F (h800)")
    parser.add_argument(
        "--attention-dtype",
        type=one_of(KvDtype),
        choices=list(KvDtype),
        default=KvDtype.AUTO,
        help="KV cache and core (auto)",
    )
    parser.add_argument(
        "--weight-dtype", choices=tuple(BYTES_OF), default=None, help="projections and experts (as published)"
    )
    parser.add_argument(
        "--streams",
        type=_streams,
        default=list(range(1, MAX_STREAMS + 1)),
        metavar="M[,M]",
        help=f"micro-batches in flight (the best of 1 to {MAX_STREAMS})",
    )
    parser.add_argument(
        "--network-gbit", default=None, metavar="GBIT[/server]", help="Gbit/s of a chip's link, or of a server's"
    )
    parser.add_argument(
        "--ranks-per-instance", type=positive, default=0, metavar="N", help="chips of an instance (a server's)"
    )
    parser.add_argument("--dispatch", type=one_of(Dispatch), choices=list(Dispatch), default=Dispatch.BROADCAST)
    parser.add_argument(
        "--pipeline", type=one_of(PipelineKind), choices=list(PipelineKind), default=PipelineKind.OPTIMISTIC
    )
    parser.add_argument(
        "--mtp", type=int, choices=range(8), default=0, metavar="N", help="drafts that a step verifies, 0 to 7 (0)"
    )
    parser.add_argument(
        "--mtp-acceptance",
        type=_shares,
        default=(),
        metavar="P[,P]",
        help="share of drafts accepted, by place; the last one for all behind it (0.82,0.75,0.78: MiMo-V2-Flash's)",
    )
    parser.add_argument("--efficiency", action="append", default=[], metavar="KEY=VALUE", help="a factor (repeatable)")
    parser.add_argument("--calibrate", default=None, metavar="FILE", help="stage times measured on a cluster, JSON")


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise argparse.ArgumentTypeError("expected names, separated by commas")
    return list(dict.fromkeys(names))


def _shares(text: str) -> tuple[float, ...]:
    try:
        shares = tuple(float(part) for part in text.split(","))
    except ValueError:
        shares = (-1.0,)
    if any(not 0.0 <= share <= 1.0 for share in shares):
        raise argparse.ArgumentTypeError("acceptance rates are shares from 0 to 1, separated by commas")
    return shares


def _contexts(text: str) -> list[int]:
    return [positive(name) for name in _names(text)]


def _streams(text: str) -> list[int]:
    values = sorted({positive(name) for name in _names(text)})
    if values[-1] > MAX_STREAMS:
        raise argparse.ArgumentTypeError(f"streams must be 1 to {MAX_STREAMS}")
    return values

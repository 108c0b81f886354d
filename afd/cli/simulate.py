"""The command line of `afd simulate`: flags, and one call into the simulation."""

from __future__ import annotations

import argparse

from afd.cli.parser import not_negative, one_of, positive, positive_number, ratio
from afd.plan.deployment import Dispatch, KvDtype
from afd.plan.weights import BYTES_OF

_DESCRIPTION = """\
Simulate a whole cluster under load: the service's own dispatcher, schedulers, admission and gang tables, with stage
times from data sheets, from a calibration, or constant. Prints what clients would see and where workers would wait."""

_EPILOG = "exit code: 0 an answer; 2 bad input (one line on stderr)."


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds `simulate`; its `func` maps a Namespace to an exit code and raises AfdError."""
    parser = subparsers.add_parser(
        "simulate",
        help="what a cluster would do under load: latencies, goodput, bubbles, losses",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser)
    parser.set_defaults(func=run)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """All flags, grouped."""
    _add_cluster(parser.add_argument_group("cluster"))
    _add_load(parser.add_argument_group("load"))
    _add_service(parser.add_argument_group("service"))
    parser.add_argument(
        "--fail",
        action="append",
        default=[],
        metavar="ROLE:INDEX@S[+RESTART_S|+load]",
        help="kill attention:I or ffn:I after S seconds; a successor serves RESTART_S later, or when it has loaded "
        "(repeatable)",
    )
    parser.add_argument(
        "--rollout",
        action="append",
        default=[],
        metavar="ROLE@S",
        help="from S seconds on replace a role's workers one after the other (repeatable)",
    )
    parser.add_argument(
        "--scale",
        action="append",
        default=[],
        metavar="WORKERS@S",
        help="from S seconds on there are to be so many attention workers (repeatable)",
    )
    parser.add_argument(
        "--slow",
        action="append",
        default=[],
        metavar="ROLE:INDEX*FACTOR[@S[+FOR_S]]",
        help="attention:I or ffn:I takes FACTOR times as long, from S seconds on, for FOR_S seconds (repeatable)",
    )
    parser.add_argument(
        "--detail",
        choices=("ends", "layers"),
        default="ends",
        help="simulate the first and last layer and take the others in closed form, or every layer (ends)",
    )
    parser.add_argument(
        "--baseline",
        choices=("ep",),
        help="the same requests through colocated expert parallelism on the same chips",
    )
    parser.add_argument(
        "--seeds", type=positive, metavar="N", help="run with N seeds, and print means with 95 %% confidence intervals"
    )
    parser.add_argument("--per-request", metavar="FILE", help="write one JSON line for each request when it ends")
    parser.add_argument(
        "--autoscale", metavar="MIN:MAX", help="what `afd autoscale` would advise for this load, such as 1A1F:8A4F"
    )
    parser.add_argument(
        "--autoscale-apply", action="store_true", help="with --autoscale: the number of attention workers follows it"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def _add_cluster(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--topology", required=True, metavar="xAyF")
    group.add_argument("--model", default="step3", metavar="NAME|PATH", help="a known model, or a config.json (step3)")
    group.add_argument("--attention", default="h800", metavar="CHIP", help="(h800)")
    group.add_argument("--ffn", default="h800", metavar="CHIP", help="(h800)")
    group.add_argument("--attention-dtype", type=one_of(KvDtype), choices=list(KvDtype), default=KvDtype.AUTO)
    group.add_argument("--weight-dtype", choices=tuple(BYTES_OF), default=None)
    group.add_argument(
        "--ranks-per-instance", type=positive, default=0, metavar="N", help="chips of an instance (a server's)"
    )
    group.add_argument("--hardware-file", action="append", default=[], metavar="FILE", help="TOML with more chips")
    group.add_argument("--model-file", action="append", default=[], metavar="FILE", help="TOML with more models")
    group.add_argument("--price", action="append", default=[], metavar="CHIP=USD", help="rent per chip and hour")
    group.add_argument("--dispatch", type=one_of(Dispatch), choices=list(Dispatch), default=Dispatch.BROADCAST)
    group.add_argument("--network-gbit", metavar="GBIT[/server]", help="of a chip's link, or of a server's")
    group.add_argument(
        "--oversubscription",
        type=positive_number,
        metavar="R",
        help="the network between the roles carries 1/R of the smaller role's links, for all together (no limit)",
    )
    group.add_argument(
        "--expert-skew",
        type=not_negative,
        default=0.0,
        metavar="S",
        help="a layer's i-th popular expert is asked for i^-S as often as its first (0: alike)",
    )
    group.add_argument("--efficiency", action="append", default=[], metavar="KEY=VALUE", help="a factor (repeatable)")
    times = group.add_mutually_exclusive_group()
    times.add_argument(
        "--calibrate", metavar="FILE", help="stage times measured on a cluster (`afd trace --calibrate`)"
    )
    times.add_argument(
        "--stages",
        metavar="KEY=US,...",
        help="constant stage times a layer: attention_us, ffn_us, to_ffn_us, to_attention_us; head_us a step",
    )
    group.add_argument(
        "--transfers",
        choices=("link", "sender", "delay"),
        help="what a transfer keeps busy: a link, its sender, or nothing (link; with --calibrate: nothing)",
    )


def _add_load(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--requests", type=positive, metavar="N", help="how many (1000, or the whole trace)")
    pace = group.add_mutually_exclusive_group()
    pace.add_argument("--rate", type=positive_number, metavar="R", help="requests/s of an open loop")
    pace.add_argument(
        "--load",
        type=positive_number,
        default=0.8,
        metavar="SHARE",
        help="the rate as a share of what the planner forecasts (0.8)",
    )
    pace.add_argument("--concurrency", type=positive, metavar="N", help="clients of a closed loop")
    pace.add_argument(
        "--trace",
        metavar="FILE",
        help='JSON lines {"at_s": 0.25, "input_len": 310, "output_len": 128, "hash_ids": [1, 2]}, or a Mooncake trace',
    )
    group.add_argument("--trace-speed", type=positive_number, default=1.0, metavar="X", help="times as fast (1)")
    group.add_argument(
        "--skip-long", action="store_true", help="leave requests of a trace out that the model cannot hold"
    )
    group.add_argument(
        "--hash-block-tokens",
        type=positive,
        default=512,
        metavar="N",
        help="tokens that one of its hash_ids names (512)",
    )
    group.add_argument(
        "--burstiness", type=positive_number, default=1.0, help="of an open loop: 1 = Poisson, below = bursts (1)"
    )
    group.add_argument("--input-len", type=positive, default=128, metavar="N", help="tokens of a prompt (128)")
    group.add_argument("--output-len", type=positive, default=200, metavar="N", help="tokens of an answer (200)")
    group.add_argument("--range-ratio", type=ratio, default=0.0, help="lengths vary by +- this share (0)")
    group.add_argument(
        "--max-tokens",
        type=positive,
        metavar="N",
        help="what clients allow; answers end before, at lengths the service cannot know (exactly the answer's length)",
    )
    group.add_argument("--seed", type=int, default=0, help="of lengths, arrivals and crowded experts (0)")


def _add_service(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--streams", type=int, choices=range(5), default=3, help="micro-batches in flight, 0 = auto (3)")
    group.add_argument("--sla-tpot-ms", type=positive_number, default=50.0, metavar="MS", help="(50)")
    group.add_argument("--sla-ttft-ms", type=positive_number, default=5000.0, metavar="MS", help="(5000)")
    group.add_argument("--sla-policy", choices=("enforce", "observe", "off"), default="observe", help="(observe)")
    group.add_argument("--max-num-seqs", type=positive, metavar="N", help="running requests of a worker (256 a rank)")
    group.add_argument("--max-step-tokens", type=positive, metavar="N", help="rows of a micro-batch (256 a rank)")
    group.add_argument("--min-chunk-tokens", type=positive, default=8, metavar="N", help="of prefill (8)")
    group.add_argument("--kv-blocks", type=positive, metavar="N", help="of a worker (what its chips hold)")
    group.add_argument("--block-size", type=int, choices=(8, 16, 32, 64), default=16, help="tokens (16)")
    group.add_argument("--max-queue", type=positive, default=1024, metavar="N", help="of the gateway (1024)")
    group.add_argument("--gang-window-ms", type=not_negative, default=10.0, metavar="MS", help="(10)")
    group.add_argument(
        "--load-gb-per-s", type=positive_number, default=2.0, metavar="G", help="weights, an instance (2)"
    )
    group.add_argument(
        "--start-s", type=not_negative, default=10.0, metavar="S", help="of a process, before weights (10)"
    )
    group.add_argument("--drain-s", type=not_negative, default=10.0, metavar="S", help="of a worker that leaves (10)")
    group.add_argument("--recovery-timeout-s", type=positive_number, default=60.0, metavar="S", help="(60)")


def run(arguments: argparse.Namespace) -> int:
    """Simulate and print; returns the exit code."""
    from afd.simulate.command import run as simulate  # the service's code, which `afd --help` need not import

    return simulate(arguments)

"""`afd autoscale`: predict from a cluster's step times what its load needs, and say (or set) how many workers."""

from __future__ import annotations

import argparse
import signal
import threading
import time
from contextlib import ExitStack, closing
from types import FrameType
from typing import TYPE_CHECKING

from afd.cli.locate import add_locate_flags, locate
from afd.cli.parser import positive_number
from afd.config import ClusterConfig, resolve_config
from afd.errors import ConfigError
from afd.types import Topology

if TYPE_CHECKING:
    from afd.cluster.autoscale.decision import Limits, Policy
    from afd.membership.client import CoordinatorClient

LOOK_S = 5.0


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "autoscale",
        help="recommend (or, in Kubernetes, set) the numbers of workers",
        description="Predict from the workers' step times which topologies hold the TPOT target under the present "
        "load, and recommend the cheapest: in the log, as metrics, in `afd status`. With --apply the number of "
        "attention workers is set, too; the number of FFN workers changes with a new topology only.",
    )
    add_locate_flags(parser)
    parser.add_argument("--min", type=_topology, default="1A1F", metavar="xAyF", help="no fewer (default: 1A1F)")
    parser.add_argument("--max", type=_topology, default="8A4F", metavar="xAyF", help="no more (default: 8A4F)")
    parser.add_argument(
        "--ffn-cost", type=positive_number, default=1.0, metavar="C", help="of an FFN worker, in attention workers (1)"
    )
    parser.add_argument("--interval", type=float, default=15.0, metavar="S", help="between rounds (default: 15)")
    parser.add_argument("--apply", metavar="RESOURCE/NAME", help="scale this, such as statefulsets/afd-attention")
    parser.add_argument("--once", action="store_true", help=f"look for {LOOK_S:.0f} s, print one line, end")
    parser.add_argument("--host", default="127.0.0.1", help="address of the metrics (default: 127.0.0.1)")
    parser.add_argument("--metrics-port", type=int, default=0, metavar="PORT", help="0 = any (default: 0)")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Exit code 0 after SIGTERM or Ctrl-C, and after --once; 1 where --once saw no working cluster."""
    from afd.cluster.autoscale.decision import Limits, Policy

    if not 1.0 <= args.interval <= 3600.0:
        raise ConfigError(f"--interval {args.interval:g} is not between 1 and 3600 seconds")
    limits = Limits(args.min, args.max)
    config = resolve_config(args.config, {})
    policy = Policy(
        tpot_s=config.sla.tpot_ms / 1e3,
        ttft_s=config.sla.ttft_ms / 1e3,
        max_num_seqs=config.attention.max_num_seqs,
        ffn_cost=args.ffn_cost,
    )
    with locate(args).client() as client:
        serve = _look_once if args.once else _serve
        return serve(args, config, client, policy, limits)


def _topology(text: str) -> Topology:
    try:
        return Topology.parse(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _look_once(
    args: argparse.Namespace, config: ClusterConfig, client: CoordinatorClient, policy: Policy, limits: Limits
) -> int:
    from afd.cluster.autoscale.decision import Demand, wish
    from afd.cluster.autoscale.observation import Observer

    observer = Observer(config.attention.streams)
    observer.observe(client.status(), time.monotonic())
    time.sleep(LOOK_S)
    seen = observer.observe(client.status(), time.monotonic())
    if seen is None:
        print("no attention and FFN workers to compare")
        return 1
    asked = wish(seen, Demand.of(seen, policy), policy, limits)
    print(f"{seen.size} -> {asked.size}: {asked.reason}")
    return 0


def _serve(
    args: argparse.Namespace, config: ClusterConfig, client: CoordinatorClient, policy: Policy, limits: Limits
) -> int:
    from afd.cluster.autoscale.controller import Controller
    from afd.cluster.autoscale.decision import Adviser
    from afd.cluster.autoscale.metrics import AutoscaleMetrics
    from afd.cluster.autoscale.observation import Observer
    from afd.cluster.autoscale.scale_target import ScaleTarget
    from afd.cluster.launch import files_needed
    from afd.host.open_files import want_open_files
    from afd.telemetry.exposition import MetricsServer, process_registry
    from afd.telemetry.log import setup_logging
    from afd.telemetry.log_level import follow_config

    setup_logging("autoscale", level=config.log.level, fmt=config.log.format)
    want_open_files(files_needed("autoscale", config), "autoscale")
    target = ScaleTarget.parse(args.apply) if args.apply else None
    stop = threading.Event()

    def on_signal(signum: int, frame: FrameType | None) -> None:
        stop.set()

    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, on_signal)
    registry = process_registry("autoscale")
    controller = Controller(
        client,
        Adviser(policy, limits),
        AutoscaleMetrics(registry),
        observer=Observer(config.attention.streams),
        target=target,
    )
    with ExitStack() as life:
        life.enter_context(closing(MetricsServer(args.host, args.metrics_port, registry, controller.ready)))
        if args.config:
            life.enter_context(closing(follow_config(args.config)))
        controller.run(stop, args.interval)
    return 0

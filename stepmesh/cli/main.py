"""Arguments of `python -m stepmesh` and the way to its commands."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from stepmesh.cli import doctor, m2n, topo
from stepmesh.cli.m2n_experiment import Experiment
from stepmesh.config import TRANSPORTS
from stepmesh.errors import MeshError

_SECRET_VARIABLE = "STEPMESH_SECRET"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; its exit status: 0 good, 1 the host or the run is not, 2 wrong arguments."""
    parser = _parser()
    args = parser.parse_args(arguments)
    try:
        return int(args.run(args))
    except MeshError as error:
        print(f"stepmesh: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m stepmesh", description=__doc__)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    command = commands.add_parser("doctor", help="what this host can do, and what to fix")
    command.add_argument("--json", action="store_true", help="one JSON document instead of text")
    command.set_defaults(run=_doctor)

    command = commands.add_parser("topo", help="GPUs, RDMA ports and network devices, and how near they are")
    command.add_argument("--json", action="store_true", help="one JSON document instead of text")
    command.set_defaults(run=_topo)

    command = commands.add_parser("m2n", help="M attention and N FFN ranks exchange, verified and timed")
    command.add_argument("--ranks", default="2x2", metavar="MxN", help="attention ranks x FFN ranks (default 2x2)")
    _add_run_arguments(command)

    command = commands.add_parser("pingpong", help="m2n with one rank each")
    command.set_defaults(ranks="1x1")
    _add_run_arguments(command)
    return parser


def _add_run_arguments(command: argparse.ArgumentParser) -> None:
    choices = ", ".join(name for name in TRANSPORTS if name != "inproc")
    command.add_argument("--transport", default="auto", help=f"one or more of {choices}, comma-separated")
    command.add_argument("--sizes", default="64,8K,1M", help="bytes of a dispatch to each peer (64, 8K, 1M, 917504)")
    command.add_argument("--back", default="1", help="bytes of the answer as a multiple of the dispatch's: 1 or 2")
    command.add_argument("--count", type=int, default=200, help="timed exchanges of each size (default 200)")
    command.add_argument("--at", metavar="HOST:PORT", help="across hosts: where all ranks meet (attention/0's host)")
    command.add_argument(
        "--run-ranks", metavar="LIST", help="across hosts: the ranks of this host, such as attention/0,ffn/0"
    )
    command.add_argument("--host", default="127.0.0.1", help="address that this host's FFN ranks listen on")
    command.add_argument(
        "--secret-file", type=Path, help=f"the cluster's key; or {_SECRET_VARIABLE} in the environment"
    )
    command.add_argument("--timeout", type=float, default=60.0, help="limit of every wait in seconds (default 60)")
    command.add_argument("--json", action="store_true", help="one JSON line at the end")
    command.set_defaults(run=_m2n)


def _doctor(args: argparse.Namespace) -> int:
    findings = doctor.examine()
    print(json.dumps([finding._asdict() for finding in findings]) if args.json else doctor.text(findings))
    return 1 if any(finding.level == doctor.FAIL for finding in findings) else 0


def _topo(args: argparse.Namespace) -> int:
    host = topo.read_host()
    print(json.dumps(topo.as_dict(host)) if args.json else topo.text(host))
    return 0


def _m2n(args: argparse.Namespace) -> int:
    secret = os.environ.get(_SECRET_VARIABLE, "").encode()
    if args.secret_file is not None:
        secret = args.secret_file.read_bytes().strip()
    experiment = Experiment.parse(
        ranks=args.ranks,
        transports=args.transport,
        sizes=args.sizes,
        back=args.back,
        count=args.count,
        host=args.host,
        timeout_s=args.timeout,
    )
    results = m2n.run(experiment, secret=secret, at=args.at, run_ranks=args.run_ranks)
    for result in results:
        print(m2n.text(result), flush=True)
    if args.json and results:
        print(json.dumps({"stepmesh": "m2n", "results": [result._asdict() for result in results]}))
    return 0

"""`afd coordinator | attention | ffn | gateway`: one process of a cluster, on its own host or under `afd up`."""

from __future__ import annotations

import argparse
import os
from contextlib import ExitStack, closing

from afd.cli.flags import ATTENTION, COORDINATOR, FFN, GATEWAY, add_config_flags, config_from_args
from afd.config import ClusterConfig
from afd.errors import ConfigError

HELP = {
    COORDINATOR: "keep the cluster together: membership, epochs, plan",
    ATTENTION: "run one attention worker",
    FFN: "run one FFN worker",
    GATEWAY: "run one HTTP gateway",
}


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    for role, text in HELP.items():
        parser = commands.add_parser(role, help=text, description=text)
        add_config_flags(parser, role)
        if role != COORDINATOR:
            parser.add_argument("--rank", type=int, default=-1, help="rank to ask for (default: any free one)")
        else:
            parser.add_argument("--rank", type=int, default=-1, help=argparse.SUPPRESS)
        if role in (ATTENTION, FFN):
            text = "all workers of the topology run on this host: compute with a share of its cores, not with all"
            parser.add_argument("--share-host", action="store_true", help=text)
        parser.add_argument("--dry-run", action="store_true", help="print the resolved configuration, start nothing")
        parser.add_argument("--supervised", action="store_true", help=argparse.SUPPRESS)
        parser.set_defaults(func=run, role=role)


def run(args: argparse.Namespace) -> int:
    from afd.cluster.role_process import run_role, run_supervised
    from afd.cluster.roles import ROLE_ENTRIES, preload

    entry = ROLE_ENTRIES[args.role]
    if args.supervised:
        return run_supervised(args.role, entry, preload=lambda: preload(args.role))

    from afd.cli.show import config_toml
    from afd.cluster.launch import RoleLaunch
    from afd.cluster.process import role_environment
    from afd.cluster.resolve import find_model, share_threads, usable_cores, whole_host_threads
    from afd.cluster.secret_file import require_secret
    from afd.telemetry.log import setup_logging
    from afd.telemetry.log_level import follow_config

    config = config_from_args(args)
    setup_logging(args.role, level=config.log.level, fmt=config.log.format)
    if args.role != COORDINATOR:
        _check_reachable(config)
        config, _ = find_model(config)
    share = share_threads if getattr(args, "share_host", False) else whole_host_threads
    config = share(config, usable_cores())
    if args.dry_run:
        print(config_toml(config))
        return 0
    secret = require_secret(config.cluster.secret_file)
    os.environ.update(role_environment(0))  # before the role's libraries are loaded
    with ExitStack() as life:
        if args.config:
            life.enter_context(closing(follow_config(args.config)))
        return run_role(RoleLaunch(role=args.role, rank=args.rank, config=config, secret=secret.hex()), entry)


def _check_reachable(config: ClusterConfig) -> None:
    if config.coordinator.address.endswith(":0"):
        raise ConfigError("--coordinator HOST:PORT is needed: where the cluster's coordinator listens")

"""`afd up`: a whole cluster on this host."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from afd.cli.flags import UP, add_config_flags, config_from_args, keys_from_args
from afd.cli.show import config_toml, process_table

_EXAMPLES = """\
examples:
  afd up                                        1A1F around the built-in chat model
  afd up --topology 2A2F --streams 2            two attention and two FFN workers
  afd up --model /path/to/hf-folder --port 0    a Hugging Face folder, at any free port
  afd up --config cluster.toml --dry-run        what each process would get"""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "up",
        help="start a cluster on this host and serve",
        description="Start a whole cluster on this host and serve. Ctrl-C drains and stops it.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_config_flags(parser, UP)
    parser.add_argument("--plan", metavar="FILE", help="the best plan of `afd plan --json` (- = stdin); flags go first")
    parser.add_argument("--dry-run", action="store_true", help="print what each process would get, start nothing")
    parser.add_argument("--no-restart", action="store_true", help="stop the cluster when a process dies")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    from afd.cluster.fork_server import ForkServer
    from afd.cluster.launch import files_needed
    from afd.cluster.resolve import check_ports, find_model, share_threads, usable_cores
    from afd.cluster.restart import RestartPolicy
    from afd.cluster.secret_file import new_secret, read_secret
    from afd.cluster.supervisor import Supervisor
    from afd.host.open_files import want_open_files
    from afd.telemetry.log import setup_logging

    config = config_from_args(args, _planned(args))
    setup_logging("afd up", level=config.log.level, fmt=config.log.format)
    config, folder = find_model(config)
    config = share_threads(config, usable_cores())
    secret = read_secret(config.cluster.secret_file) if config.cluster.secret_file else new_secret()
    if args.dry_run:
        print(config_toml(config))
        print(process_table(config))
        return 0
    want_open_files(files_needed("up", config), "afd up")
    check_ports(config)
    if "cuda" in (config.attention.device, config.ffn.device):
        from afd.ops.select import check_device  # imports torch: only where it must look for a GPU

        check_device(config.attention.device, "attention.device")
        check_device(config.ffn.device, "ffn.device")
    restart = None if args.no_restart else RestartPolicy
    has_tokenizer = folder.tokenizer_path is not None
    fork_server = ForkServer if sys.platform == "linux" else None
    return Supervisor(config, secret, has_tokenizer=has_tokenizer, restart=restart, fork_server=fork_server).run()


def _planned(args: argparse.Namespace) -> dict[str, Any]:
    """What --plan says, by key. ConfigError when AFD cannot run that plan."""
    if not args.plan:
        return {}
    from afd.plan.deploy import read_deploy

    return read_deploy(args.plan).with_model(keys_from_args(args).get("model.name")).overrides()

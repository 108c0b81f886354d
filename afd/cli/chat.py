"""`afd chat`: talk to a running cluster from the terminal."""

from __future__ import annotations

import argparse

from afd.cli.locate import locate_local
from afd.errors import ConfigError


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("chat", help="talk to a running cluster from the terminal")
    parser.add_argument("--url", help="of a gateway (default: the `afd up` running on this host)")
    parser.add_argument("--pid", type=int, help="process id of the `afd up` meant, when several run here")
    parser.add_argument("--model", default="", help="default: the only one served")
    parser.add_argument("--system", default="", help="system prompt")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    from afd.gateway.chat_client import run_chat

    url = args.url or locate_local(args.pid).url
    if not url:
        raise ConfigError("the cluster on this host is still starting; try again when it answers")
    return run_chat(url, args.model, args.system)

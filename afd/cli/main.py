"""Parse, dispatch, and turn every error that is the user's to fix into one line."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from afd import __version__
from afd.cli.parser import EXIT_USAGE, Parser, make_streams_usable
from afd.errors import AfdError
from afd.telemetry.log import json_line

EXIT_INTERRUPTED = 130


_MODULES = {
    "up": ("up",),
    "roles": ("coordinator", "attention", "ffn", "gateway"),
    "status": ("status", "drain", "stop"),
    "trace": ("trace",),
    "chat": ("chat",),
    "k8s": ("k8s",),
    "autoscale": ("autoscale",),
    "inspect": ("inspect",),
    "bench": ("bench",),
    "plan": ("plan",),
    "simulate": ("simulate",),
}
"""Module of this package -> the commands that its `add_parser` adds, in the order of `afd --help`."""

COMMANDS = (*(command for adds in _MODULES.values() for command in adds), "version")


def build_parser(command: str = "") -> argparse.ArgumentParser:
    """command: the one to be parsed, whose module alone is imported; all are where it is none of ours."""
    parser: argparse.ArgumentParser = Parser(
        prog="afd", description="Serve a language model with attention and FFN in separate processes (AFD)."
    )
    parser.add_argument("--version", action="version", version=f"afd {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for module in [name for name, adds in _MODULES.items() if command in adds] or _MODULES:
        importlib.import_module(f"afd.cli.{module}").add_parser(commands)
    version = commands.add_parser("version", help="print the version")
    version.set_defaults(func=_print_version)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0, 1 for a failure at run time, 2 for what the user has to change."""
    make_streams_usable()
    argv = sys.argv[1:] if argv is None else argv
    parser = build_parser(argv[0] if argv else "")
    args = parser.parse_args(argv)
    if args.command is None:
        parser.print_help()
        return 0
    try:
        code: int = args.func(args)
        return code
    except AfdError as error:
        print(_error_line(error, args), file=sys.stderr)
        from afd.cluster.role_process import exit_code_of

        return exit_code_of(error) if hasattr(args, "role") else EXIT_USAGE
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # `afd status | head`: stdout is closed, nothing more to say
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_INTERRUPTED


def _error_line(error: AfdError, args: argparse.Namespace) -> str:
    """An error in the log's format: the one that was resolved, else the one that a flag asks for."""
    if getattr(args, "log_format", vars(args).get("key:log.format")) == "json":
        return json_line("error", f"afd {args.command}", str(error))
    return f"afd: error: {error}"


def _print_version(args: argparse.Namespace) -> int:
    print(f"afd {__version__}")
    return 0

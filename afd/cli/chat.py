"""`afd chat`: talk to a running cluster from the terminal."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys

from afd.cli.locate import locate_local
from afd.cli.parser import not_negative, positive, positive_number
from afd.errors import ConfigError

KEY_VARIABLE = "AFD_API_KEY"


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "chat",
        help="talk to a running cluster from the terminal",
        description="Talk to a running cluster from the terminal. /help lists what can be typed beside messages.",
    )
    server = parser.add_argument_group("server")
    server.add_argument("--url", help="of a gateway (default: the `afd up` running on this host)")
    server.add_argument("--pid", type=int, help="process id of the `afd up` meant, when several run here")
    server.add_argument("--model", metavar="NAME", default="", help="default: the only one served")
    server.add_argument(
        "--api-key", metavar="KEY", help=f"better in ${KEY_VARIABLE} or a file: others on this host see command lines"
    )
    server.add_argument("--api-key-file", metavar="FILE", help='its first line that is not empty and not a "#" comment')
    answers = parser.add_argument_group("answers", "What is not given is the model's own default.")
    answers.add_argument("--system", metavar="TEXT", default="", help="system prompt")
    answers.add_argument("--temperature", type=not_negative, metavar="T", help="0 = always the likeliest token")
    answers.add_argument("--top-p", type=positive_number, metavar="P", help="only of the likeliest tokens, up to 1")
    answers.add_argument("--max-tokens", type=positive, metavar="N", help="of an answer")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    from afd.gateway.chat_client import run_chat

    key = _api_key(args)
    url = args.url or locate_local(args.pid).url
    if not url:
        raise ConfigError("the cluster on this host is still starting; try again when it answers")
    sampling = {"temperature": args.temperature, "top_p": args.top_p, "max_tokens": args.max_tokens}
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (`input` then edits lines and remembers them)
    given = {name: value for name, value in sampling.items() if value is not None}
    return run_chat(url, args.model, args.system, api_key=key, sampling=given)


def _api_key(args: argparse.Namespace) -> str:
    if args.api_key_file and args.api_key:
        raise ConfigError("give --api-key or --api-key-file, not both")
    if not args.api_key_file:
        return str(args.api_key or os.environ.get(KEY_VARIABLE, "")).strip()
    try:
        with open(args.api_key_file, encoding="utf-8-sig") as file:
            lines = [line.strip() for line in file]
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise ConfigError(f"--api-key-file {args.api_key_file}: {reason}") from error
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys:
        raise ConfigError(f"--api-key-file {args.api_key_file} has no key in it")
    return keys[0]

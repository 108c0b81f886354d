"""The command line of `afd bench`: flags in, settings, table or JSON out."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import uvloop

from afd.cli.parser import count, positive, positive_number, ratio
from afd.errors import ConfigError
from afd.load.http1 import ServerUrl
from afd.load.metrics import Goals, summarise
from afd.load.progress import Progress
from afd.load.report import (
    check_writable,
    detailed_json,
    failure_reasons,
    render_table,
    result_json,
    save_result,
)
from afd.load.runner import BenchRun, BenchSettings, StoppedError, run_bench

DEFAULT_CONCURRENCY = 16
_EXIT_FAILURES = 1
_EXIT_INTERRUPTED = 130

_DESCRIPTION = """\
Load an OpenAI-compatible server with streamed completions and report latencies and throughput, with the keys of
`vllm bench serve`. A closed loop of --concurrency requests, or with --rate an open loop of Poisson arrivals."""
_EPILOG = """\
exit code: 0 all requests completed (or were refused with 503 or 429); 1 some failed otherwise, or none completed;
2 the run could not start; 130 interrupted (what was measured is reported)."""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    """Add the `bench` command; its `func` maps a Namespace to an exit code and raises AfdError when it cannot start."""
    parser = subparsers.add_parser(
        "bench",
        help="measure an OpenAI-compatible server",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser)
    parser.set_defaults(func=run)
    return parser


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """All flags, grouped."""
    server = parser.add_argument_group("server")
    server.add_argument("--url", default="http://127.0.0.1:8000", help="http(s)://host:port (default: %(default)s)")
    server.add_argument("--model", help="model name (default: the first of /v1/models)")
    server.add_argument(
        "--endpoint", choices=("completions", "chat"), default="completions", help="API (default: %(default)s)"
    )
    server.add_argument("--api-key", default=os.environ.get("AFD_API_KEY", ""), help="bearer token (or $AFD_API_KEY)")
    server.add_argument("--timeout", type=positive_number, default=600.0, help="s per request (default: %(default)g)")
    server.add_argument("--num-workers", type=positive, help="to divide by (default: from the server's topology)")

    load = parser.add_argument_group("load")
    load.add_argument(
        "--concurrency",
        type=positive,
        help=f"running requests of a closed loop (default: {DEFAULT_CONCURRENCY}); with --rate, the most that may run",
    )
    load.add_argument("--rate", type=positive_number, help="requests/s of an open loop with Poisson arrivals")
    load.add_argument(
        "--burstiness",
        type=positive_number,
        default=1.0,
        help="of arrivals; < 1 burstier, > 1 more even (default: 1)",
    )
    load.add_argument("--num-prompts", type=positive, help="requests to measure (default: 100, or the dataset)")
    load.add_argument("--num-warmups", type=count, default=1, help="requests before the clock starts (default: 1)")
    load.add_argument("--seed", type=int, default=0, help="of prompts, lengths and arrivals (default: 0)")

    content = parser.add_argument_group("requests")
    content.add_argument(
        "--dataset", default="random", help="'random', or a JSON-lines file of prompts (default: %(default)s)"
    )
    content.add_argument("--input-len", type=positive, default=128, help="tokens of random prompts (default: 128)")
    content.add_argument("--output-len", type=positive, default=128, help="tokens to generate (default: 128)")
    content.add_argument("--range-ratio", type=ratio, default=0.0, help="lengths vary by +- this share (default: 0)")
    content.add_argument("--vocab-size", type=positive, help="for random prompts (default: the server's)")
    content.add_argument("--temperature", type=float, default=0.0, help="(default: 0, greedy)")
    content.add_argument(
        "--ignore-eos",
        action=argparse.BooleanOptionalAction,
        help="generate the full output length (default: on for random prompts)",
    )

    report = parser.add_argument_group("report")
    report.add_argument("--goodput", nargs="+", default=[], metavar="METRIC:MS", help="goals of ttft, tpot, e2el in ms")
    report.add_argument("--percentiles", type=_percentiles, default="50,90,95,99", help="(default: 50,90,95,99)")
    report.add_argument("--json", action="store_true", help="print one line of JSON instead of the table")
    report.add_argument("--save-result", type=Path, metavar="FILE", help="write the JSON to a file too")
    report.add_argument("--save-detailed", action="store_true", help="one array entry per request in the saved JSON")
    report.add_argument("--label", default="afd", help="name of the run in the JSON (default: %(default)s)")
    report.add_argument("--metadata", nargs="+", default=[], metavar="KEY=VALUE", help="added to the JSON: commit=...")
    report.add_argument("--quiet", action="store_true", help="no progress on stderr")


def settings_from(args: argparse.Namespace) -> BenchSettings:
    """Flags as settings. ConfigError when they do not fit together."""
    dataset = None if args.dataset == "random" else Path(args.dataset)
    concurrency = args.concurrency or (DEFAULT_CONCURRENCY if args.rate is None else None)
    if args.burstiness != 1.0 and args.rate is None:
        raise ConfigError("--burstiness is about the arrivals of an open loop: pass --rate")
    if args.save_detailed and args.save_result is None:
        raise ConfigError("--save-detailed needs --save-result")
    return BenchSettings(
        url=ServerUrl.parse(args.url),
        model=args.model,
        endpoint=args.endpoint,
        concurrency=concurrency,
        rate=args.rate,
        burstiness=args.burstiness,
        num_prompts=args.num_prompts,
        num_warmups=args.num_warmups,
        input_len=args.input_len,
        output_len=args.output_len,
        range_ratio=args.range_ratio,
        dataset=dataset,
        vocab_size=args.vocab_size,
        seed=args.seed,
        ignore_eos=args.ignore_eos if args.ignore_eos is not None else dataset is None,
        temperature=args.temperature,
        timeout_s=args.timeout,
        api_key=args.api_key,
        keep_texts=args.save_detailed,
    )


def run(args: argparse.Namespace) -> int:
    """Benchmark and report; returns the exit code. AfdError when the run cannot start."""
    settings = settings_from(args)
    goals = Goals.parse(args.goodput)
    metadata = _parse_metadata(args.metadata)
    if args.save_result is not None:
        check_writable(args.save_result)
    progress = Progress(None if args.quiet else sys.stderr)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        try:
            bench_run = runner.run(_run_until_signal(settings, progress))
        except StoppedError:
            print("afd bench: interrupted before anything was measured", file=sys.stderr)
            return _EXIT_INTERRUPTED
    summary = summarise(
        bench_run.records,
        duration_s=bench_run.duration_s,
        percentiles=args.percentiles,
        goals=goals,
        concurrency=settings.concurrency if settings.rate is None else None,
    )
    result = result_json(
        bench_run,
        summary,
        settings,
        num_workers=args.num_workers,
        goals=goals,
        label=args.label,
        metadata=metadata,
    )
    if args.save_result is not None:
        save_result(args.save_result, result | (detailed_json(bench_run.records) if args.save_detailed else {}))
    if args.json:
        print(msgspec.json.encode(result).decode())
    else:
        print(render_table(result, summary, failure_reasons(bench_run.records)))
    return _exit_code(bench_run, result)


def _exit_code(bench_run: BenchRun, result: dict[str, Any]) -> int:
    if bench_run.interrupted:
        return _EXIT_INTERRUPTED
    return 0 if result["completed"] and result["failed"] == result["refused"] else _EXIT_FAILURES


async def _run_until_signal(settings: BenchSettings, progress: Progress) -> BenchRun:
    """The first SIGINT or SIGTERM stops the run and lets it report; the second one kills as usual."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()

    def on_signal() -> None:
        stop.set()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, on_signal)
    try:
        return await run_bench(settings, progress, stop)
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)


def _parse_metadata(pairs: Sequence[str]) -> dict[str, str]:
    metadata = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"--metadata {pair!r} is not KEY=VALUE")
        metadata[key.strip()] = value.strip()
    return metadata


def _percentiles(text: str) -> tuple[float, ...]:
    values = tuple(float(part) for part in text.split(","))
    if any(not 0 <= value <= 100 for value in values):
        raise argparse.ArgumentTypeError(f"{text} is not a list of numbers from 0 to 100")
    return values

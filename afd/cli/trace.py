"""`afd trace`: the last seconds of a running cluster, stage by stage."""

from __future__ import annotations

import argparse
import importlib.util
import json
from pathlib import Path
from typing import TYPE_CHECKING

from afd.cli.locate import add_locate_flags, locate
from afd.errors import ConfigError

if TYPE_CHECKING:
    from afd.trace.timeline import Timeline

DEFAULT_OUTPUT = "trace.json"


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "trace",
        help="what each worker of a running cluster did in the last seconds",
        description="Collect the last seconds' stages of all workers into a trace for https://ui.perfetto.dev, "
        "and draw a part of it.",
    )
    add_locate_flags(parser)
    parser.add_argument("--seconds", type=float, default=2.0, help="how far back (default: 2)")
    parser.add_argument("-o", "--output", metavar="FILE", help=f"the trace (default: {DEFAULT_OUTPUT})")
    parser.add_argument("--input", metavar="FILE", help="take this trace instead of a running cluster's")
    parser.add_argument("--png", metavar="FILE", help="draw a part of it (needs matplotlib)")
    parser.add_argument("--from-ms", type=float, metavar="MS", help="where the picture begins (default: chosen)")
    parser.add_argument("--for-ms", type=float, metavar="MS", help="what it spans (default: single layers are seen)")
    parser.add_argument("--calibrate", metavar="FILE", help="write stage times for `afd plan` and `afd simulate`")
    parser.add_argument(
        "--context", type=int, default=0, metavar="N", help="mean cached tokens of the requests meanwhile (not known)"
    )
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    _check(args)
    timeline, text = _read(args.input) if args.input else _collect(args)
    output = args.output or ("" if args.input or args.calibrate else DEFAULT_OUTPUT)
    if output:
        _write(timeline, output)
    print(text)
    if output:
        print(f"{output}: open it in https://ui.perfetto.dev or chrome://tracing")
    if args.calibrate:
        _calibrate(timeline, args)
    if args.png:
        _draw(timeline, args)
    return 0


def _check(args: argparse.Namespace) -> None:
    """What can be refused before anything is asked for."""
    from afd.telemetry.ring import MAX_SECONDS

    if not 0.0 < args.seconds < MAX_SECONDS:
        raise ConfigError(f"--seconds {args.seconds:g} is not between 0 and {MAX_SECONDS:g}")
    if args.for_ms is not None and not args.for_ms > 0.0:
        raise ConfigError(f"--for-ms {args.for_ms:g} is not above 0")
    if args.from_ms is not None and not args.from_ms >= 0.0:
        raise ConfigError(f"--from-ms {args.from_ms:g} is below 0")
    if args.context < 0:
        raise ConfigError(f"--context {args.context} is below 0")
    if args.context and not args.calibrate:
        raise ConfigError("--context is for --calibrate FILE")
    if not args.png and (args.from_ms is not None or args.for_ms is not None):
        raise ConfigError("--from-ms and --for-ms choose what --png FILE draws; the trace itself is always whole")
    if args.png and importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("--png needs matplotlib: pip install 'afd[plan]'; the trace alone needs nothing")


def _collect(args: argparse.Namespace) -> tuple[Timeline, str]:
    from afd.messages.keys import trace_token
    from afd.trace.collect import collect, targets_of
    from afd.trace.summary import summary_text
    from afd.trace.window import turns_of

    place = locate(args)
    with place.client() as client:
        status = client.status()
    view = status.view
    topology = f"{view.num_attention}A{view.num_ffn}F" if view.num_ffn else "mono"
    token = trace_token(place.secret)
    collected = collect(targets_of(status.members), args.seconds, token, title=f"{topology} {view.model}")
    turns_of(collected.timeline)  # nothing is written of a cluster that idles
    return collected.timeline, summary_text(collected.timeline, collected.offsets)


def _read(path: str) -> tuple[Timeline, str]:
    from afd.trace.chrome import from_chrome
    from afd.trace.summary import summary_text

    try:
        text = Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"--input {path}: {error.strerror}") from None
    timeline = from_chrome(text, path)
    return timeline, summary_text(timeline)


def _write(timeline: Timeline, path: str) -> None:
    from afd.trace.chrome import to_chrome

    try:
        with open(path, "w", encoding="utf-8") as file:
            file.writelines(to_chrome(timeline))
    except OSError as error:
        raise ConfigError(f"--output {path}: {error.strerror}") from None


def _calibrate(timeline: Timeline, args: argparse.Namespace) -> None:
    from afd.trace.calibration import calibration

    topology, _, model = timeline.title.partition(" ")
    measured = calibration(timeline, model=model, topology=topology, context=args.context)
    try:
        Path(args.calibrate).write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--calibrate {args.calibrate}: {error.strerror}") from None
    print(f"{args.calibrate}: for afd plan --calibrate and afd simulate --calibrate")


def _draw(timeline: Timeline, args: argparse.Namespace) -> None:
    from afd.trace.picture import draw
    from afd.trace.window import choose_window

    from_s = None if args.from_ms is None else args.from_ms / 1e3
    start_s, end_s = choose_window(timeline, from_s, None if args.for_ms is None else args.for_ms / 1e3)
    draw(timeline, start_s, end_s, args.png)
    print(f"{args.png}: {(end_s - start_s) * 1e3:.4g} ms from {start_s * 1e3:.4g} ms on (--from-ms, --for-ms)")

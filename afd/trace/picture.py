"""A window of the trace as a PNG: who computed what when, and where the rows went. Needs matplotlib (extra `plan`).

Attention workers above, FFN workers below. Each has a tall lane (its main thread) and thin ones, one a stream: rows
that are away, or rows that wait for their gang. Colours are streams; thin lines follow the rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection, PatchCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from afd.telemetry.ring import Stage
from afd.trace.errors import TraceError
from afd.trace.pipeline import exposed_spans
from afd.trace.summary import stage_shares
from afd.trace.timeline import ATTENTION, COMPUTING, FFN, Timeline, Worker, gang_members, hops

WIDTH_IN, DPI = 16.0, 110
STREAM_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7")
"""Distinguishable with colour-blind eyes (Okabe and Ito)."""
TEXT_COLOURS = ("white", "black", "white", "black")

WAIT_COLOUR, EXPOSED_COLOUR, INK = "#ececec", "#f2b8b5", "#222222"
MAIN, THIN, GAP, SIDES_GAP = 1.0, 0.26, 0.55, 0.75  # heights and distances of lanes
THIN_ALPHA = 0.32
_HATCHES = {"head": "////", "head_slice": "////", "look_ahead": "...."}
GANG_LINE = 0.27  # streams' gangs are named on lines of their own
LABEL_IN = 0.15  # a bar this wide holds a layer's number


@dataclass(frozen=True, slots=True)
class Lanes:
    """Heights at which a worker's lanes are drawn.

    main: bottom of the tall one.
    thin: bottom of each stream's.
    """

    worker: Worker
    main: float
    thin: tuple[float, ...]

    @property
    def middle(self) -> float:
        return self.main + MAIN / 2


def draw(timeline: Timeline, start_s: float, end_s: float, path: str) -> None:
    """Write the PNG of [start_s, end_s] of the timeline. TraceError when `path` cannot be written."""
    figure = pipeline_figure(timeline, start_s, end_s)
    try:
        figure.savefig(Path(path), dpi=DPI, format="png", metadata={"Software": None})
    except OSError as error:
        raise TraceError(f"--png {path}: {error.strerror or error}") from None


def pipeline_figure(timeline: Timeline, start_s: float, end_s: float) -> Figure:
    """The figure; equal timelines give equal pictures."""
    layout, height = _layout(timeline)
    figure = Figure(figsize=(WIDTH_IN, 1.45 + 0.52 * height), layout="constrained")
    FigureCanvasAgg(figure)
    with matplotlib.rc_context({"font.family": "DejaVu Sans"}):
        axes = figure.add_subplot()
        axes.set_xlim(0.0, (end_s - start_s) * 1e3)
        axes.set_ylim(height, 0.0)
        picture = _Picture(axes, timeline, start_s, end_s)
        for lanes in layout.values():
            picture.worker(lanes)
        picture.rows(layout)
        _decorate(axes, layout, start_s)
        _legend(figure, timeline)
        title = timeline.title or "pipeline"
        axes.set_title(f"{title}: {(end_s - start_s) * 1e3:.3g} ms", loc="left", fontsize=13, color=INK, pad=10)
    return figure


def _layout(timeline: Timeline) -> tuple[dict[str, Lanes], float]:
    """Lanes from top to bottom; attention workers' thin lanes below the tall one, FFN workers' above it, so that the
    rows' lines run through the thin ones."""
    streams = timeline.num_streams
    layout: dict[str, Lanes] = {}
    y, role = 0.35, ATTENTION
    for worker in timeline.workers:
        if worker.role != role:
            y += SIDES_GAP
            role = worker.role
        thin_height = THIN * streams
        if worker.role == FFN:
            layout[worker.name] = Lanes(worker, y + thin_height, tuple(y + THIN * k for k in range(streams)))
        else:
            layout[worker.name] = Lanes(worker, y, tuple(y + MAIN + THIN * k for k in range(streams)))
        y += MAIN + thin_height + GAP + (GANG_LINE * (streams - 1) if worker.role == FFN else 0.0)
    return layout, y


class _Picture:
    """Draws stages of one window."""

    def __init__(self, axes: Axes, timeline: Timeline, start_s: float, end_s: float):
        self._axes = axes
        self._timeline = timeline
        self._start_s, self._end_s = start_s, end_s
        self._members = gang_members(timeline)
        self._inches_per_s = WIDTH_IN * 0.93 / (end_s - start_s)

    def worker(self, lanes: Lanes) -> None:
        """All bars of one worker, and their labels."""
        bars: dict[tuple[str, str, float], list[Rectangle]] = {}
        if lanes.worker.role == FFN:  # it computes or waits, and nothing else worth a stage
            until_s = min(self._end_s, self._timeline.seconds)
            idle = self._bar(Stage("wait", max(self._start_s, 0.0), until_s), lanes.main, MAIN)
            bars[WAIT_COLOUR, "", 1.0] = [idle]
        exposed = [Stage("exposed", *span) for span in exposed_spans(self._timeline, lanes.worker)]
        last_gang: dict[int, int] = {}
        for stage in self._inside([*lanes.worker.stages, *exposed]):
            colour, hatch, alpha = _style(stage)
            if stage.name in ("exchange", "gang_wait") and stage.stream >= 0:
                bar = self._bar(stage, lanes.thin[stage.stream] + 0.03, THIN - 0.06)
            elif stage.name in COMPUTING or stage.name in ("wait", "exposed"):
                bar = self._bar(stage, lanes.main, MAIN)
                self._label(stage, lanes, last_gang)
            else:
                continue
            bars.setdefault((colour, hatch, alpha), []).append(bar)
        for (colour, hatch, alpha), rectangles in bars.items():
            edge = "white" if hatch else "none"
            self._axes.add_collection(
                PatchCollection(
                    rectangles,
                    facecolor=colour,
                    edgecolor=edge,
                    hatch=hatch or None,
                    alpha=alpha,
                    linewidth=0,
                    zorder=2,
                )
            )

    def rows(self, layout: dict[str, Lanes]) -> None:
        """Lines from dispatch to the batch, and from its answer to the combine."""
        lines: dict[str, list[list[tuple[float, float]]]] = {}
        for hop in hops(self._timeline):
            above, below = layout[hop.attention.name], layout[hop.ffn_worker.name]
            top, bottom = above.main + MAIN, below.main
            ends = []
            if hop.dispatch is not None:
                ends.append((hop.dispatch.end_s, top, hop.ffn.start_s, bottom))
            if hop.combine is not None:
                ends.append((hop.ffn.end_s, bottom, hop.combine.start_s, top))
            for from_s, from_y, to_s, to_y in ends:
                if to_s > self._start_s and from_s < self._end_s:
                    line = [(self._ms(from_s), from_y), (self._ms(to_s), to_y)]
                    lines.setdefault(_colour(hop.ffn.stream), []).append(line)
        for colour, segments in lines.items():
            self._axes.add_collection(LineCollection(segments, colors=colour, linewidths=0.7, alpha=0.55, zorder=1))

    def _inside(self, stages: Sequence[Stage]) -> Iterator[Stage]:
        return (stage for stage in stages if stage.end_s > self._start_s and stage.start_s < self._end_s)

    def _ms(self, at_s: float) -> float:
        return (at_s - self._start_s) * 1e3

    def _bar(self, stage: Stage, y: float, height: float) -> Rectangle:
        return Rectangle((self._ms(stage.start_s), y), (stage.end_s - stage.start_s) * 1e3, height)

    def _label(self, stage: Stage, lanes: Lanes, last_gang: dict[int, int]) -> None:
        """The layer's number inside the bar; a gang's name under the first of its batches that is seen."""
        begin_s, end_s = max(stage.start_s, self._start_s), min(stage.end_s, self._end_s)
        width_in = (end_s - begin_s) * self._inches_per_s
        at_ms = self._ms((begin_s + end_s) / 2)
        if stage.name in ("attention", "ffn") and width_in >= LABEL_IN:
            self._text(at_ms, lanes.middle, str(stage.layer), stage.stream)
        elif stage.name == "head" and width_in >= 2 * LABEL_IN:
            self._text(at_ms, lanes.middle, "head", stage.stream)
        if stage.name == "ffn" and stage.gang_id and last_gang.get(stage.stream) != stage.gang_id:
            last_gang[stage.stream] = stage.gang_id
            members = self._members.get(stage.gang_id) or f"{stage.gang_size} of A"
            self._axes.text(
                self._ms(begin_s),
                lanes.main + MAIN + 0.08 + GANG_LINE * stage.stream,
                f"gang {stage.gang_id & 0xFFFFFFFF}: {members}",
                fontsize=7,
                color=_colour(stage.stream),
                va="top",
                ha="left",
                clip_on=True,
            )

    def _text(self, x: float, y: float, text: str, stream: int) -> None:
        box = {"facecolor": _colour(stream), "edgecolor": "none", "pad": 1.0}
        ink = TEXT_COLOURS[stream % len(TEXT_COLOURS)]
        self._axes.text(x, y, text, fontsize=7, color=ink, ha="center", va="center", clip_on=True, zorder=3, bbox=box)


def _colour(stream: int) -> str:
    return STREAM_COLOURS[stream % len(STREAM_COLOURS)]


def _dark(colour: str) -> str:
    red, green, blue = (round(255 * 0.55 * part) for part in to_rgb(colour))
    return f"#{red:02x}{green:02x}{blue:02x}"


def _style(stage: Stage) -> tuple[str, str, float]:
    """(colour, hatch, alpha)."""
    if stage.name in ("wait", "exposed"):
        return WAIT_COLOUR if stage.name == "wait" else EXPOSED_COLOUR, "", 1.0
    colour = _colour(stage.stream)
    if stage.name in ("exchange", "gang_wait"):
        return colour, "", THIN_ALPHA
    if stage.name in ("dispatch", "combine", "embed"):
        return _dark(colour), "", 1.0
    return colour, _HATCHES.get(stage.name, ""), 1.0


def _decorate(axes: Axes, layout: dict[str, Lanes], start_s: float) -> None:
    axes.set_yticks([lanes.middle for lanes in layout.values()], list(layout), fontsize=10)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=8, colors="#666666")
    axes.set_xlabel(f"ms since {start_s * 1e3:.3f} ms of the trace", fontsize=8, color="#666666")
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#bbbbbb")
    axes.grid(axis="x", color="#eeeeee", zorder=0)
    axes.set_axisbelow(True)


def _legend(figure: Figure, timeline: Timeline) -> None:
    grey, thin = "#8c8c8c", _colour(0)
    handles = [Patch(facecolor=_colour(k), label=f"stream {k}") for k in range(timeline.num_streams)]
    handles += [
        Patch(facecolor=grey, label="attention (A), ffn (F), layer inside"),
        Patch(facecolor=_dark(grey), label="embed, dispatch, combine"),
        Patch(facecolor=grey, hatch="////", edgecolor="white", linewidth=0, label="head and sampling"),
        Patch(facecolor=grey, hatch="....", edgecolor="white", linewidth=0, label="look-ahead"),
        Patch(facecolor=thin, alpha=THIN_ALPHA, label="thin: rows away (A), waiting (F)"),
        Patch(facecolor=WAIT_COLOUR, label="nothing ready"),
        Patch(facecolor=EXPOSED_COLOUR, label="exposed transfer"),
    ]
    figure.legend(handles=handles, loc="outside lower left", ncols=len(handles), fontsize=8, frameon=False)
    busy = ", ".join(f"{w.name} {stage_shares(w, timeline.seconds)['busy']:.0%}" for w in timeline.workers)
    figure.text(0.995, 0.985, f"busy over {timeline.seconds:g} s: {busy}", ha="right", va="top", fontsize=8, color=INK)

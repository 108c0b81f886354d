"""The figures of docs/planning.md, drawn from the same functions as the tables. Needs matplotlib (extra `plan`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from afd.errors import ConfigError
from afd.plan.cost import cheapest_split, split_cost
from afd.plan.efficiency import Efficiency
from afd.plan.estimate import Estimator, Objective
from afd.plan.hardware import Chip
from afd.plan.models import ModelShape
from afd.plan.report import REPORT_CHIPS, REPORT_MODELS
from afd.plan.search import SearchSpace
from afd.plan.stages import RooflineStages
from afd.types import Topology

Models = dict[str, ModelShape]
Chips = dict[str, Chip]

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#999999", "#000000", "#8b4513")
"""Distinguishable with colour-blind eyes (Okabe and Ito)."""

CONTEXTS = (8192, 32768, 131072)
TGS_CONTEXTS = (2048, 4096, 8192, 16384, 32768, 65536)
REPORT_ROWS = ((4096, 4039, "2A2F"), (8192, 2643, "4A2F"), (32768, 898, "16A2F"))
"""Published tokens/GPU/s of Step-3 with fp8 attention (report Table 8)."""


def draw_all(models: Models, chips: Chips, out: str) -> list[Path]:
    """Writes every figure as PNG and SVG into `out`; returns the paths. ConfigError when `out` cannot be written."""
    folder = Path(out)
    drawings = {
        "plan_cost_frontier": cost_frontier(models, chips),
        "plan_cost_by_chip": cost_by_chip(models, chips),
        "plan_kv_context": kv_and_cost_by_context(models, chips),
        "plan_intensity": intensity(models, chips),
        "plan_tgs": tgs_by_topology(models, chips),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return [path for name, figure in drawings.items() for path in save(figure, folder / name)]
    except OSError as error:
        raise ConfigError(f"--out {out}: {error.strerror or error}") from None


def save(figure: Figure, path: Path) -> list[Path]:
    """Writes `path` with .png and .svg appended; equal figures give equal files. Returns the two paths."""
    png, svg = path.with_name(f"{path.name}.png"), path.with_name(f"{path.name}.svg")
    with matplotlib.rc_context({"svg.hashsalt": "afd-plan", "svg.fonttype": "path"}):
        figure.savefig(png, dpi=120, metadata={"Software": None})
        figure.savefig(svg, metadata={"Date": None})
    return [png, svg]


def cost_frontier(models: Models, chips: Chips) -> Figure:
    """Report Fig. 1: cheapest AFD cost at 8K against activated parameters; the Pareto frontier is what nothing beats
    in both (more activated parameters for less money)."""
    figure, (axes,) = _figure(1)
    points = [
        (models[name].activated_params, cheapest_split(models[name], _report(chips), 8192).total_usd_per_mtok, name)
        for name in REPORT_MODELS
    ]
    frontier = pareto_frontier([(x, y) for x, y, _ in points])
    axes.plot(*zip(*frontier, strict=True), color=COLOURS[6], linestyle="--", label="Pareto frontier")
    for x, y, name in points:
        axes.scatter(x, y, color=COLOURS[1] if name == "step3" else COLOURS[0], zorder=3)
        axes.annotate(models[name].title, (x, y), textcoords="offset points", xytext=(6, 4))
    axes.set(xlabel="activated parameters (1e9)", ylabel="USD per 1e6 decoded tokens", ylim=(0, 0.11), xlim=(12, 54))
    axes.set_title("Decoding cost at 8K context, best chip for each part")
    axes.legend()
    return figure


def pareto_frontier(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Points that no other beats with a larger x at a smaller or equal y, by rising x."""
    kept: list[tuple[float, float]] = []
    for x, y in sorted(points, key=lambda point: (-point[0], point[1])):
        if not kept or y < kept[-1][1]:
            kept.append((x, y))
    return kept[::-1]


def cost_by_chip(models: Models, chips: Chips) -> Figure:
    """Report Fig. 2 and Table 6: each model on each chip and as AFD, attention below and FFN above."""
    figure, panels = _figure(2, width=13)
    for axes, context in zip(panels, (8192, 32768), strict=True):
        labels = [chips[name].title for name in REPORT_CHIPS] + ["AFD"]
        width = 0.8 / len(labels)
        for i, label in enumerate(labels):
            for j, name in enumerate(REPORT_MODELS):
                model = models[name]
                if i < len(REPORT_CHIPS):
                    chip = chips[REPORT_CHIPS[i]]
                    row = split_cost(model, chip, chip, context)
                else:
                    row = cheapest_split(model, _report(chips), context)
                x, low = j + (i - 2) * width, row.attention_usd_per_mtok
                axes.bar(x, low, width, color=COLOURS[i], label=label if j == 0 else None)
                axes.bar(x, row.ffn_usd_per_mtok, width, bottom=low, color=COLOURS[i], alpha=0.4)
        titles = [models[name].title for name in REPORT_MODELS]
        axes.set_xticks(range(len(titles)), titles, rotation=30, ha="right")
        axes.set(ylabel="USD per 1e6 decoded tokens", title=f"{context // 1024}K context (solid attention, pale FFN)")
        axes.set_ylim(0, 1.18 * axes.get_ylim()[1])
        axes.legend(ncols=len(labels), fontsize=8, loc="upper center")
    return figure


def kv_and_cost_by_context(models: Models, chips: Chips) -> Figure:
    """Report Fig. 3: KV cache per request and all-H800 cost at 8K, 32K, 128K."""
    figure, (left, right) = _figure(2)
    for colour, name in zip(COLOURS, ("step3", "minimax-m1", "llama4-maverick", "deepseek-v3"), strict=False):
        model, h800 = models[name], chips["h800"]
        ticks = [context / 1024 for context in CONTEXTS]
        left.plot(ticks, [model.kv_bytes(c) / 1e9 for c in CONTEXTS], marker="o", color=colour, label=model.title)
        costs = [split_cost(model, h800, h800, context).total_usd_per_mtok for context in CONTEXTS]
        right.plot(ticks, costs, marker="o", color=colour, label=model.title)
    left.set(ylabel="KV and state moved per decoded token (GB)", title="KV cache by context")
    right.set(ylabel="USD per 1e6 decoded tokens", title="Cost by context, all H800")
    for axes in (left, right):
        axes.set(xlabel="context (1024 tokens)", ylim=(0, None))
        axes.legend()
    return figure


def intensity(models: Models, chips: Chips) -> Figure:
    """Report Fig. 5: attention FLOPs against KV bytes from 8K to 32K; a chip is compute bound above its line."""
    figure, (axes,) = _figure(1)
    drawn = ("deepseek-v3", "kimi-k2", "step3", "qwen3-235b-a22b")
    for colour, name in zip(COLOURS, drawn, strict=False):
        model = models[name]
        x = [model.kv_bytes(c) for c in (8192, 32768)]
        y = [model.attention_flops(c) for c in (8192, 32768)]
        axes.plot(x, y, marker="o", color=colour, label=f"{model.title}, 8K to 32K")
    span = (1e8, 5e9)
    for i, name in enumerate(REPORT_CHIPS):
        ridge = chips[name].ridge_flop_per_byte
        axes.plot(span, [b * ridge for b in span], color=COLOURS[6], linestyle=("-", "--", "-.", ":")[i], linewidth=1)
        axes.annotate(
            f"{chips[name].title} {ridge:.0f} FLOP/B",
            (span[0], span[0] * ridge),
            xytext=(0, (4, 4, -8, 3)[i]),
            textcoords="offset points",
            fontsize=7,
        )
    axes.set(xscale="log", yscale="log", xlabel="KV bytes per decoded token", ylabel="attention core FLOPs per token")
    axes.set_title("Arithmetic intensity of the attention core")
    axes.legend()
    return figure


def tgs_by_topology(models: Models, chips: Chips) -> Figure:
    """Forecast tokens/GPU/s of Step-3 on H800 over context, one line per topology; the report's points on top."""
    figure, (axes,) = _figure(1)
    efficiency = Efficiency()
    estimator, h800 = Estimator(RooflineStages(efficiency), efficiency), chips["h800"]
    space = SearchSpace(model=models["step3"], attention_chips=[h800], ffn_chips=[h800])
    for colour, shape in zip(COLOURS, ("1A2F", "2A2F", "4A2F", "8A2F", "16A2F", "28A2F"), strict=False):
        deployment = space.deployment(h800, h800, Topology.parse(shape), streams=3)
        found = [(c, estimator.best(deployment, Objective(c, 0.05))) for c in TGS_CONTEXTS]
        line = [(context / 1024, best.tgs) for context, best in found if best is not None]
        axes.plot(*zip(*line, strict=True), marker=".", color=colour, label=shape)
    for context, tgs, shape in REPORT_ROWS:
        axes.scatter(context / 1024, tgs, marker="*", s=120, color=COLOURS[7], zorder=3)
        axes.annotate(f"report {shape}", (context / 1024, tgs), textcoords="offset points", xytext=(8, 4))
    axes.set(xscale="log", xlabel="context (1024 tokens)", ylabel="tokens/s per GPU", ylim=(0, None))
    axes.set_xticks([c / 1024 for c in TGS_CONTEXTS], [str(c // 1024) for c in TGS_CONTEXTS])
    axes.minorticks_off()
    axes.set_title("Step-3 on H800, TPOT within 50 ms, best batch of each topology")
    axes.legend()
    return figure


def _report(chips: Chips) -> list[Chip]:
    return [chips[name] for name in REPORT_CHIPS]


def _figure(panels: int, width: float = 0.0) -> tuple[Figure, list[Axes]]:
    """A figure with `panels` axes side by side, without pyplot's global state."""
    figure = Figure(figsize=(width or 7.0 * panels, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = [figure.add_subplot(1, panels, i + 1) for i in range(panels)]
    for panel in axes:
        panel.grid(alpha=0.3)
    return figure, axes

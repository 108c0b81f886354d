"""Figures: the frontier is right, every file is written, equal inputs give equal files."""

import json

import pytest

matplotlib = pytest.importorskip("matplotlib")

from afd.cli.main import main  # noqa: E402
from afd.plan.figures import cost_frontier, pareto_frontier, save, tgs_by_topology  # noqa: E402

NAMES = ("plan_cost_frontier", "plan_cost_by_chip", "plan_kv_context", "plan_intensity", "plan_tgs")


def test_pareto_frontier_keeps_what_nothing_beats():
    points = [(1, 1), (2, 3), (3, 2), (4, 5), (4, 4)]
    assert pareto_frontier(points) == [(1, 1), (3, 2), (4, 4)]
    assert pareto_frontier([]) == []


def test_step3_is_on_the_reports_frontier(models, chips):
    (axes,) = cost_frontier(models, chips).axes
    (line,) = axes.get_lines()
    frontier = {(float(x), round(float(y), 3)) for x, y in line.get_xydata()}
    assert (38.0, 0.055) in frontier
    assert all(x >= 38 for x, _ in frontier)


def test_tgs_lines_cross_where_the_report_changes_topology(models, chips):
    (axes,) = tgs_by_topology(models, chips).axes
    lines = {line.get_label(): dict(line.get_xydata().tolist()) for line in axes.get_lines()}
    for context_k, winner in ((4, "2A2F"), (8, "4A2F"), (16, "8A2F"), (32, "16A2F")):
        assert max(lines, key=lambda name: lines[name].get(context_k, 0)) == winner


def test_every_figure_is_written_as_png_and_svg(tmp_path, capsys):
    assert main(["plan", "figures", "--out", str(tmp_path / "figures"), "--json"]) == 0
    written = json.loads(capsys.readouterr().out)
    files = sorted((tmp_path / "figures").iterdir())
    assert sorted(written) == [str(path) for path in files]
    assert [path.name for path in files] == sorted(f"{name}.{kind}" for name in NAMES for kind in ("png", "svg"))
    assert all(path.stat().st_size > 10_000 for path in files)


def test_equal_figures_give_equal_files(models, chips, tmp_path):
    one, two = (save(cost_frontier(models, chips), tmp_path / name) for name in ("one", "two"))
    for first, second in zip(one, two, strict=True):
        assert first.read_bytes() == second.read_bytes()


def test_a_folder_that_cannot_be_made(tmp_path, capsys):
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert main(["plan", "figures", "--out", str(blocked / "figures")]) == 2
    assert "--out" in capsys.readouterr().err

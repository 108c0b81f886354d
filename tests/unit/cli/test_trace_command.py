"""`afd trace`: flags, files, errors in one line."""

from __future__ import annotations

import contextlib
import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest

from afd.cli.main import main
from afd.messages.membership import ClusterView, Plan, StatusReply
from afd.trace.chrome import to_chrome
from afd.trace.collect import Collected
from tests.fakes.trace import two_to_one


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    path = tmp_path / "recorded.json"
    path.write_text("".join(to_chrome(two_to_one())))
    return path


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (("--seconds", "0"), "--seconds 0 is not between"),
        (("--seconds", "nan"), "--seconds nan is not between"),
        (("--for-ms", "5"), "choose what --png FILE draws"),
        (("--png", "x.png", "--for-ms", "0"), "--for-ms 0 is not above 0"),
        (("--png", "x.png", "--from-ms", "-1"), "--from-ms -1 is below 0"),
        (("--input", "/nowhere.json"), "--input /nowhere.json: No such file"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(flags, complaint, capsys):
    assert main(["trace", *flags]) == 2
    error = capsys.readouterr().err
    assert complaint in error and error.count("\n") == 1


def test_a_missing_matplotlib_is_said_before_anything_is_asked(monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "matplotlib" else find(name))
    assert main(["trace", "--png", "x.png"]) == 2
    assert "pip install 'afd[plan]'" in capsys.readouterr().err


def test_without_a_cluster_it_says_so(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert main(["trace"]) == 2
    assert "no `afd up` runs on this host" in capsys.readouterr().err


def test_a_recorded_trace_is_summed_up_and_drawn_again(recorded, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    copy, picture = tmp_path / "copy.json", tmp_path / "picture.png"
    flags = ("--png", str(picture), "--from-ms", "10", "--for-ms", "20", "-o", str(copy))
    assert main(["trace", "--input", str(recorded), *flags]) == 0
    out = capsys.readouterr().out
    assert "attention/1" in out and "20 ms from 10 ms on" in out
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert json.loads(copy.read_text())["otherData"] == json.loads(recorded.read_text())["otherData"]


def test_reading_alone_writes_nothing(recorded, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["trace", "--input", str(recorded)]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["recorded.json"]
    assert main(["trace", "--input", str(recorded), "-o", str(tmp_path / "no" / "x.json")]) == 2
    assert "--output" in capsys.readouterr().err


def test_of_an_idle_cluster_it_says_so_first_and_writes_nothing(monkeypatch, tmp_path, capsys):
    timeline = two_to_one()
    idle = replace(timeline, workers=tuple(replace(worker, stages=()) for worker in timeline.workers))
    monkeypatch.setattr("afd.trace.collect.collect", lambda *args, **kwargs: Collected(idle, {}))
    monkeypatch.setattr("afd.cli.trace.locate", lambda args: FakePlace())
    output = tmp_path / "trace.json"
    assert main(["trace", "-o", str(output), "--png", str(tmp_path / "trace.png")]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith("afd: error: nothing ran while the trace was taken")
    assert list(tmp_path.iterdir()) == []


class FakePlace:
    """Where a coordinator says that the cluster is 1A1F."""

    secret = b"s" * 32

    def client(self):
        return contextlib.nullcontext(self)

    def status(self):
        return StatusReply(ClusterView("c" * 32, 1, 1, 1, 1, "m", "h", "hybrid", Plan(), []), [], [])

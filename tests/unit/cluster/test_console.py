"""What `afd up` shows: a progress line that fits any terminal, plain or JSON lines elsewhere, the first request."""

from __future__ import annotations

import io
import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from afd.cluster import console as console_module
from afd.cluster.console import Console, fit, width
from afd.cluster.progress import ChildProgress, curl_line, progress_line
from afd.config import resolve_config
from afd.telemetry.log import json_line


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def a_terminal_with_a_cursor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")


def rows_of(screen: str, columns: int) -> list[str]:
    """The rows of a terminal of that width after `screen` was written to it: text wraps, and the three sequences."""
    rows, row, column = [""], 0, 0
    for token in re.findall(r"\x1b\[\d*[A-Z]|.|\n", screen):
        if token == "\r":
            column = 0
        elif token == "\n":
            row, column = row + 1, 0
        elif token == "\x1b[2K":
            rows[row] = ""
        elif token == "\x1b[J":
            rows[row:] = [rows[row][:column]]
        elif token.startswith("\x1b["):
            row -= int(token[2:-1])
        else:
            if column == columns:
                row, column = row + 1, 0
            rows += [""] * (row + 1 - len(rows))
            rows[row] = rows[row][:column].ljust(column) + token + rows[row][column + 1 :]
            column += 1
        rows += [""] * (row + 1 - len(rows))
    return [row for row in rows if row]


def test_progress_of_a_child() -> None:
    progress = ChildProgress()
    assert str(progress) == "starting"
    assert progress.update({"loading": 0.42}) and str(progress) == "42%"
    assert not progress.update({"loading": 0.42, "other": 1})
    assert progress.update({"loading": 1.0}) and str(progress) == "loaded"
    assert progress.update({"ready": True}) and progress.ready


def children(**states: float | bool | None) -> dict[str, ChildProgress]:
    return {
        name: ChildProgress(None if isinstance(state, bool) else state, ready=state is True)
        for name, state in states.items()
    }


def test_the_progress_line_names_who_is_not_ready() -> None:
    states = children(coordinator=True, a0=0.5, f0=None)
    assert progress_line("m", states, 1.25, 80) == "loading m: 1 of 3 ready  a0 50%  f0 starting  (1.2 s)"
    assert progress_line("m", states, 1.25, 52) == "loading: 1 of 3 ready  a0 50%  f0 starting  (1.2 s)"
    assert progress_line("m", states, 1.25, 50) == "loading: 1 of 3 ready  a0 50%  and 1 more  (1.2 s)"
    assert progress_line("m", states, 1.25, 20) == "loading: 1 of 3 r..."


NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=150)
STATES = st.builds(ChildProgress, st.none() | st.floats(0, 1), st.booleans())


@given(NAMES, st.dictionaries(st.text("/abc0", min_size=1), STATES, max_size=20), st.integers(1, 200))
def test_the_progress_line_fits_every_width(model: str, states: dict[str, ChildProgress], columns: int) -> None:
    line = progress_line(model, states, 123.4, columns)
    assert width(line) <= columns and line.isprintable()


def test_wide_and_combining_characters_are_counted_as_a_terminal_does() -> None:
    assert width("日本") == 4 and width("e\u0301") == 1
    assert fit("日本語モデル", 9) == "日本語..." and fit("a\x1b[2Jb\n", 80) == "a?[2Jb?"


@pytest.mark.parametrize("columns", [20, 40, 80, 200])
def test_one_row_whatever_the_width_and_the_topology(columns: int) -> None:
    err = Terminal()
    console = Console(io.StringIO(), err, columns=lambda: columns)
    names = ["coordinator", *(f"attention/{rank}" for rank in range(8)), *(f"ffn/{rank}" for rank in range(8))]
    states = {name: ChildProgress() for name in names}
    for turn in range(100):
        console.progress(lambda room, at=turn / 5: progress_line("smollm2-135m-instruct", states, at, room))
    assert len(rows_of(err.getvalue(), columns)) == 1
    console.line("a log line")
    assert rows_of(err.getvalue(), columns)[0] == "a log line"
    console.close()
    assert rows_of(err.getvalue(), columns) == ["a log line"]


def test_a_terminal_that_becomes_narrower_or_wider_keeps_one_line() -> None:
    """It reflows what is shown: the old line takes more rows, all of which are taken back."""
    widths = [120, 40, 25, 100]
    err = Terminal()
    now = widths[0]
    console = Console(io.StringIO(), err, columns=lambda: now)
    for now in widths:  # noqa: B007
        console.progress(lambda room: ("x" * 200)[:room])
    pieces = err.getvalue().split("x" * 24)
    assert err.getvalue().startswith("x" * 119)
    assert f"\r\x1b[2A\x1b[J{'x' * 39}\r\x1b[1A\x1b[J{'x' * 24}\r\x1b[2K{'x' * 99}" in err.getvalue(), pieces


def test_results_go_to_stdout_and_end_the_progress_line() -> None:
    out, err = io.StringIO(), Terminal()
    console = Console(out, err, columns=lambda: 80)
    console.progress(lambda _: "50%")
    console.line("a log line")
    console.say("ready", url="http://h")
    console.note("later")
    assert err.getvalue() == "50%\r\x1b[2Ka log line\n50%\r\x1b[2Kafd up: later\n"
    assert out.getvalue() == "ready\n"


@pytest.mark.parametrize("term", ["", "dumb"])
def test_a_terminal_without_a_cursor_gets_plain_lines(term: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", term)
    err = Terminal()
    Console(io.StringIO(), err).progress(lambda _: "50%")
    assert err.getvalue() == "50%\n"


def test_without_a_terminal_progress_is_logged_ever_more_rarely(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(console_module.time, "monotonic", lambda: now)
    err = io.StringIO()
    console = Console(io.StringIO(), err)
    for tick in range(10 * 60 * 5):
        now = tick / 5
        console.progress(lambda room, at=now: f"{at:.0f} s, {room} columns")
    lines = err.getvalue().splitlines()
    assert lines[:5] == [f"{at} s, 400 columns" for at in (0, 5, 15, 35, 75)] and len(lines) == 13


def test_every_line_is_json_where_one_is() -> None:
    out, err = io.StringIO(), Terminal()
    console = Console(out, err, "json", columns=lambda: 80)
    console.progress(lambda room: f"loading, {room} columns")
    console.line('{"message": "a worker\'s own"}', "ffn/0")
    console.line("Traceback (most recent call last):", "ffn/0")
    console.line("[1, 2]", "ffn/0")
    console.note("draining", "warning")
    console.say("AFD is ready\nmore", url="http://h")
    console.close()
    entries = [json.loads(line) for line in err.getvalue().splitlines()]
    assert [entry.get("who") for entry in entries] == ["afd up", None, "ffn/0", "ffn/0", "afd up"]
    assert entries[2]["message"] == "Traceback (most recent call last):" and entries[4]["level"] == "warning"
    [ready] = [json.loads(line) for line in out.getvalue().splitlines()]
    assert ready["url"] == "http://h" and ready["message"] == "AFD is ready\nmore"


@given(st.text(), st.text())
def test_a_json_line_is_one_line(who: str, message: str) -> None:
    line = json_line("info", who, message)
    assert "\n" not in line and json.loads(line)["message"] == message


def test_a_terminal_that_goes_away_is_no_reason_to_end() -> None:
    closed = io.StringIO()
    console = Console(closed, closed)
    closed.close()
    console.line("nobody reads this")


def test_the_curl_line_fits_the_model() -> None:
    config = resolve_config(None, {"model.served_name": "mine"})
    assert "/v1/chat/completions" in curl_line(config, "http://h:1", has_tokenizer=True)
    ids = curl_line(config, "http://h:1", has_tokenizer=False)
    assert "/v1/completions" in ids and '"prompt": [1, 2, 3]' in ids


def test_the_curl_line_reads_the_first_key_and_quotes_names(tmp_path: Path) -> None:
    keys = tmp_path / "the keys.txt"
    keys.write_text("# ours\n\nfirst-key\nsecond\n")
    config = resolve_config(None, {"model.served_name": "it's $mine", "gateway.api_keys_file": str(keys)})
    line = curl_line(config, "http://h:1", has_tokenizer=True)
    shown = subprocess.run(["sh", "-c", f"printf '%s\\n' {line}"], capture_output=True, text=True, check=True).stdout
    words = shown.splitlines()
    assert "Authorization: Bearer first-key" in words
    assert json.loads(words[-1])["model"] == "it's $mine"
    assert shlex.split(line)[0] == "curl"

"""What others say reaches the log on one line, as text that does nothing to a terminal."""

from __future__ import annotations

import json
import logging
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from afd.telemetry.log import json_line, printable, setup_logging

HOSTILE = "bad\x1b[31m\x9b2J\nforged line\r\x00\u202e\ud800 für 日本"


@given(st.text())
def test_nothing_unprintable_is_left_and_printable_text_is_untouched(text: str) -> None:
    shown = printable(text)
    assert shown.isprintable()
    assert shown == text or not text.isprintable()


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_a_json_line_is_one_line_and_keeps_its_text(text: str) -> None:
    line = json_line("info", "gateway/0", text)
    assert line.isprintable() and json.loads(line)["message"] == text


@pytest.mark.parametrize("fmt", ["text", "json"])
def test_a_log_line_stays_one_line(
    fmt: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    monkeypatch.setattr(root, "level", root.level)
    setup_logging("ffn/0", fmt=fmt)
    logging.getLogger("afd.test").info("from %s", HOSTILE)
    sys.stderr.flush()
    line = capsys.readouterr().err
    assert line.endswith("\n") and line[:-1].isprintable() and "für 日本" in line


def test_a_traceback_keeps_its_lines_and_nothing_else(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    monkeypatch.setattr(root, "level", root.level)
    setup_logging("ffn/0")
    try:
        raise ValueError(HOSTILE)
    except ValueError:
        logging.getLogger("afd.test").exception("failed")
    shown = capsys.readouterr().err
    assert "Traceback" in shown
    assert all(line.isprintable() for line in shown.split("\n"))

"""Log lines that strangers cause: one at once, one per interval, none forgotten."""

from __future__ import annotations

import logging

import pytest

from afd.telemetry.rare_log import RareLog


def test_what_comes_within_the_interval_is_counted(caplog: pytest.LogCaptureFixture) -> None:
    now = 100.0
    rare = RareLog(logging.getLogger("rare"), 10.0, lambda: now)
    for message in ("a", "b", "c 50 %s"):
        rare.warn(message)
    now = 110.0
    rare.warn("d %s")
    rare.warn("e")
    now = 120.0
    rare.warn("f")
    now = 300.0
    rare.warn("g")
    assert [record.getMessage() for record in caplog.records] == [
        "a",
        "d %s (and 2 more since the last such line)",
        "f (and 1 more since the last such line)",
        "g",
    ]

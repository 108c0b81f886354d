"""Nothing depends on the wall clock, which jumps: it is read only where people are told the time."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WALL_CLOCK = {"time": {"time", "time_ns", "localtime", "gmtime"}, "datetime": {"now", "utcnow", "today"}}
TOLD = {
    "afd/telemetry/log.py": "log lines",
    "afd/gateway/api/openai.py": "`created` of an answer",
    "afd/gateway/served_model.py": "`created` of the model",
    "afd/gateway/templating.py": "a template's date",
    "afd/load/report.py": "a report's date",
}


def readers(source: str) -> bool:
    """Whether a module names the wall clock: `time.time`, `datetime.datetime.now`, `from time import time`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module in WALL_CLOCK:
            if any(alias.name in WALL_CLOCK[node.module] for alias in node.names):
                return True
        elif isinstance(node, ast.Attribute):
            owner = node.value.attr if isinstance(node.value, ast.Attribute) else getattr(node.value, "id", "")
            if node.attr in WALL_CLOCK.get(owner, ()):
                return True
    return False


def test_the_check_sees_what_it_looks_for() -> None:
    for seen in ("time.time()", "x = time.time", "datetime.datetime.now()", "from time import time", "time.time_ns()"):
        assert readers(seen), seen
    for other in ("time.monotonic()", "time.perf_counter()", "self.time", "from time import sleep"):
        assert not readers(other), other


def test_the_wall_clock_is_only_told() -> None:
    paths = [path for package in ("afd", "stepmesh") for path in (ROOT / package).rglob("*.py")]
    found = {str(path.relative_to(ROOT)) for path in paths if readers(path.read_text(encoding="utf-8"))}
    assert found == set(TOLD)

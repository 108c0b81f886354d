"""docs/stepmesh.md keeps its word: the example runs as printed, and is as short as it says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import stepmesh
from stepmesh.lanes import Lanes

PAGE = (Path(__file__).parents[3] / "docs/stepmesh.md").read_text()


def test_the_example_runs() -> None:
    (example,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len([line for line in example.splitlines() if line.strip()]) <= 31
    done = subprocess.run([sys.executable, "-c", example], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "(3, 64) 2.0\n"


def test_every_call_that_is_named_exists() -> None:
    table = PAGE.split("## API")[1].split("## Guarantees")[0]
    names = set(re.findall(r"`((?:lanes\.)?\w+)\(", table)) - {"Mesh"}
    assert names >= {"dispatch", "dispatch_sparse", "combine", "progress", "lanes.book"}
    for name in names:
        owner = Lanes if name.startswith("lanes.") else stepmesh.Mesh
        assert callable(getattr(owner, name.removeprefix("lanes."))), name

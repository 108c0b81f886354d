"""Print what the package itself needs, one requirement a line: python runtime_requirements.py pyproject.toml."""

import sys
import tomllib
from pathlib import Path

print("\n".join(tomllib.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))["project"]["dependencies"]))

"""`python -m afd.bench`: the benchmark client alone."""

from __future__ import annotations

import sys

from afd.bench.cli import main

sys.exit(main())

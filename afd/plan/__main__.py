"""`python -m afd.plan`: the planner without the rest of the command line."""

from __future__ import annotations

import sys

from afd.plan.cli import main

sys.exit(main())

"""`python -m afd.cli`: the same as the `afd` command."""

import sys

from afd.cli import main

sys.exit(main())

"""The `afd` command: one parser, one file a command. `--help` and the errors need no torch."""

from afd.cli.main import main

__all__ = ["main"]

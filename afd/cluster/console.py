"""The terminal of `afd up`: log lines on stderr, one progress line that is redrawn below them, results on stdout."""

from __future__ import annotations

import time
from typing import TextIO

PLAIN_INTERVAL_S = 5.0  # without a terminal the progress line is logged now and then instead
CLEAR = "\r\x1b[2K"


class Console:
    """Not thread-safe. A terminal that goes away is no reason to end: writing to it is given up."""

    def __init__(self, out: TextIO, err: TextIO):
        self._out = out
        self._err = err
        self._is_terminal = err.isatty()
        self._shown = ""
        self._plain_at = float("-inf")

    def line(self, text: str) -> None:
        """One line of log."""
        self._write(self._err, f"{CLEAR if self._shown else ''}{text}\n{self._shown}")

    def progress(self, text: str) -> None:
        """Replace the progress line."""
        if self._is_terminal:
            self._shown = text
            self._write(self._err, CLEAR + text)
        elif time.monotonic() - self._plain_at >= PLAIN_INTERVAL_S:
            self._plain_at = time.monotonic()
            self._write(self._err, text + "\n")

    def say(self, text: str) -> None:
        """A result, on stdout; ends the progress line."""
        self.close()
        self._write(self._out, text + "\n")

    def close(self) -> None:
        """Remove the progress line."""
        if self._shown:
            self._shown = ""
            self._write(self._err, CLEAR)

    def _write(self, stream: TextIO, text: str) -> None:
        try:
            stream.write(text)
            stream.flush()
        except (OSError, ValueError):
            return

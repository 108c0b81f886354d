"""The terminal of `afd up`: log lines on stderr, one progress line that is redrawn below them, results on stdout."""

from __future__ import annotations

import json
import os
import time
import unicodedata
from collections.abc import Callable
from typing import TextIO

from afd.telemetry.log import json_line

FIRST_INTERVAL_S = 5.0  # without a terminal the progress line is logged now and then instead, ever more rarely
LAST_INTERVAL_S = 60.0
CLEAR = "\r\x1b[2K"
CLEAR_BELOW = "\r\x1b[{}A\x1b[J"
DEFAULT_COLUMNS = 80
PLAIN_COLUMNS = 400
DUMB_TERMINALS = ("", "dumb", "unknown")

Draw = Callable[[int], str]
"""A text that fits so many columns."""


class Console:
    """Not thread-safe. A terminal that goes away is no reason to end: writing to it is given up.

    fmt: "json" makes every line on both streams one JSON object, and draws nothing.
    columns: of the terminal, now; asked before every drawing.
    """

    def __init__(self, out: TextIO, err: TextIO, fmt: str = "text", *, columns: Callable[[], int] | None = None):
        self._out = out
        self._err = err
        self._json = fmt == "json"
        self._draws = not self._json and err.isatty() and os.environ.get("TERM", "") not in DUMB_TERMINALS
        self._columns = columns if columns is not None else lambda: _columns(err)
        self._shown = ""
        self._shown_columns = 0
        self._plain_at = float("-inf")
        self._plain_interval_s = FIRST_INTERVAL_S

    def line(self, text: str, who: str = "") -> None:
        """One line of a child's output. who: its name, for a line that is not JSON where all are."""
        self._log(json_line("info", who, text) if self._json and not _is_json(text) else text)

    def note(self, text: str, level: str = "info") -> None:
        """One line of `afd up` itself."""
        self._log(json_line(level, "afd up", text) if self._json else f"afd up: {text}")

    def progress(self, draw: Draw) -> None:
        """Replace the progress line."""
        now = time.monotonic()
        if self._draws:
            before = self._clear()
            # A character in the last column makes some terminals wrap.
            self._shown_columns = max(1, self._columns() - 1)
            self._shown = draw(self._shown_columns)
            self._write(self._err, before + self._shown)
        elif now - self._plain_at >= self._plain_interval_s:
            if self._plain_at > float("-inf"):
                self._plain_interval_s = min(LAST_INTERVAL_S, 2 * self._plain_interval_s)
            self._plain_at = now
            text = draw(PLAIN_COLUMNS)
            self._write(self._err, (json_line("info", "afd up", text) if self._json else text) + "\n")

    def say(self, text: str, **fields: object) -> None:
        """A result, on stdout; ends the progress line. fields: stand beside it where lines are JSON."""
        self.close()
        self._write(self._out, (json_line("info", "afd up", text, fields) if self._json else text) + "\n")

    def close(self) -> None:
        """Remove the progress line."""
        if self._shown:
            self._write(self._err, self._clear())
            self._shown = ""

    def _log(self, text: str) -> None:
        self._write(self._err, f"{self._clear()}{text}\n{self._shown}")

    def _clear(self) -> str:
        """What removes the progress line, which takes several rows after the terminal became narrower."""
        if not self._shown:
            return ""
        rows = -(-width(self._shown) // max(1, self._columns()))
        return CLEAR if rows <= 1 else CLEAR_BELOW.format(rows - 1)

    def _write(self, stream: TextIO, text: str) -> None:
        try:
            stream.write(text)
            stream.flush()
        except (OSError, ValueError):
            return


def width(text: str) -> int:
    """Columns that a terminal needs for a text without control characters."""
    return sum(_char_width(char) for char in text)


def fit(text: str, columns: int) -> str:
    """The text without control characters, cut to so many columns."""
    text = "".join(char if char.isprintable() else "?" for char in text)
    if width(text) <= columns:
        return text
    kept, room = "", columns - 3
    for char in text:
        room -= _char_width(char)
        if room < 0:
            break
        kept += char
    return (kept + "...")[: max(0, columns)]


def _char_width(char: str) -> int:
    if unicodedata.combining(char):
        return 0
    return 2 if unicodedata.east_asian_width(char) in "WF" else 1


def _columns(stream: TextIO) -> int:
    try:
        return os.get_terminal_size(stream.fileno()).columns or DEFAULT_COLUMNS
    except (OSError, ValueError):
        return DEFAULT_COLUMNS


def _is_json(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False

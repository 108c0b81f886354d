"""Logging for every process: one line per event on stderr, role and rank in each line, text or JSON."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Mapping


def printable(text: str, keep: str = "") -> str:
    """The text with whatever no terminal should be told (control characters, lone surrogates, ...) as escapes.

    keep: characters that stay as they are, such as "\\n".
    """
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() or char in keep else char.encode("unicode_escape").decode() for char in text
    )


class _TextFormatter(logging.Formatter):
    def __init__(self, who: str):
        super().__init__()
        self._who = who

    def format(self, record: logging.LogRecord) -> str:
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        line = f"{clock}.{int(record.msecs):03d} {record.levelname[0]} {self._who:<12} {printable(record.getMessage())}"
        if record.exc_info:
            line += "\n" + printable(self.formatException(record.exc_info), keep="\n")
        return line


class _JsonFormatter(logging.Formatter):
    def __init__(self, who: str):
        super().__init__()
        self._who = who

    def format(self, record: logging.LogRecord) -> str:
        more: dict[str, object] = {"logger": record.name}
        if record.exc_info:
            more["exception"] = self.formatException(record.exc_info)
        return json_line(record.levelname.lower(), self._who, record.getMessage(), more, at=record.created)


def json_line(
    level: str, who: str, message: str, more: Mapping[str, object] | None = None, *, at: float | None = None
) -> str:
    """One line of a JSON log.

    more: further keys.
    at: Unix time, now by default.
    """
    when = round(time.time() if at is None else at, 3)
    entry = {"time": when, "level": level, "who": who, "message": message, **(more or {})}
    line = json.dumps(entry, ensure_ascii=False)
    # Anything else than plain text can only be inside a string here, where JSON has escapes for it.
    return (
        line if line.isprintable() else "".join(char if char.isprintable() else json.dumps(char)[1:-1] for char in line)
    )


def setup_logging(who: str, *, level: str = "info", fmt: str = "text") -> None:
    """Configure the root logger of this process. who: "gateway", "attention/0", ..."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonFormatter(who) if fmt == "json" else _TextFormatter(who))
    logging.getLogger().handlers[:] = [handler]
    set_level(level)


def set_level(level: str) -> None:
    """The least that this process logs from now on; of chatty libraries warnings at most."""
    root = logging.getLogger()
    root.setLevel(level.upper())
    for noisy in ("uvicorn.access", "uvicorn.error", "httpx"):
        logging.getLogger(noisy).setLevel(max(logging.WARNING, root.level))

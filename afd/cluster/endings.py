"""How a supervisor tells its coordinator of members whose processes have ended: lines over the coordinator's input."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable

Tell = Callable[[str, str], None]
"""Told of one process that has ended: its incarnation, and how it ended in words."""
MAX_KEPT = 256  # that wait for a listener


def ending_line(incarnation: str, how: str) -> bytes:
    """One process has ended."""
    return json.dumps({"ended": incarnation, "how": how}).encode() + b"\n"


class Endings:
    """The coordinator's end. `feed` belongs to the thread that reads the pipe, `listen` to any other, once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._rest = b""
        self._kept: list[tuple[str, str]] = []
        self._tell: Tell | None = None

    def listen(self, tell: Tell) -> None:
        """Have `tell` told of every ending from now on, and at once of those that came before."""
        with self._lock:
            self._tell = tell
            kept, self._kept = self._kept, []
            for incarnation, how in kept:
                tell(incarnation, how)

    def feed(self, data: bytes) -> None:
        """Bytes of the pipe. A line that is none is dropped: silence is noticed, too, only later."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            try:
                word = json.loads(line)
                incarnation, how = str(word["ended"]), str(word["how"])
            except (ValueError, TypeError, KeyError):
                continue
            with self._lock:
                if self._tell is not None:
                    self._tell(incarnation, how)
                elif len(self._kept) < MAX_KEPT:
                    self._kept.append((incarnation, how))

"""The log level of the configuration file, followed while the process runs: nobody restarts to log more."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable

from afd.config import resolve_config
from afd.errors import ConfigError
from afd.telemetry.log import set_level

EVERY_S = 5.0
log = logging.getLogger(__name__)


class LogLevelWatch:
    """A thread that looks whether the file has changed, and then takes its level. Close it.

    path: the file.
    read: its level now; ConfigError where it is wrong, and then the present level stays.
    A level that a flag gave holds until the file's own changes.
    """

    def __init__(self, path: str, read: Callable[[], str], *, every_s: float = EVERY_S):
        self._path = path
        self._read = read
        self._every_s = every_s
        self._stamp = self._stamp_now()
        self._level = read()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="log-level", daemon=True)
        self._thread.start()

    def look(self) -> None:
        """Take the level of a file that has changed since the last look."""
        stamp = self._stamp_now()
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            level = self._read()
        except ConfigError as error:
            log.warning("the log level stays at %s: %s", self._level, error)
            return
        if level != self._level:
            self._level = level
            set_level(level)
            log.warning("the log level is %s now", level)

    def close(self) -> None:
        self._stop.set()
        self._thread.join()

    def _follow(self) -> None:
        while not self._stop.wait(self._every_s):
            self.look()

    def _stamp_now(self) -> tuple[int, int, int] | None:
        """What differs after a write, a rename over it and Kubernetes' swap of a link above it; None = no file."""
        try:
            found = os.stat(self._path)
        except OSError:
            return None
        return found.st_mtime_ns, found.st_ino, found.st_size


def follow_config(path: str) -> LogLevelWatch:
    """Follow log.level of the configuration file at `path`."""
    return LogLevelWatch(path, lambda: resolve_config(path, {}).log.level)

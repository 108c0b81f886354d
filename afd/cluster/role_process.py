"""The frame of every role's process: logging, signals, the supervisor's pipe, deadlines and exit codes.

Two threads watch for the end. One reads the supervisor's pipe: at its end of file the process stops, within
ORPHAN_LIMIT_S in any case; what comes over it before is the coordinator's (endings.py). One gives a stop, from wherever
it came, a deadline. On Linux the kernel kills a worker whose supervisor dies; the coordinator is only asked to end, so
that it can remove the run file.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable
from types import FrameType

from afd.cluster.endings import Endings
from afd.cluster.launch import (
    EXIT_CONFIG,
    EXIT_FAILURE,
    EXIT_LOST,
    EXIT_OK,
    RoleLaunch,
    files_needed,
    read_launch,
    write_news,
)
from afd.cluster.process import die_with_parent
from afd.cluster.roles import RoleContext, RoleEntry
from afd.cluster.run_file import remove_run_file
from afd.errors import AfdError, ConfigError, CoordinatorError, ModelError
from afd.host.open_files import want_open_files
from afd.membership.thread import MembershipLostError
from afd.telemetry.log import setup_logging

log = logging.getLogger(__name__)

ORPHAN_LIMIT_S = 2.0
STOP_MARGIN_S = 8.0
FATAL_LIMIT_S = 5.0
MAX_ERROR_CHARS = 1000
_SUPERVISOR_FD = 0


def run_supervised(role: str, entry: RoleEntry, *, preload: Callable[[], None] | None = None) -> int:
    """A child of `afd up`: read the launch frame from standard input, run, return the exit code.

    preload: imports what the role needs while the frame is on its way.
    """
    die_with_parent(signal.SIGHUP if role == "coordinator" else signal.SIGKILL)
    if preload is not None:
        preload()
    launch = read_launch(_SUPERVISOR_FD)
    if launch is None or launch.orphaned:
        return EXIT_OK  # the supervisor was gone before we began
    if launch.role != role:
        raise ConfigError(f"a launch frame for {launch.role} was given to {role}")
    try:
        return run_role(launch, entry)
    except AfdError as error:
        log.error("%s", error)
        if launch.announce_fd >= 0:
            write_news(launch.announce_fd, {"error": str(error)[:MAX_ERROR_CHARS]})
        return exit_code_of(error)


def run_role(launch: RoleLaunch, entry: RoleEntry) -> int:
    """Run one role to its end, in the main thread; returns the exit code. AfdError is the caller's to report."""
    setup_logging(launch.name, level=launch.config.log.level, fmt=launch.config.log.format)
    want_open_files(files_needed(launch.role, launch.config), launch.name)
    process = _Process(launch)
    process.install_signals()
    process.start_watching()
    try:
        exit_code = entry(process.context())
    except AfdError:
        raise
    except Exception:
        log.exception("%s failed", launch.name)
        return EXIT_FAILURE
    finally:
        process.ended.set()
        if process.hung_up or launch.orphaned:  # SIGHUP may come before the pipe's end, and before a new parent
            process.clear_up()
    if process.fatal is not None:
        raise process.fatal
    return exit_code


def exit_code_of(error: AfdError) -> int:
    """EXIT_CONFIG where the user must act, EXIT_LOST where a fresh process may do better, else EXIT_FAILURE."""
    if isinstance(error, MembershipLostError):
        return EXIT_LOST
    if isinstance(error, ConfigError | ModelError | CoordinatorError):
        return EXIT_CONFIG
    return EXIT_FAILURE


class _Process:
    """The stop event of one process, and everything that sets it."""

    def __init__(self, launch: RoleLaunch):
        self._launch = launch
        self._stop = threading.Event()
        self._endings = Endings()
        self._num_signals = 0
        self.hung_up = False  # the kernel said that the supervisor, or one of its threads, is gone
        self.ended = threading.Event()
        self.fatal: CoordinatorError | None = None

    def context(self) -> RoleContext:
        """What the role's entry function is given."""
        return RoleContext(
            name=self._launch.name,
            rank=self._launch.rank,
            config=self._launch.config,
            secret=bytes.fromhex(self._launch.secret),
            stop=self._stop,
            announce=self._announce,
            on_fatal=self._on_fatal,
            on_ended=self._endings.listen,
        )

    def install_signals(self) -> None:
        """SIGTERM and SIGINT ask for a graceful stop; a second one ends the process at once.

        SIGHUP, the kernel's word that the supervisor is gone, may come for each of the supervisor's threads.
        """
        if self._launch.supervisor_pid:
            signal.signal(signal.SIGHUP, self._on_hang_up)
        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, self._on_signal)

    def start_watching(self) -> None:
        """Daemon threads: a blocked main thread cannot keep them from ending the process."""
        threading.Thread(target=self._enforce_stop, name="stop-deadline", daemon=True).start()
        if self._launch.supervisor_pid:
            threading.Thread(target=self._watch_supervisor, name="supervisor-watch", daemon=True).start()

    def clear_up(self) -> None:
        """Remove what a supervisor that is gone has left. Called by the thread that hears of it first."""
        if self._launch.run_file:
            remove_run_file(self._launch.run_file)

    def _announce(self, news: dict[str, object]) -> None:
        if self._launch.announce_fd >= 0:
            write_news(self._launch.announce_fd, news)

    def _on_fatal(self, error: CoordinatorError) -> None:
        self.fatal = error
        self._stop.set()

    def _on_hang_up(self, signum: int, frame: FrameType | None) -> None:
        self.hung_up = True
        self._stop.set()

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        self._num_signals += 1
        if self._num_signals > 1:
            os._exit(128 + signum)
        self._stop.set()

    def _enforce_stop(self) -> None:
        self._stop.wait()
        limit_s = FATAL_LIMIT_S if self.fatal is not None else self._launch.config.gateway.drain_s + STOP_MARGIN_S
        if not self.ended.wait(limit_s):
            log.error("did not stop within %.0f s%s", limit_s, f" after: {self.fatal}" if self.fatal else "")
            os._exit(EXIT_LOST if self.fatal is not None else EXIT_FAILURE)

    def _watch_supervisor(self) -> None:
        while data := os.read(_SUPERVISOR_FD, 4096):
            self._endings.feed(data)
        self.clear_up()
        self._stop.set()
        if not self.ended.wait(ORPHAN_LIMIT_S):
            os._exit(EXIT_FAILURE)

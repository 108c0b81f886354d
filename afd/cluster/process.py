"""One child process of the supervisor: what it is started with, and what is asked of it."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import Protocol

Command = Callable[[str, int], list[str]]
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


class Process(Protocol):
    """A running child. announce_fd: the number of its descriptor for news, there."""

    pid: int
    announce_fd: int

    def poll(self) -> int | None:
        """Exit code (negative: the signal that killed it), or None while it runs."""

    def send_signal(self, signum: int) -> None:
        """Nothing once it has ended."""

    def kill(self) -> None:
        """End it and wait for that."""


class Spawned:
    """A fresh interpreter in a process group of its own, so that a Ctrl-C in the terminal reaches the supervisor alone.

    Not in a session of its own: between sessions (autogroups) Linux shares a core evenly, and a worker that polls and
    yields would take half of it from a partner that computes there; within one session it takes nothing.
    """

    def __init__(self, command: list[str], stdin: int, output: int, news: int, *, threads: int):
        self._process = subprocess.Popen(
            command,
            stdin=stdin,
            stdout=output,
            stderr=output,
            pass_fds=(news,),
            process_group=0,
            env=role_environment(threads),
        )
        self.pid = self._process.pid
        self.announce_fd = news
        self.poll = self._process.poll
        self.send_signal = self._process.send_signal

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


def role_command(role: str, rank: int) -> list[str]:
    """How a role's process is started; the rank is there for `ps` only."""
    return [sys.executable, "-m", "afd", role, "--supervised", "--rank", str(rank)]


def role_environment(threads: int) -> dict[str, str]:
    """This process's environment, with library thread pools bounded and gRPC's own log quiet.

    threads: 0 = whatever the library chooses.
    """
    environment = dict(os.environ)
    if threads > 0:
        environment["OMP_NUM_THREADS"] = str(threads)
    # torch's idle OpenMP threads would spin for milliseconds on cores where the native kernels' threads, or another
    # process, have work: with two threads on two shared cores a step took 1.1 to 3 times as long.
    environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    environment.setdefault("GRPC_VERBOSITY", "ERROR")
    environment.setdefault("PYTHONUNBUFFERED", "1")
    return environment


def die_with_parent(signum: signal.Signals) -> None:
    """Linux: the kernel sends us `signum` when our parent dies, even if every thread of ours is stuck."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signum), 0, 0, 0)


def adopt_orphans() -> None:
    """Linux: a descendant whose parent ends becomes our child."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def describe_exit(exit_code: int) -> str:
    """Exit code in words."""
    if exit_code >= 0:
        return f"exit code {exit_code}"
    try:
        return f"killed by {signal.Signals(-exit_code).name}"
    except ValueError:
        return f"killed by signal {-exit_code}"

"""`afd up` without the seconds that its processes take to import their libraries.

One process of a test run has imported them all (multiprocessing's fork server). It forks the supervisor, which forks
its roles where the command would start an interpreter for each. They are processes like any others: with pids,
sessions, descriptors and ends of their own. How a cluster starts by itself is for other tests.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import traceback
from functools import partial
from multiprocessing.reduction import DupFd

from afd.cluster.fork_server import Forked

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    [
        "torch",
        "afd.attention.worker",
        "afd.ffn.worker",
        "afd.gateway.serve",
        "afd.coordinator.service",
        "afd.cli.up",
        "afd.cli.roles",
        "afd.cluster.supervisor",
        "afd.cluster.resolve",
        __name__,
    ]
)


class WarmUp:
    """`afd up` with those arguments, as much of a Popen as the tests need: output as text in `stdout`."""

    def __init__(self, arguments: list[str], env: dict[str, str]):
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as `role_environment`; read when torch is imported
        reader, writer = os.pipe()
        self.stdout = os.fdopen(reader)
        try:
            self._process = _CONTEXT.Process(target=_up, args=(arguments, env, DupFd(writer)))
            self._process.start()
        finally:
            os.close(writer)
        assert self._process.pid is not None
        self.pid = self._process.pid
        self.send_signal = partial(os.kill, self.pid)
        self.kill = self._process.kill

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("afd up", timeout)
        return self._process.exitcode


def _fork(command: list[str], stdin: int, output: int, news: int, *, threads: int) -> Forked:
    """In the place of `afd.cluster.process.Spawned`: a role by fork from the supervisor, which has one thread."""
    pid = os.fork()
    if pid == 0:
        _become(command, stdin, output, news)
    return Forked(pid, news)


def _up(arguments: list[str], env: dict[str, str], output: DupFd) -> None:
    """In the process that becomes the supervisor."""
    from afd.cli.main import main
    from afd.cluster import fork_server, supervisor

    fd = output.detach()
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    os.close(fd)
    # What they were before may have been a file, and these objects would still take them for one.
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", buffering=1, closefd=False)  # noqa: SIM115
    os.environ.clear()
    os.environ.update(env)
    supervisor.Spawned = _fork
    fork_server.ForkServer = None
    sys.exit(main(arguments))


def _become(command: list[str], stdin: int, output: int, news: int) -> None:
    """In a process forked from the supervisor: what exec would leave of it, then the role. Does not return."""
    import setproctitle

    from afd.cli.main import main

    exit_code = 1
    try:
        gc.freeze()  # no collection closes what was the supervisor's: its descriptors' numbers will be others'
        os.setsid()
        for source, target in ((stdin, 0), (output, 1), (output, 2)):
            os.dup2(source, target)
        os.closerange(3, news)
        os.closerange(news + 1, os.sysconf("SC_OPEN_MAX"))
        signal.set_wakeup_fd(-1)
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD):
            signal.signal(signum, signal.SIG_DFL)
        setproctitle.setthreadtitle(f"{command[-4]} {command[-1]}")  # no title replaces the words behind `python -c`
        exit_code = main(command[command.index("afd") + 1 :])
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_code)

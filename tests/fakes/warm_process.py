"""Processes without the seconds that importing their libraries takes, by fork from one that has imported them all.

A test run has one such process (multiprocessing's fork server), made when the first is asked for. What is forked from
it is a process like any other, with a pid, descriptors and an end of its own.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
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
        "afd.cli.status",
        "afd.cluster.supervisor",
        "afd.cluster.resolve",
        "tests.fakes.supervisor",
        __name__,
    ]
)


class WarmProcess:
    """`main(arguments)` in a process of its own, as much of a Popen as the tests need: output as text in `stdout`.

    main: a function of a module; its result is the exit code.
    """

    def __init__(self, main: Callable[[list[str]], int], arguments: list[str], env: dict[str, str]):
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as `role_environment`; read when torch is imported
        reader, writer = os.pipe()
        self.stdout = os.fdopen(reader)
        try:
            self._process = _CONTEXT.Process(target=_run, args=(main, arguments, env, DupFd(writer)))
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
            raise subprocess.TimeoutExpired("a warm process", timeout)
        return self._process.exitcode


def afd(arguments: list[str], env: dict[str, str], timeout: float) -> tuple[int, str]:
    """Exit code and output (both streams) of the command `afd` with those arguments."""
    process = WarmProcess(_afd, arguments, env)
    with process.stdout:
        output = process.stdout.read()
    return process.wait(timeout), output


def fork_role(title: str, run: Callable[[], int], stdin: int, output: int, news: int) -> Forked:
    """In the place of `afd.cluster.process.Spawned`: a role by fork from the supervisor, which has one thread.

    title: the name of the process, at most 15 characters.
    """
    pid = os.fork()
    if pid == 0:
        _become(title, run, stdin, output, news)
    return Forked(pid, news)


def _afd(arguments: list[str]) -> int:
    from afd.cli.main import main

    return main(arguments)


def _run(main: Callable[[list[str]], int], arguments: list[str], env: dict[str, str], output: DupFd) -> None:
    """In the new process."""
    fd = output.detach()
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    os.close(fd)
    # What they were before may have been a file, and these objects would still take them for one.
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", buffering=1, closefd=False)  # noqa: SIM115
    os.environ.clear()
    os.environ.update(env)
    sys.exit(main(arguments))


def _become(title: str, run: Callable[[], int], stdin: int, output: int, news: int) -> None:
    """In a process forked from the supervisor: what exec would leave of it, then the role. Does not return."""
    import setproctitle

    exit_code = 1
    try:
        gc.freeze()  # no collection closes what was the supervisor's: its descriptors' numbers will be others'
        os.setpgid(0, 0)
        for source, target in ((stdin, 0), (output, 1), (output, 2)):
            os.dup2(source, target)
        os.closerange(3, news)
        os.closerange(news + 1, os.sysconf("SC_OPEN_MAX"))
        signal.set_wakeup_fd(-1)
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD):
            signal.signal(signum, signal.SIG_DFL)
        setproctitle.setthreadtitle(title)  # no title replaces the words behind `python -c`
        exit_code = run()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_code)

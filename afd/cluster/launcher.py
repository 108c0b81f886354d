"""Spawn one role as a child process and read what it says: news lines, stderr lines, its end.

Children are spawned, never forked with our state: a fresh interpreter, its own session (a Ctrl-C in the terminal
reaches the supervisor alone), and three pipes: stdin carries the launch frame and then stands for "the supervisor
lives", one descriptor carries news, one carries stdout and stderr. Single-threaded; descriptors are non-blocking.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from afd.cluster.launch import MAX_NEWS_BYTES, RoleLaunch, parse_news, write_launch
from afd.config import ClusterConfig

KEPT_LINES = 5
MAX_LINE_BYTES = 16 << 10
READ_BYTES = 64 << 10
READS_AT_ONCE = 16

Command = Callable[[str, int], list[str]]


def role_command(role: str, rank: int) -> list[str]:
    """How a role's process is started; the rank is there for `ps` only."""
    return [sys.executable, "-m", "afd", role, "--supervised", "--rank", str(rank)]


class Lines:
    """Splits what a non-blocking descriptor delivers into lines; overlong ones are cut, never collected."""

    def __init__(self, fd: int, max_line_bytes: int):
        self.fd = fd
        self._max = max_line_bytes
        self._rest = b""
        self.ended = False

    def read(self) -> Iterator[bytes]:
        """The complete lines available now (bounded: a flood must not keep us from other work); at the end of file
        also an unfinished one."""
        for _ in range(READS_AT_ONCE):
            if self.ended:
                return
            try:
                data = os.read(self.fd, READ_BYTES)
            except BlockingIOError:
                return
            self.ended = not data
            *lines, self._rest = (self._rest + data).split(b"\n")
            if len(self._rest) > self._max or (self.ended and self._rest):
                lines.append(self._rest[: self._max])
                self._rest = b""
            yield from lines


class Child:
    """One running role. `configure` sends its launch frame (it may import its libraries before that)."""

    def __init__(self, role: str, rank: int, command: list[str], *, threads: int):
        self.role = role
        self.rank = rank
        self.tail: deque[str] = deque(maxlen=KEPT_LINES)
        news_read, news_write = os.pipe()
        output_read, output_write = os.pipe()
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=output_write,
                stderr=output_write,
                pass_fds=(news_write,),
                start_new_session=True,
                env=role_environment(threads),
            )
        except OSError:
            os.close(news_read)
            os.close(output_read)
            raise
        finally:
            os.close(news_write)
            os.close(output_write)
        self._announce_fd = news_write  # its number in the child
        for fd in (news_read, output_read):
            os.set_blocking(fd, False)
        self.news = Lines(news_read, MAX_NEWS_BYTES)
        self.output = Lines(output_read, MAX_LINE_BYTES)

    @property
    def name(self) -> str:
        return f"{self.role}/{self.rank}" if self.rank >= 0 else self.role

    @property
    def pid(self) -> int:
        return self._process.pid

    def configure(self, config: ClusterConfig, secret: bytes, *, run_file: str = "") -> None:
        """Tell the child everything; a child that has died already is noticed by its end, not here."""
        launch = RoleLaunch(
            role=self.role,
            rank=self.rank,
            config=config,
            secret=secret.hex(),
            announce_fd=self._announce_fd,
            supervisor_pid=os.getpid(),
            run_file=run_file,
        )
        assert self._process.stdin is not None
        try:
            write_launch(self._process.stdin.fileno(), launch)
        except BrokenPipeError:
            return

    def read_news(self) -> Iterator[dict[str, Any]]:
        """News that arrived since the last call."""
        for line in self.news.read():
            yield parse_news(line)

    def read_output(self) -> Iterator[str]:
        """stdout and stderr lines since the last call; the last KEPT_LINES stay in `tail`."""
        for line in self.output.read():
            text = line.decode(errors="replace")
            self.tail.append(text)
            yield text

    def signal(self, signum: signal.Signals) -> None:
        """Send a signal; nothing when the child has ended."""
        self._process.send_signal(signum)

    def poll(self) -> int | None:
        """The exit code (negative: the signal that killed it), or None while it runs."""
        return self._process.poll()

    def close(self) -> None:
        """Free the pipes; kills the child if it still runs. Idempotent."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        if self.news.fd >= 0:
            for fd in (self.news.fd, self.output.fd):
                os.close(fd)
            self.news.fd = self.output.fd = -1
            assert self._process.stdin is not None
            self._process.stdin.close()


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


def describe_exit(exit_code: int) -> str:
    """Exit code in words."""
    if exit_code >= 0:
        return f"exit code {exit_code}"
    try:
        return f"killed by {signal.Signals(-exit_code).name}"
    except ValueError:
        return f"killed by signal {-exit_code}"

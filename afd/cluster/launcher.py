"""One role as a child process, and what it says: news lines, stderr lines, its end.

A child has three pipes: stdin carries the launch frame, then what a coordinator is told of others' ends, and stands for
"the supervisor lives"; one descriptor carries news, one carries stdout and stderr. Single-threaded; descriptors are
non-blocking.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from afd.cluster.launch import MAX_NEWS_BYTES, RoleLaunch, parse_news, write_launch
from afd.cluster.process import Process
from afd.config import ClusterConfig

KEPT_LINES = 5
MAX_LINE_BYTES = 16 << 10
READ_BYTES = 64 << 10
READS_AT_ONCE = 16

Start = Callable[[int, int, int], Process]
"""Starts it with those descriptors: its standard input, its output, its news. They stay the caller's."""


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

    def __init__(self, role: str, rank: int, start: Start):
        self.role = role
        self.rank = rank
        self.incarnation = ""  # once it has said it
        self.tail: deque[str] = deque(maxlen=KEPT_LINES)
        stdin_read, stdin_write = os.pipe()
        output_read, output_write = os.pipe()
        news_read, news_write = os.pipe()
        try:
            self._process = start(stdin_read, output_write, news_write)
        except OSError:
            for fd in (stdin_write, output_read, news_read):
                os.close(fd)
            raise
        finally:
            for fd in (stdin_read, output_write, news_write):
                os.close(fd)
        for fd in (news_read, output_read):
            os.set_blocking(fd, False)
        self._stdin = stdin_write
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
            announce_fd=self._process.announce_fd,
            supervisor_pid=os.getpid(),
            run_file=run_file,
        )
        with contextlib.suppress(BrokenPipeError):
            write_launch(self._stdin, launch)

    def tell(self, line: bytes) -> None:
        """Write to its standard input, behind the launch frame. Lost where it is dead, or stands still for long."""
        os.set_blocking(self._stdin, False)
        with contextlib.suppress(BrokenPipeError, BlockingIOError):
            os.write(self._stdin, line)

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
        """The exit code, or None while it runs."""
        return self._process.poll()

    def close(self) -> None:
        """Free the pipes; kills the child if it still runs. Idempotent."""
        if self._process.poll() is None:
            self._process.kill()
        if self.news.fd >= 0:
            for fd in (self.news.fd, self.output.fd, self._stdin):
                os.close(fd)
            self.news.fd = self.output.fd = -1

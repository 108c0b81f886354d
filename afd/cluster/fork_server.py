"""Workers by fork from a process that has imported their libraries: torch takes seconds to import, a fork milliseconds.

The server imports and does nothing else: no thread, no socket but its own, no device. For each request it forks twice
and lets the process between end, so that the worker becomes the supervisor's own child (a subreaper, prctl(2)): its
exit code, signals and its death with the supervisor are those of any child. It stays, for workers that are started
again. Linux only; where it is not there, workers are spawned.
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence

import msgspec
import setproctitle

from afd.cluster.launcher import MAX_LINE_BYTES, Lines
from afd.cluster.process import Process, adopt_orphans, die_with_parent, role_command, role_environment

FORKED_ROLES = ("attention", "ffn")
COMMAND = (sys.executable, "-m", "afd.cluster.fork_server")
FORK_TIMEOUT_S = 5.0
STOP_S = 2.0
_MAX_BYTES = 4096


class _Request(msgspec.Struct):
    role: str
    rank: int


class _Answer(msgspec.Struct):
    pid: int
    announce_fd: int


class ForkServer:
    """The supervisor's end.

    fd: readable once the server is ready, or gone.
    output: what it writes, line by line.

    threads: that a worker computes with.

    command: the server's; our process id and the descriptor of its socket are put behind it.
    """

    name = "fork server"

    def __init__(self, threads: int, command: Sequence[str] = COMMAND):
        adopt_orphans()
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.settimeout(FORK_TIMEOUT_S)
        output_read, output_write = os.pipe()
        os.set_blocking(output_read, False)
        with theirs:
            self._process = subprocess.Popen(
                [*command, str(os.getpid()), str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=output_write,
                stderr=output_write,
                pass_fds=(theirs.fileno(),),
                process_group=0,
                env=role_environment(threads),
            )
        os.close(output_write)
        self.output = Lines(output_read, MAX_LINE_BYTES)
        self.fd = self._socket.fileno()

    def read_output(self) -> Iterator[str]:
        """Lines written since the last call: warnings of the libraries that are imported, a traceback."""
        for line in self.output.read():
            yield line.decode(errors="replace")

    def is_ready(self) -> bool:
        """Whether the server is ready; False = it has died. Ask once `fd` is readable."""
        try:
            return bool(self._socket.recv(_MAX_BYTES))
        except OSError:
            return False

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def fork(self, role: str, rank: int, stdin: int, output: int, news: int) -> Process:
        """A worker with those descriptors (they stay the caller's). OSError when the server does not answer."""
        socket.send_fds(self._socket, [msgspec.json.encode(_Request(role, rank))], [stdin, output, news])
        data = self._socket.recv(_MAX_BYTES)
        if not data:
            raise ConnectionError("the fork server has died")
        answer = msgspec.json.decode(data, type=_Answer)
        return Forked(answer.pid, answer.announce_fd)

    def end(self) -> None:
        """No more forks: the server ends meanwhile; its workers live on."""
        self._socket.close()

    def close(self) -> None:
        """End the server and wait for that. Idempotent."""
        self.end()
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:  # it still imports
            self._process.kill()
            self._process.wait()
        if self.output.fd >= 0:
            os.close(self.output.fd)
            self.output.fd = -1


class Forked:
    """A child of ours that we did not start ourselves."""

    def __init__(self, pid: int, announce_fd: int):
        self.pid = pid
        self.announce_fd = announce_fd
        self._exit_code: int | None = None

    def poll(self) -> int | None:
        if self._exit_code is None:
            self._reap(os.WNOHANG)
        return self._exit_code

    def send_signal(self, signum: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, signum)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)
        if self._exit_code is None:
            self._reap(0)

    def _reap(self, flags: int) -> None:
        pid, status = os.waitpid(self.pid, flags)
        if pid:
            self._exit_code = os.waitstatus_to_exitcode(status)


# -- the server's process -----------------------------------------------------------------------------------


def serve(requests: socket.socket, supervisor: int) -> _Request | None:
    """Fork a process for each request. Returns in each of them with its request, in the server with None at the end."""
    while True:
        data, descriptors, _, _ = socket.recv_fds(requests, _MAX_BYTES, 3)
        if not data:
            return None
        request = msgspec.json.decode(data, type=_Request)
        between = os.fork()
        if between == 0:
            if os.fork():
                os._exit(0)
            _become_child_of(supervisor)
            _take_over(request, descriptors, requests)
            return request
        os.waitpid(between, 0)
        for fd in descriptors:
            os.close(fd)


def _become_child_of(supervisor: int) -> None:
    """Wait for the end of the process between; without a supervisor, end."""
    until = time.monotonic() + FORK_TIMEOUT_S
    while os.getppid() != supervisor:
        if time.monotonic() > until:
            os._exit(1)
        time.sleep(0.0005)


def _take_over(request: _Request, descriptors: list[int], requests: socket.socket) -> None:
    """Descriptors, process group and name of a spawned process."""
    os.setpgid(0, 0)
    stdin, output, news = descriptors
    os.dup2(stdin, 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(stdin)
    os.close(output)
    setproctitle.setproctitle(" ".join(role_command(request.role, request.rank)))
    requests.send(msgspec.json.encode(_Answer(os.getpid(), news)))
    requests.close()


def main() -> int:
    from afd.cluster.role_process import run_supervised  # not in the supervisor's process
    from afd.cluster.roles import ROLE_ENTRIES, preload

    def imports() -> None:
        for role in FORKED_ROLES:
            preload(role)

    return run(imports, lambda role, rank: run_supervised(role, ROLE_ENTRIES[role]))


def run(imports: Callable[[], None], worker: Callable[[str, int], int]) -> int:
    """The server of the supervisor and on the socket that the command line ends with; in its workers, `worker`."""
    supervisor, requests = int(sys.argv[-2]), socket.socket(fileno=int(sys.argv[-1]))
    die_with_parent(signal.SIGKILL)
    if os.getppid() != supervisor:
        return 0  # it was gone before we began
    imports()
    gc.collect()
    gc.freeze()  # what is imported stays shared with the workers: no collection writes to it
    request = None
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        requests.send(b"ready")
        request = serve(requests, supervisor)
    return 0 if request is None else worker(request.role, request.rank)


if __name__ == "__main__":
    sys.exit(main())

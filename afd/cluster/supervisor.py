"""`afd up`: one cluster on this host, from the first process to the last.

A single-threaded loop over the children's pipes, SIGCHLD and deadlines. Start: gateway and coordinator are spawned,
workers forked from a process that imports their libraries meanwhile; the coordinator is told its configuration first,
and the others when it has announced its address. Run: a child that dies is reported with its last lines, and to the
coordinator, and started again. Stop: gateway, workers, coordinator, each within bounds.
"""

from __future__ import annotations

import http.client
import os
import selectors
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from math import inf
from pathlib import Path
from types import FrameType
from typing import Any
from urllib.parse import urlsplit

import msgspec

from afd.cluster.console import Console
from afd.cluster.endings import ending_line
from afd.cluster.fork_server import FORKED_ROLES, ForkServer
from afd.cluster.launch import EXIT_CONFIG, EXIT_FAILURE, EXIT_OK
from afd.cluster.launcher import Child, Start
from afd.cluster.process import Command, Spawned, describe_exit, role_command
from afd.cluster.progress import ChildProgress, progress_line, ready_text
from afd.cluster.resolve import most_threads, with_cores, worker_cores
from afd.cluster.restart import RestartPolicy, worth_restarting
from afd.cluster.run_file import RunInfo, new_run_file, process_start_time, remove_run_file, write_run_file
from afd.cluster.shutdown import StopSequence, phases
from afd.config import ClusterConfig

POLL_S = 0.2
PROBE_TIMEOUT_S = 0.5
MAX_ENDINGS = 64  # that a new coordinator is told of


class Supervisor:
    """Owns the children of one cluster. `run` blocks in the main thread until all have ended.

    restart: makes each child's restart policy; None = the first death ends the cluster.
    command: how a role's process is started (tests put fakes there).
    fork_server: starts one, from which workers come, for that many threads; None = they are spawned.
    """

    def __init__(
        self,
        config: ClusterConfig,
        secret: bytes,
        *,
        has_tokenizer: bool = True,
        restart: Callable[[], RestartPolicy] | None = RestartPolicy,
        command: Command = role_command,
        fork_server: Callable[[int], ForkServer] | None = None,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._config = config
        self._secret = secret
        self._has_tokenizer = has_tokenizer
        self._restart = restart
        self._command = command
        self._make_fork_server = fork_server
        self._fork_server: ForkServer | None = None
        self._cores = worker_cores(config)
        self._console = console if console is not None else Console(sys.stdout, sys.stderr, config.log.format)
        self._clock = clock
        self._started = clock()
        self._selector = selectors.DefaultSelector()
        self._children: dict[str, Child] = {}
        self._progress: dict[str, ChildProgress] = {}
        self._policies: dict[str, RestartPolicy] = {}
        self._due: dict[str, float] = {}  # children to start, by time; inf: when the fork server has imported
        self._endings: deque[bytes] = deque(maxlen=MAX_ENDINGS)
        self._coordinator = ""  # its address, once announced
        self._url = ""
        self._answers = False  # /readyz said 200 at least once
        self._run_file = Path()  # from `run` on
        self._stopping: StopSequence | None = None
        self._num_interrupts = 0
        self._exit_code = EXIT_OK

    def run(self) -> int:
        """Bring the cluster up, keep it up, take it down; the exit code of `afd up`.

        ConfigError, before anything is started, where the run file has no place.
        """
        self._run_file = new_run_file()
        try:
            with self._signals() as signals:
                if self._make_fork_server is not None:
                    self._start_fork_server(self._make_fork_server)
                for role, rank in self._places():
                    if self._fork_server is not None and role in FORKED_ROLES:
                        self._due[f"{role}/{rank}"] = inf
                        self._progress[f"{role}/{rank}"] = ChildProgress()
                    else:
                        self._start(role, rank)
                while self._children or self._due:
                    self._turn(signals)
        finally:
            for child in self._children.values():
                child.close()
            self._close_fork_server()
            self._selector.close()
            remove_run_file(self._run_file)
            self._console.close()
        return self._exit_code

    # --- one turn of the loop -------------------------------------------------------------------------------

    def _turn(self, signals: socket.socket) -> None:
        for key, _ in self._selector.select(self._patience()):
            if key.fileobj is signals:
                signals.recv(4096)
            elif key.fd not in self._selector.get_map():
                continue  # closed because of what was heard before it in this turn
            elif isinstance(key.data, Child):
                self._hear(key.data)
            elif key.fd == key.data.fd:
                self._hear_fork_server(key.data)
            else:
                self._forward(key.data)
        self._reap()
        self._handle_interrupts()
        now = self._clock()
        if self._stopping is not None:
            self._send(self._stopping.step(self._alive(), now))
            return
        for name in [name for name, due in self._due.items() if due <= now]:
            del self._due[name]
            self._start(*self._place_of(name))
        if not self._answers:
            name = self._config.model.served_name
            self._console.progress(partial(progress_line, name, self._progress, now - self._started))
            if self._url and answers(self._url):
                self._announce_ready()

    def _patience(self) -> float:
        soonest = min(self._due.values(), default=inf) - self._clock()
        return max(0.0, min(POLL_S, soonest))

    def _hear(self, child: Child) -> None:
        """Forward what a child wrote, take its news in; forget a pipe that has ended."""
        self._forward(child)
        for news in child.read_news():
            self._take_news(child, news)
        if child.news.ended and child.news.fd in self._selector.get_map():
            self._selector.unregister(child.news.fd)

    def _forward(self, source: Child | ForkServer) -> None:
        for line in source.read_output():
            self._console.line(line, source.name)
        if source.output.ended and source.output.fd in self._selector.get_map():
            self._selector.unregister(source.output.fd)

    def _take_news(self, child: Child, news: dict[str, Any]) -> None:
        was_ready = self._progress[child.name].ready
        self._progress[child.name].update(news)
        child.incarnation = str(news.get("incarnation", child.incarnation))
        if child.role == "coordinator" and "address" in news:
            self._coordinator = str(news["address"])
            self._progress[child.name].ready = True
            self._write_run_file()
            for other in self._children.values():
                if other is not child:
                    self._configure(other)
        if child.role == "coordinator" and "lost" in news:
            self._end_lost(str(news["lost"]))
        if child.role == "gateway" and "url" in news:
            self._url = str(news["url"])
            self._progress[child.name].ready = True
        if not was_ready and self._progress[child.name].ready and child.name in self._policies:
            self._policies[child.name].ready(self._clock())
        if self._answers and not was_ready and self._progress[child.name].ready:
            self._console.note(f"{child.name} is ready again")

    # --- children -------------------------------------------------------------------------------------------

    def _places(self) -> Iterator[tuple[str, int]]:
        topology = self._config.topology
        yield "coordinator", -1
        for rank in range(topology.num_attention):
            yield "attention", rank
        for rank in range(self._config.num_ffn_workers):
            yield "ffn", rank
        yield "gateway", 0

    def _place_of(self, name: str) -> tuple[str, int]:
        role, _, rank = name.partition("/")
        return role, int(rank) if rank else -1

    def _start_fork_server(self, make: Callable[[int], ForkServer]) -> None:
        self._fork_server = make(max(most_threads(self._config, role) for role in FORKED_ROLES))
        for fd in (self._fork_server.fd, self._fork_server.output.fd):
            self._selector.register(fd, selectors.EVENT_READ, self._fork_server)

    def _hear_fork_server(self, server: ForkServer) -> None:
        """The fork server is ready, or has died."""
        self._selector.unregister(server.fd)
        if server.is_ready():
            self._end_wait_for_fork_server()
        else:
            self._lose_fork_server("has died")

    def _end_wait_for_fork_server(self) -> None:
        now = self._clock()
        self._due = {name: now if due == inf else due for name, due in self._due.items()}

    def _lose_fork_server(self, why: str) -> None:
        self._console.note(f"the fork server {why}; workers are spawned from now on")
        self._close_fork_server()
        self._end_wait_for_fork_server()

    def _end_fork_server(self, server: ForkServer) -> None:
        if server.fd in self._selector.get_map():
            self._selector.unregister(server.fd)
        server.end()

    def _close_fork_server(self) -> None:
        if self._fork_server is not None:
            self._end_fork_server(self._fork_server)
            self._forward(self._fork_server)
            if self._fork_server.output.fd in self._selector.get_map():
                self._selector.unregister(self._fork_server.output.fd)
            self._fork_server.close()
            self._fork_server = None

    def _start(self, role: str, rank: int) -> None:
        """A child with its configuration, if there is one for it yet."""
        spawn = partial(Spawned, self._command(role, rank), threads=most_threads(self._config, role))
        if self._fork_server is not None and role in FORKED_ROLES:
            try:
                self._add(role, rank, partial(self._fork_server.fork, role, rank))
                return
            except OSError as error:
                self._lose_fork_server(f"does not answer ({error})")
        self._add(role, rank, spawn)

    def _add(self, role: str, rank: int, start: Start) -> None:
        child = Child(role, rank, start)
        self._children[child.name] = child
        self._progress[child.name] = ChildProgress()
        if self._restart is not None and child.name not in self._policies:
            self._policies[child.name] = self._restart()
        for lines in (child.output, child.news):
            self._selector.register(lines.fd, selectors.EVENT_READ, child)
        self._configure(child)

    def _configure(self, child: Child) -> None:
        """The coordinator comes first, since the others need its address.

        It and the gateway are found again where they were: a port that was drawn at the first start is kept.
        """
        config = self._config
        if self._coordinator:
            section = msgspec.structs.replace(config.coordinator, address=self._coordinator)
            config = msgspec.structs.replace(config, coordinator=section)
        elif child.role != "coordinator":
            return
        if self._url:
            gateway = msgspec.structs.replace(config.gateway, port=urlsplit(self._url).port or config.gateway.port)
            config = msgspec.structs.replace(config, gateway=gateway)
        config = with_cores(config, child.role, self._cores.get(child.name, ""))
        run_file = str(self._run_file) if child.role == "coordinator" else ""
        child.configure(config, self._secret, run_file=run_file)
        if child.role == "coordinator":
            child.tell(b"".join(self._endings))  # its predecessor may not have heard of the last ones

    def _reap(self) -> None:
        if self._fork_server is not None and self._stopping is None and not self._fork_server.alive:
            self._lose_fork_server("has died")
        for child in list(self._children.values()):
            exit_code = child.poll()
            if exit_code is None:
                continue
            self._hear(child)
            for lines in (child.output, child.news):
                if lines.fd in self._selector.get_map():
                    self._selector.unregister(lines.fd)
            child.close()
            del self._children[child.name]
            self._progress[child.name] = ChildProgress()
            if self._stopping is None:
                self._bury(child, exit_code)

    def _bury(self, child: Child, exit_code: int) -> None:
        """An end that nobody asked the supervisor for: report it, then heal or give up."""
        now = self._clock()
        if exit_code == EXIT_OK:
            self._console.note(f"{child.name} has left the cluster")
            if child.role in ("coordinator", "gateway") or not self._alive():
                self._stop(EXIT_OK)
            return
        self._tell_of_end(child, exit_code)
        self._console.note(f"{child.name} (pid {child.pid}) died: {describe_exit(exit_code)}")
        for line in child.tail:
            self._console.line(f"    {child.name} | {line}", child.name)
        if not worth_restarting(exit_code):
            self._stop(EXIT_CONFIG)
            return
        if self._restart is None:
            self._console.note(f"{child.name} is not started again (--no-restart); stopping the cluster")
            self._stop(EXIT_FAILURE)
            return
        due = self._policies[child.name].next_start(now)
        self._console.note(f"starting {child.name} again in {due - now:.1f} s")
        self._due[child.name] = due

    def _end_lost(self, incarnation: str) -> None:
        """A worker that was declared lost, and may hang for long, is in its successor's way."""
        for child in self._children.values():
            if child.incarnation == incarnation and child.role in ("attention", "ffn") and self._stopping is None:
                self._console.note(f"{child.name} (pid {child.pid}) was declared lost: killing it")
                child.signal(signal.SIGKILL)

    def _tell_of_end(self, child: Child, exit_code: int) -> None:
        """The coordinator need not wait for its silence."""
        if not child.incarnation:
            return
        self._endings.append(ending_line(child.incarnation, describe_exit(exit_code)))
        coordinator = self._children.get("coordinator")
        if coordinator is not None:
            coordinator.tell(self._endings[-1])

    def _alive(self) -> list[tuple[str, str]]:
        return [(child.name, child.role) for child in self._children.values()]

    def _send(self, orders: list[tuple[str, signal.Signals]]) -> None:
        for name, signum in orders:
            if signum is signal.SIGKILL:
                self._console.note(f"killing {name}")
            self._children[name].signal(signum)

    # --- ready and stop -------------------------------------------------------------------------------------

    def _announce_ready(self) -> None:
        self._answers = True
        self._write_run_file()
        self._console.say(ready_text(self._config, self._url, has_tokenizer=self._has_tokenizer), url=self._url)

    def _write_run_file(self) -> None:
        """Let `afd status` find this cluster: as soon as it has a coordinator, and again with its URL."""
        info = RunInfo(
            pid=os.getpid(),
            started=process_start_time(os.getpid()),
            coordinator=self._coordinator,
            secret=self._secret.hex(),
            url=self._url,
            topology=str(self._config.topology),
            model=self._config.model.served_name,
            ca_file=os.path.abspath(ca_file) if (ca_file := self._config.coordinator.tls_ca_file) else "",
        )
        write_run_file(self._run_file, info)

    def _stop(self, exit_code: int) -> None:
        """Begin to stop; the first reason decides the exit code."""
        if self._stopping is None:
            self._exit_code = exit_code
            self._console.close()
            self._stopping = StopSequence(phases(self._config.gateway.drain_s))
            self._due.clear()
            if self._fork_server is not None:
                self._end_fork_server(self._fork_server)

    def _handle_interrupts(self) -> None:
        if self._num_interrupts and self._stopping is None:
            self._console.note("draining and stopping (again: stop at once)")
            self._stop(EXIT_OK)
        elif self._num_interrupts > 1 and self._stopping is not None and not self._stopping.killing:
            self._send(self._stopping.kill(self._alive()))

    @contextmanager
    def _signals(self) -> Iterator[socket.socket]:
        """SIGINT and SIGTERM count as interrupts; they and SIGCHLD wake the loop through a socket pair."""
        reader, writer = socket.socketpair()
        for end in (reader, writer):
            end.setblocking(False)

        def interrupt(signum: int, frame: FrameType | None) -> None:
            self._num_interrupts += 1

        def wake(signum: int, frame: FrameType | None) -> None:
            return None  # the wake-up descriptor has it

        handlers = {signal.SIGINT: interrupt, signal.SIGTERM: interrupt, signal.SIGHUP: interrupt, signal.SIGCHLD: wake}
        before = {signum: signal.signal(signum, handler) for signum, handler in handlers.items()}
        wakeup_fd = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        self._selector.register(reader, selectors.EVENT_READ)
        try:
            yield reader
        finally:
            signal.set_wakeup_fd(wakeup_fd)
            for signum, old in before.items():
                signal.signal(signum, old)
            self._selector.unregister(reader)
            reader.close()
            writer.close()


def answers(url: str) -> bool:
    """True when the gateway's /readyz says 200 now."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "127.0.0.1", parts.port, timeout=PROBE_TIMEOUT_S)
    try:
        connection.request("GET", "/readyz")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()

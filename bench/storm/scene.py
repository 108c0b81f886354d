"""The processes of a cluster on this host: whether it is whole, and losing some of them."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path

import msgspec
import psutil

from afd.cluster.run_file import RunInfo
from afd.errors import CoordinatorError
from afd.membership.client import CoordinatorClient
from afd.messages.keys import grpc_token
from afd.messages.membership import StatusReply
from bench.storm.plan import Loss

POLL_S = 0.02
STATUS_TIMEOUT_S = 1.0


class Scene:
    """A context manager: leaves nothing stopped behind. One thread.

    supervisor_pid: of `afd up`.
    runtime_dir: its XDG_RUNTIME_DIR.
    """

    def __init__(self, supervisor_pid: int, runtime_dir: Path):
        [run_file] = (runtime_dir / "afd").glob("*.json")
        self._run = msgspec.json.decode(run_file.read_bytes(), type=RunInfo)
        self._supervisor = psutil.Process(supervisor_pid)
        token = grpc_token(bytes.fromhex(self._run.secret))
        self._client = CoordinatorClient(self._run.coordinator, token, timeout_s=STATUS_TIMEOUT_S)
        self._killed: set[int] = set()
        self._stock: Counter[str] = Counter()
        self._resuming: list[tuple[threading.Timer, list[int]]] = []

    def __enter__(self) -> Scene:
        return self

    def __exit__(self, *exc: object) -> None:
        for timer, pids in self._resuming:
            timer.cancel()
            timer.join()
            _signal(pids, signal.SIGCONT)
        self._client.close()

    @property
    def is_running(self) -> bool:
        """The supervisor lives."""
        return self._supervisor.is_running() and self._supervisor.status() != psutil.STATUS_ZOMBIE

    def take_stock(self) -> None:
        """Who is here now is what a whole cluster has: standbys too."""
        self._stock = self._count(ready=False)
        if not self._stock:
            raise RuntimeError(f"the coordinator {self._run.coordinator} does not say who its members are")

    def is_whole(self) -> bool:
        """As many ready processes of each role as at the last stock-taking, none of them killed or stopped."""
        if any(timer.is_alive() for timer, _ in self._resuming):
            return False
        return self._count(ready=True) >= self._stock

    def _count(self, *, ready: bool) -> Counter[str]:
        members = self._members(self._status())
        return Counter(name.split("/")[0] for name, pid, works in members if pid not in self._killed and works >= ready)

    def wait_until_whole(self, until_s: float) -> bool:
        """until_s: of `time.perf_counter()`. False where it is not by then, or the cluster has ended."""
        while time.perf_counter() < until_s and self.is_running:
            if self.is_whole():
                return True
            time.sleep(POLL_S)
        return False

    def strike(self, loss: Loss) -> tuple[float, tuple[str, ...]]:
        """Lose the processes: when, and those of its targets that were there. Blocks while successors are killed."""
        pids = self._pids(loss.targets)
        at_s = time.perf_counter()
        if loss.how == "stop":
            self._stop(list(pids.values()), loss.hold_s)
        else:
            self._kill(pids.values())
        while loss.how == "keep" and time.perf_counter() < at_s + loss.hold_s:
            self._kill(self._pids(loss.targets).values())
            time.sleep(POLL_S)
        return at_s, tuple(pids)

    def _kill(self, pids: Collection[int]) -> None:
        _signal(pids, signal.SIGKILL)
        self._killed.update(pids)

    def _stop(self, pids: list[int], hold_s: float) -> None:
        _signal(pids, signal.SIGSTOP)
        timer = threading.Timer(hold_s, _signal, (pids, signal.SIGCONT))
        timer.start()
        self._resuming.append((timer, pids))

    def _pids(self, targets: tuple[str, ...]) -> dict[str, int]:
        members = {name: pid for name, pid, _ in self._members(self._status())}
        pids = {}
        for target in targets:
            pid = self._coordinator() if target == "coordinator" else members.get(target)
            if pid is not None and pid not in self._killed:
                pids[target] = pid
        return pids

    def _coordinator(self) -> int | None:
        for process in self._supervisor.children():
            with contextlib.suppress(psutil.NoSuchProcess):
                # Its title is the words of its command, or, forked by tests, its name and no title.
                words = " ".join([process.name()] if " " in process.name() else process.cmdline()).split()
                if "coordinator" in words:
                    return process.pid
        return None

    def _status(self) -> StatusReply | None:
        """None while the coordinator does not answer."""
        try:
            return self._client.status()
        except CoordinatorError:
            return None

    @staticmethod
    def _members(reply: StatusReply | None) -> Iterator[tuple[str, int, bool]]:
        """Name, process id and readiness."""
        for status in reply.members if reply is not None else ():
            member = status.member
            name = "gateway" if member.info.role == "gateway" else f"{member.info.role}/{member.rank}"
            yield name, member.info.pid, member.ready


def _signal(pids: Collection[int], signum: int) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signum)

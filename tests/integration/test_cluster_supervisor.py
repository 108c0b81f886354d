"""`afd up`'s supervisor with real processes and a real coordinator around workers without a model."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.fakes import supervisor
from tests.fakes.warm_process import WarmProcess, afd

ROOT = Path(__file__).resolve().parents[2]
WAIT_S = 50.0
NAMES = re.compile(r"(coordinator|fork-server|\w+/\d+)$")


class Up:
    """One `afd up`, its output as it comes, and the processes under it.

    forks: workers come from a fork server.

    cold: the supervisor and what it spawns are fresh interpreters, else forked (tests/fakes/warm_process.py).
    """

    def __init__(
        self,
        run_base: Path,
        topology: str,
        *behaviours: str,
        restart: bool = True,
        forks: bool = False,
        cold: bool = False,
    ):
        self.env = {**os.environ, "XDG_RUNTIME_DIR": str(run_base)}
        self.run_base = run_base
        self.lines: list[str] = []
        self._changed = threading.Condition()
        words = [topology, "restart" if restart else "no", "forks" if forks else "spawns", *behaviours]
        self.process = self._start_cold(words) if cold else WarmProcess(supervisor.warm, words, self.env)
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        self.seen: set[psutil.Process] = set()

    def _start_cold(self, words: list[str]) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "tests.fakes.supervisor", *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=self.env,
            cwd=ROOT,
            start_new_session=True,
        )

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._changed:
                self.lines.append(line.rstrip("\n"))
                self._changed.notify_all()
        with self._changed:
            self._changed.notify_all()

    def wait_line(self, pattern: str, *, count: int = 1, since: int = 0) -> str:
        """The `count`-th line that matches, of those from line `since` on, waiting for it."""
        found: list[str] = []

        def there() -> bool:
            found[:] = [line for line in self.lines[since:] if re.search(pattern, line)]
            return len(found) >= count or not self._reader.is_alive()

        with self._changed:
            self._changed.wait_for(there, WAIT_S)
        assert len(found) >= count, f"no {pattern!r} in:\n" + "\n".join(self.lines)
        return found[count - 1]

    def children(self) -> dict[str, psutil.Process]:
        """Living children by name ("ffn/0")."""
        found = {}
        for child in psutil.Process(self.process.pid).children():
            try:
                # A warm process has a name; the title of another is one word, or several.
                last = NAMES.search(child.name()) or NAMES.search(" ".join(child.cmdline()).rstrip())
            except psutil.NoSuchProcess:
                continue
            if last:
                found[last[0]] = child
        self.seen |= set(found.values())
        return found

    def status(self) -> dict[str, object]:
        exit_code, output = afd(["status", "--json"], self.env, WAIT_S)
        return json.loads(output) if exit_code == 0 else {}

    def wait_status(self, wanted: Callable[[dict[str, dict[str, object]]], bool]) -> dict[str, object]:
        until = time.monotonic() + WAIT_S
        while time.monotonic() < until:
            status = self.status()
            if status and wanted(status):  # type: ignore[arg-type]
                return status
        raise AssertionError(f"status never as wanted: {status}\n" + "\n".join(self.lines))

    def end(self) -> int:
        """Wait for the end; nothing may be left."""
        code = self.process.wait(WAIT_S)
        self.assert_nothing_left()
        return code

    def assert_nothing_left(self) -> None:
        _, alive = psutil.wait_procs(self.seen, timeout=5.0)
        assert not alive, f"still alive: {[process.cmdline() for process in alive]}"
        self._reader.join(WAIT_S)
        assert list(self.run_base.iterdir()) == []

    def close(self) -> None:
        if self.process.poll() is None:
            self.children()
            self.process.kill()
            self.process.wait(WAIT_S)
        psutil.wait_procs(self.seen, timeout=5.0)
        self._reader.join(WAIT_S)
        assert self.process.stdout is not None
        self.process.stdout.close()


@pytest.fixture
def up(tmp_path: Path) -> Iterator[Callable[..., Up]]:
    running: list[Up] = []

    def start(*args: str, **options: bool) -> Up:
        running.append(Up(tmp_path, *args, **options))
        return running[-1]

    yield start
    for one in running:
        one.close()


@pytest.mark.parametrize("forks", [False, True], ids=["spawned", "forked"])
def test_a_cluster_comes_up_heals_and_stops_on_ctrl_c(up: Callable[..., Up], forks: bool) -> None:
    cluster = up("2A1F", forks=forks, cold=not forks)
    ready = cluster.wait_line("AFD is ready: http://127.0.0.1:")
    cluster.wait_line("curl ")
    members = {"coordinator", "attention/0", "attention/1", "ffn/0", "gateway/0"}
    assert set(cluster.children()) == members | ({"fork-server"} if forks else set())
    status = cluster.status()
    assert status["view"]["epoch"] == 1 and len(status["members"]) == 4  # type: ignore[index, arg-type]
    [run_file] = cluster.run_base.rglob("*.json")
    assert run_file.stat().st_mode & 0o777 == 0o600

    for name in ("ffn/0", "coordinator", "attention/1", "gateway/0"):
        before, since = cluster.children()[name], len(cluster.lines)
        before.kill()
        cluster.wait_line(rf"{name} \(pid {before.pid}\) died: killed by SIGKILL", since=since)
        cluster.wait_line(f"{name} is ready again", since=since)
        assert cluster.children()[name].pid != before.pid
        if name == "ffn/0":  # the supervisor told the coordinator: nobody waited for silence
            cluster.wait_line(rf"{name} lost: killed by SIGKILL", since=since)
    status = cluster.wait_status(lambda s: s["view"]["epoch"] >= 3 and len(s["view"]["members"]) == 4)  # type: ignore[operator, arg-type]
    port = int(ready.rpartition(":")[2])
    socket.create_connection(("127.0.0.1", port), timeout=WAIT_S).close()  # the gateway kept the port it had drawn
    ranks = sorted((m["member"]["info"]["role"], m["member"]["rank"]) for m in status["members"])  # type: ignore[index, attr-defined]
    assert [rank for role, rank in ranks if role == "attention"] == [0, 1]
    assert status["view"]["config_hash"] == "same"  # type: ignore[index]

    cluster.children()
    since = len(cluster.lines)
    cluster.process.send_signal(signal.SIGINT)
    assert cluster.end() == 0
    assert not any("killing" in line for line in cluster.lines[since:])


@pytest.mark.parametrize(
    ("behaviours", "forks", "line", "num_children"),
    [(["ffn/0=deaf"], False, "coordinator listens", 4), ([], True, "AFD is ready", 5)],
    ids=["while starting", "with a fork server"],
)
def test_kill_9_of_the_supervisor_leaves_nothing(
    up: Callable[..., Up], behaviours: list[str], forks: bool, line: str, num_children: int
) -> None:
    cluster = up("1A1F", *behaviours, forks=forks, cold=True)
    cluster.wait_line(line)
    assert len(cluster.children()) == num_children
    cluster.process.kill()
    cluster.process.wait(WAIT_S)
    cluster.assert_nothing_left()


@pytest.mark.parametrize("forks", [False, True], ids=["spawned", "forked"])
def test_roles_are_process_groups_of_the_supervisors_session(up: Callable[..., Up], forks: bool) -> None:
    """Ctrl-C is not for them; and one session, since Linux gives a core's time out by sessions, polling or not."""
    cluster = up("1A1F", forks=forks, cold=True)
    cluster.wait_line("AFD is ready: http://127.0.0.1:")
    session = os.getsid(cluster.process.pid)
    for process in cluster.children().values():
        assert (os.getsid(process.pid), os.getpgid(process.pid)) == (session, process.pid)
    cluster.process.send_signal(signal.SIGINT)
    assert cluster.end() == 0


def test_workers_are_spawned_where_the_fork_server_has_died(up: Callable[..., Up]) -> None:
    cluster = up("1A1F", forks=True)
    cluster.wait_line("AFD is ready")
    children = cluster.children()
    children["fork-server"].kill()
    cluster.wait_line("the fork server has died; workers are spawned from now on")
    children["ffn/0"].kill()
    cluster.wait_line("ffn/0 is ready again")
    assert set(cluster.children()) == {"coordinator", "attention/0", "ffn/0", "gateway/0"}
    cluster.process.send_signal(signal.SIGINT)
    assert cluster.end() == 0


def test_workers_are_spawned_where_the_fork_server_cannot_start(up: Callable[..., Up]) -> None:
    cluster = up("1A1F", "fork-server=crash", forks=True)
    cluster.wait_line("the fork server has died; workers are spawned from now on")
    cluster.wait_line("AFD is ready")
    cluster.children()
    cluster.process.send_signal(signal.SIGINT)
    assert cluster.end() == 0


def test_a_forked_worker_that_dies_is_told_with_its_exit_code_and_last_lines(up: Callable[..., Up]) -> None:
    cluster = up("1A1F", "ffn/0=bad-config", forks=True)
    cluster.wait_line(r"ffn/0 .* died: exit code 2")
    cluster.wait_line(r"ffn/0 \| .*this worker cannot work with that")
    assert cluster.end() == 2


def test_a_worker_that_hangs_is_replaced_without_waiting_for_it(up: Callable[..., Up]) -> None:
    cluster = up("1A1F", forks=True)
    cluster.wait_line("AFD is ready")
    before, since = cluster.children()["ffn/0"], len(cluster.lines)
    before.suspend()
    cluster.wait_line(r"ffn/0 lost: no heartbeat", since=since)
    cluster.wait_line(rf"ffn/0 \(pid {before.pid}\) was declared lost: killing it", since=since)
    cluster.wait_line("ffn/0 is ready again", since=since)
    assert cluster.children()["ffn/0"].pid != before.pid
    cluster.process.send_signal(signal.SIGTERM)
    assert cluster.end() == 0


def test_ctrl_c_while_the_fork_server_imports(up: Callable[..., Up]) -> None:
    cluster = up("1A1F", "fork-server=deaf", forks=True)
    cluster.wait_line("the fork server imports for ever")
    assert "fork-server" in cluster.children()
    cluster.process.send_signal(signal.SIGINT)
    assert cluster.end() == 0


def test_a_second_ctrl_c_does_not_wait_for_the_deaf(up: Callable[..., Up]) -> None:
    cluster = up("1A1F", "gateway/0=deaf")
    cluster.wait_line("epoch 1")
    cluster.children()
    cluster.process.send_signal(signal.SIGTERM)
    cluster.wait_line("again: stop at once")
    cluster.process.send_signal(signal.SIGINT)
    assert cluster.end() == 0
    cluster.wait_line("killing gateway/0")


def test_a_wrong_configuration_stops_everything_and_says_why(up: Callable[..., Up]) -> None:
    cluster = up("1A1F", "ffn/0=bad-config")
    cluster.wait_line("this worker cannot work with that")
    cluster.wait_line(r"ffn/0 .* died: exit code 2")
    assert cluster.end() == 2
    assert not any("again in" in line for line in cluster.lines)


def test_what_dies_again_and_again_is_started_again_while_the_others_go_on(up: Callable[..., Up]) -> None:
    cluster = up("1A1F", "attention/0=crash")
    cluster.wait_line("starting attention/0 again", count=4)
    cluster.wait_line(r"attention/0 \| about to crash on purpose", count=4)
    assert {"coordinator", "ffn/0", "gateway/0"} <= set(cluster.children())
    cluster.process.send_signal(signal.SIGTERM)
    assert cluster.end() == 0


def test_no_restart_stops_at_the_first_death(up: Callable[..., Up]) -> None:
    cluster = up("1A1F", "attention/0=crash", restart=False)
    cluster.wait_line(r"not started again \(--no-restart\)")
    assert cluster.end() == 1


def test_afd_drain_takes_one_worker_out_and_afd_stop_all(up: Callable[..., Up]) -> None:
    cluster = up("2A1F")
    cluster.wait_line("AFD is ready")
    cluster.children()
    assert afd(["drain", "attention/1"], cluster.env, WAIT_S) == (0, "")
    cluster.wait_line("afd up: attention/1 has left the cluster")
    cluster.wait_status(lambda s: s["view"]["epoch"] == 2)
    assert "attention/1" not in cluster.children()
    assert afd(["stop"], cluster.env, WAIT_S)[0] == 0
    assert cluster.end() == 0
    for name in ("gateway/0", "attention/0", "ffn/0"):
        assert any(f"{name} left" in line for line in cluster.lines)


def test_two_clusters_live_side_by_side_and_kill_9_of_one_leaves_nothing(up: Callable[..., Up]) -> None:
    first, second = up("1A1F"), up("mono")
    for cluster in (first, second):
        cluster.wait_line("AFD is ready")
        cluster.children()
    exit_code, both = afd(["status"], first.env, WAIT_S)
    assert exit_code == 2 and "choose one with --pid" in both
    exit_code, one = afd(["status", "--pid", str(second.process.pid)], first.env, WAIT_S)
    assert exit_code == 0 and "mono" in one and "attention/0" in one
    first.process.kill()
    first.process.wait(WAIT_S)
    _, alive = psutil.wait_procs(first.seen, timeout=5.0)
    assert not alive, f"still alive: {alive}"
    assert [path.stem for path in second.run_base.rglob("*.json")] == [str(second.process.pid)]
    assert second.process.poll() is None and len(second.children()) == 3
    second.process.send_signal(signal.SIGINT)
    assert second.end() == 0


def test_a_port_in_use_is_said_before_anything_starts(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        command = [sys.executable, "-m", "afd", "up", "--model", "dummy:llama-tiny", "--port", port]
        answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=WAIT_S, check=False)
    assert answer.returncode == 2 and answer.stdout == ""
    assert answer.stderr == (
        f"afd: error: gateway: port {port} on 127.0.0.1 is in use; choose another with --port (0 = any)\n"
    )


def test_a_taken_run_directory_does_not_hide_the_cluster(
    up: Callable[..., Up], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    taken = tmp_path / "afd"  # where run files would lie
    taken.touch()
    cluster = up("1A1F")
    cluster.wait_line(f"{taken}: File exists; this cluster's run file is in {tmp_path}/afd-")
    cluster.wait_line("AFD is ready: http://127.0.0.1:")
    assert len(cluster.status()["members"]) == 3  # type: ignore[arg-type]
    taken.unlink()
    assert len(cluster.status()["members"]) == 3, "also once the name is free"  # type: ignore[arg-type]
    cluster.process.send_signal(signal.SIGINT)
    assert cluster.end() == 0

"""kill -9 of every kind of process: what clients see, how fast, and that nothing is left behind."""

from __future__ import annotations

import os
import signal
import threading
import time

import httpx
import psutil
import pytest

from tests.e2e.conftest import STEP3_TINY
from tests.e2e.local_cluster import LocalCluster, eventually

MODEL = ("--model", STEP3_TINY, "--dtype", "float32")
LONG = 250  # tokens: a stream that surely runs while a process is killed


class Stream(threading.Thread):
    """A client that reads a stream to its end and notes what came when."""

    def __init__(self, cluster, prompt):
        super().__init__(daemon=True)
        self.cluster, self.prompt = cluster, prompt
        self.ids: list[int] = []
        self.error: dict | None = None
        self.done = False
        self.broken: Exception | None = None
        self.ended_s = 0.0
        self.running = threading.Event()
        self.start()

    def run(self):
        try:
            for event in self.cluster.stream(self.prompt, LONG):
                if event == "[DONE]":
                    self.done = True
                elif "error" in event:
                    self.error = event["error"]
                else:
                    for choice in event["choices"]:
                        self.ids += choice.get("token_ids") or []
                    if len(self.ids) > 3:
                        self.running.set()
        except httpx.HTTPError as error:
            self.broken = error
        self.ended_s = time.monotonic()


def start_streams(cluster, count):
    streams = [Stream(cluster, [5 + idx, 7, 9]) for idx in range(count)]
    for stream in streams:
        assert stream.running.wait(30), "the stream did not begin"
    return streams


def test_a_killed_ffn_worker_ends_requests_with_an_error_event_where_nobody_waits_for_its_successor(tmp_path):
    """Within 3 s; the cluster then heals (the supervisor starts the worker again) and serves."""
    impatient = ("--set", "cluster.recovery_timeout_s=0.05")  # sooner than any FFN worker can start again
    with LocalCluster(tmp_path, *MODEL, *impatient, "--topology", "1A2F") as cluster:
        streams = start_streams(cluster, 3)
        killed_s = time.monotonic()
        os.kill(cluster.pid_of("ffn"), signal.SIGKILL)
        for stream in streams:
            stream.join(10)
            assert stream.error is not None and stream.done, (stream.error, stream.broken)
            assert stream.ended_s - killed_s < 3.0
            assert stream.error["type"] and stream.error["message"]
        eventually(lambda: httpx.get(f"{cluster.url}/readyz").status_code == 200, 40, "the cluster heals")
        assert len(cluster.greedy_ids([1, 2, 3], 8)) == 8


@pytest.mark.parametrize(
    ("flags", "victims"),
    [
        (("--topology", "1A2F"), ["ffn/1"]),  # its successor joins, and the interrupted steps run again
        (("--topology", "1A2F", "--standby-ffn", "1"), ["ffn/0"]),  # the third one has its shard already
        (("--topology", "1A1F"), ["attention/0"]),  # its successor gets the requests with what they had
        (("--topology", "2A1F"), ["attention/0"]),  # the other one goes on with them
        (("--topology", "2A1F"), ["attention/0", "ffn/0"]),  # one machine of two
    ],
    ids=["ffn", "ffn with a standby", "the only attention", "attention of two", "attention and ffn"],
)
def test_a_loss_is_a_pause_and_no_token_differs(flags, victims, tmp_path, reference):
    with LocalCluster(tmp_path, *MODEL, *flags) as cluster:
        streams = start_streams(cluster, 4)
        pids = [cluster.pid_of(role, int(rank)) for role, rank in (victim.split("/") for victim in victims)]
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        late = Stream(cluster, [50, 7, 9])  # comes while nobody may serve: it waits, too
        for stream in (*streams, late):
            stream.join(90)
            assert stream.done and stream.error is None, (stream.error, stream.broken)
    for stream in (*streams, late):
        reference.check(STEP3_TINY, stream.prompt, stream.ids, LONG)


def test_without_a_coordinator_streams_go_on_and_new_requests_are_served(tmp_path):
    with LocalCluster(tmp_path, *MODEL, "--topology", "1A1F") as cluster:
        streams = start_streams(cluster, 2)
        coordinator = psutil.Process(cluster.pid_of("coordinator"))
        coordinator.suspend()  # silent, and not started again: what a hung or unreachable coordinator is
        try:
            for stream in streams:
                stream.join(90)
                assert stream.done and stream.error is None and len(stream.ids) == LONG
            assert len(cluster.greedy_ids([1, 2, 3], 8)) == 8
            assert httpx.get(f"{cluster.url}/readyz").status_code == 200
        finally:
            coordinator.resume()
        coordinator.kill()
        eventually(lambda: any("coordinator is ready again" in line for line in cluster.lines), 40, "its successor")
        assert len(cluster.greedy_ids([1, 2, 3], 8)) == 8


@pytest.mark.parametrize("victim", ["gateway", "supervisor"])
def test_a_killed_gateway_or_supervisor_closes_connections_and_leaves_nothing(victim, tmp_path):
    cold = victim == "supervisor"
    cluster = LocalCluster(tmp_path, *MODEL, "--topology", "1A1F", "--no-restart", expect_exit=None, cold=cold)
    with cluster:
        streams = start_streams(cluster, 2)
        os.kill(cluster.process.pid if victim == "supervisor" else cluster.pid_of("gateway"), signal.SIGKILL)
        for stream in streams:
            stream.join(5)
            assert not stream.is_alive() and stream.broken is not None
        _, alive = psutil.wait_procs(cluster.members, timeout=5)
        # Orphans that have ended wait for whoever is process 1 here to take notice.
        assert not [p for p in alive if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
        for path in cluster.run_dir.rglob("*.json"):
            path.unlink()  # the supervisor itself is gone: `afd status` clears its stale run file

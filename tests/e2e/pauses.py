"""Streams over a cluster in which processes are stopped (SIGSTOP) for a while and go on."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from dataclasses import dataclass, field

import httpx
import psutil

from tests.e2e.conftest import Reference
from tests.e2e.local_cluster import LocalCluster, eventually

NUM_STREAMS = 4
EVERYTHING = "everything"  # the supervisor too: a machine that was frozen, or moved to another host


@dataclass
class Outcome:
    """What one client saw."""

    prompt: list[int]
    ids: list[int] = field(default_factory=list)
    finished: bool = False
    error: object = None
    running: threading.Event = field(default_factory=threading.Event)


def read_stream(cluster: LocalCluster, outcome: Outcome, num_tokens: int) -> None:
    """One client, to its end or to whatever breaks it."""
    try:
        for event in cluster.stream(outcome.prompt, num_tokens):
            if event == "[DONE]":
                outcome.finished = True
            elif "error" in event:
                outcome.error = event["error"]
            else:
                outcome.ids += [token for choice in event["choices"] for token in choice.get("token_ids") or []]
                outcome.running.set()
    except Exception as error:  # whatever it is, the test shows it
        outcome.error = error
    finally:
        outcome.running.set()


def streams_over_a_pause(
    cluster: LocalCluster, roles: str, pause_s: float, num_tokens: int, vocab: int = 1000
) -> list[Outcome]:
    """Start streams, stop the newest process of each of `roles` once all run, go on after `pause_s`, wait for all.

    roles: names, with spaces, or `EVERYTHING`.
    """
    outcomes = [Outcome([(7 * idx + k * k) % vocab + 1 for k in range(5 + idx)]) for idx in range(NUM_STREAMS)]
    clients = [threading.Thread(target=read_stream, args=(cluster, outcome, num_tokens)) for outcome in outcomes]
    for client in clients:
        client.start()
    for outcome in outcomes:
        assert outcome.running.wait(30), "the stream did not begin"
    if roles == EVERYTHING:
        supervisor = psutil.Process(cluster.process.pid)
        pids = [process.pid for process in (supervisor, *supervisor.children(recursive=True))]
    else:
        pids = [cluster.pid_of(role) for role in roles.split()]
    try:
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        time.sleep(pause_s)  # the pause itself, not a wait for something
    finally:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):  # declared lost meanwhile, and replaced
                os.kill(pid, signal.SIGCONT)
    for client in clients:
        client.join(150)
        assert not client.is_alive(), "the stream did not end"
    return outcomes


def check_pause(
    cluster: LocalCluster, reference: Reference, model: str, roles: str, pause_s: float, num_tokens: int
) -> None:
    """All streams end complete, with the tokens of an undisturbed run; then the cluster is whole again."""
    num_members = len(members_of(cluster))
    for outcome in streams_over_a_pause(cluster, roles, pause_s, num_tokens):
        assert outcome.finished and outcome.error is None, f"{roles}: {outcome.error!r}"
        reference.check(model, outcome.prompt, outcome.ids, num_tokens)

    def whole() -> bool:
        members = members_of(cluster)
        ready = httpx.get(f"{cluster.url}/readyz", timeout=10).status_code == 200
        return ready and len(members) == num_members and all(member["ready"] for member in members)

    eventually(whole, 60, f"the cluster is whole again after a pause of {roles}")


def members_of(cluster: LocalCluster) -> list[dict]:
    """As the gateway knows them."""
    return httpx.get(f"{cluster.url}/cluster", timeout=10).json()["members"]

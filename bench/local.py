"""A cluster of real processes for benchmarks, and a client that talks to its attention workers directly.

The client bypasses HTTP: `bench/engine.py` measures the engine, `afd bench` and `bench/serving.py` the service.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import zmq

from afd.messages.codec import encode
from afd.messages.serving import Lease, Refused, Submit, Tokens, worker_message_decoder
from afd.messages.serving_sockets import client_socket
from afd.sched.leases import MAX_LEASE_S
from afd.types import FinishReason, SamplingParams
from bench.drawing import GREEDY, Drawing

READY_S = 120.0


def flags_of(config: str, model: str, dtype: str, transport: str = "auto") -> list[str]:
    """ "TOPOLOGY[:STREAMS[:WEIGHTS]]" -> flags of `afd up`: "1A1F:2", "mono", "1A1F:0:int8".

    One stream unless said otherwise, 0 = as many as the worker chooses; weights of the FFN (`model.weights`).
    """
    topology, streams, weights = (*config.split(":"), "", "")[:3]
    flags = ["--topology", topology, "--model", model, "--dtype", dtype, "--sla-policy", "off"]
    flags += ["--streams", streams or "1", "--set", "attention.prefix_cache=false"]
    if weights:
        flags += ["--set", f"model.weights={weights}"]
    if transport != "auto" and topology != "mono":
        flags += ["--transport", transport]
    return flags


class BenchCluster:
    """`afd up` with the given flags, and where its workers listen. A context manager."""

    def __init__(self, *flags: str):
        self.flags = flags

    def __enter__(self) -> BenchCluster:
        self._folder = tempfile.TemporaryDirectory(prefix="afd-bench-")
        self.env = {**os.environ, "XDG_RUNTIME_DIR": self._folder.name}
        secret_file = Path(self._folder.name) / "secret"
        secret_file.write_text(os.urandom(32).hex())
        secret_file.chmod(0o600)
        command = [sys.executable, "-m", "afd", "up", "--port", "0", "--secret-file", str(secret_file), *self.flags]
        self.process = subprocess.Popen(
            command, env=self.env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self._ready = threading.Event()
        self.lines: list[str] = []
        threading.Thread(target=self._read, daemon=True).start()
        if not self._ready.wait(READY_S) or self.process.poll() is not None:
            self.__exit__()
            raise RuntimeError(f"{' '.join(command)} did not get ready:\n" + "\n".join(self.lines[-20:]))
        run_file = next((Path(self._folder.name) / "afd").glob("*.json"))
        run = json.loads(run_file.read_text())
        self.secret, self.url = bytes.fromhex(run["secret"]), str(run["url"])
        workers = [m["member"] for m in self.status()["members"] if m["member"]["info"]["role"] == "attention"]
        self.endpoints = [w["info"]["serving"] for w in sorted(workers, key=lambda w: w["rank"])]
        return self

    @property
    def supervisor_pid(self) -> int:
        return self.process.pid

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip())
            if re.search(r"AFD is ready", line):
                self._ready.set()
        self._ready.set()

    def status(self) -> dict:
        command = [sys.executable, "-m", "afd", "status", "--json"]
        return json.loads(subprocess.run(command, env=self.env, capture_output=True, check=True).stdout)

    def stats(self, role: str) -> list[dict[str, float]]:
        """What each worker of a role said in its last heartbeat, in rank order."""
        members = [m for m in self.status()["members"] if m["member"]["info"]["role"] == role]
        return [m["stats"] for m in sorted(members, key=lambda m: m["member"]["rank"])]

    def metrics_addresses(self, role: str) -> list[str]:
        """host:port of /metrics of each worker of a role."""
        return [m["member"]["info"]["metrics"] for m in self.status()["members"] if m["member"]["info"]["role"] == role]

    def __exit__(self, *exc: object) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            self.process.wait(30)
        self._folder.cleanup()


@dataclass(slots=True)
class Timeline:
    """One request. Times are seconds of time.perf_counter()."""

    sent_s: float
    token_s: list[float]
    ids: list[int]


@dataclass(slots=True)
class Round:
    """All requests of one closed batch."""

    timelines: list[Timeline]

    @property
    def output_tokens_per_s(self) -> float:
        """Output tokens over the time from the first submit to the last token."""
        begin = min(t.sent_s for t in self.timelines)
        end = max(t.token_s[-1] for t in self.timelines)
        return sum(len(t.ids) for t in self.timelines) / (end - begin)

    @property
    def decode_tokens_per_s(self) -> float:
        """Tokens after the moment every request had its first one, over that time: decode alone."""
        begin = max(t.token_s[0] for t in self.timelines)
        end = max(t.token_s[-1] for t in self.timelines)
        count = sum(1 for t in self.timelines for s in t.token_s if s > begin)
        return count / (end - begin) if end > begin else 0.0

    @property
    def mean_tpot_s(self) -> float:
        tpots = [(t.token_s[-1] - t.token_s[0]) / (len(t.token_s) - 1) for t in self.timelines if len(t.token_s) > 1]
        return sum(tpots) / max(1, len(tpots))


def check_equal_tokens(clusters: Mapping[str, BenchCluster], prompts: Sequence[Sequence[int]], length: int = 8) -> None:
    """The correctness gate: every cluster gives the first one's greedy tokens, or half of them where rounding parts
    them; how many is printed."""
    found = {name: [t.ids for t in run_round(cluster, prompts, length).timelines] for name, cluster in clusters.items()}
    first, wanted = next(iter(found.items()))
    for name, ids in found.items():
        pairs = [pair for ours, theirs in zip(wanted, ids, strict=True) for pair in zip(ours, theirs, strict=True)]
        same = sum(a == b for a, b in pairs)
        print(f"gate {name}: {same}/{len(pairs)} greedy tokens equal {first}'s", flush=True)
        assert 2 * same >= len(pairs), "outputs differ beyond rounding"


def run_round(
    cluster: BenchCluster,
    prompts: Sequence[Sequence[int]],
    output_len: int,
    timeout_s: float = 300,
    drawing: Drawing = GREEDY,
) -> Round:
    """Submit all prompts at once (round robin over the attention workers) and read every token."""
    context = zmq.Context()
    sockets = [client_socket(context, cluster.secret, os.urandom(8).replace(b"\0", b"x")) for _ in cluster.endpoints]
    poller = zmq.Poller()
    for socket, endpoint in zip(sockets, cluster.endpoints, strict=True):
        socket.connect(endpoint)
        poller.register(socket, zmq.POLLIN)
    timelines: dict[str, Timeline] = {}
    deadline = time.perf_counter() + timeout_s
    lease_until = 0.0
    try:
        for idx, prompt in enumerate(prompts):
            req_id = f"bench-{os.urandom(6).hex()}"
            timelines[req_id] = Timeline(time.perf_counter(), [], [])
            params = SamplingParams(
                max_tokens=output_len, seed=idx, temperature=drawing.temperature, top_p=drawing.top_p
            )
            sockets[idx % len(sockets)].send(encode(Submit(req_id, 0, list(prompt), [], params)))
        live = set(timelines)
        while live:
            if time.perf_counter() > deadline:
                raise TimeoutError(f"{len(live)} requests did not finish in {timeout_s} s")
            if time.perf_counter() > lease_until - MAX_LEASE_S / 2:  # a round may take longer than a worker grants
                lease_until = time.perf_counter() + MAX_LEASE_S
                for socket in sockets:
                    socket.send(encode(Lease("bench", MAX_LEASE_S)))
            for socket, _ in poller.poll(1000):
                message = worker_message_decoder.decode(socket.recv())
                now = time.perf_counter()
                if isinstance(message, Refused):
                    raise RuntimeError(f"refused: {message.reason}: {message.detail}")
                if not isinstance(message, Tokens):
                    continue
                for chunk in message.chunks:
                    timeline = timelines[chunk.req_id]
                    timeline.ids += chunk.ids
                    timeline.token_s += [now] * len(chunk.ids)
                    if chunk.finish is FinishReason.ERROR:
                        log = "\n".join(cluster.lines[-20:])
                        raise RuntimeError(f"request failed: {chunk.error}; the cluster's log ends with\n{log}")
                    if chunk.finish is not None:
                        live.discard(chunk.req_id)
    finally:
        for socket in sockets:
            socket.close(linger=0)
        context.term()
    return Round(list(timelines.values()))

"""What the gateway costs per streamed token: its own process, a modelled worker and raw SSE clients around it.

    python bench/gateway.py --streams 64 --tokens 128 --step-ms 20

The worker sends one message per step with one token for every running request, as an attention worker does. Reported:
the gateway's CPU time per token (its own process's, so the load generator does not count), the share of one core it
needs at this rate, and how late tokens reach the client (inter-token latency beside the step time, which is the floor).
The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import multiprocessing
import os
import platform
import statistics
import sys
import threading
import time
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
import zmq

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from afd.config import ClusterConfig, GatewayConfig, ModelConfig
from afd.messages.codec import encode
from afd.messages.membership import ClusterView, Member, Plan, WorkerInfo
from afd.messages.serving import Abort, Submit, TokenChunk, Tokens, WorkerStats, gateway_message_decoder
from afd.messages.serving_sockets import server_socket
from afd.types import FinishReason

SECRET = b"a secret for the benchmark only"
TOKEN_IDS = range(300, 8000)


class StaticMembership:
    """A membership that never changes."""

    rank = 0
    coordinator_alive = True

    def __init__(self, endpoint: str):
        attention = WorkerInfo("attention", "a" * 32, "127.0.0.1", os.getpid(), "", serving=endpoint)
        ffn = WorkerInfo("ffn", "f" * 32, "127.0.0.1", os.getpid(), "")
        members = [Member(attention, 0, ready=True), Member(ffn, 0, ready=True)]
        self._view = ClusterView("bench", 1, 1, 1, 1, "bench", "", "hybrid", Plan(), members)

    def view(self) -> ClusterView:
        return self._view

    def on_view(self, callback: Any) -> None:
        callback(self._view)

    def set_ready(self, ready: bool) -> None:
        """Nobody to tell."""


def gateway_process(endpoint: str, announce: Connection) -> None:
    """Child: the gateway, until the parent closes the pipe."""
    from afd.gateway.serve import run_gateway

    stop = threading.Event()

    def wait_for_parent() -> None:
        announce.poll(None)
        stop.set()

    threading.Thread(target=wait_for_parent, daemon=True).start()
    config = ClusterConfig(gateway=GatewayConfig(port=0, drain_s=1.0), model=ModelConfig())
    run_gateway(config, StaticMembership(endpoint), SECRET, announce.send, stop)  # type: ignore[arg-type]


@dataclass
class ModelledWorker:
    """Thread: every step, one token for each request."""

    step_s: float
    endpoint: str = ""
    running: dict[str, tuple[bytes, Submit, int]] = field(default_factory=dict)
    stop: threading.Event = field(default_factory=threading.Event)

    def start(self) -> threading.Thread:
        bound = threading.Event()
        thread = threading.Thread(target=self._run, args=(bound,), daemon=True)
        thread.start()
        bound.wait()
        return thread

    def _run(self, bound: threading.Event) -> None:
        with zmq.Context() as ctx, server_socket(ctx, SECRET, 8 << 20) as socket:
            self.endpoint = f"tcp://127.0.0.1:{socket.bind_to_random_port('tcp://127.0.0.1')}"
            bound.set()
            next_step = time.perf_counter() + self.step_s
            while not self.stop.is_set():
                wait_s = next_step - time.perf_counter()
                if socket.poll(max(1, wait_s * 1e3)):
                    self._receive(socket)
                if time.perf_counter() >= next_step:
                    next_step = max(next_step + self.step_s, time.perf_counter())
                    if self.running:
                        self._step(socket)

    def _receive(self, socket: zmq.Socket[Any]) -> None:
        gateway, frame = socket.recv_multipart()
        message = gateway_message_decoder.decode(frame)
        if isinstance(message, Submit):
            self.running[message.req_id] = (gateway, message, 0)
        elif isinstance(message, Abort):
            for req_id in message.req_ids:
                self.running.pop(req_id, None)
        else:
            stats = WorkerStats(0, len(self.running), 0, 1000, 1000 - len(self.running))
            socket.send_multipart([gateway, encode(stats)])

    def _step(self, socket: zmq.Socket[Any]) -> None:
        chunks = []
        for req_id, (gateway, submit, idx) in list(self.running.items()):
            finish = FinishReason.LENGTH if idx + 1 == submit.sampling.max_tokens else None
            token_id = TOKEN_IDS[(len(req_id) * 31 + idx * 7919) % len(TOKEN_IDS)]
            chunks.append(TokenChunk(req_id, submit.attempt, idx, [token_id], finish=finish))
            if finish is None:
                self.running[req_id] = (gateway, submit, idx + 1)
            else:
                del self.running[req_id]
        socket.send_multipart([gateway, encode(Tokens(chunks))])


async def read_stream(host: str, port: int, num_tokens: int) -> tuple[float, list[float]]:
    """(time to first event, gaps between events) of one streamed chat completion."""
    body = {
        "messages": [{"role": "user", "content": "hi"}],
        "max_tokens": num_tokens,
        "stream": True,
        "ignore_eos": True,
    }
    payload = json.dumps(body).encode()
    reader, writer = await asyncio.open_connection(host, port)
    begun = time.perf_counter()
    writer.write(
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: %d\r\n\r\n"
        % len(payload)
    )
    writer.write(payload)
    times = []
    while line := await reader.readline():
        if line.startswith(b'data: {"id"'):
            times.append(time.perf_counter())
    writer.close()
    if not times:
        raise SystemExit("the gateway refused a stream")
    return times[0] - begun, [b - a for a, b in itertools.pairwise(times)]


async def load(host: str, port: int, num_streams: int, num_tokens: int) -> tuple[list[float], list[float]]:
    results = await asyncio.gather(*(read_stream(host, port, num_tokens) for _ in range(num_streams)))
    return [ttft for ttft, _ in results], [gap for _, gaps in results for gap in gaps]


def percentile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--step-ms", type=float, default=20.0)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()

    worker = ModelledWorker(args.step_ms / 1e3)
    thread = worker.start()
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    child = spawn.Process(target=gateway_process, args=(worker.endpoint, theirs))
    child.start()
    try:
        host, port = ours.recv().removeprefix("http://").split(":")
        time.sleep(1.0)  # the link to the worker comes up
        asyncio.run(load(host, int(port), args.streams, 8))  # warm-up, dropped
        process = psutil.Process(child.pid)
        rounds = []
        for _ in range(args.rounds):
            cpu_begin, begun = sum(process.cpu_times()[:2]), time.perf_counter()
            ttfts, gaps = asyncio.run(load(host, int(port), args.streams, args.tokens))
            wall_s = time.perf_counter() - begun
            cpu_s = sum(process.cpu_times()[:2]) - cpu_begin
            rounds.append(
                {
                    "cpu_us_per_token": cpu_s / (args.streams * args.tokens) * 1e6,
                    "core_share": cpu_s / wall_s,
                    "tokens_per_s": args.streams * args.tokens / wall_s,
                    "ttft_p50_ms": percentile(ttfts, 0.5) * 1e3,
                    "itl_p50_ms": percentile(gaps, 0.5) * 1e3,
                    "itl_p99_ms": percentile(gaps, 0.99) * 1e3,
                }
            )
        rss_mib = process.memory_info().rss / 2**20
    finally:
        ours.close()
        child.join(10)
        worker.stop.set()
        thread.join(5)
    medians = {key: round(statistics.median(entry[key] for entry in rounds), 3) for key in rounds[0]}
    for key, value in medians.items():
        print(f"{key:>20}  {value:10.3f}")
    summary = {
        **vars(args),
        **medians,
        "rss_mib": round(rss_mib, 1),
        "cpu": platform.machine(),
        "cores": os.cpu_count(),
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()

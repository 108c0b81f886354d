"""The StepMesh face at work: upstream's behaviour restated, over shm and tcp, without a GPU.

Each worker and server is a node in a thread of its own (the process-wide functions: in processes of their own).
"""

from __future__ import annotations

import contextlib
import gc
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from stepmesh.compat import Environment, ServerNode, WorkerNode, open_node
from stepmesh.compat.node import ExchangeTimeout, PeerLostError
from stepmesh.compat.scheduler import SchedulerNode
from stepmesh.errors import ConfigError, TransportError
from tests.contract.world import Holdings

LIMIT_S = 30.0
SECRET = "a secret of the cluster"


class Cluster:
    """Nodes of one run, each in its thread; the first error of any is the test's."""

    def __init__(self, transport: str, num_workers: int, num_servers: int, **variables: str) -> None:
        self.base = {
            "DMLC_NUM_WORKER": str(num_workers),
            "DMLC_NUM_SERVER": str(num_servers),
            "DMLC_PS_ROOT_URI": "127.0.0.1",
            "STEPMESH_TRANSPORT": transport,
            "STEPMESH_SECRET": SECRET,
            "STEPMESH_TIMEOUT": str(LIMIT_S),
            "STEPMESH_MAX_MESSAGE_BYTES": str(1 << 20),
        } | variables
        self.scheduler = self._scheduler()
        self._threads: list[threading.Thread] = []
        self._errors: list[BaseException] = []

    def _scheduler(self) -> SchedulerNode:
        for port in range(20000 + os.getpid() % 20000, 65000):
            self.base["DMLC_PS_ROOT_PORT"] = str(port)
            with contextlib.suppress(TransportError):  # somebody else's
                return SchedulerNode(Environment.parse(self.base | {"DMLC_ROLE": "scheduler"}))
        raise AssertionError("no free port")

    def start(self, role: str, rank: int, program: Callable[[Any], None], **variables: str) -> None:
        env = Environment.parse(self.base | {"DMLC_ROLE": role, "DMLC_NODE_RANK": str(rank)} | variables)

        def run() -> None:
            try:
                node = open_node(env)
                try:
                    program(node)
                    node.stop()
                finally:
                    node.close()
            except BaseException as error:
                self._errors.append(error)

        thread = threading.Thread(target=run, name=env.name)
        thread.start()
        self._threads.append(thread)

    def end(self) -> None:
        for thread in self._threads:
            thread.join(2 * LIMIT_S)
            assert not thread.is_alive(), f"{thread.name} hangs"
        self.scheduler.close()
        if self._errors:
            raise self._errors[0]


@pytest.fixture(params=["shm", "tcp"])
def transport(request: pytest.FixtureRequest) -> Iterator[str]:
    gc.collect()  # what tests of other things left in circles may go now, not meanwhile
    before = Holdings.now()
    yield request.param
    assert Holdings.now() == before


def serve(num_rounds: int, answer: Callable[[list[Any], list[int]], list[Any]]) -> Callable[[ServerNode], None]:
    def program(node: ServerNode) -> None:
        for _ in range(num_rounds):
            for handler, tensors, keys in node.get_batch(LIMIT_S):
                node.respond(answer(tensors, keys), handler)

    return program


def test_push_and_pull_with_several_keys(transport: str) -> None:
    """Upstream's test_fserver: three tensors out, their sum back."""
    cluster = Cluster(transport, 1, 1)

    def worker(node: WorkerNode) -> None:
        for seed in range(5):
            rng = np.random.default_rng(seed)
            push = [rng.random((1, 8192), np.float32) for _ in range(3)]
            pull = [np.zeros((1, 8192), np.float32)]
            node.wait(node.push_pull(push, [0, 1, 2], pull, [0]), LIMIT_S)
            np.testing.assert_array_equal(pull[0], sum(push))

    def answer(tensors: list[Any], keys: list[int]) -> list[Any]:
        assert keys == [0, 1, 2]
        return [sum(tensors)]

    cluster.start("worker", 0, worker)
    cluster.start("server", 0, serve(5, answer))
    cluster.end()


def test_several_workers_and_servers_in_a_ring_of_micro_batches(transport: str) -> None:
    """Upstream's test_fserver_dynamic: three stages under way, sizes that vary and grow, keys by stage and rank."""
    num_workers, num_servers, num_stages, num_rounds = 2, 2, 3, 6
    cluster = Cluster(transport, num_workers, num_servers)

    def worker(node: WorkerNode) -> None:
        rank = node.environment.node_rank
        rng = np.random.default_rng(rank)
        ring: dict[int, tuple[int, Any, list[Any]]] = {}

        def collect(stage: int) -> None:
            handler, sent, pulls = ring.pop(stage)
            node.wait(handler, LIMIT_S)
            for server, pull in enumerate(pulls):
                np.testing.assert_array_equal(pull, sent * (server + 1))

        for _ in range(num_rounds):
            for stage in range(num_stages):
                if stage in ring:
                    collect(stage)
                sent = rng.integers(0, 100, (int(rng.integers(1, 129)), 64)).astype(np.int32)
                pulls = [np.zeros_like(sent) for _ in range(num_servers)]
                keys = [(1 << 24) + (rank << 16) + (stage << 8) + server for server in range(num_servers)]
                handler = node.push_pull([sent], [(rank << 16) + (stage << 8)], pulls, keys)
                ring[stage] = handler, sent, pulls
        for stage in list(ring):
            collect(stage)

    def server(node: ServerNode) -> None:
        for number in range(num_rounds * num_stages):
            batch = node.get_batch(LIMIT_S)
            assert len(batch) == num_workers
            for rank, (handler, tensors, keys) in enumerate(batch):
                # One request of each worker, in rank order, each worker's in the order it made them.
                assert keys == [(rank << 16) + (number % num_stages << 8)]
                node.respond([tensors[0] * (node.environment.node_rank + 1)], handler)

    for rank in range(num_workers):
        cluster.start("worker", rank, worker)
    for rank in range(num_servers):
        cluster.start("server", rank, server)
    cluster.end()


def test_torch_tensors_and_a_registered_buffer(transport: str) -> None:
    """A contiguous batch of all workers' rows without a concatenation, answered by slices of one buffer."""
    cluster = Cluster(transport, 2, 1)
    counts = [3, 5]

    def worker(node: WorkerNode) -> None:
        rank = node.environment.node_rank
        for step in range(3):
            push = torch.full((counts[rank], 32), float(10 * rank + step), dtype=torch.bfloat16)
            pull = torch.zeros((counts[rank], 32), dtype=torch.bfloat16)
            node.wait(node.push_pull([push], [7], [pull], [8]), LIMIT_S)
            assert torch.equal(pull, push + 1), rank

    def server(node: ServerNode) -> None:
        buffer = torch.zeros((2, 8, 32), dtype=torch.bfloat16)
        node.register_recv_buffer(buffer, [0, 1], [7, 7])
        result = torch.zeros((8, 32), dtype=torch.bfloat16)
        for step in range(3):
            batch = node.get_batch(LIMIT_S)
            for rank, (_, (tensor,), _) in enumerate(batch):
                assert tensor.dtype is torch.bfloat16 and tuple(tensor.shape) == (counts[rank], 32)
                assert tensor.data_ptr() == buffer[rank].data_ptr()
                assert float(buffer[rank, 0, 0]) == 10 * rank + step
            tensors = [tensors[0] for _, tensors, _ in batch]
            torch.cat(tensors, out=result)
            result += 1
            node.respond_vec(result, tensors, [handler for handler, _, _ in batch])

    for rank in range(2):
        cluster.start("worker", rank, worker)
    cluster.start("server", 0, server)
    cluster.end()


def test_rails_do_not_mix() -> None:
    """Worker GPU i and server GPU i only; instance barriers count all GPUs, group barriers the first of each node."""
    cluster = Cluster("shm", 1, 1, DMLC_GROUP_SIZE="2")

    def worker(node: WorkerNode) -> None:
        node.barrier(True, True, True)
        node.barrier(True, True, False)
        node.barrier(False, True, True)
        pull = np.zeros(1, np.int64)
        node.wait(node.push_pull([np.array([node.environment.gpu])], [1], [pull], [1]), LIMIT_S)
        assert pull[0] == 100 + node.environment.gpu

    def server(node: ServerNode) -> None:
        node.barrier(True, True, True)
        node.barrier(True, True, False)
        with pytest.raises(ConfigError, match="does not include it"):
            node.barrier(False, True, True)
        ((handler, (tensor,), _),) = node.get_batch(LIMIT_S)
        assert tensor[0] == node.environment.gpu
        node.respond([tensor + 100], handler)

    for gpu in range(2):
        cluster.start("worker", 0, worker, STEPMESH_GPU=str(gpu))
        cluster.start("server", 0, server, STEPMESH_GPU=str(gpu))
    cluster.end()


def test_waits_are_bounded_and_may_be_repeated() -> None:
    cluster = Cluster("shm", 1, 1, STEPMESH_IN_FLIGHT="2")
    server_waited, worker_waited = threading.Event(), threading.Event()

    def worker(node: WorkerNode) -> None:
        assert server_waited.wait(LIMIT_S)
        one = np.ones(4, np.float32)
        pulls = [np.zeros(4, np.float32) for _ in range(2)]
        handlers = [node.push_pull([one], [0], [pull], [0]) for pull in pulls]
        with pytest.raises(ExchangeTimeout, match=r"no answer of ffn/0 within 0\.01 s"):
            node.wait(handlers[0], 0.01)
        worker_waited.set()
        for handler, pull in zip(handlers, pulls, strict=True):
            node.wait(handler, LIMIT_S)
            node.wait(handler, LIMIT_S)  # as often as one likes
            np.testing.assert_array_equal(pull, one * 2)
            trace = node.trace(handler)
            assert len(trace) == 8 and trace == sorted(trace)  # one host: one clock
        with pytest.raises(ConfigError, match="never given out"):
            node.wait(99, 1.0)
        with pytest.raises(ConfigError, match="no trace"):
            node.trace(99)

    def server(node: ServerNode) -> None:
        with pytest.raises(ExchangeTimeout, match=r"no request of worker 0 within 0\.01 s"):
            node.get_batch(0.01)
        server_waited.set()
        assert worker_waited.wait(LIMIT_S)
        for _ in range(2):
            ((handler, tensors, _),) = node.get_batch(LIMIT_S)
            with pytest.raises(ConfigError, match="2 tensors for 1 pull keys"):
                node.respond(tensors * 2, handler)
            with pytest.raises(ConfigError, match="has room for 16"):
                node.respond([np.zeros(5, np.float32)], handler)
            node.respond([tensors[0] * 2], handler)
            with pytest.raises(ConfigError, match="answered already"):
                node.respond(tensors, handler)

    cluster.start("worker", 0, worker)
    cluster.start("server", 0, server)
    cluster.end()


def test_all_places_taken_is_an_error_not_a_hang() -> None:
    cluster = Cluster("shm", 1, 1, STEPMESH_IN_FLIGHT="1", STEPMESH_TIMEOUT="1.5")
    gave_up = threading.Event()

    def worker(node: WorkerNode) -> None:
        one, pull = np.ones(1), np.zeros(1)
        first = node.push_pull([one], [0], [pull], [0])
        with pytest.raises(ExchangeTimeout, match="STEPMESH_IN_FLIGHT"):
            node.push_pull([one], [0], [pull], [0])
        gave_up.set()
        node.wait(first, LIMIT_S)

    def server(node: ServerNode) -> None:
        assert gave_up.wait(LIMIT_S)
        serve(1, lambda tensors, _: tensors)(node)

    cluster.start("worker", 0, worker)
    cluster.start("server", 0, server)
    cluster.end()


def test_wrong_pushes_are_refused() -> None:
    cluster = Cluster("shm", 1, 2)

    def worker(node: WorkerNode) -> None:
        one = np.ones(1)
        with pytest.raises(ConfigError, match="1 tensors for 2 keys to push"):
            node.push_pull([one], [0, 1], [one, one], [0, 1])
        with pytest.raises(ConfigError, match="cannot be shared by 2 servers"):
            node.push_pull([one], [0], [one], [0])
        with pytest.raises(ConfigError, match="STEPMESH_MAX_MESSAGE_BYTES"):
            node.push_pull([np.zeros(1 << 18)], [0], [one, one], [0, 1])
        with pytest.raises(ConfigError, match="list is neither a torch tensor nor a numpy array"):
            node.push_pull([[1.0]], [0], [one, one], [0, 1])

    cluster.start("worker", 0, worker)
    for rank in range(2):
        cluster.start("server", rank, lambda node: None)
    cluster.end()


def test_a_lost_server_fails_what_needs_it_and_nothing_else() -> None:
    """The link breaks with exchanges under way: they fail, the next ones go through, in order, over the new link."""
    cluster = Cluster("shm", 1, 2)
    pushed, broken = threading.Event(), threading.Event()

    def worker(node: WorkerNode) -> None:
        one, pulls = np.ones(2), [np.zeros(2) for _ in range(2)]
        lost = [node.push_pull([one], [0], pulls, [0, 1]) for _ in range(3)]
        pushed.set()
        assert broken.wait(LIMIT_S)
        for handler in lost:
            with pytest.raises(PeerLostError, match="ffn/1 is lost"):
                node.wait(handler, LIMIT_S)
        for number in range(4):
            while True:
                try:
                    handler = node.push_pull([np.full(2, float(number))], [9], pulls, [0, 1])
                    break
                except PeerLostError:
                    node.progress(0.05)  # it comes back by itself
            node.wait(handler, LIMIT_S)
            assert [float(pull[0]) for pull in pulls] == [number, number]

    def server(node: ServerNode) -> None:
        assert pushed.wait(LIMIT_S)
        if node.environment.node_rank == 1:
            (pair,) = node._mesh._pairs.values()
            node._mesh._roster.drop(pair, "the test breaks it", retryable=True)
            del pair
            broken.set()
        answered = 0
        while answered < 4:
            for handler, tensors, keys in node.get_batch(LIMIT_S):
                node.respond(tensors, handler)
                answered += keys == [9]

    cluster.start("worker", 0, worker)
    for rank in range(2):
        cluster.start("server", rank, server)
    cluster.end()


PROGRAM = """
import os
import numpy as np
import stepmesh.compat as f

f.init()
role = os.environ["DMLC_ROLE"]
if role == "worker":
    push, pull = [np.ones((2, 8), np.float32)] * 2, [np.zeros((2, 8), np.float32)]
    f.barrier(False, True)
    handler = f.push_pull(push, [0, 1], pull, [2])
    assert f.get_all_handlers(handler) == [handler]
    f.wait(handler, timeout_ms=30_000)
    assert (pull[0] == 2).all() and f.get_nanosecond() >= f.fetch_trace(handler)[-1]
elif role == "server":
    f.register_recv_buffer(np.zeros((2, 8), np.float32), [0], [0])
    for handler, tensors, keys in f.get_batch(timeout_ms=30_000):
        f.respond([sum(tensors)], handler, need_event=True)
f.stop()
print(role, "done")
"""


def test_three_processes_like_upstreams_examples() -> None:
    """A program for `fserver_lib` with another import: scheduler, worker and server in any order."""
    cluster = Cluster("auto", 1, 1)
    cluster.scheduler.close()  # its port is what is wanted
    processes = []
    try:
        for role in ("worker", "server", "scheduler"):
            variables = {key: value for key, value in os.environ.items() if not key.startswith(("DMLC_", "STEPMESH_"))}
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-c", PROGRAM],
                    env=variables | cluster.base | {"DMLC_ROLE": role},
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
        said = [process.communicate(timeout=2 * LIMIT_S) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert [out for out, _ in said] == ["worker done\n", "server done\n", "scheduler done\n"], said

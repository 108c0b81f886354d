"""The calls of upstream StepMesh (`fserver_lib`) over this library: `import stepmesh.compat as f`.

One node a process, made by `init` from the DMLC_* / STEPMESH_* environment and ended by `stop`; all calls come from
one thread. Tensors are torch tensors or numpy arrays. What differs from upstream, for the better: nothing aborts the
process (errors are exceptions, see `stepmesh.errors`), every wait has a time limit, a lost peer fails the exchanges
that need it and comes back, memory does not grow with the number of exchanges, a message may be larger than the first
one of its key, and `respond_vec` gives each worker its own rows. docs/stepmesh.md has the list.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any

from stepmesh.compat.environment import Environment
from stepmesh.compat.node import Node
from stepmesh.compat.scheduler import SchedulerNode
from stepmesh.compat.server import ServerNode
from stepmesh.compat.worker import WorkerNode
from stepmesh.errors import ConfigError

__all__ = [
    "Environment",
    "Node",
    "SchedulerNode",
    "ServerNode",
    "WorkerNode",
    "barrier",
    "fetch_trace",
    "get_all_handlers",
    "get_batch",
    "get_nanosecond",
    "init",
    "open_node",
    "push_pull",
    "register_recv_buffer",
    "respond",
    "respond_vec",
    "stop",
    "wait",
]

# Upstream's interface is one node a process, named by nobody: the one place where this library keeps such a thing.
_nodes: list[Node | SchedulerNode] = []


def init() -> None:
    """Start the role that DMLC_ROLE names, meet all others, connect; ends with a barrier of workers and servers."""
    if _nodes:
        raise ConfigError("init was called already: call stop first")
    environment = Environment.parse(os.environ)
    _nodes.append(open_node(environment))


def open_node(environment: Environment) -> Node | SchedulerNode:
    """A node without the process-wide functions: for several in one process."""
    if environment.role == "worker":
        return WorkerNode(environment)
    return ServerNode(environment) if environment.role == "server" else SchedulerNode(environment)


def stop() -> None:
    """Wait for all others, then leave. Without init before: nothing to do."""
    while _nodes:
        _nodes.pop().stop()


def barrier(include_server: bool, include_client: bool, instance_barrier: bool = True) -> None:
    """Wait for all servers and/or all workers; instance_barrier False: for GPU 0 of each of their nodes only."""
    node = _node()
    if isinstance(node, Node):
        node.barrier(include_server, include_client, instance_barrier)


def push_pull(
    push_tensors: Sequence[Any],
    push_keys: Sequence[int],
    pull_tensors: Sequence[Any],
    pull_keys: Sequence[int],
    need_event: bool = True,
) -> int:
    """Worker: send tensors to all servers and let them fill others; returns a handler for `wait` at once.

    len(pull_tensors) is a multiple of the number of servers, all of server 0 first. `need_event` is accepted: tensors
    on a device are copied to the host, behind the work that makes them, before this returns.
    """
    return _worker().push_pull(push_tensors, push_keys, pull_tensors, pull_keys)


def wait(handler: int, timeout_ms: int = 10_000) -> None:
    """Worker: return once all pull tensors of the handler are filled.

    Raises ExchangeTimeout, after which one may wait again, or PeerLostError, after which one may push again.
    """
    _worker().wait(handler, timeout_ms / 1000)


def get_all_handlers(handler: int) -> list[int]:
    """Worker: the handlers that make up a handler: itself, an exchange is one here."""
    return [handler]


def fetch_trace(handler: int) -> list[int]:
    """Worker: eight times of a completed exchange in ns, for one of the last 1024.

    push begun, push posted, push seen by the last server, taken by its get_batch, answered, posted, seen here, copied
    to the pull tensors. The middle four are the server's clock: its host's monotonic time.
    """
    return _worker().trace(handler)


def get_batch(timeout_ms: int = 10_000) -> list[tuple[int, list[Any], list[int]]]:
    """Server: one request of every worker, in rank order, as (handler, tensors, keys).

    Tensors are valid until their handler is answered. Raises ExchangeTimeout that names the workers that are missing.
    """
    return _server().get_batch(timeout_ms / 1000)


def respond(tensors: Sequence[Any], handler: int, need_event: bool = False) -> None:
    """Server: answer a request, one tensor per pull key."""
    _server().respond(tensors, handler)


def respond_vec(ret_buffer: Any, tensors_vec: Sequence[Any], handler_vec: Sequence[int]) -> None:
    """Server: answer several requests with consecutive slices of one buffer, slice i as long as tensors_vec[i]."""
    _server().respond_vec(ret_buffer, tensors_vec, handler_vec)


def register_recv_buffer(tensor: Any, worker_ranks: Sequence[int], push_keys: Sequence[int]) -> None:
    """Server: receive (worker_ranks[i], push_keys[i]) in the i-th of equal parts of `tensor`: one batch, in order."""
    _server().register_recv_buffer(tensor, worker_ranks, push_keys)


def get_nanosecond() -> int:
    """This host's monotonic time in ns."""
    return time.monotonic_ns()


def _node() -> Node | SchedulerNode:
    if not _nodes:
        raise ConfigError("call init first")
    return _nodes[0]


def _worker() -> WorkerNode:
    node = _node()
    if not isinstance(node, WorkerNode):
        raise ConfigError("only workers (DMLC_ROLE=worker) push")
    return node


def _server() -> ServerNode:
    node = _node()
    if not isinstance(node, ServerNode):
        raise ConfigError("only servers (DMLC_ROLE=server) answer")
    return node

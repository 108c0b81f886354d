"""A server: takes one request of every worker of its rail at a time and answers them."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from stepmesh.compat import arrays, message
from stepmesh.compat.environment import Environment
from stepmesh.compat.message import Pull, Table, Times
from stepmesh.compat.node import ExchangeTimeout, Node
from stepmesh.config import MAX_ATTENTION_RANKS, MAX_STREAMS
from stepmesh.errors import ConfigError, ProtocolError, StaleArrivalError
from stepmesh.types import CombineMeta, DispatchArrived, Event, PeerDown, RankId, Role

log = logging.getLogger("stepmesh")

_MAX_OPEN = 4 * MAX_STREAMS * MAX_ATTENTION_RANKS  # requests handed out and not answered


class _Request(NamedTuple):
    """A push that has arrived. The tensors are views of this rank's slot."""

    arrival: DispatchArrived
    table: Table
    contents: list[message.Bytes]
    seen_ns: int


class _Open(NamedTuple):
    """A request that get_batch has handed out."""

    request: _Request
    pulls: tuple[Pull, ...]
    taken_ns: int


class _Inbox:
    """One worker's requests, put back into the order in which it made them: slots of several streams carry them."""

    def __init__(self) -> None:
        self._chain = 0
        self._next = 0
        self._waiting: dict[int, _Request] = {}

    def put(self, request: _Request) -> None:
        chain, place = divmod(request.arrival.header.gang_id, 1 << 32)
        if chain > self._chain:
            self.clear()
            self._chain, self._next = chain, 0
        if chain == self._chain and place >= self._next:
            self._waiting[place] = request

    @property
    def ready(self) -> bool:
        return self._next in self._waiting

    def pop(self) -> _Request:
        self._next += 1
        return self._waiting.pop(self._next - 1)

    def clear(self) -> None:
        """The worker has given up what is here: it says so with a higher chain in what it sends next."""
        self._waiting.clear()


class ServerNode(Node):
    """Upstream's AFTensorServer."""

    role = Role.FFN

    def __init__(self, environment: Environment) -> None:
        self._inboxes = {RankId(Role.ATTENTION, rank): _Inbox() for rank in range(environment.num_workers)}
        self._open: dict[int, _Open] = {}
        self._last_handler = 0
        self._buffers: dict[tuple[int, int], Any] = {}  # (worker rank, key) -> flat uint8 part of a registered tensor
        super().__init__(environment)

    def get_batch(self, timeout_s: float) -> list[tuple[int, list[Any], list[int]]]:
        """Raises ExchangeTimeout; ConfigError when a request does not fit its registered buffer."""
        deadline = time.monotonic() + timeout_s
        while not all(inbox.ready for inbox in self._inboxes.values()):
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                missing = [peer.rank for peer, inbox in self._inboxes.items() if not inbox.ready]
                raise ExchangeTimeout(f"no request of worker {', '.join(map(str, missing))} within {timeout_s:g} s")
            self.progress(left_s)
        return [self._hand_out(peer.rank, inbox.pop()) for peer, inbox in self._inboxes.items()]

    def respond(self, tensors: Sequence[Any], handler: int) -> None:
        """Raises ConfigError. The answer to a worker that is gone is dropped: it was told that its exchange failed."""
        opened = self._open.get(handler)
        if opened is None:
            raise ConfigError(f"handler {handler} is not open: never handed out, or answered already")
        pulls = opened.pulls
        described = [arrays.describe(tensor) for tensor in tensors]
        if len(described) != len(pulls):
            raise ConfigError(f"{len(described)} tensors for {len(pulls)} pull keys of handler {handler}")
        for pull, one in zip(pulls, described, strict=True):
            if one.num_bytes > pull.num_bytes:
                raise ConfigError(f"{one.num_bytes} bytes for pull key {pull.key}, which has room for {pull.num_bytes}")
        answered_ns = time.monotonic_ns()
        table = Table(tuple((pull.key, one) for pull, one in zip(pulls, described, strict=True)))
        arrival = opened.request.arrival
        try:
            rows = self._mesh.combine_view(arrival)
            times = Times(opened.request.seen_ns, opened.taken_ns, answered_ns, time.monotonic_ns())
            message.pack(rows.reshape(-1).view(np.uint8), table, [arrays.read(tensor) for tensor in tensors], times)
            self._mesh.combine(arrival, CombineMeta(compute_ns=answered_ns - opened.taken_ns), rows)
        except StaleArrivalError as error:
            log.info("%s: an answer has no reader any more: %s", self.environment.name, error)
        del self._open[handler]

    def respond_vec(self, ret_buffer: Any, tensors_vec: Sequence[Any], handler_vec: Sequence[int]) -> None:
        """Raises ConfigError."""
        if len(tensors_vec) != len(handler_vec):
            raise ConfigError(f"{len(tensors_vec)} tensors for {len(handler_vec)} handlers")
        ends = np.cumsum([0, *(tensor.shape[0] for tensor in tensors_vec)]).tolist()
        if ends[-1] > ret_buffer.shape[0]:
            raise ConfigError(f"{ends[-1]} rows to answer with, the buffer has {ret_buffer.shape[0]}")
        for handler, start, end in zip(handler_vec, ends, ends[1:], strict=False):
            self.respond([ret_buffer[start:end]], handler)

    def register_recv_buffer(self, tensor: Any, worker_ranks: Sequence[int], push_keys: Sequence[int]) -> None:
        """Raises ConfigError."""
        if len(worker_ranks) != len(push_keys) or not worker_ranks:
            raise ConfigError(f"{len(worker_ranks)} worker ranks for {len(push_keys)} keys")
        parts = [arrays.part(tensor, place, len(push_keys)) for place in range(len(push_keys))]
        self._buffers.update(zip(zip(worker_ranks, push_keys, strict=True), parts, strict=True))

    def _hand_out(self, worker_rank: int, request: _Request) -> tuple[int, list[Any], list[int]]:
        table = request.table
        tensors = []
        for (key, described), content in zip(table.tensors, request.contents, strict=True):
            flat = self._buffers.get((worker_rank, key))
            if flat is None:
                tensors.append(arrays.view(content, described))
                continue
            if described.num_bytes > flat.shape[0]:
                raise ConfigError(
                    f"worker {worker_rank} pushed {described.num_bytes} bytes under key {key}, "
                    f"its registered buffer has {flat.shape[0]}"
                )
            arrays.write(flat, content)
            tensors.append(arrays.reshape(flat, described))
        per_server = len(table.pulls) // self.environment.num_servers
        first = self.environment.node_rank * per_server
        self._last_handler += 1
        while len(self._open) >= _MAX_OPEN:
            del self._open[next(iter(self._open))]  # the oldest: no program means to answer that still
        self._open[self._last_handler] = _Open(request, table.pulls[first : first + per_server], time.monotonic_ns())
        return self._last_handler, tensors, [key for key, _ in table.tensors]

    def _take(self, event: Event) -> None:
        if isinstance(event, DispatchArrived):
            try:
                table, contents, _ = message.unpack(event.parts.rows.reshape(-1).view(np.uint8))
            except ProtocolError as error:
                log.error("%s: a request of %s is malformed: %s", self.environment.name, event.peer, error)
                return
            self._inboxes[event.peer].put(_Request(event, table, contents, time.monotonic_ns()))
        elif isinstance(event, PeerDown):
            self._inboxes[event.peer].clear()
            self._open = {h: o for h, o in self._open.items() if o.request.arrival.peer != event.peer}

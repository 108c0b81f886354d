"""A worker: pushes tensors to all servers of its rail and has them fill others."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from stepmesh.compat import arrays, message
from stepmesh.compat.environment import Environment
from stepmesh.compat.message import Pull, Table, Times
from stepmesh.compat.node import EPOCH, ExchangeTimeout, Node, PeerLostError
from stepmesh.errors import ConfigError, MeshError, PeerNotConnectedError, ProtocolError, SlotBusyError
from stepmesh.types import CombineArrived, DispatchMeta, Event, PeerDown, RankId, Role

_T = TypeVar("_T")
_MAX_REMEMBERED = 1024  # completed or failed exchanges whose trace or error can still be asked for


@dataclass(slots=True)
class _Exchange:
    """A push_pull on its way."""

    handler: int
    stream: int
    seq: int
    pull_tensors: Sequence[Any]
    missing: set[RankId]
    begun_ns: int
    posted_ns: int = 0
    seen_ns: int = 0
    times: Times = field(default_factory=Times)


class WorkerNode(Node):
    """Upstream's AFTensorWorker."""

    role = Role.ATTENTION

    def __init__(self, environment: Environment) -> None:
        self._servers = [RankId(Role.FFN, rank) for rank in range(environment.num_servers)]
        self._last_handler = 0
        self._chain = 0  # counts losses: exchanges of an earlier chain are void at every server
        self._place = 0  # of the next exchange in its chain
        self._streams: dict[int, _Exchange] = {}  # under way, by stream
        self._errors: OrderedDict[int, MeshError] = OrderedDict()
        self._traces: OrderedDict[int, list[int]] = OrderedDict()
        super().__init__(environment)

    def push_pull(
        self,
        push_tensors: Sequence[Any],
        push_keys: Sequence[int],
        pull_tensors: Sequence[Any],
        pull_keys: Sequence[int],
    ) -> int:
        """Raises ConfigError, PeerLostError, or ExchangeTimeout when all places stay taken."""
        begun_ns = time.monotonic_ns()
        table, num_bytes = self._plan(push_tensors, push_keys, pull_tensors, pull_keys)
        stream = self._free_stream()
        num_rows = message.num_rows(num_bytes)
        try:
            view = self._mesh.dispatch_view(self._servers[0], stream, num_rows, 0)
            message.pack(view.rows.reshape(-1).view(np.uint8), table, [arrays.read(tensor) for tensor in push_tensors])
            handler = self._last_handler + 1
            meta = DispatchMeta(stream, EPOCH, handler, 0, gang_id=self._chain << 32 | self._place)
            seq = self._mesh.dispatch(self._servers, meta, view)
        except (PeerNotConnectedError, SlotBusyError) as error:
            raise PeerLostError(f"{self.environment.name} cannot push: {error}") from error
        self._last_handler = handler
        self._place += 1
        self._streams[stream] = _Exchange(
            handler, stream, seq, pull_tensors, set(self._servers), begun_ns, time.monotonic_ns()
        )
        return handler

    def wait(self, handler: int, timeout_s: float) -> None:
        """Raises ExchangeTimeout, PeerLostError, or ConfigError for a handler that was never given out."""
        if not 0 < handler <= self._last_handler:
            raise ConfigError(f"handler {handler} was never given out")
        deadline = time.monotonic() + timeout_s
        while (exchange := self._under_way(handler)) is not None:
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                missing = ", ".join(str(peer) for peer in sorted(exchange.missing))
                raise ExchangeTimeout(f"no answer of {missing} within {timeout_s:g} s")
            self.progress(left_s)
        if (error := self._errors.get(handler)) is not None:
            raise error

    def trace(self, handler: int) -> list[int]:
        """Raises ConfigError when the exchange has not completed, or too many have since."""
        if handler not in self._traces:
            raise ConfigError(f"no trace of handler {handler}: not completed, failed, or long ago")
        return self._traces[handler]

    def _plan(
        self,
        push_tensors: Sequence[Any],
        push_keys: Sequence[int],
        pull_tensors: Sequence[Any],
        pull_keys: Sequence[int],
    ) -> tuple[Table, int]:
        """The push's table, and the bytes that hold the push as well as any answer."""
        if len(push_tensors) != len(push_keys) or len(pull_tensors) != len(pull_keys):
            raise ConfigError(
                f"{len(push_tensors)} tensors for {len(push_keys)} keys to push, "
                f"{len(pull_tensors)} for {len(pull_keys)} to pull"
            )
        per_server, rest = divmod(len(pull_tensors), len(self._servers))
        if rest:
            raise ConfigError(f"{len(pull_tensors)} tensors to pull cannot be shared by {len(self._servers)} servers")
        described = [arrays.describe(tensor) for tensor in push_tensors]
        pulls = [Pull(key, arrays.describe(t).num_bytes) for key, t in zip(pull_keys, pull_tensors, strict=True)]
        table = Table(tuple(zip(push_keys, described, strict=True)), tuple(pulls))
        answers = [
            message.answer_bytes(pulls[place * per_server : (place + 1) * per_server])
            for place in range(len(self._servers))
        ]
        num_bytes = max(message.message_bytes(table), *answers)
        if num_bytes > self.environment.max_message_bytes:
            raise ConfigError(
                f"a message of {num_bytes} bytes exceeds STEPMESH_MAX_MESSAGE_BYTES "
                f"({self.environment.max_message_bytes}): set it higher in all processes"
            )
        return table, num_bytes

    def _free_stream(self) -> int:
        """A place for one more exchange; waits for one while all are taken."""
        env = self.environment
        deadline = time.monotonic() + env.timeout_s
        while len(self._streams) >= env.in_flight:
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                raise ExchangeTimeout(
                    f"{len(self._streams)} exchanges have had no answer for {env.timeout_s:g} s (STEPMESH_IN_FLIGHT)"
                )
            self.progress(left_s)
        return next(stream for stream in range(env.in_flight) if stream not in self._streams)

    def _under_way(self, handler: int) -> _Exchange | None:
        return next((one for one in self._streams.values() if one.handler == handler), None)

    def _take(self, event: Event) -> None:
        if isinstance(event, CombineArrived):
            self._arrived(event)
        elif isinstance(event, PeerDown):
            # Every exchange goes to every server: all of them are void.
            for exchange in list(self._streams.values()):
                self._fail(exchange, PeerLostError(f"{event.peer} is lost: {event.reason}"))
            self._chain, self._place = self._chain + 1, 0

    def _arrived(self, event: CombineArrived) -> None:
        exchange = self._streams.get(event.header.stream)
        if exchange is None or exchange.seq != event.header.seq or event.peer not in exchange.missing:
            return  # of an exchange that was given up
        seen_ns = time.monotonic_ns()
        try:
            _, contents, times = message.unpack(event.rows.reshape(-1).view(np.uint8))
            per_server = len(exchange.pull_tensors) // len(self._servers)
            first = event.peer.rank * per_server
            if len(contents) != per_server:
                raise ProtocolError(f"{event.peer} answered with {len(contents)} tensors, {per_server} were asked for")
            for tensor, content in zip(exchange.pull_tensors[first : first + per_server], contents, strict=True):
                arrays.write(tensor, content)
        except (ProtocolError, ConfigError) as error:
            self._fail(exchange, error)
            return
        exchange.missing.discard(event.peer)
        if not exchange.missing:
            del self._streams[exchange.stream]
            trace = [exchange.begun_ns, exchange.posted_ns, *times, seen_ns, time.monotonic_ns()]
            _remember(self._traces, exchange.handler, trace)

    def _fail(self, exchange: _Exchange, error: MeshError) -> None:
        del self._streams[exchange.stream]
        _remember(self._errors, exchange.handler, error)


def _remember(kept: OrderedDict[int, _T], handler: int, value: _T) -> None:
    kept[handler] = value
    if len(kept) > _MAX_REMEMBERED:
        kept.popitem(last=False)

"""The worker's end of the gateway conversation: requests in, tokens out, leases, resends. Main thread only.

Nothing here blocks: a gateway that does not read loses messages, and asks for them again (`Resend`).
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import zmq

from afd.messages.codec import MessageError, encode
from afd.messages.serving import (
    GatewayMessage,
    Lease,
    Refused,
    TokenChunk,
    TokenLogprobs,
    Tokens,
    WorkerMessage,
    gateway_message_decoder,
    lease_identity,
)
from afd.types import FinishReason

log = logging.getLogger(__name__)

FINISHED_KEPT = 1024  # ended requests whose tokens a gateway may still ask for again
MAX_LEASE_S = 60.0
PAUSE_S = 0.5
RECEIVE_BATCH = 256  # messages taken per call, so that a flood cannot starve the pipeline


@dataclass(slots=True)
class _Record:
    """All that was sent of one attempt: ids[i] has output index first_idx + i."""

    gateway: bytes
    attempt: int
    first_idx: int
    ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish: FinishReason | None = None
    error: str | None = None
    retryable: bool = False


class Frontend:
    """Owns the ROUTER socket; knows which gateway each request belongs to."""

    def __init__(self, socket: zmq.Socket[Any]):
        self._socket = socket
        self._records: OrderedDict[str, _Record] = OrderedDict()
        self._finished: OrderedDict[str, None] = OrderedDict()
        self._outbox: dict[bytes, list[TokenChunk]] = {}
        self._resent: set[str] = set()  # requests whose tokens are in the outbox once more
        self._lease_end_s: dict[bytes, float] = {}
        self._looked_s = float("inf")  # at the leases
        self.num_dropped = 0

    @property
    def fd(self) -> int:
        """Readable (edge-triggered) when `receive` may have something."""
        return int(self._socket.getsockopt(zmq.FD))

    def receive(self, now: float) -> Iterator[tuple[bytes, GatewayMessage]]:
        """Messages that wait, each taken when it is asked for, leases already booked. What is no message is logged."""
        for _ in range(RECEIVE_BATCH):
            try:
                frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                break
            if len(frames) != 2:
                log.warning("dropped a message of %d frames from a gateway (expected 2)", len(frames))
                continue
            try:
                message = gateway_message_decoder.decode(frames[1])
            except MessageError as error:
                log.warning("dropped a frame of gateway %s: %s", frames[0].hex(), error)
                continue
            if isinstance(message, Lease):
                gateway = frames[0]
                if gateway == lease_identity(message.gateway):
                    gateway = message.gateway.encode()
                self._lease_end_s[gateway] = now + min(max(0.0, message.ttl_s), MAX_LEASE_S)  # NaN counts as 0
            else:
                self._lease_end_s.setdefault(frames[0], now + 5.0)
            yield frames[0], message

    @property
    def has_input(self) -> bool:
        """True when messages wait: must be asked before blocking on `fd`, which is edge-triggered."""
        return bool(int(self._socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN)

    def wait(self, timeout_s: float) -> None:
        """Block until a message waits, at most `timeout_s`."""
        self._socket.poll(int(timeout_s * 1e3))

    def ended_leases(self, now: float) -> list[bytes]:
        """Gateways that went silent; they are forgotten, their requests are the caller's to abort.

        Call it after `receive`, many times a second: time in which this process stood still is nobody's silence.
        """
        gap_s, self._looked_s = now - self._looked_s, now
        if gap_s > PAUSE_S:
            self._lease_end_s = {gateway: end_s + gap_s for gateway, end_s in self._lease_end_s.items()}
        ended = [gateway for gateway, end_s in self._lease_end_s.items() if end_s < now]
        for gateway in ended:
            del self._lease_end_s[gateway]
        return ended

    @property
    def gateways(self) -> Iterable[bytes]:
        return self._lease_end_s.keys()

    def open(self, req_id: str, gateway: bytes, attempt: int, first_idx: int) -> None:
        """Start recording an attempt."""
        self._finished.pop(req_id, None)
        self._records[req_id] = _Record(gateway, attempt, first_idx)

    def post(self, chunk: TokenChunk) -> None:
        """Queue new tokens of an open request; `flush` sends one message per gateway."""
        record = self._records.get(chunk.req_id)
        if record is None or record.attempt != chunk.attempt:
            return
        record.ids.extend(chunk.ids)
        if chunk.logprobs is not None:
            record.logprobs.extend(chunk.logprobs)
        if chunk.finish is not None:
            record.finish, record.error, record.retryable = chunk.finish, chunk.error, chunk.retryable
            self._finished[chunk.req_id] = None
            while len(self._finished) > FINISHED_KEPT:
                oldest, _none = self._finished.popitem(last=False)
                self._records.pop(oldest, None)
        self._outbox.setdefault(record.gateway, []).append(chunk)

    def resend(self, req_id: str, attempt: int, from_idx: int) -> bool:
        """Queue what was sent before, from output index `from_idx` on. False: that attempt is not known here."""
        record = self._records.get(req_id)
        if record is None or record.attempt != attempt:
            return False
        if req_id in self._resent:
            return True  # asked for twice before the first answer left
        self._resent.add(req_id)
        skip = max(0, from_idx - record.first_idx)
        chunk = TokenChunk(
            req_id,
            attempt,
            record.first_idx + skip,
            record.ids[skip:],
            record.logprobs[skip:] or None,
            record.finish,
            record.error,
            record.retryable,
        )
        self._outbox.setdefault(record.gateway, []).append(chunk)
        return True

    def close_request(self, req_id: str) -> None:
        """Forget an aborted request."""
        self._records.pop(req_id, None)
        self._finished.pop(req_id, None)

    def flush(self) -> None:
        """Send what is queued: one message per gateway."""
        for gateway, chunks in self._outbox.items():
            self.send(gateway, Tokens(chunks))
        self._outbox.clear()
        self._resent.clear()

    def refuse(self, gateway: bytes, refused: Refused) -> None:
        self.send(gateway, refused)

    def send(self, gateway: bytes, message: WorkerMessage) -> None:
        """Send now; dropped when the gateway's queue is full or it has gone."""
        try:
            self._socket.send_multipart([gateway, encode(message)], zmq.NOBLOCK)
        except zmq.Again:
            self.num_dropped += 1

    def close(self) -> None:
        self._socket.close(linger=200)

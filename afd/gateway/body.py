"""Receiving requests' bodies, with a bound on each and on all together.

How long one may take is the connection's affair.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from starlette.requests import ClientDisconnect, Request

from afd.errors import RequestError, UnavailableError

MAX_LENGTH_DIGITS = 18


class Receipt:
    """One body in a `BodyRoom`: num_bytes of it are here.

    whole: nothing more is to come.
    """

    def __init__(self, room: BodyRoom, client: str, limit: asyncio.Timeout):
        self.client = client
        self.num_bytes = 0
        self.whole = False
        self.refused = False
        self._room = room
        self._limit = limit

    def add(self, num_bytes: int) -> None:
        """Some more of the body has come. UnavailableError when there is no room for it."""
        self._room.grow(self, num_bytes)
        if self.refused:
            raise _busy()

    def leave(self) -> None:
        """Its turn to be read has come: its bytes count no longer, and nobody takes its place. Idempotent."""
        self._room.forget(self)

    def refuse(self) -> None:
        """Whoever waits for this body, or with it, gets UnavailableError."""
        self.refused = True
        self._room.forget(self)
        self._limit.reschedule(asyncio.get_running_loop().time())


class BodyRoom:
    """All bodies that are being received or wait to be read, no more than `max_bytes`. Event-loop thread only.

    Where more comes, the client that has most here loses a body: the one that has been on its way longest, or where all
    of them are whole, the newest.
    """

    def __init__(self, max_bytes: int):
        self._max_bytes = max_bytes
        self._bodies: dict[str, dict[Receipt, None]] = {}  # by client, oldest first
        self._sizes: dict[str, int] = {}  # by client
        self.num_bytes = 0

    @contextlib.asynccontextmanager
    async def receive(self, client: str) -> AsyncIterator[Receipt]:
        """A receipt for a body that begins to come. UnavailableError where it has to make room."""
        receipt = None
        try:
            async with asyncio.timeout(None) as limit:
                receipt = Receipt(self, client, limit)
                self._bodies.setdefault(client, {})[receipt] = None
                yield receipt
        except TimeoutError as error:
            if receipt is not None and receipt.refused:
                raise _busy() from error
            raise
        finally:
            if receipt is not None:
                self.forget(receipt)

    def grow(self, receipt: Receipt, num_bytes: int) -> None:
        """Count more bytes of a body, and make room where they are too many."""
        receipt.num_bytes += num_bytes
        self._count(receipt.client, num_bytes)
        while self.num_bytes > self._max_bytes:
            self._victim().refuse()

    def forget(self, receipt: Receipt) -> None:
        """Count a body no longer. Idempotent."""
        bodies = self._bodies.get(receipt.client, {})
        if receipt not in bodies:
            return
        del bodies[receipt]
        self._count(receipt.client, -receipt.num_bytes)
        if not bodies:
            del self._bodies[receipt.client]
            del self._sizes[receipt.client]

    def _count(self, client: str, num_bytes: int) -> None:
        self.num_bytes += num_bytes
        self._sizes[client] = self._sizes.get(client, 0) + num_bytes

    def _victim(self) -> Receipt:
        bodies = self._bodies[max(self._sizes, key=self._sizes.__getitem__)]
        on_their_way = (receipt for receipt in bodies if not receipt.whole and receipt.num_bytes)
        return next(on_their_way, None) or next(receipt for receipt in reversed(bodies) if receipt.num_bytes)


async def read_body(request: Request, max_bytes: int, receipt: Receipt) -> bytes:
    """The whole body. UnavailableError.

    RequestError: 413 above `max_bytes`, 415 when it is compressed, 400 when it will never be complete.
    """
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        raise RequestError(
            f"bodies with Content-Encoding {encoding[:32]!r} are not read here: send it as it is",
            code="unsupported_encoding",
            status=415,
        )
    length = request.headers.get("content-length", "")
    # Digits are counted first: int() refuses thousands of them.
    if length.isascii() and length.isdigit() and (len(length) > MAX_LENGTH_DIGITS or int(length) > max_bytes):
        raise _too_large(max_bytes)
    chunks: list[bytes] = []
    try:
        async for chunk in request.stream():
            receipt.add(len(chunk))
            if receipt.num_bytes > max_bytes:
                raise _too_large(max_bytes)
            chunks.append(chunk)
    except ClientDisconnect as error:
        raise RequestError("the client hung up before its body was complete") from error
    receipt.whole = True
    return b"".join(chunks)


def _too_large(max_bytes: int) -> RequestError:
    return RequestError(
        f"the body is larger than {max_bytes} bytes (gateway.max_body_bytes)", code="body_too_large", status=413
    )


def _busy() -> UnavailableError:
    return UnavailableError(
        "too many bodies are being received, or wait to be read (gateway.max_waiting_bytes); retry later",
        code="overloaded",
    )

"""A transport whose `close` neither cuts off the last answer nor waits for its client for ever.

Closing a socket while the client still sends makes the kernel reset the connection, and the answer may be lost on the
way: a proxy turns a 413 into its own 502. So our direction is closed first, and what still comes is read and dropped
(RFC 9112, 9.6).
"""

from __future__ import annotations

import asyncio
from typing import Any

LINGER_S = 2.0
WRITE_STALL_S = 30.0


class ClosingTransport(asyncio.Transport):
    """Around the event loop's transport. The protocol calls `lost` when the connection is gone.

    linger: set while the client may still be sending, so that its data must be read, and dropped by the protocol.
    """

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop):
        super().__init__()
        self._transport = transport
        self._loop = loop
        self.linger = False
        self._closing = False
        self._timer: asyncio.TimerHandle | None = None

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self._transport.get_extra_info(name, default)

    def is_closing(self) -> bool:
        return self._closing or self._transport.is_closing()

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if not self.is_closing():
            self._transport.write(data)

    def pause_reading(self) -> None:
        if not self.is_closing():
            self._transport.pause_reading()

    def resume_reading(self) -> None:
        if not self.is_closing():
            self._transport.resume_reading()

    def close(self) -> None:
        """Close as soon as everything is written; abort a client that does not take it, or does not stop sending."""
        if self.is_closing():
            return
        self._closing = True
        unsent = self._transport.get_write_buffer_size()
        limit_s = LINGER_S if self.linger and not unsent else WRITE_STALL_S
        self._timer = self._loop.call_later(limit_s, self._transport.abort)
        if self.linger:
            self._transport.write_eof()
            self._transport.resume_reading()
        else:
            self._transport.close()

    def abort(self) -> None:
        self._closing = True
        self._transport.abort()

    def lost(self) -> None:
        self._closing = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

"""Host names to socket addresses, looked up in side threads: a name server that is away must not hold up a rank."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from stepmesh.errors import TransportError


class Endpoint(NamedTuple):
    """What `socket.socket` and `connect` take."""

    family: int
    kind: int
    protocol: int
    where: Any


GetAddrInfo = Callable[..., list[tuple[Any, ...]]]


def resolve(host: str, port: int, flags: int = 0, getaddrinfo: GetAddrInfo = socket.getaddrinfo) -> Endpoint:
    """The first address of a host. Blocks, but for addresses in digits. Raises OSError."""
    try:
        family, kind, protocol, _, where = getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=flags)[0]
    except ValueError as error:  # too long, a NUL in it: no name at all
        raise OSError(str(error)) from error
    return Endpoint(family, kind, protocol, where)


class NameResolver:
    """Main thread only. One thread a name, while it is being looked up.

    timeout_s: after which a look-up counts as failed; its answer counts for as long.
    on_answer: called in the side thread, when `look_up` has something to say.
    """

    def __init__(
        self,
        timeout_s: float,
        on_answer: Callable[[], None],
        *,
        getaddrinfo: GetAddrInfo = socket.getaddrinfo,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._timeout_s = timeout_s
        self._on_answer = on_answer
        self._getaddrinfo = getaddrinfo
        self._now = now
        self._lookups: dict[tuple[str, int], _LookUp] = {}

    def look_up(self, host: str, port: int) -> Endpoint | None:
        """The address to connect to; None: the name is being looked up, ask again. Raises TransportError.

        An answer is given once: a name may stand for another address the next time.
        """
        try:
            return resolve(host, port, socket.AI_NUMERICHOST)
        except OSError:
            pass  # a name
        key, now = (host, port), self._now()
        running = self._lookups.get(key)
        if running is None or (running.answer is not None and now - running.answer.at > self._timeout_s):
            self._lookups[key] = _LookUp(now)
            name = f"stepmesh-names {host}"
            threading.Thread(target=self._run, args=(self._lookups[key], host, port), name=name, daemon=True).start()
            return None
        if running.answer is None:
            if now - running.since > self._timeout_s:
                raise TransportError(f"looking up {host!r} has had no answer for {now - running.since:.1f} s")
            return None
        del self._lookups[key]
        found = running.answer.found
        if isinstance(found, OSError):
            raise TransportError(f"cannot resolve {host!r}: {found}")
        return found

    def _run(self, lookup: _LookUp, host: str, port: int) -> None:  # side thread
        found: Endpoint | OSError
        try:
            found = resolve(host, port, getaddrinfo=self._getaddrinfo)
        except OSError as error:
            found = error
        lookup.answer = _Answer(self._now(), found)
        self._on_answer()


class _Answer(NamedTuple):
    at: float
    found: Endpoint | OSError


class _LookUp:
    def __init__(self, since: float) -> None:
        self.since = since
        self.answer: _Answer | None = None  # set once, by the side thread

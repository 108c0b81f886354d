"""The process that reads requests: a fresh interpreter without keys or secrets, with a bound on its memory."""

from __future__ import annotations

import contextlib
import gc
import logging
import resource
import signal
import socket
from collections.abc import Sequence
from types import FrameType
from typing import Any

import msgspec

from afd.errors import RequestError
from afd.gateway.intake.protocol import LENGTH, Refusal, Reply, Setup, pack
from afd.gateway.intake.reader import RawRequest, RequestReader
from afd.gateway.templating import BAD_TEMPLATE, ChatTemplate, Message

log = logging.getLogger(__name__)

MAX_TASK_BYTES = 1 << 30  # of memory, beyond what the tokenizer needs
RENDER_S = 5.0
ALARM_S = 60  # the gateway kills it earlier; this is for when the gateway is killed in the midst of a request
MAX_MESSAGE_CHARS = 2_000

_requests = msgspec.msgpack.Decoder(RawRequest)


class _TooSlow(BaseException):
    """Raised inside a template by the alarm. It is no Exception: templates are foreign code, which may catch those."""


class TimedTemplate(ChatTemplate):
    """A template that comes to an end. Main thread only; what no signal can interrupt is the gateway's to kill."""

    def render(self, messages: Sequence[Message], **how: Any) -> str:
        previous = signal.signal(signal.SIGALRM, _too_slow)
        signal.setitimer(signal.ITIMER_REAL, RENDER_S)
        try:
            return super().render(messages, **how)
        except _TooSlow as error:
            reason = f"the chat template did not come to an end within {RENDER_S:g} s"
            raise RequestError(reason, param="messages", code=BAD_TEMPLATE) from error
        finally:
            signal.signal(signal.SIGALRM, previous)
            signal.alarm(ALARM_S)


def _too_slow(signum: int, frame: FrameType | None) -> None:
    raise _TooSlow


def serve(descriptor: int) -> None:
    """Answer until the other end closes."""
    with contextlib.suppress(ConnectionError), socket.socket(fileno=descriptor) as connection:
        signal.alarm(ALARM_S)
        setup = _receive(connection)
        if not setup:
            return
        decoded = msgspec.msgpack.decode(setup, type=Setup)
        reader = RequestReader(decoded.restore(TimedTemplate), decoded.limits)
        del setup
        _limit_memory()
        gc.collect()
        gc.freeze()
        gc.disable()  # millions of objects may come from one body, and each collection would look at all of them
        _send(connection, msgspec.msgpack.encode(Reply()))
        signal.alarm(0)
        while data := _receive(connection):
            signal.alarm(ALARM_S)
            for frame in _answer(reader, data):
                _send(connection, frame)
            del data
            gc.collect()
            signal.alarm(0)


def _answer(reader: RequestReader, data: bytes) -> tuple[bytes, bytes]:
    ids = b""
    try:
        reply, ids = pack(reader.read(_requests.decode(data)))
    except RequestError as error:
        error.args = (str(error)[:MAX_MESSAGE_CHARS],)
        reply = Reply(refusal=Refusal.of(error))
    except MemoryError:
        reply = Reply(refusal=Refusal("reading this request needs too much memory", None, "too_large", 413))
    except Exception:
        log.exception("a request could not be read")
        reply = Reply(failed=True)
    return msgspec.msgpack.encode(reply), ids


def _limit_memory() -> None:
    with contextlib.suppress(ValueError, OSError):  # not on every system
        with open("/proc/self/statm") as statm:
            size = int(statm.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + MAX_TASK_BYTES,) * 2)


def _receive(connection: socket.socket) -> bytes:
    """One frame; empty when the other end has closed."""
    head = connection.recv(LENGTH.size, socket.MSG_WAITALL)
    if len(head) < LENGTH.size:
        return b""
    data = bytearray(LENGTH.unpack(head)[0])
    view, num_read = memoryview(data), 0
    while num_read < len(data):
        count = connection.recv_into(view[num_read:])
        if not count:
            return b""
        num_read += count
    return bytes(data)


def _send(connection: socket.socket, data: bytes) -> None:
    connection.sendall(LENGTH.pack(len(data)) + data)

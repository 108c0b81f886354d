"""Chat templates in a process of their own, where they can be stopped.

A template is a program from a stranger: a few characters of it loop for ever, or fill the memory in one multiplication
that no thread can interrupt. Here such a program costs the request that ran it, and nobody else: the child's memory is
limited, a request has a deadline, and a child that misses it is killed and replaced. The child is a fresh interpreter,
so that no key and no secret is in its memory.

Protocol, over a socket pair: frames of a length and a body. The first one to the child is `_Setup`, then each `_Task`
gets one `_Answer`.
"""

from __future__ import annotations

import contextlib
import logging
import resource
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from afd.errors import ModelError, RequestError, UnavailableError
from afd.gateway.templating import BAD_TEMPLATE, ChatTemplate, Message, Tools, reason_of

log = logging.getLogger(__name__)

START_S = 15.0  # a fresh interpreter on a busy machine, and compiling
RENDER_S = 5.0
MAX_MEMORY_BYTES = 512 << 20
SAMPLE = [{"role": "user", "content": "Hello"}]
SAMPLE_CHARS = 1 << 20
_LENGTH = struct.Struct("!I")
_MAX_FRAME_BYTES = 1 << 28


class _Setup(msgspec.Struct, array_like=True):
    sources: dict[str, str]
    special_tokens: dict[str, str]


class _Task(msgspec.Struct, array_like=True):
    messages: list[Message]
    max_chars: int
    tools: list[dict[str, Any]] | None
    add_generation_prompt: bool
    extra: dict[str, Any]


class _Answer(msgspec.Struct, array_like=True):
    """text, or the reason why there is none with its code."""

    text: str | None = None
    reason: str = ""
    code: str | None = None


class TemplateProcess:
    """A `Renderer` in a child process. Thread-safe: one request after the other. `close` ends the child."""

    def __init__(self, sources: Mapping[str, str], special_tokens: Mapping[str, str], *, render_s: float = RENDER_S):
        self._setup = msgspec.json.encode(_Setup(dict(sources), dict(special_tokens)))
        self._render_s = render_s
        self._lock = threading.Lock()
        self._child: _Child | None = None
        self._closed = False

    def check(self) -> None:
        """Render a short conversation. ModelError when the template is not valid, or does not come to an end."""
        try:
            self.render(SAMPLE, max_chars=SAMPLE_CHARS)
        except RequestError as error:
            if error.code in (BAD_TEMPLATE, "context_length_exceeded"):
                raise ModelError(str(error)) from error
            log.debug("the chat template takes no lone user message: %s", error)

    def render(
        self,
        messages: Sequence[Message],
        *,
        max_chars: int,
        tools: Tools | None = None,
        add_generation_prompt: bool = True,
        extra: Mapping[str, Any] | None = None,
    ) -> str:
        """As `Renderer.render`; UnavailableError when others keep the template busy."""
        task = _Task(list(messages), max_chars, None, add_generation_prompt, dict(extra or {}))
        task.tools = None if tools is None else [dict(tool) for tool in tools]
        try:
            data = msgspec.json.encode(task)
        except (OverflowError, RecursionError, TypeError, ValueError) as error:
            raise RequestError(
                f"the chat template cannot be given these messages: {reason_of(error)}", param="messages"
            ) from error
        if not self._lock.acquire(timeout=self._render_s):
            raise UnavailableError("other requests keep the chat template busy", code="overloaded")
        try:
            answer = self._ask(data)
        finally:
            self._lock.release()
        if answer.text is None:
            raise RequestError(answer.reason, param="messages", code=answer.code)
        return answer.text

    def close(self) -> None:
        """End the child. Idempotent."""
        with self._lock:
            self._closed = True
            self._drop_child()

    def _ask(self, data: bytes) -> _Answer:
        if self._closed:
            raise UnavailableError("the gateway is shutting down", code="shutdown")
        reused = self._child is not None
        try:
            if self._child is None:
                self._child = _Child(self._setup)
            return self._child.ask(data, self._render_s)
        except TimeoutError:
            self._drop_child()
            return _Answer(
                reason=f"the chat template did not come to an end within {self._render_s:g} s", code=BAD_TEMPLATE
            )
        except (OSError, msgspec.MsgspecError) as error:
            self._drop_child()
            if reused:  # it may have died since its last answer: this request is not to blame
                return self._ask(data)
            return _Answer(reason=f"the chat template ended its process: {reason_of(error)}", code=BAD_TEMPLATE)

    def _drop_child(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            child.close()


class _Child:
    """One child process. Any error means that it is of no use any more: close it."""

    def __init__(self, setup: bytes):
        self._socket, theirs = socket.socketpair()
        program = f"import sys; sys.path[:] = {sys.path!r}; from {__name__} import serve; serve({theirs.fileno()})"
        try:
            with theirs:
                self._process = subprocess.Popen(
                    [sys.executable, "-c", program],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    pass_fds=(theirs.fileno(),),
                    process_group=0,  # Ctrl-C is for the gateway, which still renders while it drains
                )
            _send(self._socket, setup, time.monotonic() + START_S)
            if _receive(self._socket, time.monotonic() + START_S) is None:
                raise ConnectionError("it could not be compiled")
        except BaseException:
            self.close()
            raise

    def ask(self, data: bytes, timeout_s: float) -> _Answer:
        """TimeoutError, or OSError when the child is gone."""
        deadline = time.monotonic() + timeout_s
        _send(self._socket, data, deadline)
        reply = _receive(self._socket, deadline)
        if reply is None:
            raise ConnectionError("it is gone")
        return msgspec.json.decode(reply, type=_Answer)

    def close(self) -> None:
        self._socket.close()
        process = getattr(self, "_process", None)
        if process is not None:
            process.kill()
            process.wait()


def serve(descriptor: int) -> None:
    """The child: answer tasks until the other end closes."""
    with contextlib.suppress(ValueError, OSError):  # not on every system
        resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    own_limit_s = int(2 * max(START_S, RENDER_S))  # if the gateway is killed in the midst of a task
    with contextlib.suppress(ConnectionError), socket.socket(fileno=descriptor) as connection:
        signal.alarm(own_limit_s)
        setup = _receive(connection, None)
        if setup is None:
            return
        decoded = msgspec.json.decode(setup, type=_Setup)
        template = ChatTemplate(decoded.sources, decoded.special_tokens)
        _send(connection, b"", None)
        signal.alarm(0)
        while (data := _receive(connection, None)) is not None:
            signal.alarm(own_limit_s)
            _send(connection, _answer(template, data), None)
            signal.alarm(0)


def _answer(template: ChatTemplate, data: bytes) -> bytes:
    try:
        task = msgspec.json.decode(data, type=_Task)
        text = template.render(
            task.messages,
            max_chars=task.max_chars,
            tools=task.tools,
            add_generation_prompt=task.add_generation_prompt,
            extra=task.extra,
        )
        return msgspec.json.encode(_Answer(text))
    except RequestError as error:
        return msgspec.json.encode(_Answer(None, str(error), error.code))
    except (MemoryError, msgspec.MsgspecError, RecursionError) as error:
        reason = f"the chat template cannot be given these messages: {reason_of(error)}"
        return msgspec.json.encode(_Answer(None, reason))


def _send(connection: socket.socket, data: bytes, deadline: float | None) -> None:
    connection.settimeout(_remaining(deadline))
    connection.sendall(_LENGTH.pack(len(data)) + data)


def _receive(connection: socket.socket, deadline: float | None) -> bytes | None:
    """One frame; None when the other end has closed."""
    head = _receive_exactly(connection, _LENGTH.size, deadline)
    if not head:
        return None
    (num_bytes,) = _LENGTH.unpack(head)
    if num_bytes > _MAX_FRAME_BYTES:
        raise ConnectionError(f"a frame of {num_bytes} bytes")
    return _receive_exactly(connection, num_bytes, deadline)


def _receive_exactly(connection: socket.socket, num_bytes: int, deadline: float | None) -> bytes:
    """Empty when the other end has closed."""
    data = bytearray()
    while len(data) < num_bytes:
        connection.settimeout(_remaining(deadline))
        piece = connection.recv(min(num_bytes - len(data), 1 << 20))
        if not piece:
            return b""
        data += piece
    return bytes(data)


def _remaining(deadline: float | None) -> float | None:
    """Seconds until then; TimeoutError when there are none."""
    if deadline is None:
        return None
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left

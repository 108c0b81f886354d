"""The gateway's end of a process that reads requests: started, asked, and killed when it takes too long."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import threading

import msgspec

from afd.errors import AfdError, UnavailableError
from afd.gateway.intake.protocol import LENGTH, MAX_FRAME_BYTES, Reply, unpack
from afd.gateway.intake.reader import Prepared, RawRequest

START_S = 60.0  # a fresh interpreter on a busy machine, and a tokenizer of many megabytes
READ_S = 20.0
LONG_PROMPT_TOKENS = 1 << 14  # others get a turn after so many ids were turned into integers

_replies = msgspec.msgpack.Decoder(Reply)


class ReaderProcess:
    """One child, one request at a time. Event-loop thread only; `close` kills it."""

    def __init__(self, setup: bytes, *, read_s: float = READ_S):
        """setup: the first frame."""
        self._setup = setup
        self._read_s = read_s
        self._process: subprocess.Popen[bytes] | None = None
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    @property
    def pid(self) -> int | None:
        """None = not running."""
        return None if self._process is None else self._process.pid

    async def start(self) -> None:
        """Bring the child up, unless it is. UnavailableError when that fails."""
        if self._process is not None and self._process.poll() is None:
            return
        self.close()
        try:
            async with asyncio.timeout(START_S):
                self._process, ours = await _spawned()
                self._reader, self._writer = await asyncio.open_connection(sock=ours, limit=1 << 20)
                await self._send(self._setup)
                await self._receive()
        except (OSError, EOFError, TimeoutError) as error:
            self.close()
            raise UnavailableError(f"the process that reads requests does not start: {error!r}") from error
        except BaseException:
            self.close()
            raise

    async def read(self, request: RawRequest) -> Prepared:
        """RequestError when the request is refused; AfdError when the child takes too long over it, or dies of it."""
        await self.start()
        try:
            async with asyncio.timeout(self._read_s):
                await self._send(msgspec.msgpack.encode(request))
                reply, ids = _replies.decode(await self._receive()), await self._receive()
        except TimeoutError as error:
            self.close()
            raise AfdError(f"reading this request took longer than {self._read_s:.0f} s") from error
        except (OSError, EOFError, msgspec.MsgspecError) as error:
            self.close()
            raise AfdError("the process that reads requests ended with this one") from error
        except BaseException:
            self.close()  # an answer that nobody waits for must not become the next one's
            raise
        steps = unpack(request.route, reply, memoryview(ids))
        for length in reply.lengths:
            next(steps)
            if length >= LONG_PROMPT_TOKENS:
                await asyncio.sleep(0)
        prepared = next(steps)
        assert prepared is not None
        return prepared

    def close(self) -> None:
        """Kill the child. Idempotent."""
        process, writer = self._process, self._writer
        self._process = self._reader = self._writer = None
        if writer is not None:
            writer.close()
        if process is not None:
            _end(process)

    async def _send(self, data: bytes) -> None:
        assert self._writer is not None
        self._writer.write(LENGTH.pack(len(data)))
        self._writer.write(data)
        await self._writer.drain()

    async def _receive(self) -> bytes:
        assert self._reader is not None
        (num_bytes,) = LENGTH.unpack(await self._reader.readexactly(LENGTH.size))
        if num_bytes > MAX_FRAME_BYTES:
            raise ConnectionError(f"a frame of {num_bytes} bytes")
        return await self._reader.readexactly(num_bytes)


async def _spawned() -> tuple[subprocess.Popen[bytes], socket.socket]:
    """`_spawn` in a thread, which nothing can stop: what nobody waits for any more is ended when it is there."""
    spawning = asyncio.ensure_future(asyncio.to_thread(_spawn))
    try:
        return await asyncio.shield(spawning)
    except asyncio.CancelledError:
        spawning.add_done_callback(_discard)
        raise


def _discard(spawning: asyncio.Future[tuple[subprocess.Popen[bytes], socket.socket]]) -> None:
    if not spawning.cancelled() and spawning.exception() is None:
        process, ours = spawning.result()
        ours.close()
        _end(process)


def _spawn() -> tuple[subprocess.Popen[bytes], socket.socket]:
    """A child, and our end of the connection to it."""
    ours, theirs = socket.socketpair()
    with theirs:
        code = f"from afd.gateway.intake.child import serve; serve({theirs.fileno()})"
        try:
            process = subprocess.Popen(
                [sys.executable, "-c", f"import sys; sys.path[:] = {sys.path!r}; {code}"],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                process_group=0,  # Ctrl-C is for the gateway, which still reads while it drains
                env={**os.environ, "TOKENIZERS_PARALLELISM": "false"},
            )
        except BaseException:
            ours.close()
            raise
    return process, ours


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill it, and wait in a thread: a process of a gigabyte takes a while to go."""
    process.kill()
    threading.Thread(target=process.wait, name="end of a request reader").start()

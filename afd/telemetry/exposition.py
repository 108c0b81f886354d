"""Prometheus metrics of one process: its registry, and a tiny HTTP server for /metrics, probes and dumps.

Each process makes its own registry and passes it down; nothing registers itself globally. The server has a thread of
its own, and one that makes pages, so a scrape never runs on a worker's main thread. /metrics and the probes ask for no
key: what they show must be fit for everyone who can reach the port (numbers and times; no text, no tokens). And whoever
can reach it must not keep the probes from being answered, since a silent probe ends the process.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import http
import logging
import resource
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import parse_qsl

import httptools
from prometheus_client import CollectorRegistry, Info, ProcessCollector
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from afd import __version__
from afd.errors import ConfigError
from afd.types import host_port

log = logging.getLogger(__name__)

MAX_CONNECTIONS = 256
ACCEPTED_AT_ONCE = 16  # a fraction of the connections: who has just come is heard before it has to make room
MAX_PENDING = 1024  # connections not accepted yet
MAX_HEAD_BYTES = 16 << 10
REQUEST_TIMEOUT_S = 1.0  # from the connection, or the last answer, to the last byte of a request
ANSWER_TIMEOUT_S = 3.0
MAX_REQUESTS = 64  # over one connection
RESTS = 4.0  # after a page of /metrics, of the time that it took: strangers cost a process a fifth of a core at most
MAX_REST_S = 0.25
TEXT = "text/plain; charset=utf-8"
JSON_LINES = "application/x-ndjson"
_RESET = struct.pack("ii", 1, 0)
Ready = Callable[[], tuple[bool, str]]
Page = Callable[[Mapping[str, str]], Iterable[bytes]]
"""Query -> chunks of JSON lines; ValueError for a wrong query. Called from a thread of the server's, one at a time."""


def process_registry(role: str) -> CollectorRegistry:
    """A fresh registry with the process's CPU, memory and descriptors, and afd_build_info{version, role}."""
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    Info("afd_build", "Version and role of this process", registry=registry).info(
        {"version": __version__, "role": role}
    )
    return registry


class MetricsServer:
    """Serves /metrics, /livez (200 while the process lives), /readyz (503 with the reason while it is not ready),
    /clock (the reading of `time.perf_counter()`, to compare clocks with) and further pages.

    port: 0 = any.
    ready: called from the server's thread; does not wait.
    pages: by path, for holders of the bearer token `token` only.

    `close()` frees the port and ends the threads.
    """

    def __init__(
        self,
        host: str,
        port: int,
        registry: CollectorRegistry,
        ready: Ready,
        pages: Mapping[str, Page] | None = None,
        *,
        token: str = "",
    ):
        host = host.strip("[]")
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            self._socket = socket.create_server((host, port), family=family, backlog=MAX_PENDING)
        except OSError as error:
            raise ConfigError(f"metrics cannot listen on {host}:{port}: {error.strerror}") from error
        self.address = host_port(host, self._socket.getsockname()[1])
        self._loop = asyncio.new_event_loop()
        self._site = _Site(self._loop, registry, ready, pages or {}, token)
        self._thread = threading.Thread(target=self._run, name="metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Idempotent; returns after the page that is being made."""
        with contextlib.suppress(RuntimeError):  # the loop has ended already
            self._loop.call_soon_threadsafe(self._site.stop)
        self._thread.join()

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._site.serve(self._socket))


class _Site:
    """What is served, and to whom: a bounded number of clients, the oldest making room. In the server's thread."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        registry: CollectorRegistry,
        ready: Ready,
        pages: Mapping[str, Page],
        token: str,
    ):
        self._loop = loop
        self._registry = registry
        self._ready = ready
        self._pages = pages
        self._expected = f"Bearer {token}".encode() if token else None
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._max_clients = MAX_CONNECTIONS if soft == resource.RLIM_INFINITY else min(MAX_CONNECTIONS, soft // 4)
        self._clients: dict[_Client, None] = {}  # oldest first
        self._scrapers: list[_Client] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_scraping = False
        self._maker = ThreadPoolExecutor(1, thread_name_prefix="metrics")  # of pages, however many ask
        self._stopped = asyncio.Event()

    async def serve(self, sock: socket.socket) -> None:
        """Serve until `stop`."""
        self._loop.set_exception_handler(_log_failure)
        server = await self._loop.create_server(lambda: _Client(self), sock=sock, backlog=ACCEPTED_AT_ONCE)
        sock.listen(MAX_PENDING)  # asyncio takes one number for both
        await self._stopped.wait()
        self._loop.remove_reader(sock.fileno())  # who was accepted meanwhile still becomes a client, to be cut
        for task in self._tasks:
            task.cancel()
        rest = asyncio.all_tasks() - {asyncio.current_task()}  # also asyncio's own, of clients that just came
        await asyncio.gather(*rest, return_exceptions=True)
        for client in list(self._clients):
            client.cut()
        server.close()
        await asyncio.sleep(0)  # a turn, in which their sockets are closed
        self._maker.shutdown()

    def stop(self) -> None:
        """Stop serving, also where that has not begun."""
        self._stopped.set()

    def admit(self, client: _Client) -> None:
        """The oldest makes room for one more, whatever it is doing: so nobody who has just come is put out unheard."""
        if len(self._clients) >= self._max_clients:
            next(iter(self._clients)).cut()
        self._clients[client] = None

    def forget(self, client: _Client) -> None:
        self._clients.pop(client, None)

    def serve_request(self, client: _Client, method: str, target: str, authorization: bytes) -> None:
        """Answers now, or a little later where a page must be made."""
        now_s = time.perf_counter()
        path, _, query = target.partition("?")
        if method != "GET":
            client.answer(405, TEXT, b"only GET is served\n")
        elif path == "/metrics":
            self._scrapers.append(client)
            if not self._is_scraping:
                self._is_scraping = True
                self._begin(self._scrape())
        elif path == "/livez":
            client.answer(200, TEXT, b"ok\n")
        elif path == "/readyz":
            ready, reason = self._ready()
            client.answer(200 if ready else 503, TEXT, f"{'ok' if ready else reason}\n".encode())
        elif path == "/clock":
            client.answer(200, "application/json", f'{{"perf_counter_s": {now_s!r}}}\n'.encode())
        elif path not in self._pages:
            known = ", ".join(["/metrics", "/livez", "/readyz", "/clock", *self._pages])
            client.answer(404, TEXT, f"try one of {known}\n".encode())
        elif self._expected is None or not hmac.compare_digest(authorization, self._expected):
            client.answer(401, TEXT, f"{path} needs the cluster's token for it\n".encode())
        else:
            self._begin(self._show(client, self._pages[path], dict(parse_qsl(query))))

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _scrape(self) -> None:
        """One page for all who ask before it is begun, then a rest."""
        while self._scrapers:
            waiting, self._scrapers = self._scrapers, []
            begun = time.monotonic()
            try:
                page = await self._loop.run_in_executor(self._maker, generate_latest, self._registry)
            except Exception:
                log.exception("the metrics cannot be read")
                for client in waiting:
                    client.answer(500, TEXT, b"the metrics cannot be read: see the log\n")
            else:
                for client in waiting:
                    client.answer(200, CONTENT_TYPE_LATEST, page)
            await asyncio.sleep(min(MAX_REST_S, RESTS * (time.monotonic() - begun)))
        self._is_scraping = False

    async def _show(self, client: _Client, page: Page, query: dict[str, str]) -> None:
        try:
            body = await self._loop.run_in_executor(self._maker, lambda: b"".join(page(query)))
        except ValueError as error:
            client.answer(400, TEXT, f"{error}\n".encode())
        else:
            client.answer(200, JSON_LINES, body)


def _log_failure(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """A client that hangs up, or a lack of descriptors, is no failure of ours."""
    error = context.get("exception")
    quiet = error is None or isinstance(error, OSError)
    log.log(logging.DEBUG if quiet else logging.ERROR, "metrics: %s", context["message"], exc_info=error)


class _Client(asyncio.Protocol):
    """One connection: a request at a time, each within its deadline, each answered before the next is looked at."""

    def __init__(self, site: _Site):
        self._site = site
        self._parser = httptools.HttpRequestParser(self)
        self._transport: asyncio.Transport
        self._deadline: asyncio.TimerHandle | None = None
        self._requests: deque[tuple[str, str, bytes, bool]] = deque()
        self._num_requests = 0
        self._num_bytes = 0  # since the last complete request
        self._target = b""
        self._authorization = b""
        self._is_last = False  # the request that is being answered
        self._has_ended = False  # nothing more is read
        self._is_answered = False  # a complete request of its is being answered

    def cut(self) -> None:
        """Close the connection at once, whatever is under way."""
        self._site.forget(self)
        if self._transport.get_write_buffer_size():  # nor does the kernel keep what is not read
            self._transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        self._transport.abort()

    def answer(self, status: int, content_type: str, body: bytes) -> None:
        """The one that `serve_request` was asked for."""
        if self._transport.is_closing():
            return
        head = (
            f"HTTP/1.1 {status} {http.HTTPStatus(status).phrase}\r\nContent-Type: {content_type}\r\n"
            f"Content-Length: {len(body)}\r\nConnection: {'close' if self._is_last else 'keep-alive'}\r\n\r\n"
        )
        self._transport.write(head.encode() + body)
        if self._transport.get_write_buffer_size() == 0:
            self.resume_writing()

    # --- asyncio's ------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.set_write_buffer_limits(high=0)  # resume_writing: all of the answer is sent
        self._wait_for(REQUEST_TIMEOUT_S)
        self._site.admit(self)

    def connection_lost(self, error: Exception | None) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        self._site.forget(self)

    def data_received(self, data: bytes) -> None:
        if self._has_ended:
            return
        self._num_bytes += len(data)
        if self._num_bytes > MAX_HEAD_BYTES or len(self._requests) > MAX_REQUESTS:
            self.cut()
            return
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):  # what came whole is answered
            self._has_ended = True
            if not self._requests and not self._is_answered:
                self.cut()
        if not self._is_answered:
            self._take_request()

    def eof_received(self) -> bool:
        """True keeps the connection open until the answer is sent."""
        return self._is_answered

    def resume_writing(self) -> None:
        """The answer is on its way as a whole."""
        if self._is_last or (self._has_ended and not self._requests):
            self._transport.close()
        elif self._is_answered:
            self._is_answered = False
            self._wait_for(REQUEST_TIMEOUT_S)
            self._take_request()

    # --- the parser's ---------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        self._target = self._authorization = b""

    def on_url(self, url: bytes) -> None:
        self._target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() == b"authorization":
            self._authorization = value

    def on_message_complete(self) -> None:
        self._num_bytes = 0
        self._num_requests += 1
        method = self._parser.get_method().decode()
        goes_on = self._parser.should_keep_alive() and method == "GET"
        is_last = not goes_on or self._num_requests >= MAX_REQUESTS
        self._requests.append((method, self._target.decode("latin-1"), self._authorization, is_last))

    # ---------------------------------------------------------------------------------------------------------

    def _take_request(self) -> None:
        if self._requests and not self._is_last:
            method, target, authorization, is_last = self._requests.popleft()
            self._is_last = is_last or (self._has_ended and not self._requests)
            self._is_answered = True
            self._wait_for(ANSWER_TIMEOUT_S)
            self._site.serve_request(self, method, target, authorization)

    def _wait_for(self, seconds: float) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        self._deadline = asyncio.get_running_loop().call_later(seconds, self.cut)

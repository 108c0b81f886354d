"""Prometheus metrics of one process: its registry, and a tiny HTTP server for /metrics, probes and dumps.

Each process makes its own registry and passes it down; nothing registers itself globally. The server has threads of its
own and renders there, so a scrape never runs on a worker's main thread. Nothing here asks for a key: what a page
shows must be fit for everyone who can reach the port (numbers and times; no text, no tokens). And whoever can reach it
must not keep the probes from being answered, since a silent probe ends the process.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl

from prometheus_client import CollectorRegistry, Info, ProcessCollector
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from afd import __version__
from afd.errors import ConfigError

log = logging.getLogger(__name__)

MAX_CONNECTIONS = 32  # a thread each
REQUEST_TIMEOUT_S = 1.0  # from the connection, or the last answer, to the last byte of a request
ANSWER_TIMEOUT_S = 3.0
MAX_REQUESTS = 64  # over one connection
OUT_OF_DESCRIPTORS_PAUSE_S = 0.05
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
    /clock (the reading of `time.perf_counter()`, for whoever compares clocks) and further pages.

    port: 0 = any.  ready: called from any thread.  pages: by path.  `close()` frees the port and ends the threads.
    """

    def __init__(
        self,
        host: str,
        port: int,
        registry: CollectorRegistry,
        ready: Ready,
        pages: Mapping[str, Page] | None = None,
    ):
        try:
            self._server = _Server((host.strip("[]"), port), registry, ready, pages or {})
        except OSError as error:
            raise ConfigError(f"metrics cannot listen on {host}:{port}: {error.strerror}") from error
        self.address = f"{host}:{self._server.server_address[1]}"
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.1}, name="metrics", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Idempotent; returns within about 0.1 s, or after the answer that is being made."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
        self._server.server_close()


@dataclass(slots=True)
class _Connection:
    """Its client is given until `ends_at`."""

    sock: socket.socket
    ends_at: float
    answering: bool = False


class _Server(ThreadingHTTPServer):
    """A bounded number of connections, each with a deadline: who is slow, or idle, makes room for who is not."""

    request_queue_size = 128
    daemon_threads = False  # server_close waits for them

    def __init__(self, address: tuple[str, int], registry: CollectorRegistry, ready: Ready, pages: Mapping[str, Page]):
        self.registry = registry
        self.ready = ready
        self.pages = pages
        self.rendering = threading.Lock()  # however many ask, one page at a time costs the process
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self._lock = threading.Lock()
        self._connections: dict[Any, _Connection] = {}  # by socket, oldest first
        super().__init__(address, _Handler)

    def get_request(self) -> tuple[socket.socket, Any]:
        try:
            return super().get_request()
        except OSError:
            time.sleep(OUT_OF_DESCRIPTORS_PAUSE_S)  # accepting again at once would only spin
            raise

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._lock:
            if len(self._connections) >= MAX_CONNECTIONS:
                self._cut(min(self._connections.values(), key=lambda connection: connection.answering))
            self._connections[request] = _Connection(request, time.monotonic() + REQUEST_TIMEOUT_S)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self._lock:
            self._connections.pop(request, None)
        super().shutdown_request(request)

    def set_answering(self, request: Any, answering: bool) -> None:
        """A request is complete, or answered: its client's next deadline begins."""
        with self._lock:
            connection = self._connections.get(request)
            if connection is not None:
                connection.answering = answering
                connection.ends_at = time.monotonic() + (ANSWER_TIMEOUT_S if answering else REQUEST_TIMEOUT_S)

    def service_actions(self) -> None:
        """Several times a second, and at each connection."""
        now = time.monotonic()
        with self._lock:
            for connection in [one for one in self._connections.values() if one.ends_at < now]:
                self._cut(connection)

    def server_close(self) -> None:
        with self._lock:
            for connection in list(self._connections.values()):
                self._cut(connection)
        super().server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up or sends garbage is its own problem."""
        log.debug("metrics client %s failed", client_address, exc_info=True)

    def _cut(self, connection: _Connection) -> None:
        """Its thread reads an end of file, or cannot write, and ends. With the lock held."""
        del self._connections[connection.sock]
        with contextlib.suppress(OSError):
            connection.sock.shutdown(socket.SHUT_RDWR)


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    server_version = "afd"
    sys_version = ""
    disable_nagle_algorithm = True
    num_requests = 0  # over this connection

    def do_GET(self) -> None:
        now_s = time.perf_counter()
        self.server.set_answering(self.request, True)
        self.num_requests += 1
        self.close_connection |= self.num_requests >= MAX_REQUESTS
        self._serve(now_s)
        self.server.set_answering(self.request, False)

    def _serve(self, now_s: float) -> None:
        path, _, query = self.path.partition("?")
        if path == "/metrics":
            with self.server.rendering:
                page = generate_latest(self.server.registry)
            self._answer(200, CONTENT_TYPE_LATEST, page)
        elif path == "/livez":
            self._answer(200, "text/plain; charset=utf-8", b"ok\n")
        elif path == "/readyz":
            ready, reason = self.server.ready()
            text = "ok" if ready else reason
            self._answer(200 if ready else 503, "text/plain; charset=utf-8", f"{text}\n".encode())
        elif path == "/clock":
            self._answer(200, "application/json", f'{{"perf_counter_s": {now_s!r}}}\n'.encode())
        elif path in self.server.pages:
            self._page(self.server.pages[path], query)
        else:
            known = ", ".join(["/metrics", "/livez", "/readyz", "/clock", *self.server.pages])
            self._answer(404, "text/plain; charset=utf-8", f"try one of {known}\n".encode())

    def log_message(self, format: str, *args: Any) -> None:
        log.debug(format, *args)

    def _answer(self, status: int, content_type: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Connection", "close" if self.close_connection else "keep-alive")
        self.end_headers()
        self.wfile.write(body)

    def _page(self, page: Page, query: str) -> None:
        """The end of the connection is the end of the answer: its length is not known before."""
        try:
            chunks = page(dict(parse_qsl(query)))
        except ValueError as error:
            self._answer(400, "text/plain; charset=utf-8", f"{error}\n".encode())
            return
        self.close_connection = True
        self.send_response(200)
        self.send_header("Content-Type", "application/x-ndjson")
        self.end_headers()
        rest = iter(chunks)
        while True:
            with self.server.rendering:
                chunk = next(rest, None)
            if chunk is None:
                return
            self.wfile.write(chunk)

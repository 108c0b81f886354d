"""Prometheus metrics of one process: its registry, and a tiny HTTP thread for /metrics, probes and dumps.

Each process makes its own registry and passes it down; nothing registers itself globally. The server runs in its own
thread and renders there, so a scrape never runs on a worker's main thread. Nothing here asks for a key: what a page
shows must be fit for everyone who can reach the port (numbers and times; no text, no tokens).
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any
from urllib.parse import parse_qsl

from prometheus_client import CollectorRegistry, Info, ProcessCollector
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from afd import __version__
from afd.errors import ConfigError

log = logging.getLogger(__name__)

CLIENT_TIMEOUT_S = 1.0  # one slow client holds the thread for no longer
PAGE_TIMEOUT_S = 3.0  # nor does one long answer
MAX_PINGS = 64  # clock readings over one connection
Ready = Callable[[], tuple[bool, str]]
Page = Callable[[Mapping[str, str]], Iterable[bytes]]
"""Query -> chunks of JSON lines; ValueError for a wrong query. Called from the server's thread."""


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

    port: 0 = any.  ready: called from the server's thread.  pages: by path.  `close()` frees the port and ends the
    thread.
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
        """Idempotent; returns within about 0.1 s, or after the client being served (1 s)."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
        self._server.server_close()


class _Server(HTTPServer):
    """Single-threaded: metrics have one reader at a time, and a bounded wait for each."""

    request_queue_size = 16

    def __init__(self, address: tuple[str, int], registry: CollectorRegistry, ready: Ready, pages: Mapping[str, Page]):
        self.registry = registry
        self.ready = ready
        self.pages = pages
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        super().__init__(address, _Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up or sends garbage is its own problem."""
        log.debug("metrics client %s failed", client_address, exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    server_version = "afd"
    sys_version = ""
    timeout = CLIENT_TIMEOUT_S
    disable_nagle_algorithm = True
    num_pings = 0  # over this connection

    def do_GET(self) -> None:
        now_s = time.perf_counter()
        path, _, query = self.path.partition("?")
        if path == "/metrics":
            self._answer(200, CONTENT_TYPE_LATEST, generate_latest(self.server.registry))
        elif path == "/livez":
            self._answer(200, "text/plain; charset=utf-8", b"ok\n")
        elif path == "/readyz":
            ready, reason = self.server.ready()
            text = "ok" if ready else reason
            self._answer(200 if ready else 503, "text/plain; charset=utf-8", f"{text}\n".encode())
        elif path == "/clock":
            self.num_pings += 1
            self.close_connection = self.num_pings >= MAX_PINGS
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
        self.send_response(200)
        self.send_header("Content-Type", "application/x-ndjson")
        self.end_headers()
        until_s = time.monotonic() + PAGE_TIMEOUT_S
        for chunk in chunks:
            self.wfile.write(chunk)
            if time.monotonic() > until_s:
                log.warning("a client of %s reads too slowly: cut off", self.path)
                return

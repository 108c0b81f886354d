"""The gateway process: bind, serve, drain. Everything with a lifetime is made and closed here."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator

import uvicorn
import uvloop

from afd.config import ClusterConfig
from afd.errors import ConfigError, RequestError
from afd.gateway.acceptor import Acceptor
from afd.gateway.api_keys import load_api_keys
from afd.gateway.app import build_app
from afd.gateway.connections import Connections
from afd.gateway.http_protocol import HttpEdge, StrictHttpProtocol
from afd.gateway.served_model import ServedModel, load_served_model
from afd.gateway.service import GatewayService
from afd.host.open_files import OWN_FILES, open_files_limit
from afd.membership.port import Membership
from afd.telemetry.rare_log import RareLog
from afd.types import host_port

log = logging.getLogger(__name__)

STOP_POLL_S = 0.1
LOAD_S = 1.0
FAREWELL_S = 2  # for the last events of ended streams to leave
BACKLOG = 1024
MIN_CONNECTIONS = 16
SEND_BUFFER_BYTES = 256 << 10  # per connection, inherited: a client that does not read is noticed, and costs no more


def run_gateway(
    config: ClusterConfig,
    membership: Membership,
    secret: bytes,
    on_ready: Callable[[str], None],
    stop: threading.Event,
    model: ServedModel | None = None,
    on_load: Callable[[dict[str, float]], None] = lambda load: None,
) -> int:
    """Serve until `stop` is set (or the cluster shuts down), drain, return the exit code 0.

    on_ready: called once with the URL as soon as connections are accepted (not: as soon as the cluster is ready).
    on_load: called once a second with `GatewayService.load()`, from the event loop.
    model: None = resolve the configured one. ConfigError: port in use, bad key file. ModelError: bad model files.
    """
    keys = load_api_keys(config.gateway.api_keys_file)
    served = model if model is not None else load_served_model(config.model, config.gateway.generation_config)

    async def serve(listener: socket.socket) -> None:
        service = GatewayService(config, served, membership, secret)
        connections = Connections(max_connections(config.gateway.max_connections, open_files_limit()), time.monotonic)
        server = _Server(
            uvicorn.Config(
                build_app(service, keys),
                http=StrictHttpProtocol,
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_graceful_shutdown=FAREWELL_S,
            )
        )
        service.start()
        service.intake.warm_up()
        serving = asyncio.get_running_loop().create_task(server.serve(sockets=[]))
        acceptor: Acceptor | None = None
        try:
            while not server.started and not serving.done():
                await asyncio.sleep(0.01)
            edge = HttpEdge(connections, _on_refused(service))
            acceptor = Acceptor(
                listener, connections, lambda: StrictHttpProtocol(edge, server.config, server.server_state, {})
            )
            on_ready(url_of(listener))
            load_at = 0.0
            while not (stop.is_set() or serving.done() or _shut_down(membership)):
                now = time.monotonic()
                if now >= load_at:
                    load_at = now + LOAD_S
                    on_load(service.load(now))
                await asyncio.sleep(STOP_POLL_S)
            log.info("draining: %d requests are running", service.num_requests_running)
            await service.drain(config.gateway.drain_s)
        finally:
            if acceptor is not None:
                await acceptor.close()
            server.should_exit = True
            await serving
            await service.close()

    with bind(config.gateway.host, config.gateway.port) as listener:
        uvloop.run(serve(listener))
    return 0


def max_connections(wanted: int, max_open_files: int) -> int:
    """How many connections are taken: `wanted`, or as many as leave the process the files that it needs itself."""
    return max(MIN_CONNECTIONS, min(wanted, max_open_files - OWN_FILES))


def bind(host: str, port: int) -> socket.socket:
    """A listening socket (port 0 = any free one); ConfigError when the address cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        listener.bind((host, port))
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise ConfigError(f"the gateway cannot listen on {host}:{port}: {error.strerror or error}") from error
    listener.setblocking(False)
    return listener


def url_of(listener: socket.socket) -> str:
    """http://host:port of a listening socket; a wildcard address is shown as localhost."""
    host, port = listener.getsockname()[:2]
    if host in ("0.0.0.0", "::"):
        host = "localhost"
    return f"http://{host_port(host, port)}"


def _on_refused(service: GatewayService) -> Callable[[RequestError, str], None]:
    """Count what was refused before it was a request, and log it now and then."""
    news = RareLog(log)

    def on_refused(error: RequestError, client: str) -> None:
        service.metrics.http_request("invalid", error.status)
        news.warn(f"refused what {client or 'a client'} sent: {error}")

    return on_refused


def _shut_down(membership: Membership) -> bool:
    view = membership.view()
    return view is not None and view.shutdown


class _Server(uvicorn.Server):
    """Leaves signals to the process that owns us (it sets `stop`)."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

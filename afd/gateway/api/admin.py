"""Routes for operators: liveness, readiness, metrics, version, the cluster's state, and a page for humans."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from starlette.responses import HTMLResponse, PlainTextResponse, Response

from afd import __version__
from afd.errors import UnavailableError
from afd.gateway.api.answers import ClusterState, Health, Version
from afd.gateway.api.openapi import answers
from afd.gateway.dialect import json
from afd.gateway.errors import error_response
from afd.gateway.page import load_page
from afd.gateway.service import GatewayService


class AdminRoutes:
    """Handlers bound to one service."""

    def __init__(self, service: GatewayService):
        self._service = service
        self._page, self._page_headers = load_page()

    def install(self, app: FastAPI) -> None:
        ready = answers(Health, errors=(503,), is_open=True)
        for path, handler, described in (
            ("/", self.page, {"response_class": HTMLResponse}),
            ("/favicon.ico", self.favicon, {"include_in_schema": False}),
            ("/livez", self.livez, answers(Health, is_open=True)),
            ("/readyz", self.readyz, ready),
            ("/health", self.readyz, ready),
            ("/metrics", self.metrics, {"response_class": PlainTextResponse}),
            ("/version", self.version, answers(Version, is_open=True)),
            ("/cluster", self.cluster, answers(ClusterState)),
        ):
            app.add_api_route(path, handler, methods=["GET"], response_model=None, **described)

    async def livez(self, request: Request) -> Response:
        """The process answers."""
        return _json_response({"status": "ok"})

    async def readyz(self, request: Request) -> Response:
        """Requests are taken; 503 with the reason otherwise."""
        reason = self._service.unready_reason()
        if reason is not None:
            return error_response(UnavailableError(reason, code="not_ready"))
        return _json_response({"status": "ok"})

    async def metrics(self, request: Request) -> Response:
        """Prometheus text."""
        return Response(generate_latest(self._service.registry), media_type=CONTENT_TYPE_LATEST)

    async def version(self, request: Request) -> Response:
        """This software's version."""
        return _json_response({"version": __version__})

    async def cluster(self, request: Request) -> Response:
        """Topology, members and load, as the gateway sees them."""
        return _json_response(self._cluster_state())

    async def page(self, request: Request) -> Response:
        """A chat box and the cluster's state."""
        return Response(self._page, headers=self._page_headers, media_type="text/html")

    async def favicon(self, request: Request) -> Response:
        """There is none, which is no error."""
        return Response(status_code=204)

    def _cluster_state(self) -> dict[str, Any]:
        service = self._service
        view = service.view()
        workers = {worker.key: worker for worker in service.dispatcher.workers.values()}
        members = []
        for member in view.members if view is not None else ():
            entry: dict[str, Any] = {
                "role": member.info.role,
                "rank": member.rank,
                "host": member.info.host,
                "ready": member.ready,
                "draining": member.draining,
            }
            worker = workers.get(member.info.incarnation)
            if worker is not None:
                entry["serving"] = worker.serving
                entry["stats"] = worker.stats
            members.append(entry)
        return {
            "model": service.model.name,
            "max_context": service.model.max_context,
            "topology": str(service.config.topology),
            "ready": service.unready_reason() is None,
            "reason": service.unready_reason(),
            "epoch": view.epoch if view is not None else 0,
            "queued": len(service.dispatcher.queue),
            "running": service.dispatcher.num_running,
            "members": members,
        }


def _json_response(value: object) -> Response:
    return Response(json(value), media_type="application/json")

"""The FastAPI application: routes, error shape, middleware. Everything it needs comes with the service."""

from __future__ import annotations

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

from afd import __version__
from afd.errors import AfdError
from afd.gateway.api.admin import AdminRoutes
from afd.gateway.api.openai import OpenAiRoutes
from afd.gateway.api.openapi import document
from afd.gateway.api_keys import ApiKeys
from afd.gateway.browser_guard import BrowserGuard
from afd.gateway.errors import on_afd_error, on_http_error, on_unexpected_error
from afd.gateway.middleware import RequestGate
from afd.gateway.service import GatewayService


def build_app(service: GatewayService, keys: ApiKeys) -> ASGIApp:
    """The ASGI application. The caller starts and closes the service.

    The gate is outermost, so that even the answer to a bug of ours has its request id and is counted.
    """
    app = FastAPI(title="AFD gateway", version=__version__, docs_url=None, redoc_url=None, redirect_slashes=False)
    AdminRoutes(service).install(app)
    OpenAiRoutes(service).install(app)
    app.add_exception_handler(AfdError, on_afd_error)
    app.add_exception_handler(HTTPException, on_http_error)
    app.add_exception_handler(Exception, on_unexpected_error)
    paths = frozenset(getattr(route, "path", "") for route in app.routes)
    app.openapi = lambda: document(app)  # type: ignore[method-assign]
    guard = None if keys.required else BrowserGuard.of(service.config.gateway)
    return RequestGate(app, keys, guard, service.metrics, paths)

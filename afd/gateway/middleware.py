"""Around every request: its id (X-Request-Id in and out), the API key or who sent it, the count by path and status.

Plain ASGI: it costs a streamed token one function call.
"""

from __future__ import annotations

import hashlib
import re
import uuid

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from afd.errors import RequestError
from afd.gateway.api_keys import ApiKeys
from afd.gateway.browser_guard import BrowserGuard
from afd.gateway.errors import error_response
from afd.gateway.metrics import GatewayMetrics

OPEN_PATHS = frozenset({"/", "/livez", "/readyz", "/health", "/metrics", "/version", "/favicon.ico"})
_REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,128}")


class RequestGate:
    """Outermost ASGI application.

    guard: None where keys are asked for.
    paths: the routes counted by name; all others count as "other".
    """

    def __init__(
        self, app: ASGIApp, keys: ApiKeys, guard: BrowserGuard | None, metrics: GatewayMetrics, paths: frozenset[str]
    ):
        self._app = app
        self._keys = keys
        self._guard = guard
        self._metrics = metrics
        self._paths = paths

    def _client(self, scope: Scope, headers: dict[bytes, bytes]) -> str:
        """Whose turn a request counts as: its key's, or its host's where keys are not asked for."""
        if self._keys.required:
            return hashlib.sha256(headers.get(b"authorization", b"")).hexdigest()
        return scope["client"][0] if scope.get("client") else ""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        given_id = headers.get(b"x-request-id", b"")
        request_id = given_id.decode() if _REQUEST_ID.fullmatch(given_id) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        path = scope["path"] if scope["path"] in self._paths else "other"

        async def counted_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                # A copy: streams share one start message.
                message = {**message, "headers": list(message["headers"])}
                MutableHeaders(scope=message)["x-request-id"] = request_id
                self._metrics.http_request(path, message["status"])
            await send(message)

        scope["state"]["client"] = self._client(scope, headers)
        try:
            self._check(scope, headers)
        except RequestError as error:
            await error_response(error)(scope, receive, counted_send)
        else:
            await self._app(scope, receive, counted_send)

    def _check(self, scope: Scope, headers: dict[bytes, bytes]) -> None:
        """RequestError for what is not let in."""
        if self._guard is not None:
            self._guard.check(scope["method"], headers)
        needs_key = self._keys.required and scope["path"] not in OPEN_PATHS
        if needs_key and not self._keys.accepts(headers.get(b"authorization", b"")):
            raise RequestError("missing or wrong API key", code="invalid_api_key", status=401)

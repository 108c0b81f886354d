"""One error shape for everything: {"error": {"message", "type", "param", "code"}}, in answers and in streams."""

from __future__ import annotations

import http
import logging
import math

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from afd.errors import AfdError, PeerLostError, RequestError, UnavailableError

log = logging.getLogger(__name__)

_TYPES = {401: "authentication_error", 503: "service_unavailable", 504: "timeout"}
MAX_RETRY_AFTER_S = 3600.0  # of any forecast, also one that is no number


class ApiError(msgspec.Struct):
    """What goes over the wire, plus the status and headers it travels with."""

    message: str
    type: str
    param: str | None
    code: str | None

    def json(self) -> bytes:
        return msgspec.json.encode({"error": self})


def describe(error: Exception) -> tuple[int, ApiError, dict[str, str]]:
    """An exception as status, body and headers. What is not ours is a 500 that tells nothing of the inside."""
    headers: dict[str, str] = {}
    param: str | None = None
    code: str | None
    if isinstance(error, RequestError):
        status, message, param, code = error.status, str(error), error.param, error.code
    elif isinstance(error, UnavailableError):
        status, message, code = (504 if error.code == "timeout" else 503), str(error), error.code
        headers["retry-after"] = str(math.ceil(min(max(1.0, error.retry_after_s), MAX_RETRY_AFTER_S)))
    elif isinstance(error, PeerLostError):
        status, message, code = 503, str(error), "worker_lost"
        headers["retry-after"] = "1"
    elif isinstance(error, HTTPException):
        status, message, code = error.status_code, str(error.detail), None
        headers.update(error.headers or {})
    elif isinstance(error, AfdError):
        status, message, code = 500, str(error), "worker_error"
    else:
        status, message, code = 500, "internal error of the gateway; its log has the details", "internal_error"
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return status, ApiError(message, kind, param, code), headers


def error_response(error: Exception) -> Response:
    """An exception as an HTTP response."""
    status, body, headers = describe(error)
    if status == 401:
        headers["www-authenticate"] = "Bearer"
    return Response(body.json(), status, headers, media_type="application/json")


def error_event(error: Exception) -> bytes:
    """An exception as the last events of a stream."""
    return b"data: " + describe(error)[1].json() + b"\n\ndata: [DONE]\n\n"


async def on_afd_error(request: Request, error: Exception) -> Response:
    """FastAPI handler of `AfdError`."""
    return error_response(error)


async def on_http_error(request: Request, error: Exception) -> Response:
    """FastAPI handler of routing errors: says which path or method it was."""
    assert isinstance(error, HTTPException)
    path = request.scope["path"]  # a URL made of it would take //name for a host
    if error.status_code == http.HTTPStatus.NOT_FOUND:
        return error_response(RequestError(f"there is nothing at {path}", code="unknown_path", status=404))
    if error.status_code == http.HTTPStatus.METHOD_NOT_ALLOWED:
        response = error_response(
            RequestError(f"{path} does not take {request.method}", code="method_not_allowed", status=405)
        )
        response.headers.update(error.headers or {})
        return response
    return error_response(error)


async def on_unexpected_error(request: Request, error: Exception) -> Response:
    """Handler of everything else: a bug of ours. The server logs the traceback."""
    return error_response(error)

"""The OpenAPI document: FastAPI's view of the routes, with the bodies and answers that msgspec describes. Pure."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import msgspec
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from afd.gateway.api.answers import SHAPES, ErrorAnswer
from afd.gateway.api.schema import DECODERS, BodyDecoder, TokenizeBody

API_KEY = "api_key"
_REASONS = {
    400: "The request is not valid, or asks for what is not supported; `param` names the field",
    401: "The API key is missing or wrong",
    404: "There is no such model",
    408: "The body did not arrive in time",
    413: "The body is too large",
    500: "A worker failed the request for good, or a bug of the gateway",
    503: "Not ready, overloaded, or the request's worker was lost",
    504: "The request took too long",
}
_BODY_ERRORS = (400, 401, 404, 408, 413, 500)
GENERATION_ERRORS = (*_BODY_ERRORS, 503, 504)
_HEADERS = (
    ("X-Request-Id", {"type": "string", "maxLength": 128}, "Comes back in the answer"),
    ("X-SLA-TTFT-Ms", {"type": "number", "exclusiveMinimum": 0}, "This request's own target for the first token"),
    ("X-SLA-TPOT-Ms", {"type": "number", "exclusiveMinimum": 0}, "This request's own target for the others"),
)


def answers(
    shape: type, *, events: type | None = None, errors: Collection[int] = (), is_open: bool = False
) -> dict[str, Any]:
    """Arguments of `add_api_route` for a GET of JSON.

    shape: of the answer.
    events: of a stream's.
    errors: statuses beside 200.
    is_open: no key is needed.
    """
    content: dict[str, Any] = {"application/json": {"schema": _reference(shape)}}
    if events is not None:
        stream = {
            "type": "string",
            "description": f"Server-sent events: `data: ` with a {events.__name__} each (an ErrorAnswer when it breaks "
            "off), and `data: [DONE]` at the end. Lines that begin with a colon are comments.",
            "contentSchema": _reference(events),
        }
        content["text/event-stream"] = {"schema": stream}
    described: dict[int, Any] = {200: {"description": "Successful", "content": content}}
    for status in sorted({*errors, *(() if is_open else (401,))}):
        described[status] = {
            "description": _REASONS[status],
            "content": {"application/json": {"schema": _reference(ErrorAnswer)}},
        }
        if status in (503, 504):
            described[status]["headers"] = {"Retry-After": {"schema": {"type": "integer"}, "description": "Seconds"}}
    return {"responses": described, "openapi_extra": {} if is_open else {"security": [{}, {API_KEY: []}]}}


def takes(decoder: BodyDecoder[Any], shape: type, *, events: type | None = None) -> dict[str, Any]:
    """The answers of a POST of JSON, as `answers` has them; events: the answer may be a stream of these."""
    arguments = answers(shape, events=events, errors=_BODY_ERRORS if events is None else GENERATION_ERRORS)
    schema = _reference(decoder.body_type)
    arguments["openapi_extra"]["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    if events is not None:
        arguments["openapi_extra"]["parameters"] = [
            {"name": name, "in": "header", "schema": schema, "description": text} for name, schema, text in _HEADERS
        ]
    return arguments


def path_parameter(name: str, text: str) -> dict[str, Any]:
    """A parameter that the handler takes from the path by itself."""
    return {"name": name, "in": "path", "required": True, "schema": {"type": "string"}, "description": text}


def document(app: FastAPI) -> dict[str, Any]:
    """The whole document; made once."""
    if app.openapi_schema is None:
        schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
        bodies = [decoder.body_type for decoder in DECODERS]
        _, shapes = msgspec.json.schema_components([*bodies, *SHAPES], ref_template="#/components/schemas/{name}")
        for decoder in DECODERS:
            shapes[decoder.body_type.__name__]["properties"] |= decoder.unsupported.schema()
        shapes[TokenizeBody.__name__]["anyOf"] = [{"required": ["prompt"]}, {"required": ["messages"]}]
        components = schema.setdefault("components", {})
        components.setdefault("schemas", {}).update(shapes)
        components["securitySchemes"] = {
            API_KEY: {"type": "http", "scheme": "bearer", "description": "Where `gateway.api_keys_file` is set"}
        }
        app.openapi_schema = schema
    return app.openapi_schema


def _reference(shape: type) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{shape.__name__}"}

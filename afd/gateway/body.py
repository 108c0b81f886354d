"""Reading a request's body with a bound on its size. How long it may take is the connection's affair."""

from __future__ import annotations

from starlette.requests import ClientDisconnect, Request

from afd.errors import RequestError

MAX_LENGTH_DIGITS = 18


async def read_body(request: Request, max_bytes: int) -> bytes:
    """The whole body. RequestError: 413 above `max_bytes`, 400 when it will never be complete."""
    length = request.headers.get("content-length", "")
    # Digits are counted first: int() refuses thousands of them.
    if length.isascii() and length.isdigit() and (len(length) > MAX_LENGTH_DIGITS or int(length) > max_bytes):
        raise _too_large(max_bytes)
    chunks: list[bytes] = []
    num_bytes = 0
    try:
        async for chunk in request.stream():
            num_bytes += len(chunk)
            if num_bytes > max_bytes:
                raise _too_large(max_bytes)
            chunks.append(chunk)
    except ClientDisconnect as error:
        raise RequestError("the client hung up before its body was complete") from error
    return b"".join(chunks)


def _too_large(max_bytes: int) -> RequestError:
    return RequestError(
        f"the body is larger than {max_bytes} bytes (gateway.max_body_bytes)", code="body_too_large", status=413
    )

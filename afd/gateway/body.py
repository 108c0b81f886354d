"""Reading a request's body with a bound on its size and on the time it may take."""

from __future__ import annotations

import asyncio

from starlette.requests import ClientDisconnect, Request

from afd.errors import RequestError

BODY_TIMEOUT_S = 60.0
MAX_LENGTH_DIGITS = 18


async def read_body(request: Request, max_bytes: int) -> bytes:
    """The whole body. RequestError: 413 above `max_bytes`, 408 when it does not arrive, 400 after a hang-up."""
    length = request.headers.get("content-length", "")
    # Digits are counted first: int() refuses thousands of them.
    if length.isascii() and length.isdigit() and (len(length) > MAX_LENGTH_DIGITS or int(length) > max_bytes):
        raise _too_large(max_bytes)
    chunks: list[bytes] = []
    num_bytes = 0
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            async for chunk in request.stream():
                num_bytes += len(chunk)
                if num_bytes > max_bytes:
                    raise _too_large(max_bytes)
                chunks.append(chunk)
    except TimeoutError as error:
        raise RequestError(f"the body did not arrive within {BODY_TIMEOUT_S:.0f} s", status=408) from error
    except ClientDisconnect as error:
        raise RequestError("the client hung up before its body was complete") from error
    return b"".join(chunks)


def _too_large(max_bytes: int) -> RequestError:
    return RequestError(
        f"the body is larger than {max_bytes} bytes (gateway.max_body_bytes)", code="body_too_large", status=413
    )

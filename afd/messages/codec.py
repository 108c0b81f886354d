"""msgpack codec: strict on the way in, so that a hostile or mismatched frame is a typed error, never a crash.

Unknown fields are ignored (a newer peer may send more); missing or mistyped ones are `MessageError`.
"""

from __future__ import annotations

from typing import Generic, TypeVar

import msgspec

from afd.errors import AfdError

T = TypeVar("T")


class MessageError(AfdError):
    """A frame is not a valid message of the expected type: the sender is wrong; drop the frame."""


_ENCODER = msgspec.msgpack.Encoder()


def encode(message: msgspec.Struct) -> bytes:
    """Any message struct -> bytes."""
    return _ENCODER.encode(message)


class Decoder(Generic[T]):
    """Reusable decoder for one message type or union of tagged types."""

    def __init__(self, message_type: type[T]):
        self._decoder: msgspec.msgpack.Decoder[T] = msgspec.msgpack.Decoder(message_type)

    def decode(self, data: bytes | memoryview) -> T:
        """Bytes -> message; MessageError names the field that is wrong."""
        try:
            return self._decoder.decode(data)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, OverflowError) as error:
            raise MessageError(f"not a valid message: {error}") from error

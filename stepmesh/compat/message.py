"""Tensors in one payload: a table of contents, then their bytes, each aligned to 64. Pure.

The mesh carries rows; a message takes as many rows of ROW_BYTES as it needs, and its answer has as many: a message is
as large as the larger of what is pushed and what one server may answer.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from stepmesh.compat.arrays import Described
from stepmesh.errors import ConfigError, ProtocolError
from stepmesh.layout import align

ROW_BYTES = 4096
_ALIGN = 64
_HEAD = struct.Struct("<IIQQQQ")  # bytes of the table, 0, four times in ns (answers)
Bytes = npt.NDArray[np.uint8]


class Pull(NamedTuple):
    """A tensor that a server is to fill."""

    key: int
    num_bytes: int


class Table(NamedTuple):
    """What a message holds: `tensors` with their keys, and what is asked for (a push; all servers' pulls)."""

    tensors: tuple[tuple[int, Described], ...]
    pulls: tuple[Pull, ...] = ()


class Times(NamedTuple):
    """The server's four, monotonic ns."""

    seen: int = 0
    taken: int = 0
    answered: int = 0
    posted: int = 0


_NO_TIMES = Times()


def message_bytes(table: Table) -> int:
    """Size of a message."""
    place = align(_HEAD.size + len(_encode(table)), _ALIGN)
    for _, described in table.tensors:
        place = align(place + described.num_bytes, _ALIGN)
    return place


def answer_bytes(pulls: Sequence[Pull]) -> int:
    """An upper limit for the answer to these pulls, whatever shapes it has."""
    return sum(align(pull.num_bytes, _ALIGN) + 512 for pull in pulls) + 256


def num_rows(num_bytes: int) -> int:
    """Rows of the mesh that hold so many bytes."""
    return -(-num_bytes // ROW_BYTES)


def pack(target: Bytes, table: Table, contents: Sequence[Bytes], times: Times = _NO_TIMES) -> None:
    """Write a message. Raises ConfigError when it does not fit."""
    encoded = _encode(table)
    if message_bytes(table) > target.size:
        raise ConfigError(f"a message of {message_bytes(table)} bytes does not fit {target.size}")
    _HEAD.pack_into(target.data, 0, len(encoded), 0, *times)
    place = _HEAD.size + len(encoded)
    target[_HEAD.size : place] = np.frombuffer(encoded, np.uint8)
    place = align(place, _ALIGN)
    for content in contents:
        target[place : place + content.size] = content
        place = align(place + content.size, _ALIGN)


def unpack(source: Bytes) -> tuple[Table, list[Bytes], Times]:
    """The table and views of the contents. Raises ProtocolError."""
    if source.size < _HEAD.size:
        raise ProtocolError("an empty message")
    size, _, *times = _HEAD.unpack_from(source.data)
    if size > source.size - _HEAD.size:
        raise ProtocolError(f"a table of {size} bytes in a message of {source.size}")
    place = _HEAD.size + size
    table = _decode(source[_HEAD.size : place].tobytes())
    place = align(place, _ALIGN)
    contents = []
    for _, described in table.tensors:
        if described.num_bytes > source.size - place:
            raise ProtocolError(f"{described.num_bytes} bytes of a tensor do not fit a message of {source.size}")
        contents.append(source[place : place + described.num_bytes])
        place = align(place + described.num_bytes, _ALIGN)
    return table, contents, Times(*times)


@lru_cache(maxsize=1024)
def _encode(table: Table) -> bytes:
    """The same tables come again and again."""
    tensors = [[key, *described[:2], list(described.shape)] for key, described in table.tensors]
    return json.dumps([tensors, table.pulls], separators=(",", ":")).encode("ascii")


@lru_cache(maxsize=1024)
def _decode(encoded: bytes) -> Table:
    try:
        tensors, pulls = json.loads(encoded)
        return Table(
            tuple((_natural(key), Described.of(str(kind), str(dtype), shape)) for key, kind, dtype, shape in tensors),
            tuple(Pull(_natural(key), _natural(size)) for key, size in pulls),
        )
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ProtocolError(f"a message's table is malformed: {error!r}") from None


def _natural(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 64:
        raise ValueError(f"{str(value)[:40]} is no key or size")
    return value

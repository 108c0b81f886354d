"""What helm and kubectl send as protobuf, as the JSON of the same object: the kinds and fields that they make here.

Field numbers: generated.proto of k8s.io/api/core/v1 and of k8s.io/apimachinery.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Any

MAGIC = b"k8s\0"
Fields = dict[int, tuple[str, Any]]

METADATA: Fields = {1: ("name", "text"), 3: ("namespace", "text"), 11: ("labels", "map"), 12: ("annotations", "map")}
TARGET: Fields = {2: ("intVal", "number")}
PORT: Fields = {1: ("name", "text"), 2: ("protocol", "text"), 3: ("port", "number"), 4: ("targetPort", TARGET)}
SERVICE: Fields = {1: ("ports", [PORT]), 2: ("selector", "map"), 3: ("clusterIP", "text"), 4: ("type", "text")}
KINDS: dict[str, Fields] = {
    "Namespace": {1: ("metadata", METADATA)},
    "Secret": {1: ("metadata", METADATA), 2: ("data", "map of bytes"), 3: ("type", "text")},
    "Service": {1: ("metadata", METADATA), 2: ("spec", SERVICE)},
}


def decoded(data: bytes) -> dict[str, Any]:
    """The object; KeyError when its kind is none of KINDS."""
    assert data.startswith(MAGIC)
    envelope = dict(_fields(data[len(MAGIC) :]))
    names = {1: ("apiVersion", "text"), 2: ("kind", "text")}
    what = _message(envelope[1], names)
    return {**what, **_message(envelope[2], KINDS[what["kind"]])}


def _message(data: bytes, known: Fields) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for number, value in _fields(data):
        name, kind = known.get(number, ("", None))
        if kind in ("map", "map of bytes"):
            key, content = (dict(_fields(value)).get(part, b"") for part in (1, 2))
            text = content.decode() if kind == "map" else base64.b64encode(content).decode()
            found.setdefault(name, {})[key.decode()] = text
        elif isinstance(kind, list):
            found.setdefault(name, []).append(_message(value, kind[0]))
        elif kind is TARGET:
            found[name] = _message(value, kind).get("intVal", 0)
        elif isinstance(kind, dict):
            found[name] = _message(value, kind)
        elif kind is not None:
            found[name] = value.decode() if kind == "text" else value
    return found


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of each: bytes, or a number."""
    place = 0

    def varint() -> int:
        nonlocal place
        value = shift = 0
        while True:
            byte = data[place]
            place += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while place < len(data):
        tag = varint()
        size = varint()
        if tag & 7 == 0:
            yield tag >> 3, size
        else:
            assert tag & 7 == 2, "these kinds hold numbers and bytes only"
            yield tag >> 3, data[place : place + size]
            place += size

"""Server-sent events out of a byte stream, incrementally: bytes in, `data` payloads out. Pure.

Source: WHATWG HTML, section 9.2 "Server-sent events". Lines end with LF, CR LF or CR; an event ends with an empty
line; several `data` lines are joined with LF; comments and other fields are skipped. An unfinished event at the
end of the stream is no event. The shape that servers send, `data: {...}` LF LF with whole events in each read, takes a
path of one split and no loop over lines.
"""

from __future__ import annotations

MAX_EVENT_BYTES = 1 << 20


class SseError(ValueError):
    """The stream cannot be followed any further."""


class SseParser:
    """One stream's parser. Not thread-safe."""

    __slots__ = ("_ends_with_cr", "_rest")

    def __init__(self) -> None:
        self._rest = b""
        self._ends_with_cr = False

    def feed(self, data: bytes) -> list[bytes]:
        """Payloads that `data` completes. Raises SseError when an event exceeds MAX_EVENT_BYTES."""
        if not data:
            return []
        if self._ends_with_cr or b"\r" in data:
            data = self._normalise(data)
        if self._rest:
            data = self._rest + data
        blocks = data.split(b"\n\n")
        self._rest = blocks.pop()
        if len(self._rest) > MAX_EVENT_BYTES:
            raise SseError(f"an event of more than {MAX_EVENT_BYTES} bytes")
        payloads = []
        for block in blocks:
            if block.startswith(b"data: ") and b"\n" not in block:
                payloads.append(block[6:])
            elif (payload := _payload(block)) is not None:
                payloads.append(payload)
        return payloads

    def _normalise(self, data: bytes) -> bytes:
        """All line ends as LF. The LF of a CR LF that two reads share is dropped: its CR has counted already."""
        if self._ends_with_cr and data.startswith(b"\n"):
            data = data[1:]
        self._ends_with_cr = data.endswith(b"\r")
        return data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")


def _payload(block: bytes) -> bytes | None:
    """The joined `data` lines of one event; None when it has none."""
    lines = []
    for line in block.split(b"\n"):
        if line.startswith(b"data:"):
            lines.append(line[6:] if line.startswith(b"data: ") else line[5:])
        elif line == b"data":
            lines.append(b"")
    return b"\n".join(lines) if lines else None

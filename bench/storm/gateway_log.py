"""Who served which stream, from the gateway's log at level debug. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable

from bench.storm.account import Placement

DAY_S = 86400.0
_LINE = re.compile(r"(\d\d):(\d\d):(\d\d\.\d{3}) D gateway\S*\s+(\S.*)$")
_REQUEST = re.compile(r"request (\S+) is (\S+)$")
_PLACED = re.compile(r"(\S+) goes to attention/(\d+), attempt \d+$")


def placements_of(lines: Iterable[str], midnight_s: float) -> list[Placement]:
    """Where each request of one choice went, and went on.

    midnight_s: the observer's clock when the log's clock (which tells no date) was at 0:00 last.
    """
    requests: dict[str, str] = {}  # by sequence; the line comes behind that of the first placement
    found: list[tuple[float, str, int]] = []
    last_s = 0.0
    for line in lines:
        if (stamped := _LINE.match(line)) is None:
            continue
        hours, minutes, seconds, message = stamped.groups()
        at_s = midnight_s + int(hours) * 3600 + int(minutes) * 60 + float(seconds)
        if at_s < last_s - DAY_S / 2:
            midnight_s, at_s = midnight_s + DAY_S, at_s + DAY_S
        last_s = at_s
        if request := _REQUEST.match(message):
            requests[request[2]] = request[1]
        elif placed := _PLACED.match(message):
            found.append((at_s, placed[1], int(placed[2])))
    return [Placement(at_s, requests[sequence], rank) for at_s, sequence, rank in found if sequence in requests]

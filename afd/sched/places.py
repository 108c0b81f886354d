"""When a full worker has room again: for the next request, the one after it, and so on. Pure."""

from __future__ import annotations

import heapq
from collections.abc import Iterable


def places_s(
    leaving_s: Iterable[float],
    *,
    num_free: int,
    first_s: float,
    backlog_s: float,
    prefill_s: float,
    decode_s: float,
    allowed_s: float,
    count: int,
) -> tuple[float, ...]:
    """Seconds until each of the next `count` requests of typical size finds a place, in order: O(count log running).

    leaving_s: when each running sequence leaves.
    num_free: places that are free now.
    first_s: no place comes before.
    backlog_s: of prefill that the running ones still need.
    prefill_s, decode_s: what a newcomer takes of each; it leaves after both.
    allowed_s: of prefill that may lie before a newcomer when it gets its place.
    """
    leaving = list(leaving_s)
    heapq.heapify(leaving)
    places: list[float] = []
    prefilled_s = backlog_s  # when all that has a place has its first token
    for idx in range(count):
        free_s = heapq.heappop(leaving) if idx >= num_free and leaving else 0.0
        place_s = max(first_s, free_s, prefilled_s - allowed_s, places[-1] if places else 0.0)
        prefilled_s = max(prefilled_s, place_s) + prefill_s
        heapq.heappush(leaving, prefilled_s + decode_s)
        places.append(place_s)
    return tuple(places)

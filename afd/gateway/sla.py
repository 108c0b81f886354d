"""TPOT and TTFT of the requests finished in a sliding window: what the service promises, measured. Pure."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

WINDOW_S = 60.0
MAX_ENTRIES = 65_536


@dataclass(frozen=True, slots=True)
class SlaReport:
    """Percentiles in seconds (0 when nothing finished) and shares of requests that met their target (1 then)."""

    num_requests: int
    tpot_p50_s: float
    tpot_p99_s: float
    ttft_p99_s: float
    tpot_attainment: float
    ttft_attainment: float


class SlaWindow:
    """TPOT = (last - first token time) / (tokens - 1), of requests with two tokens and more."""

    def __init__(self, tpot_target_s: float, ttft_target_s: float):
        self._tpot_target_s = tpot_target_s
        self._ttft_target_s = ttft_target_s
        self._entries: deque[tuple[float, float, float | None]] = deque(maxlen=MAX_ENTRIES)

    def add(self, now: float, ttft_s: float, tpot_s: float | None) -> None:
        """One finished sequence; tpot_s None = a single token."""
        self._entries.append((now, ttft_s, tpot_s))

    def report(self, now: float) -> SlaReport:
        """Sorts the window: for scrapes, not for the hot path."""
        while self._entries and self._entries[0][0] < now - WINDOW_S:
            self._entries.popleft()
        ttfts = sorted(entry[1] for entry in self._entries)
        tpots = sorted(entry[2] for entry in self._entries if entry[2] is not None)
        return SlaReport(
            num_requests=len(ttfts),
            tpot_p50_s=_percentile(tpots, 0.50),
            tpot_p99_s=_percentile(tpots, 0.99),
            ttft_p99_s=_percentile(ttfts, 0.99),
            tpot_attainment=_share_within(tpots, self._tpot_target_s),
            ttft_attainment=_share_within(ttfts, self._ttft_target_s),
        )


def _percentile(ordered: list[float], share: float) -> float:
    """Nearest rank."""
    if not ordered:
        return 0.0
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def _share_within(values: list[float], target: float) -> float:
    return sum(value <= target for value in values) / len(values) if values else 1.0

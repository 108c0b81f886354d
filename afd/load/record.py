"""What one request did, as the client saw it. Plain values; times are `time.perf_counter()` seconds."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import pairwise


class Outcome(StrEnum):
    """How a request ended; everything but COMPLETED and INTERRUPTED counts as failed."""

    PENDING = "pending"
    COMPLETED = "completed"
    REFUSED = "refused"  # 503 or 429: the server says it is full; not a fault
    HTTP_ERROR = "http_error"  # another status than 200
    STREAM_ERROR = "stream_error"  # an error event inside the stream
    DISCONNECTED = "disconnected"  # the server closed the connection before the answer was whole
    CONNECT_FAILED = "connect_failed"
    TIMEOUT = "timeout"
    PROTOCOL_ERROR = "protocol_error"  # the bytes are not HTTP, not SSE or not chunks of a completion
    INTERRUPTED = "interrupted"  # Ctrl-C while it ran; says nothing about the server


def _times() -> array[float]:
    return array("d")


@dataclass(slots=True)
class RequestRecord:
    """One request. Written by the client while it runs, read by `metrics` afterwards.

    due_s: when the schedule wanted it sent.
    start_s: when it was sent.
    end_s: when its answer ended.
    token_times: arrival of each chunk that bore tokens, increasing; a chunk may bear several tokens.
    num_output_tokens: from the server's usage where it reports it, else one per chunk.
    num_prompt_tokens: as sent, until the server's usage says otherwise.
    texts: the output's pieces, kept on request only.
    """

    request_idx: int
    num_prompt_tokens: int
    due_s: float = 0.0
    start_s: float = 0.0
    end_s: float = 0.0
    token_times: array[float] = field(default_factory=_times)
    num_output_tokens: int = 0
    num_cached_tokens: int = 0
    outcome: Outcome = Outcome.PENDING
    status: int = 0
    error: str = ""
    retry_after_s: float | None = None
    texts: list[str] | None = None

    @property
    def completed(self) -> bool:
        return self.outcome is Outcome.COMPLETED

    @property
    def failed(self) -> bool:
        return self.outcome not in (Outcome.COMPLETED, Outcome.INTERRUPTED)

    @property
    def ttft_s(self) -> float | None:
        """Sent to first token; None when no token came."""
        return self.token_times[0] - self.start_s if self.token_times else None

    @property
    def tpot_s(self) -> float | None:
        """(last - first token time) / (n - 1); None below two tokens."""
        if self.num_output_tokens < 2 or not self.token_times:
            return None
        return (self.token_times[-1] - self.token_times[0]) / (self.num_output_tokens - 1)

    @property
    def e2el_s(self) -> float:
        """Sent to end of the answer."""
        return self.end_s - self.start_s

    def gaps_s(self) -> Iterator[float]:
        """ITL: the time between successive chunks that bore tokens."""
        return (later - earlier for earlier, later in pairwise(self.token_times))

"""One HTTP request's choices while they run: collects what the sequences produce, wakes the response's task."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from afd.errors import AfdError
from afd.gateway.metrics import GatewayMetrics
from afd.gateway.sequence import ClientSequence, Delta
from afd.types import FinishReason, SamplingParams


class ClientGoneError(AfdError):
    """The client closed its connection; nobody reads what comes."""


@dataclass(frozen=True, slots=True)
class GenerationJob:
    """A checked request, ready to run: each prompt gets `num_choices` sequences, numbered prompt by prompt.

    own_stop_ids: the client's stop_token_ids (also part of each `SamplingParams`).
    skip_special_tokens: they are no part of the text.
    ttft_s: None = the cluster's target.
    tpot_s: 0 = the cluster's.
    """

    prompts: list[tuple[list[int], SamplingParams]]
    num_choices: int = 1
    stops: tuple[str, ...] = ()
    include_stop: bool = False
    own_stop_ids: tuple[int, ...] = ()
    skip_special_tokens: bool = True
    priority: int = 0
    ttft_s: float | None = None
    tpot_s: float = 0.0


class Generation:
    """The sink of its sequences, and the source that one response reads. Event-loop thread only.

    Pending output is bounded by the sequences' own max_tokens: a slow reader is given fewer, larger pieces.
    """

    def __init__(self, metrics: GatewayMetrics, abort: Callable[[Generation], None]):
        """abort: frees sequences at their workers (idempotent).

        The service's clock looks at `expires_at` (then it calls `fail`) and `read_at` (then `nudge`), so that no timer
        is needed per token.
        """
        self.sequences: list[ClientSequence] = []
        self.expires_at = math.inf
        self.read_at = time.monotonic()
        self._metrics = metrics
        self._abort = abort
        self._pending: dict[int, Delta] = {}
        self._failure: AfdError | None = None
        self._num_open = 0
        self._closed = False
        self._nudged = False
        self._waiter: asyncio.Future[None] | None = None

    def add(self, sequence: ClientSequence) -> None:
        """Before submission only."""
        self.sequences.append(sequence)
        self._num_open += 1

    # --- sink -------------------------------------------------------------------------------------------

    def push(self, sequence: ClientSequence, delta: Delta, now: float) -> None:
        if delta.ids:
            self._metrics.tokens(sequence, delta, now)
            sequence.last_token_at = now
            if not sequence.first_token_at:
                sequence.first_token_at = now
        if delta.finish is not None:
            self._num_open -= 1
            self._metrics.finished(sequence, delta.finish, now)
        elif not delta.ids and not delta.text:
            return
        earlier = self._pending.get(delta.choice_idx)
        self._pending[delta.choice_idx] = delta if earlier is None else earlier.merged(delta)
        self._wake()

    def fail(self, error: AfdError) -> None:
        """The request cannot go on; the first reason counts."""
        if self._failure is None:
            self._failure = error
        self._wake()

    # --- source -----------------------------------------------------------------------------------------

    @property
    def finished(self) -> bool:
        """Every choice has ended and its output has been read."""
        return self._num_open == 0 and not self._pending

    def nudge(self) -> None:
        """Make the reader return from `next` although nothing has come (for keep-alive comments)."""
        self._nudged = True
        self._wake()

    async def next(self) -> list[Delta]:
        """Wait for output: at most one delta per choice; empty after a nudge. Raises what the request failed with."""
        while not self._pending and self._failure is None and not self._nudged:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        self._nudged = False
        self.read_at = time.monotonic()
        if self._pending:
            deltas = list(self._pending.values())
            self._pending.clear()
            return deltas
        if self._failure is not None:
            raise self._failure
        return []

    def close(self) -> None:
        """Nobody reads any more: abort what still runs. Idempotent."""
        if not self._closed and self._num_open:
            failed = self._failure is not None and not isinstance(self._failure, ClientGoneError)
            self._metrics.unfinished(self._num_open, FinishReason.ERROR if failed else FinishReason.ABORT)
        self._closed = True
        self._abort(self)

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

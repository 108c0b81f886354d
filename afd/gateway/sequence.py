"""One choice of one request: its tokens as they arrive, the text they make, and how it ends. Pure.

A sequence outlives the worker that runs it: it keeps all that a resubmission needs (prompt, output so far, seed), and
it alone decides which token messages count: right attempt, right index.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import Enum, auto
from typing import Protocol

from afd.errors import AfdError
from afd.gateway.stop import StopMatcher
from afd.gateway.tokenizer import Detokenizer
from afd.messages.serving import Submit, TokenChunk, TokenLogprobs
from afd.types import FinishReason, SamplingParams

_COMPLETE = (FinishReason.STOP, FinishReason.LENGTH)  # after ERROR and ABORT the same text may go on elsewhere


@dataclass(slots=True)
class Delta:
    """What one or more token messages add to a choice.

    ids, logprobs: of the same tokens (logprobs empty when not asked for).
    text: what may be shown now; it can lag behind the tokens (unfinished character, possible stop string).
    stop_reason: the stop string or the client's own stop token id that ended it.
    """

    choice_idx: int
    text: str
    ids: list[int]
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish: FinishReason | None = None
    stop_reason: str | int | None = None

    def merged(self, later: Delta) -> Delta:
        """Both as one (a slow reader gets fewer, larger pieces)."""
        return replace(
            later, text=self.text + later.text, ids=self.ids + later.ids, logprobs=self.logprobs + later.logprobs
        )


class Verdict(Enum):
    """Why a chunk gave no delta."""

    STALE = auto()  # another attempt, or tokens already here: drop it
    GAP = auto()  # tokens in between are missing: ask for them again


class Sink(Protocol):
    """Where a sequence's output goes: one HTTP request."""

    def push(self, sequence: ClientSequence, delta: Delta, now: float) -> None: ...

    def fail(self, error: AfdError) -> None: ...


class ClientSequence:
    """One choice as its client sees it. The dispatcher moves it between workers; only `accept` changes its output."""

    def __init__(
        self,
        req_id: str,
        choice_idx: int,
        prompt_ids: list[int],
        sampling: SamplingParams,
        sink: Sink,
        *,
        detokenizer: Detokenizer | None = None,
        stop: StopMatcher | None = None,
        own_stop_ids: Sequence[int] = (),
        priority: int = 0,
        tpot_s: float = 0.0,
    ):
        """own_stop_ids: those of `sampling.stop_token_ids` that the client asked for (the rest are the model's EOS)."""
        self.req_id = req_id
        self.choice_idx = choice_idx
        self.prompt_ids = prompt_ids
        self.sampling = sampling
        self.sink = sink
        self.priority = priority
        self.tpot_s = tpot_s
        self._detokenizer = detokenizer
        self._stop = stop
        self._own_stop_ids = frozenset(own_stop_ids)
        self.attempt = 0
        self.num_losses = 0  # workers that were lost with it, or failed it
        self.why_lost = ""  # the last of them
        self.num_barren = 0  # of those that ended, in a row, before a token of it had come
        self.num_placed = 0  # tokens that it had when its worker got it
        self.output_ids: list[int] = []
        self.cached_tokens = 0
        self.num_preempted = 0
        self.done = False
        self.worker_key = ""  # where it runs; "" = nowhere
        self.avoid_key = ""  # the worker that lost or gave it up
        # The dispatcher's notes; times are of its clock, 0.0 = not yet.
        self.order = 0
        self.created_at = 0.0
        self.deadline = 0.0  # to be placed at a worker
        self.first_due_at = 0.0  # its first token
        self.lined_up_at = 0.0  # first refused by a worker, and waiting since
        self.predicted_prefill_s = 0.0  # from its place to its first token
        self.predicted_s = 0.0  # how long that would take, as it was thought then
        self.placed_at = 0.0
        self.heard_at = 0.0  # last sign of life from the worker about this sequence
        self.resend_at = 0.0
        self.first_token_at = 0.0
        self.last_token_at = 0.0

    @property
    def outstanding_tokens(self) -> int:
        """Size for load balancing: the prompt and a plausible output (max_tokens is often just the context limit)."""
        return len(self.prompt_ids) + min(self.sampling.max_tokens, 256)

    def submit_message(self, ttft_deadline_s: float) -> Submit:
        """What a worker is asked to run. ttft_deadline_s: seconds until its first token is due; 0 = any time."""
        return Submit(
            req_id=self.req_id,
            attempt=self.attempt,
            prompt_ids=self.prompt_ids,
            output_ids=self.output_ids,
            sampling=self.sampling,
            priority=self.priority,
            ttft_deadline_s=ttft_deadline_s,
            tpot_s=self.tpot_s,
        )

    def fault(self, chunk: TokenChunk, vocab_size: int) -> str | None:
        """What of a chunk cannot be true, whatever the worker computed; None when nothing is. Any attempt's."""
        if chunk.first_idx < 0 or chunk.cached_tokens < 0:
            return "a negative index or count"
        if chunk.ids and not 0 <= min(chunk.ids) <= max(chunk.ids) < vocab_size:
            return f"a token id outside 0..{vocab_size - 1}"
        if chunk.ids and chunk.first_idx + len(chunk.ids) > self.sampling.max_tokens:
            return f"more than the {self.sampling.max_tokens} tokens asked for"
        return None

    @property
    def has_gained(self) -> bool:
        """Its present worker has computed a token of it."""
        return len(self.output_ids) > self.num_placed

    def accept(self, chunk: TokenChunk) -> Delta | Verdict:
        """Take a chunk's new tokens. A delta with `finish` is the last; ERROR and ABORT are left to the caller."""
        if chunk.attempt != self.attempt or self.done:
            return Verdict.STALE
        num_known = len(self.output_ids) - chunk.first_idx
        if num_known < 0:
            return Verdict.GAP
        if num_known >= len(chunk.ids) and chunk.finish is None and chunk.ids:
            return Verdict.STALE
        if not self.output_ids and chunk.cached_tokens:
            self.cached_tokens = min(chunk.cached_tokens, len(self.prompt_ids))
        self.num_preempted = max(self.num_preempted, chunk.preempted)
        new_ids = chunk.ids[num_known:]
        logprobs = chunk.logprobs[num_known:] if chunk.logprobs is not None else []
        delta = self._extend(new_ids, logprobs, chunk.finish)
        self.done = delta.finish in _COMPLETE
        return delta

    def _extend(self, ids: list[int], logprobs: list[TokenLogprobs], finish: FinishReason | None) -> Delta:
        delta = Delta(self.choice_idx, "", ids, logprobs, finish)
        if finish is FinishReason.STOP and ids and ids[-1] in self.sampling.stop_token_ids:
            shown_ids = ids[:-1]  # the token that ends the text is not part of it
            if ids[-1] in self._own_stop_ids:
                delta.stop_reason = ids[-1]
        else:
            shown_ids = ids
        if self._detokenizer is None:
            pass
        elif self._stop is None:
            delta.text = self._detokenizer.push(shown_ids)
            if finish in _COMPLETE:
                delta.text += self._detokenizer.flush()
        else:
            self._extend_until_stop(self._detokenizer, self._stop, shown_ids, delta)
        self.output_ids.extend(delta.ids)
        return delta

    def _extend_until_stop(
        self, detokenizer: Detokenizer, stop: StopMatcher, shown_ids: list[int], delta: Delta
    ) -> None:
        """Token by token, so that the output ends with the very token that completes a stop string."""
        pieces = []
        for num_shown, token_id in enumerate(shown_ids, start=1):
            text = detokenizer.push((token_id,))
            if len(self.output_ids) + num_shown <= self.sampling.min_tokens:
                pieces.append(text)
                continue
            result = stop.push(text)
            pieces.append(result.text)
            if result.matched is not None:
                delta.text = "".join(pieces)
                delta.ids, delta.logprobs = delta.ids[:num_shown], delta.logprobs[:num_shown]
                delta.finish, delta.stop_reason = FinishReason.STOP, result.matched
                return
        if delta.finish in _COMPLETE:
            result = stop.push(detokenizer.flush())
            pieces.append(result.text)
            if result.matched is None:
                pieces.append(stop.flush())
            else:
                delta.finish, delta.stop_reason = FinishReason.STOP, result.matched
        delta.text = "".join(pieces)

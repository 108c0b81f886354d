"""One request on its way through an attention worker, and the micro-batches it travels in."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto

import msgspec

from afd.messages.serving import TokenLogprobs
from afd.types import FinishReason, SamplingParams


class SequenceState(Enum):
    WAITING = auto()
    RUNNING = auto()
    FINISHED = auto()


@dataclass(slots=True, eq=False)
class Sequence:
    """Tokens and KV of one request.

    tokens: prompt followed by output, resubmitted output included.
    num_prompt: length of the prompt part.
    num_computed: leading tokens whose KV is in the cache (committed).
    window_blocks: likewise of sliding-window layers, DROPPED behind the window; empty for models without.
    blocks: KV blocks in order; the first num_published of them can be found by others.
    hashes: prefix-chain hashes of its first full blocks, as far as they were computed: its text never changes.
    tpot_s: its TPOT target; 0 = none.
    stream: place in the pipeline, -1 while waiting.
    in_flight: part of a micro-batch that is not committed.
    doomed: set by abort while in flight: carried out at that commit.
    evicted: likewise for preemption.
    num_interrupted: steps in a row that were lost with an FFN worker; see `Scheduler.fail_stream`.
    """

    req_id: str
    attempt: int
    owner: bytes  # the gateway's ZeroMQ identity, opaque here
    tokens: list[int]
    num_prompt: int
    sampling: SamplingParams
    priority: int
    arrival: int  # order of arrival at this worker
    tpot_s: float = 0.0
    state: SequenceState = SequenceState.WAITING
    stream: int = -1
    num_computed: int = 0
    blocks: list[int] = field(default_factory=list)
    window_blocks: list[int] = field(default_factory=list)
    hashes: list[bytes] = field(default_factory=list)
    num_published: int = 0
    in_flight: bool = False
    doomed: FinishReason | None = None
    evicted: bool = False
    num_interrupted: int = 0
    num_cached: int = 0
    num_preempted: int = 0

    @property
    def num_output(self) -> int:
        """Output tokens so far: the next one has output position `num_output`."""
        return len(self.tokens) - self.num_prompt

    @property
    def num_pending(self) -> int:
        """Tokens without KV: 1 while decoding, more while prefilling."""
        return len(self.tokens) - self.num_computed

    @property
    def decoding(self) -> bool:
        return self.num_pending == 1

    @property
    def rank_key(self) -> tuple[int, int]:
        """Service order: lower priority number first, then age. A victim is never smaller than its requester."""
        return (self.priority, self.arrival)

    def prompt_ids(self) -> list[int]:
        return self.tokens[: self.num_prompt]

    def output_ids(self) -> list[int]:
        return self.tokens[self.num_prompt :]


class BatchItem(msgspec.Struct, frozen=True):
    """`num_new` tokens of one sequence from position `start`. samples: its last token's logits are wanted.

    A struct, as Progress is: one of each is made for every token, at a tenth of what a frozen dataclass costs.
    """

    seq: Sequence
    start: int
    num_new: int
    samples: bool


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """What one stream computes in one step."""

    stream: int
    step: int
    items: tuple[BatchItem, ...]

    @property
    def num_tokens(self) -> int:
        return sum(item.num_new for item in self.items)

    @property
    def num_samples(self) -> int:
        """Rows that go through the head."""
        return sum(item.samples for item in self.items)


class Progress(msgspec.Struct, frozen=True):
    """What a commit did to one sequence, for the client: token ids from output index first_idx; finish if over."""

    seq: Sequence
    first_idx: int
    ids: tuple[int, ...]
    finish: FinishReason | None


class Output(msgspec.Struct, frozen=True):
    """One sequence's news after a commit: log-probabilities where asked for, error where it ended with one."""

    progress: Progress
    logprobs: TokenLogprobs | None = None
    error: str | None = None
